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

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradcodec.announcement import Announcement as Announcement  # who uses the code needs both
from gradcodec.announcement import Doubles, Levels, energies_of, levels_of
from gradcodec.bands import Share, allocate, edges_of, gains_of
from gradcodec.errors import BudgetError, CodecError
from gradcodec.expected import FEW, MOST_FALL, NUM_CLASSES, QUIETEST, number_of, order_of
from gradcodec.expected import Basis as Basis
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
    unsaturated,
)
from gradcodec.peers.eden import rotate_randomly, unrotate_randomly
from gradcodec.residues import Integers, most_residues, pack_residues, unpack_residues

MAX_LEVELS = 255
_MOST_DIGITS = 8
_MOST_HIDDEN = 2.0
"""Where nearly all values saturate little can be told: a scale that jumps is worse than one that takes a round more."""


@dataclass(frozen=True)
class Terms:
    """What a round's clients agree on.

    ``modulus`` of the sums: None takes the least that no sum exceeds. ``radius``: the L2 norm, in integers, that no
    client's contribution exceeds, for a mechanism that adds noise to the sum; None: no bound. With it every integer is
    a coordinate of its own (one digit), and ``clip``, the norm that it stands for, makes all steps equal: noise of
    equal integers then hides all directions alike. ``noise_variance``: of the noise that is added to each integer of
    the sum, in squared integers: what is decoded is drawn towards zero as far as it is noise.
    """

    clients: int
    max_bytes: int
    levels: int = 3
    modulus: int | None = None
    radius: float | None = None
    clip: float = 1.0
    noise_variance: float = 0.0

    @property
    def least_modulus(self) -> int:
        """The number of values that the sum of all clients' integers may have."""
        return self.clients * (self.levels - 1) + 1

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
        if not 0 <= self.noise_variance < math.inf:
            raise CodecError(f"noise of variance {self.noise_variance}: a finite number of at least 0 is expected")


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
        found = len(announcement.rows_N), len(announcement.columns_G), len(announcement.bands_B)
        if found != (wanted := (basis.num_rows, NUM_CLASSES, len(self._edges) - 1)):
            raise CodecError(f"an announcement of {found} rows, classes of columns and bands: {wanted} are expected")
        room = most_residues(terms.max_bytes, self.modulus)
        if room < 1:
            raise BudgetError(f"{terms.max_bytes} bytes hold no residue modulo {self.modulus}")
        gains = gains_of(terms.levels, 1 if terms.radius is not None else _MOST_DIGITS)
        self._shares = allocate(announcement.bands_B, self._edges, room, gains)
        self.num_integers = sum(int(share.num_digits_K.sum()) for share in self._shares)
        self._levels_N = basis.levels(announcement.rows_N.astype(np.int64), announcement.columns_G.astype(np.int64))
        self._order_N = order_of(self._levels_N, seed)
        self._num_digits_K = np.concatenate([share.num_digits_K for share in self._shares])
        self._band_K = np.concatenate([np.full(len(s.num_digits_K), s.band) for s in self._shares])
        self._energy_K = energies_of(announcement.bands_B)[self._band_K]
        steps = {int(d): step_of(terms.levels ** int(d))[0] for d in np.unique(self._num_digits_K)}
        of_normal_K = np.array([steps[int(d)] for d in self._num_digits_K])
        if terms.radius is None:
            # as if clients were independent: where they are alike, each is weaker than that, and none saturates
            self._step_K = of_normal_K * np.sqrt(self._energy_K / terms.clients)
        else:
            self._step_K = np.full(len(of_normal_K), terms.clip / terms.radius)
        self._half_K = half_of(self._num_digits_K, terms.levels)
        # the sum's estimate of least squared error (Wiener); the same for every sum, so that parts add up
        self._gain_K = self._energy_K / (self._energy_K + self._noise_of(terms.clients))

    def encode(self, blocks_RC: Tensor, client: int) -> Integers:
        """A client's target -> integers ``[S]`` in 0..levels-1, to be masked and summed modulo ``modulus``.

        Args:
            blocks_RC: float32 ``[R, C]``, weighted as it is to be summed.
            client: the number that the server knows it by; its dither comes from it.

        Raises:
            CodecError: the blocks hold NaN or infinity.
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

    def announce_next(self, total_S: Integers, clients: Sequence[int]) -> Announcement:
        """The next round's announcement, from what the server sees of this one.

        Args:
            total_S: as for ``decode_sum``.
            clients: whose sum it is.

        Returns:
            The energies of the decoded sum, less what rounding and noise add to it: of bands, each from its own
            coordinates, and where none were sent from the weakest that was; of rows and classes of columns, beside
            what was expected of them.
        """
        coordinates_K = self._coordinates(total_S, clients)
        noise_K = self._noise_of(len(clients))
        missing = self.terms.clients / len(clients)
        seen_K = (np.square(coordinates_K) - noise_K) * missing
        hidden_B = self._hidden(seen_K)
        bands_B = self._bands_after(seen_K * hidden_B[self._band_K])
        places_M, energies_M = self._found(coordinates_K, noise_K, missing * hidden_B)
        start = energies_of(self._announced.rows_N), energies_of(self._announced.columns_G)
        rows_N, columns_G = self._basis.fit(start, places_M, energies_M) if len(places_M) else start
        return Announcement(levels_of(rows_N), levels_of(columns_G), bands_B)

    def _noise_of(self, num_clients: int) -> Doubles:
        """Energy of rounding and noise in each coordinate of a sum ``[K]``."""
        noise_K: Doubles = np.square(self._step_K) * (num_clients / 12 + self.terms.noise_variance)
        return noise_K

    def _hidden(self, seen_K: Doubles) -> Doubles:
        """By how much each band's energy is larger than what is seen of it ``[B]``, since clients' values saturate."""
        hidden_B, stop = np.ones(len(self._edges) - 1), 0
        if self.terms.radius is not None:  # a client's norm is bounded, and hardly ever a single value
            return hidden_B
        for share in self._shares:
            start, stop = stop, stop + len(share.num_digits_K)
            seen = float(seen_K[start:stop].mean() / self._energy_K[start])
            span = self.levels ** int(share.num_digits_K[0])
            hidden_B[share.band] = np.clip(unsaturated(seen, span) / seen, 1, _MOST_HIDDEN) if seen > 0 else 1.0
        return hidden_B

    def _bands_after(self, energy_K: Doubles) -> Levels:
        num_bands = len(self._edges) - 1
        expected_N = energies_of(self._levels_N)[self._order_N]
        expected_B = np.add.reduceat(expected_N, self._edges[:-1]) / np.diff(self._edges)
        before_B = energies_of(self._announced.bands_B)
        count_B = np.bincount(self._band_K, minlength=num_bands)
        sums_B = np.bincount(self._band_K, energy_K, minlength=num_bands)
        found_B = np.maximum((FEW * before_B + sums_B) / (FEW + count_B), before_B / MOST_FALL)
        weakest = int(np.flatnonzero(count_B)[-1])
        unsent_B = found_B[weakest] * np.minimum(expected_B / expected_B[weakest], 1)
        return levels_of(np.where(count_B > 0, found_B, unsent_B))

    def _found(self, coordinates_K: Doubles, noise_K: Doubles, factor_B: Doubles) -> tuple[Integers, Doubles]:
        """Coefficients of bands that were sent whole, and their energies less that of noise, times the bands'."""
        found_N = self._unmixed(coordinates_K).double().numpy()
        places, energies, stop = [np.zeros(0, np.int64)], [np.zeros(0)], 0
        for share in self._shares:
            start, stop = stop, stop + len(share.num_digits_K)
            if share.is_whole:
                places.append(self._order_N[share.start : share.stop])
                seen = np.square(found_N[places[-1]]) - noise_K[start:stop].mean()
                energies.append(seen * factor_B[share.band])
        return np.concatenate(places), np.concatenate(energies)

    def _coordinates(self, total_S: Integers, clients: Sequence[int]) -> Doubles:
        total_S = np.asarray(total_S, np.int64)
        if not 1 <= len(clients) <= self.terms.clients:
            raise CodecError(f"a sum over {len(clients)} clients: 1 to {self.terms.clients} were agreed")
        if total_S.shape != (self.num_integers,):
            raise CodecError(f"a sum of {total_S.size} integers: {self.num_integers} are expected")
        if not (int(total_S.min()) >= 0 and int(total_S.max()) < self.modulus):
            raise CodecError(f"a sum with integers out of 0 to {self.modulus - 1}")
        offset = len(clients) * ((self.levels - 1) // 2)
        integers_K = of_digits(centred(total_S, self.modulus, offset), self._num_digits_K, self.levels)
        coordinates_K: Doubles = restore(integers_K, total_dither(len(integers_K), self._seed, clients)) * self._step_K
        return coordinates_K

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
        return number_of(self._seed + b"/band/" + str(share.band).encode())


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
    energy_N = np.square(basis.analyse(rehearsal_RC).double().numpy() * ratio) * terms.clients
    start = np.full(basis.num_rows, QUIETEST), np.ones(NUM_CLASSES)
    rows_N, columns_G = map(levels_of, basis.fit(start, np.arange(len(energy_N)), energy_N))
    order_N = order_of(basis.levels(rows_N.astype(np.int64), columns_G.astype(np.int64)), seed)
    edges = edges_of(len(energy_N))
    return Announcement(rows_N, columns_G, levels_of(np.add.reduceat(energy_N[order_N], edges[:-1]) / np.diff(edges)))
