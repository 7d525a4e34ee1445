"""The linear code: what n clients send adds up, and the sum of their integers decodes to the sum of their updates.

With secure aggregation the server sees the sum of masked integers alone. An entropy code is not linear, so a
coefficient costs ``log2(clients * (levels - 1) + 1)`` bits whatever it holds, and few can be sent. Which, and in which
steps, both ends know from the base model, the last global update, the round, and a small announcement of the server:

    blocks -> coefficients along the rank's axes and the width's directions (transform.py)
           -> by their expected level, tables and announced rows: an order, cut into bands (bands.py)
           -> each band mixed by a seeded random rotation; its first so many coordinates
           -> rounded in the band's announced step, with a dither; digits in base ``levels`` (lattice.py)
           -> [masked and summed elsewhere] -> bytes (residues.py)

Knows neither masks nor noise. Shape suffixes: R rank, C columns, N coefficients or rows, K coordinates, S integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradcodec.announcement import Announcement, Bytes, Doubles, energies_of, levels_of
from gradcodec.bands import Share, allocate, edges_of, gains_of
from gradcodec.errors import BudgetError, CodecError
from gradcodec.lattice import (
    bounded,
    centred,
    client_seed,
    dither_of,
    half_of,
    of_digits,
    quantize,
    restore,
    step_of,
    to_digits,
    total_dither,
)
from gradcodec.layout import Layout
from gradcodec.learned.spectrum import Spectrum
from gradcodec.learned.tables import LearnedTables
from gradcodec.peers.eden import rotate_randomly, unrotate_randomly
from gradcodec.residues import Integers, most_residues, pack_residues, unpack_residues
from gradcodec.transform import Transform

MAX_LEVELS = 255
_MOST_DIGITS = 8
ALIKE = 0.1
"""Correlation of two clients' coefficients that steps are made for. Recorded updates have 0.1 to 0.25."""
_FEW = 32.0
"""A row's own energies count as much as what was expected of it once it has so many."""
_MOST_FALL = 16.0
"""By how much what is announced may fall in a round: a sum may be nearly nothing by chance."""
_MOST_APART = 2.0**12
"""By how much rows may differ from the usual one."""


@dataclass(frozen=True)
class Terms:
    """What a round's clients agree on.

    ``modulus`` of the sums: None takes the least that no sum exceeds. ``radius``: the L2 norm, in integers, that no
    client's contribution exceeds, for a mechanism that adds noise to the sum; None: no bound. With it every integer is
    a coordinate of its own (one digit).
    """

    clients: int
    max_bytes: int
    levels: int = 3
    modulus: int | None = None
    radius: float | None = None

    @property
    def least_modulus(self) -> int:
        """The number of values that the sum of all clients' integers may have."""
        return self.clients * (self.levels - 1) + 1

    @property
    def coherence(self) -> float:
        """Energy of the sum over that of as many independent updates, as it is assumed."""
        return 1 + (self.clients - 1) * ALIKE

    def check(self) -> None:
        """Raises CodecError naming what cannot be served."""
        if self.clients < 1:
            raise CodecError(f"a sum over {self.clients} clients: at least one is needed")
        if not (3 <= self.levels <= MAX_LEVELS and self.levels % 2):
            raise CodecError(f"{self.levels} levels: an odd number from 3 to {MAX_LEVELS} is needed")
        if self.modulus is not None and self.modulus < self.least_modulus:
            raise CodecError(
                f"sums modulo {self.modulus}: {self.clients} clients with {self.levels} levels need at least "
                f"{self.least_modulus}"
            )


class Basis:
    """Coefficients of one round: both ends build it from the same tables and side information."""

    def __init__(self, layout: Layout, tables: LearnedTables, side: Tensor | None) -> None:
        """
        Args:
            layout: of the adapter.
            tables: with the round's directions (``LearnedTables.for_directions``), or without any.
            side: the principal axes of the last global update, ``[B, R, R]``, or None.
        """
        self.layout = layout
        self._side = side
        self._transform = Transform(layout, tables.leading)
        self._spectrum = Spectrum(layout, tables.expected, tables.any_rows)
        self.row_of_N = np.repeat(
            np.arange(self.num_rows), [block.width for block in layout.blocks for _ in range(block.rank)]
        )

    @property
    def num_rows(self) -> int:
        return self._spectrum.num_rows

    def analyse(self, blocks_RC: Tensor) -> Tensor:
        """Blocks ``[R, C]`` -> coefficients float32 ``[N]``."""
        return self.layout.flatten(self._transform.analyse(blocks_RC.cpu(), self._side))

    def synthesise(self, coefficients_N: Tensor) -> Tensor:
        """Inverse of ``analyse``."""
        return self._transform.synthesise(self.layout.unflatten(coefficients_N), self._side)

    def levels(self, rows_N: Integers) -> Integers:
        """The expected level of every coefficient ``[N]``: the tables', and what is announced of its row."""
        corrections = self._spectrum.nothing()
        corrections.rows[:] = rows_N
        levels_RC = torch.stack([*self._spectrum.levels(corrections)])
        return self.layout.flatten(levels_RC).numpy().astype(np.int64)


class LinearCode:
    """One round's linear code; see the module. Both ends build it from equal arguments."""

    def __init__(self, basis: Basis, terms: Terms, announcement: Announcement, seed: bytes) -> None:
        """
        Args:
            basis: of the round.
            terms: of the round.
            announcement: the server's, of this round.
            seed: public, of run and round: another one in every round, or dithers repeat.

        Raises:
            CodecError: terms that cannot be served, or an announcement of another layout.
            BudgetError: no integer fits into ``terms.max_bytes``.
        """
        terms.check()
        num = basis.layout.num_parameters
        self.layout, self.terms, self.levels = basis.layout, terms, terms.levels
        self.modulus = terms.modulus or terms.least_modulus
        self._basis, self._announced, self._seed = basis, announcement, seed
        self._edges = edges_of(num)
        if len(announcement.rows_N) != basis.num_rows or len(announcement.bands_B) != len(self._edges) - 1:
            raise CodecError(
                f"an announcement of {len(announcement.rows_N)} rows and {len(announcement.bands_B)} bands: "
                f"{basis.num_rows} and {len(self._edges) - 1} are expected"
            )
        room = most_residues(terms.max_bytes, self.modulus)
        if room < 1:
            raise BudgetError(f"{terms.max_bytes} bytes hold no residue modulo {self.modulus}")
        gains = gains_of(terms.levels, terms.coherence, 1 if terms.radius is not None else _MOST_DIGITS)
        self._shares = allocate(announcement.bands_B, self._edges, room, gains)
        self.num_integers = sum(int(share.num_digits_K.sum()) for share in self._shares)
        self._order_N = _order_of(basis.levels(announcement.rows_N.astype(np.int64)), seed)
        self._num_digits_K = np.concatenate([share.num_digits_K for share in self._shares])
        self._band_K = np.concatenate([np.full(len(s.num_digits_K), s.band) for s in self._shares])
        self._energy_K = energies_of(announcement.bands_B)[self._band_K]
        steps = {int(d): step_of(terms.levels ** int(d))[0] for d in np.unique(self._num_digits_K)}
        of_normal_K = np.array([steps[int(d)] for d in self._num_digits_K])
        self._step_K = of_normal_K * np.sqrt(self._energy_K / (terms.clients * terms.coherence))
        self._half_K = half_of(self._num_digits_K, terms.levels)
        self._noise_K = np.square(self._step_K) / 12  # what rounding leaves of each client's
        # the sum's estimate of least squared error (Wiener); the same for every sum, so that parts add up
        self._gain_K = self._energy_K / (self._energy_K + terms.clients * self._noise_K)

    def encode(self, blocks_RC: Tensor, client: int) -> Integers:
        """A client's target -> integers ``[S]`` in 0..levels-1, to be masked and summed modulo ``modulus``.

        Args:
            blocks_RC: float32 ``[R, C]``, weighted as it is to be summed.
            client: the number that the server knows it by; its dither comes from it.

        Raises:
            DivergedError: the blocks hold NaN or infinity.
        """
        dither_K = dither_of(len(self._step_K), client_seed(self._seed, client))
        scaled_K = self._mixed(self._basis.analyse(blocks_RC)) / self._step_K
        if self.terms.radius is None:
            integers_K = quantize(scaled_K, self._half_K, dither_K)
        else:
            integers_K = bounded(scaled_K, self._half_K, dither_K, self.terms.radius)
        return to_digits(integers_K, self._num_digits_K, self.levels)

    def decode_sum(self, total_S: Integers, clients: Sequence[int]) -> Tensor:
        """The sum of these clients' integers, modulo ``modulus`` -> the sum of their targets, float32 ``[R, C]``.

        Args:
            total_S: int64 ``[S]`` in 0..modulus-1.
            clients: whose sum it is; fewer than agreed where some dropped out.

        Raises:
            CodecError: another number of integers, one out of range, or more clients than agreed.
        """
        return self._basis.synthesise(self._unmixed(self._coordinates(total_S, clients) * self._gain_K))

    def decode_own(self, integers_S: Integers, client: int) -> Tensor:
        """What a client's own integers add to the decoded sum, ``[R, C]``: its residual is the target less it."""
        return self.decode_sum(integers_S, [client])

    def pack(self, residues_S: Integers) -> bytes:
        """Residues ``[S]`` -> bytes, at most ``terms.max_bytes``."""
        return pack_residues(residues_S, self.modulus)

    def unpack(self, data: bytes) -> Integers:
        """Inverse of ``pack``. Raises CodecError: these are no such bytes."""
        return unpack_residues(data, self.modulus, self.num_integers)

    def announce_next(self, total_S: Integers, clients: Sequence[int], added_variance: float = 0.0) -> Announcement:
        """The next round's announcement, from what the server sees of this one.

        Args:
            total_S: as for ``decode_sum``.
            clients: whose sum it is.
            added_variance: of noise that is in the integers, for privacy, in squared integers.

        Returns:
            The energies of the decoded sum, less what rounding adds to it: of bands, each from its own coordinates,
            and where none were sent from the weakest that was; of rows, beside what was expected of them.
        """
        coordinates_K = self._coordinates(total_S, clients)
        noise_K = len(clients) * self._noise_K + added_variance * np.square(self._step_K)
        missing = self._energy_of(self.terms.clients) / self._energy_of(len(clients))
        bands_B = self._bands_after((np.square(coordinates_K) - noise_K) * missing)
        rows_N = self._rows_after(coordinates_K, noise_K, missing)
        return Announcement(rows_N, bands_B)

    def _energy_of(self, num_clients: int) -> float:
        """Energy of a sum over that of one client's."""
        return num_clients * (1 + (num_clients - 1) * ALIKE)

    def _bands_after(self, energy_K: Doubles) -> Bytes:
        num_bands = len(self._edges) - 1
        expected_N = energies_of(self._basis.levels(self._announced.rows_N.astype(np.int64)))[self._order_N]
        expected_B = np.add.reduceat(expected_N, self._edges[:-1]) / np.diff(self._edges)
        before_B = energies_of(self._announced.bands_B)
        count_B = np.bincount(self._band_K, minlength=num_bands)
        sums_B = np.bincount(self._band_K, energy_K, minlength=num_bands)
        found_B = np.maximum((_FEW * before_B + sums_B) / (_FEW + count_B), before_B / _MOST_FALL)
        weakest = int(np.flatnonzero(count_B)[-1])
        unsent_B = expected_B * (found_B[weakest] / expected_B[weakest])
        return levels_of(np.where(count_B > 0, found_B, unsent_B))

    def _rows_after(self, coordinates_K: Doubles, noise_K: Doubles, missing: float) -> Bytes:
        expected_N = energies_of(self._basis.levels(self._announced.rows_N.astype(np.int64)))
        found_N = self._unmixed(coordinates_K).numpy().astype(np.float64)
        num_rows, places, ratios, stop = self._basis.num_rows, [], [], 0
        for share in self._shares:
            start, stop = stop, stop + len(share.num_digits_K)
            if share.is_whole:
                here = self._order_N[share.start : share.stop]
                places.append(self._basis.row_of_N[here])
                ratios.append((np.square(found_N[here]) - noise_K[start:stop].mean()) * missing / expected_N[here])
        if not places:
            return self._announced.rows_N
        rows_M, ratio_M = np.concatenate(places), np.concatenate(ratios)
        return levels_of(
            energies_of(self._announced.rows_N)
            * _beside(max(float(ratio_M.mean()), 1 / _MOST_FALL), rows_M, ratio_M, num_rows)
        )

    def _coordinates(self, total_S: Integers, clients: Sequence[int]) -> Doubles:
        total_S = np.asarray(total_S, np.int64)
        if not 1 <= len(clients) <= self.terms.clients:
            raise CodecError(f"a sum over {len(clients)} clients: 1 to {self.terms.clients} were agreed")
        if total_S.shape != (self.num_integers,):
            raise CodecError(f"a sum of {total_S.size} integers: {self.num_integers} are expected")
        if not (0 <= int(total_S.min()) and int(total_S.max()) < self.modulus):
            raise CodecError(f"a sum with integers out of 0 to {self.modulus - 1}")
        offset = len(clients) * ((self.levels - 1) // 2)
        integers_K = of_digits(centred(total_S, self.modulus, offset), self._num_digits_K, self.levels)
        return restore(integers_K, total_dither(len(integers_K), self._seed, clients)) * self._step_K

    def _mixed(self, coefficients_N: Tensor) -> Doubles:
        parts = [
            rotate_randomly(coefficients_N[self._places(share)], self._mixing(share))[: len(share.num_digits_K)]
            for share in self._shares
        ]
        return torch.cat(parts).double().numpy()

    def _unmixed(self, coordinates_K: Doubles) -> Tensor:
        """Inverse of ``_mixed``, zero where nothing was sent."""
        coefficients_N, stop = torch.zeros(self.layout.num_parameters), 0
        for share in self._shares:
            start, stop = stop, stop + len(share.num_digits_K)
            band = torch.zeros(share.stop - share.start)
            band[: stop - start] = torch.from_numpy(coordinates_K[start:stop])
            coefficients_N[self._places(share)] = unrotate_randomly(band, self._mixing(share))
        return coefficients_N

    def _places(self, share: Share) -> Tensor:
        return torch.from_numpy(self._order_N[share.start : share.stop])

    def _mixing(self, share: Share) -> int:
        return _number_of(self._seed + b"/band/" + str(share.band).encode())


def announce_first(basis: Basis, terms: Terms, rehearsal_RC: Tensor, seed: bytes, ratio: float = 1.0) -> Announcement:
    """The first round's announcement, from the update of the server's rehearsal.

    Args:
        basis: of the first round, from that update.
        terms: of the round.
        rehearsal_RC: what a few training steps on the server changed, ``[R, C]``.
        seed: of the first round.
        ratio: how much longer a client's update is expected to be: its steps over the rehearsal's, where each step
            moves as far (AdamW).
    """
    energy_N = np.square(basis.analyse(rehearsal_RC).double().numpy() * ratio) * (terms.clients * terms.coherence)
    relative_N = energy_N / energies_of(basis.levels(np.zeros(basis.num_rows, np.int64)))
    rows_N = levels_of(_beside(float(relative_N.mean()), basis.row_of_N, relative_N, basis.num_rows))
    order_N, edges = _order_of(basis.levels(rows_N.astype(np.int64)), seed), edges_of(len(energy_N))
    return Announcement(rows_N, levels_of(np.add.reduceat(energy_N[order_N], edges[:-1]) / np.diff(edges)))


def _beside(usual: float, rows_M: Integers, ratios_M: Doubles, num_rows: int) -> Doubles:
    """Each row's mean ratio ``[N]``, drawn towards the usual one the more, the fewer of its values are known."""
    count_N = np.bincount(rows_M, minlength=num_rows)
    sums_N = np.bincount(rows_M, ratios_M, minlength=num_rows)
    return np.clip((_FEW * usual + sums_N) / (_FEW + count_N), usual / _MOST_APART, usual * _MOST_APART)


def _order_of(levels_N: Integers, seed: bytes) -> Integers:
    """Places of coefficients from the highest level to the lowest, equal ones in an order of the round's own."""
    ties_N = np.random.PCG64(_number_of(seed + b"/order")).random_raw(-(-len(levels_N) // 4)).astype("<u8").view("<u2")
    return np.argsort((-levels_N << 16) + ties_N[: len(levels_N)], kind="stable")


def _number_of(seed: bytes) -> int:
    return int.from_bytes(hashlib.sha256(seed).digest()[:4], "little")
