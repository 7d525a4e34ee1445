"""The linear code of secure aggregation: sums of integers decode to sums of updates, on both ends alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPES, heavy_tailed_update
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from bench.linear_code import LinearArm, OpenArm, follow
from gradcodec.announcement import Announcement, energies_of, levels_of
from gradcodec.artifact import load_artifact
from gradcodec.bands import allocate, edges_of, gains_of
from gradcodec.build import artifact_folder, codec_of
from gradcodec.errors import BudgetError, CodecError, DivergedError
from gradcodec.expected import NUM_CLASSES
from gradcodec.gauge import principal_axes
from gradcodec.lattice import bounded, centred, dither_of, half_of, of_digits, quantize, restore, step_of, to_digits
from gradcodec.layout import Layout
from gradcodec.learned.codec import LearnedCodec
from gradcodec.learned.tables import LearnedTables
from gradcodec.linear import Basis, LinearCode, Terms, announce_first
from gradcodec.residues import Integers, most_residues, pack_residues, packed_bytes, unpack_residues
from gradcodec.settings import CodecSettings
from gradcodec.training.recording import load_recording

LAYOUT = Layout.of(SHAPES)
TABLES = LearnedTables({}, (7, 3, 1, 0))
SIX_SIGMA = 6.0
"""Statistical tests: a right program would fail one in 500 million of them."""
moduli = st.sampled_from([2, 3, 11, 21, 101, 255, 256, 4093, 2**20, 2**31 - 1, 2**62 + 1])


def blocks(seed: int, scale: float = 1.0) -> Tensor:
    return LAYOUT.to_blocks(heavy_tailed_update(seed)) * scale


def code_of(terms: Terms, announced: Announcement | None = None, seed: bytes = b"run/1", first: int = 0) -> LinearCode:
    basis = Basis(LAYOUT, TABLES, principal_axes(blocks(first), LAYOUT))
    return LinearCode(basis, terms, announced or announce_first(basis, terms, blocks(first), seed), seed)


def total_of(code: LinearCode, parts: Sequence[Integers]) -> Integers:
    total: Integers = np.sum(parts, axis=0) % code.modulus
    return total


# residues and bytes


@given(st.integers(0, 200), moduli, st.integers(0, 2**32 - 1))
def test_residues_come_back(count: int, modulus: int, seed: int) -> None:
    residues = np.random.default_rng(seed).integers(0, modulus, count)
    data = pack_residues(residues, modulus)
    assert len(data) == packed_bytes(count, modulus)
    assert np.array_equal(unpack_residues(data, modulus, count), residues)


@pytest.mark.parametrize(("modulus", "over"), [(3, 1.01), (11, 1.02), (21, 1.04), (61, 1.02), (101, 1.05), (401, 1.06)])
def test_a_residue_takes_little_more_than_the_logarithm_of_the_modulus(modulus: int, over: float) -> None:
    assert packed_bytes(10_000, modulus) * 8 / 10_000 < over * math.log2(modulus)


@given(st.integers(0, 1000), moduli)
def test_as_many_residues_as_fit(max_bytes: int, modulus: int) -> None:
    count = most_residues(max_bytes, modulus)
    assert packed_bytes(count, modulus) <= max_bytes < packed_bytes(count + 1, modulus)


@given(st.binary(max_size=80), moduli, st.integers(0, 100))
def test_any_bytes_are_residues_or_refused(data: bytes, modulus: int, count: int) -> None:
    try:
        found = unpack_residues(data, modulus, count)
    except CodecError:
        return
    assert pack_residues(found, modulus) == data


def test_bytes_that_no_residues_make_are_refused() -> None:
    data = pack_residues(np.full(100, 10), 11)
    with pytest.raises(CodecError, match="no residues"):
        unpack_residues(b"\xff" * len(data), 11, 100)
    with pytest.raises(CodecError, match="are expected"):
        unpack_residues(data[:-1], 11, 100)
    with pytest.raises(CodecError, match="0 to 10"):
        pack_residues(np.array([11]), 11)


# the lattice


@given(st.lists(st.integers(1, 5), max_size=40), st.sampled_from([3, 5, 7]), st.integers(1, 20), st.integers(0, 2**31))
def test_digits_add_up_to_the_sum_of_the_integers(places: list[int], levels: int, clients: int, seed: int) -> None:
    num_digits_K = np.array(places, np.int64)
    half_K = half_of(num_digits_K, levels)
    rng = np.random.default_rng(seed)
    integers = [rng.integers(-half_K, half_K + 1) for _ in range(clients)]
    digits = [to_digits(one, num_digits_K, levels) for one in integers]
    modulus = clients * (levels - 1) + 1
    assert all(len(one) == sum(places) and (one >= 0).all() and (one < levels).all() for one in digits)
    total = centred(np.sum(digits, axis=0) % modulus, modulus, clients * (levels - 1) // 2)
    assert np.array_equal(of_digits(total, num_digits_K, levels), np.sum(integers, axis=0))


@pytest.mark.parametrize("value", [0.0, 0.2, 0.5, -0.9])
def test_the_error_is_uniform_over_a_step_whatever_the_value(value: float) -> None:
    count = 100_000
    dither_K = dither_of(count, b"seed")
    error_K = restore(quantize(np.full(count, value), np.full(count, 1), dither_K), dither_K) - value
    assert np.abs(error_K).max() <= 0.5
    assert abs(error_K.mean()) < SIX_SIGMA * math.sqrt(1 / 12 / count)
    assert abs(error_K.var() - 1 / 12) < SIX_SIGMA * math.sqrt((1 / 80 - 1 / 144) / count)


def test_the_errors_of_clients_with_one_and_the_same_value_are_independent() -> None:
    count = 100_000
    errors = []
    for client in (b"1", b"2"):
        dither_K = dither_of(count, client)
        errors.append(restore(quantize(np.full(count, 0.3), np.full(count, 1), dither_K), dither_K) - 0.3)
    assert abs((errors[0] + errors[1]).var() - 2 / 12) < SIX_SIGMA * 2 / 12 * math.sqrt(2 / count)


def test_the_step_for_a_normal_value_has_the_error_that_is_said() -> None:
    values = np.random.default_rng(0).standard_normal(400_000)
    dither_K = dither_of(len(values), b"seed")
    for span in (3, 9, 27):
        step, error = step_of(span)
        half_K = np.full(len(values), (span - 1) // 2)
        found = np.square(restore(quantize(values / step, half_K, dither_K), dither_K) * step - values)
        assert abs(found.mean() - error) < SIX_SIGMA * found.std() / math.sqrt(len(values)) + 0.001 * error
        for other in (0.8 * step, 1.25 * step):
            worse = restore(quantize(values / other, half_K, dither_K), dither_K) * other - values
            assert np.square(worse).mean() > error


@given(st.floats(0, 1e6), st.floats(0, 300), st.integers(1, 200), st.sampled_from([1, 7, 127]), st.integers(0, 2**31))
def test_a_bounded_contribution_never_exceeds_its_radius(
    scale: float, radius: float, count: int, half: int, seed: int
) -> None:
    values = np.random.default_rng(seed).standard_t(2, count) * scale
    found = bounded(values, np.full(count, half), dither_of(count, b"%d" % seed), radius)
    assert sum(int(one) ** 2 for one in found) <= radius * radius
    assert np.abs(found).max() <= half


def test_a_bound_costs_length_and_not_direction() -> None:
    values = np.random.default_rng(1).standard_normal(1000) * 20
    half_K, dither_K = np.full(1000, 127), dither_of(1000, b"seed")
    assert np.array_equal(bounded(values, half_K, dither_K, 1e4), quantize(values, half_K, dither_K))
    found = bounded(values, half_K, dither_K, 300.0)
    assert 290 < np.linalg.norm(found) <= 300
    assert found @ values > 0.99 * np.linalg.norm(found) * np.linalg.norm(values)
    with pytest.raises(CodecError, match="radius"):
        bounded(values, half_K, dither_K, math.nan)


# what is announced, and what it decides


@given(st.integers(0, 60), st.integers(0, 20), st.integers(0, 2**31))
def test_announcements_come_back(rows: int, bands: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.integers(-128, 128, size).astype(np.int8) for size in (rows, NUM_CLASSES, bands)]
    found = Announcement.unpack(Announcement(*parts).pack(), rows, NUM_CLASSES, bands)
    assert all(
        np.array_equal(one, other)
        for one, other in zip(parts, (found.rows_N, found.columns_G, found.bands_B), strict=True)
    )


@given(st.binary(max_size=60))
def test_any_bytes_are_no_announcement(data: bytes) -> None:
    with pytest.raises(CodecError, match="announcement"):
        Announcement.unpack(data, 20, NUM_CLASSES, 5)


def test_an_announcement_of_another_size_is_refused_before_it_fills_memory() -> None:
    bomb = Announcement(np.zeros(10_000_000, np.int8), np.zeros(0, np.int8), np.zeros(0, np.int8)).pack()
    good = Announcement(*(np.zeros(size, np.int8) for size in (20, NUM_CLASSES, 5))).pack()
    for data in (bomb, good + b"\0", good[:-1], b""):
        with pytest.raises(CodecError, match="announcement"):
            Announcement.unpack(data, 20, NUM_CLASSES, 5)


def test_levels_are_energies_in_steps_of_a_decibel_and_a_half() -> None:
    energies = np.array([0.0, 1e-30, 1e-12, 1.0, 1e6, 1e30])
    found = energies_of(levels_of(energies))
    assert (found > 0).all() and np.isfinite(found).all()
    assert np.abs(10 * np.log10(found[2:5] / energies[2:5])).max() <= 0.76


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=12), st.integers(1, 20_000), st.sampled_from([3, 7]))
def test_every_integer_goes_where_it_takes_the_most_from_the_error(bands: list[int], room: int, levels: int) -> None:
    bands_B = np.array(bands, np.int8)
    edges, gains = [300 * i + i * i for i in range(len(bands) + 1)], gains_of(levels, 6)
    assert gains == sorted(gains, reverse=True)
    shares = allocate(bands_B, edges, room, gains)
    most = int(np.diff(edges).sum()) * len(gains)
    assert sum(int(share.num_digits_K.sum()) for share in shares) == min(room, most)
    worth = {share.band: [int(bands_B[share.band]) + gains[d - 1] for d in share.num_digits_K] for share in shares}
    least = min(min(of_band) for of_band in worth.values())
    for band, level in enumerate(bands):  # nothing that was left out is worth more than what was taken
        if band not in worth:
            assert level + gains[0] <= least


def test_bands_cover_every_coefficient_once() -> None:
    for num in (1, 255, 256, 1000, 49_152, 1_000_003):
        edges = edges_of(num)
        assert edges[0] == 0 and edges[-1] == num and edges == sorted(set(edges))
        assert len(edges) < 60


# the code


@pytest.mark.parametrize("clients", [1, 5, 10, 50])
@pytest.mark.parametrize("levels", [3, 7])
def test_what_clients_sent_adds_up_to_what_is_decoded(clients: int, levels: int) -> None:
    code = code_of(Terms(clients, 300, levels))
    sent = [code.encode(blocks(1 + client), client) for client in range(clients)]
    assert all(one.dtype == np.int64 and one.min() >= 0 and one.max() < levels for one in sent)
    parts = torch.stack([code.decode_own(one, client) for client, one in enumerate(sent)])
    decoded = code.decode_sum(total_of(code, sent), range(clients))
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, parts.sum(0), rtol=0, atol=1e-5 * float(parts.sum(0).abs().max()))


def test_masks_that_cancel_leave_no_trace() -> None:
    code = code_of(Terms(3, 300))
    sent = [code.encode(blocks(1 + client), client) for client in range(3)]
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, code.modulus, code.num_integers) for _ in range(2)]
    masks.append(-masks[0] - masks[1])
    messages = [code.pack((one + mask) % code.modulus) for one, mask in zip(sent, masks, strict=True)]
    assert all(len(message) <= 300 for message in messages)
    assert len(messages[0]) == packed_bytes(code.num_integers, code.modulus) > 290
    masked = total_of(code, [code.unpack(message) for message in messages])
    assert np.array_equal(masked, np.sum(sent, axis=0))
    assert torch.equal(code.decode_sum(masked, range(3)), code.decode_sum(np.sum(sent, axis=0), range(3)))


def test_those_who_dropped_out_are_not_in_the_sum() -> None:
    code = code_of(Terms(5, 300))
    sent = {client: code.encode(blocks(1 + client), client) for client in (0, 3)}
    decoded = code.decode_sum(total_of(code, [*sent.values()]), [0, 3])
    parts = sum(code.decode_own(one, client) for client, one in sent.items())
    torch.testing.assert_close(decoded, parts, rtol=0, atol=1e-5 * float(decoded.abs().max()))


def test_both_ends_build_the_same_code_and_every_round_another() -> None:
    terms = Terms(5, 200)
    one, other = code_of(terms), code_of(terms)
    assert np.array_equal(one.encode(blocks(1), 2), other.encode(blocks(1), 2))
    assert not np.array_equal(one.encode(blocks(1), 2), one.encode(blocks(1), 3)), "two clients share a dither"
    assert not np.array_equal(one.encode(blocks(1), 2), code_of(terms, seed=b"run/2").encode(blocks(1), 2))


def test_where_everything_fits_little_is_lost() -> None:
    updates = [blocks(1 + client) for client in range(5)]
    true, terms = torch.stack(updates).sum(0), Terms(5, 6 * LAYOUT.num_parameters, 7)
    basis = Basis(LAYOUT, TABLES, principal_axes(true, LAYOUT))
    code = LinearCode(basis, terms, announce_first(basis, terms, true / math.sqrt(5), b"seed"), b"seed")
    total = total_of(code, [code.encode(update, client) for client, update in enumerate(updates)])
    assert float((code.decode_sum(total, range(5)) - true).norm() / true.norm()) < 0.03


def test_one_huge_value_costs_as_much_as_many_small_ones() -> None:
    """Without the mixing of bands it would saturate: a ternary coordinate holds little more than its deviation."""
    generator = torch.Generator().manual_seed(0)
    even = LAYOUT.unflatten(torch.randn(LAYOUT.num_parameters, generator=generator))
    spiked = LAYOUT.unflatten(torch.zeros(LAYOUT.num_parameters).index_fill(0, torch.arange(0, 1900, 97), 1.0))
    left = []
    for update in (even, spiked):
        basis = Basis(LAYOUT, TABLES, None)
        terms = Terms(1, 4 * LAYOUT.num_parameters // 10, 3)
        announced = announce_first(basis, terms, update, b"seed")
        code = LinearCode(basis, terms, announced, b"seed")
        whole = code.decode_own(code.encode(update, 0), 0)
        left.append(float((update - whole).norm() / update.norm()))
    assert left[1] < 1.1 * left[0] < 0.6


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        (Terms(0, 100), "at least one"),
        (Terms(5, 100, levels=4), "odd number"),
        (Terms(5, 100, levels=1), "odd number"),
        (Terms(5, 100, modulus=10), "at least 11"),
        (Terms(5, 100, noise_variance=math.nan), "variance"),
    ],
)
def test_terms_that_cannot_be_served_are_refused(terms: Terms, says: str) -> None:
    with pytest.raises(CodecError, match=says):
        code_of(terms, announced=code_of(Terms(5, 100))._announced)


def test_what_does_not_fit_is_refused() -> None:
    code = code_of(Terms(5, 100))
    with pytest.raises(BudgetError, match="0 bytes hold no residue"):
        code_of(Terms(5, 0))
    with pytest.raises(CodecError, match="are expected"):
        code_of(Terms(5, 100), replace(code._announced, rows_N=np.zeros(3, np.int8)))
    with pytest.raises(DivergedError, match="diverged"):
        code.encode(blocks(1) * math.nan, 0)
    good = np.zeros(code.num_integers, np.int64)
    for total, clients in ((good[1:], [0]), (good - 1, [0]), (good + 11, [0]), (good, range(6)), (good, [])):
        with pytest.raises(CodecError, match="a sum"):
            code.decode_sum(total, clients)


# privacy: a bound for each client, and noise inside the sum


def test_with_a_radius_no_client_adds_more_and_noise_may_wrap() -> None:
    terms = Terms(5, 400, levels=15, modulus=4093, radius=9.5)
    code = code_of(terms)
    sent = [code.encode(blocks(1 + client, 100.0 if client == 2 else 1.0), client) for client in range(5)]
    for one in sent:
        assert int(((one - 7) ** 2).sum()) <= 90
    noise = np.random.default_rng(0).integers(-300, 301, code.num_integers)
    plain = code.decode_sum(total_of(code, sent), range(5))
    noised = code.decode_sum(total_of(code, [*sent, noise]), range(5))
    doubled = code.decode_sum(total_of(code, [*sent, 2 * noise]), range(5))
    assert float((noised - plain).norm()) > 10 * float(plain.norm())
    torch.testing.assert_close(doubled - noised, noised - plain, rtol=0, atol=1e-4 * float(noised.abs().max()))


def test_noise_that_is_told_of_neither_counts_as_energy_nor_comes_through() -> None:
    deviation, updates = 50.0, [blocks(1 + client) for client in range(5)]
    longest = max(float(update.norm()) for update in updates)
    untold = Terms(5, 1500, levels=201, modulus=4093, radius=100.0, clip=longest)
    told = replace(untold, noise_variance=deviation**2)
    true = torch.stack(updates).sum(0)
    energies, errors = {}, {}
    for terms in (untold, told):
        code = code_of(terms)
        sent = total_of(code, [code.encode(update, client) for client, update in enumerate(updates)])
        noise = np.rint(np.random.default_rng(0).standard_normal(code.num_integers) * deviation).astype(np.int64)
        noised = total_of(code, [sent, noise])
        energies[terms] = energies_of(code.announce_next(noised, range(5)).bands_B).sum()
        errors[terms] = float((code.decode_sum(noised, range(5)) - true).norm() / true.norm())
    quiet = energies_of(code_of(untold).announce_next(sent, range(5)).bands_B).sum()
    assert energies[told] < 3 * quiet
    assert energies[untold] > 10 * quiet
    assert errors[told] < 1.1 < errors[untold]


# over rounds


def rounds(num: int, scales: Sequence[float], error: float = 1.0) -> list[list[tuple[float, float]]]:
    """Norms of updates and residuals of each client and round, with the feedback that runs have; what is announced
    first is wrong by a factor."""
    terms = Terms(len(scales), 150)
    residuals = [torch.zeros(LAYOUT.rank, LAYOUT.num_columns) for _ in scales]
    last, announced, found = blocks(0), None, []
    common = blocks(999)
    for number in range(num):
        basis, seed = Basis(LAYOUT, TABLES, principal_axes(last, LAYOUT)), b"run/%d" % number
        announced = announced or announce_first(basis, terms, last * error, seed)
        code = LinearCode(basis, terms, announced, seed)
        sent, norms = [], []
        for client, scale in enumerate(scales):
            update = (0.5 * common + blocks(1000 * number + client)) * scale
            target = update + 0.5 * residuals[client]
            sent.append(code.encode(target, client))
            residuals[client] = target - code.decode_own(sent[-1], client)
            norms.append((float(update.norm()), float(residuals[client].norm())))
        total = total_of(code, sent)
        announced, last = code.announce_next(total, range(len(scales))), code.decode_sum(total, range(len(scales)))
        found.append(norms)
    return found


@pytest.mark.parametrize("error", [1.0, 0.03, 30.0])
def test_residuals_stay_bounded_over_thirty_rounds_whatever_was_announced_first(error: float) -> None:
    found = rounds(30, [1.0] * 5, error)
    usual = max(update for norms in found for update, _ in norms)
    late = [residual for norms in found[10:] for _, residual in norms]
    assert max(late) < 2 * usual  # what a half of all that is left adds up to if nothing ever arrives
    assert np.mean(late[-50:]) < 1.25 * np.mean(late[:50])


def test_a_quiet_client_among_loud_ones_is_left_with_the_dither() -> None:
    """The code is not contractive for a client whose update is shorter than the step that all share: its residual is
    longer than its update, yet bounded by the others' scale, and does not grow."""
    found = rounds(30, [0.01, 1.0, 1.0, 1.0, 1.0])
    loud = np.mean([update for norms in found for update, _ in norms[1:]])
    quiet = [residual for norms in found for _, residual in norms[:1]]
    assert quiet[-1] > found[-1][0][0]
    assert max(quiet[10:]) < loud
    assert np.mean(quiet[-10:]) < 1.25 * np.mean(quiet[10:20])


def test_what_is_announced_finds_the_scale_from_any_start() -> None:
    ends = []
    for error in (1.0, 0.01, 100.0):
        terms, basis = Terms(5, 150), Basis(LAYOUT, TABLES, principal_axes(blocks(0), LAYOUT))
        announced = announce_first(basis, terms, blocks(0) * error, b"run/0")
        for number in range(8):
            code = LinearCode(basis, terms, announced, b"run/%d" % number)
            sent = [code.encode(blocks(100 * number + client), client) for client in range(5)]
            announced = code.announce_next(total_of(code, sent), range(5))
        ends.append(float(energies_of(announced.bands_B).max()))
    assert max(ends) < 3 * min(ends)


def test_a_round_in_which_nothing_was_learned_decodes_to_little_and_the_next_one_goes_on() -> None:
    terms, basis = Terms(5, 150), Basis(LAYOUT, TABLES, None)
    announced = announce_first(basis, terms, blocks(0), b"run/0")
    nothing = torch.zeros(LAYOUT.rank, LAYOUT.num_columns)
    lengths = []
    for number in range(6):
        code = LinearCode(basis, terms, announced, b"run/%d" % number)
        total = total_of(code, [code.encode(nothing, client) for client in range(5)])
        lengths.append(float(code.decode_sum(total, range(5)).norm()))
        announced = code.announce_next(total, range(5))
    assert lengths == sorted(lengths, reverse=True)
    assert 0 < lengths[-1] < 0.05 * lengths[0]
    assert announce_first(basis, terms, nothing, b"run/0").bands_B.max() == -128


def test_the_bench_follows_a_recording(tmp_path: Path) -> None:
    updates = {(r, c): heavy_tailed_update(10 * r + c) for r in range(1, 4) for c in range(3)}
    save_file(
        {f"r{r}/c{c}/{name}": t for (r, c), u in updates.items() for name, t in u.items()}, tmp_path / "u.safetensors"
    )
    recording = load_recording(tmp_path / "u.safetensors")
    learned = codec_of(load_artifact(artifact_folder(CodecSettings()), "learned"), recording.layout)
    assert isinstance(learned, LearnedCodec)
    few, many = (follow(recording, LinearArm(3, learned, {}), 3, rate) for rate in (0.2, 6.0))
    opened = follow(recording, OpenArm("rotated", learned, {}), 3, 6.0)
    assert few.bits <= 0.2 and many.bits <= 6.0 and few.announced_bytes > 0
    assert opened.once < many.once < 0.2 < few.once < 1
    assert many.run < few.run
