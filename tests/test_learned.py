"""The parts of the learned codec, each against what is known of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import SHAPES, heavy_tailed_update
from hypothesis import given, settings
from hypothesis import strategies as st

from gradcodec.build import build_codec
from gradcodec.codec import Reconstructs
from gradcodec.entropy import SymbolReader, bits_of, encode_symbols
from gradcodec.errors import CodecError
from gradcodec.exchange import decode_update, encode_update
from gradcodec.fidelity import fidelity
from gradcodec.layout import Layout
from gradcodec.learned.codec import LearnedCodec
from gradcodec.learned.fit import Sample, fit_learned
from gradcodec.learned.quantizer import (
    CLASSES,
    MAX_CLASS,
    PRICE_OF_A_BIT,
    Quantizer,
    deviation,
    first_coder,
    largest_magnitude,
    num_low_bits,
)
from gradcodec.learned.spectrum import MAX_CORRECTION, Corrections, Expected, Spectrum
from gradcodec.learned.tables import LearnedTables
from gradcodec.registry import names_with_a_rate
from gradcodec.settings import CodecSettings
from gradcodec.transform import Reflection, Transform, leading_directions

UNTRAINED = LearnedTables({c: first_coder(c) for c in CLASSES}, (0, -2, -4))


@pytest.fixture(scope="module")
def quantizer() -> Quantizer:
    return Quantizer({c: first_coder(c) for c in CLASSES})


@pytest.mark.parametrize(("width", "count"), [(16, 1), (64, 32), (192, 96), (4096, 8)])
def test_a_reflection_is_orthogonal_and_starts_with_the_given_directions(width: int, count: int) -> None:
    generator = torch.Generator().manual_seed(width)
    given_WK = torch.linalg.qr(torch.randn(width, count, generator=generator))[0]
    reflection = Reflection(given_WK)
    rows = torch.randn(3, width, generator=generator)
    turned = reflection.forward(rows)
    torch.testing.assert_close(reflection.inverse(turned), rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned.norm(dim=1), rows.norm(dim=1))
    torch.testing.assert_close(turned[:, :count].abs(), (rows @ given_WK).abs(), rtol=1e-3, atol=1e-4)


def test_a_reflection_of_the_unit_vectors_themselves_is_not_singular() -> None:
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    reflection = Reflection(torch.eye(32, 8))
    torch.testing.assert_close(reflection.inverse(reflection.forward(rows)), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [[1, 0], [1, 2, 0], [0, 2, 1, 3]])
def test_a_reflection_of_swapped_unit_vectors_is_not_singular(order: list[int]) -> None:
    given_WK = torch.eye(32)[:, order]
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    turned = Reflection(given_WK).forward(rows)
    torch.testing.assert_close(Reflection(given_WK).inverse(turned), rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned[:, : len(order)].abs(), (rows @ given_WK).abs(), rtol=1e-4, atol=1e-5)


def test_training_on_two_columns_alone_gives_a_codec(layout: Layout) -> None:
    blocks_RC = torch.zeros(layout.rank, layout.num_columns)
    for block in layout.blocks:
        blocks_RC[: block.rank, block.start : block.start + 2] = torch.tensor([1.0, 5.0])
    tables = fit_learned([Sample(blocks_RC * size, None) for size in (1, 2, 3)], layout, passes=1)
    codec = LearnedCodec(layout, tables, b"test")
    payload, _ = encode_update(layout.to_update(blocks_RC), None, codec=codec, max_bytes=400)
    decoded_RC = layout.to_blocks(decode_update(payload, codec=codec))
    assert fidelity(layout.to_blocks(layout.to_update(blocks_RC)), decoded_RC).cosine > 0.99


@pytest.mark.parametrize("size", [1e-40, 1e-28, 1e-20, 1e8])
def test_sizes_at_the_edge_of_float32_are_coded_or_silent(layout: Layout, learned: LearnedCodec, size: float) -> None:
    update = {name: tensor.sign() * size for name, tensor in heavy_tailed_update(0).items()}
    for budget in (None, 200):
        payload, residual = encode_update(update, None, codec=learned, max_bytes=budget)
        decoded_RC = layout.to_blocks(decode_update(payload, codec=learned))
        assert torch.equal(residual.error_RC, residual.target_RC - decoded_RC)


@given(st.integers(0, 1000), st.sampled_from([None, 4, 30, 240, 1500]), st.sampled_from([0.0, 1e-40, 1.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_an_encoder_knows_what_its_codes_decode_to(seed: int, budget: int | None, size: float) -> None:
    """To the bit, without reading them."""
    layout = Layout.of(SHAPES)
    general = build_codec(CodecSettings(), layout)
    assert isinstance(general, Reconstructs)
    blocks_RC = layout.to_blocks(heavy_tailed_update(seed)) * size
    side = general.side_information(layout.to_blocks(heavy_tailed_update(seed + 1))) if seed % 2 else None
    codes, decoded_RC = general.encode_with_decoded(blocks_RC, budget, side)
    assert codes == general.encode(blocks_RC, budget, side)
    assert torch.equal(decoded_RC, general.decode(codes, side))


@pytest.mark.parametrize("size", [1e19, 1e30])
def test_an_update_beyond_float32s_squares_is_refused(learned: LearnedCodec, size: float) -> None:
    with pytest.raises(CodecError, match="diverged"):
        encode_update({n: t * size for n, t in heavy_tailed_update(0).items()}, None, codec=learned, max_bytes=200)


def test_directions_gather_the_energy_of_a_low_rank_recording() -> None:
    generator = torch.Generator().manual_seed(1)
    rows_NW = torch.randn(40, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    coordinates = Reflection(leading_directions(rows_NW, 3)).forward(rows_NW)
    assert coordinates[:, :3].square().sum() > 0.999 * coordinates.square().sum()


def test_a_tensor_of_another_width_keeps_its_columns() -> None:
    layout = Layout.of({"x.lora_A.weight": (2, 32)})
    blocks = torch.randn(2, 32)
    transform = Transform(layout, {"x.lora_A.weight": torch.eye(48, 4)})
    assert torch.equal(transform.analyse(blocks, None), blocks)


@pytest.mark.parametrize("symbol_class", [*CLASSES, MAX_CLASS - 3, MAX_CLASS])
def test_quantising_stays_within_its_cell_and_costs_what_the_table_says(
    quantizer: Quantizer, symbol_class: int
) -> None:
    values_N = torch.randn(4000, generator=torch.Generator().manual_seed(symbol_class + 50)) * deviation(symbol_class)
    integers_N = quantizer.quantize(values_N, symbol_class)
    error_N = (quantizer.restore(integers_N, symbol_class) - values_N).abs()
    inside = values_N.abs() < 2 * deviation(symbol_class)
    widest = 0.5 + (0 if num_low_bits(symbol_class) else PRICE_OF_A_BIT * 10)
    assert float(error_N[inside].max()) <= widest
    parts = quantizer.pack(integers_N.numpy(), symbol_class)
    taken = sum(float(bits_of(table)[symbols].sum()) for symbols, table in parts)
    assert quantizer.num_bits(integers_N, symbol_class) == pytest.approx(taken, rel=1e-3)
    found_N = quantizer.unpack(SymbolReader(encode_symbols(parts)), len(values_N), symbol_class)
    assert np.array_equal(found_N, integers_N.numpy())


def test_the_search_is_exact(quantizer: Quantizer) -> None:
    """Thresholds give the codeword that trying all of them gives: squared error plus lambda times bits."""
    for symbol_class in (-4, 0, 5, 10):
        coder = quantizer.coders[symbol_class]
        values_N = torch.linspace(0, float(coder.centroids_M[-1]) * 0.9, 500)
        bits_M = torch.from_numpy(bits_of(coder.table)[coder.largest :]).float()
        cost_NM = (values_N[:, None] - coder.centroids_M).square() + PRICE_OF_A_BIT * bits_M
        found = quantizer.quantize(values_N, symbol_class).long()
        chosen = cost_NM.gather(1, found[:, None]).squeeze(1)
        assert float((chosen - cost_NM.min(1).values).max()) < 0.02


def test_outliers_are_sent_apart(quantizer: Quantizer) -> None:
    assert all(largest_magnitude(c) >= 3 * deviation(c) for c in CLASSES)
    assert [num_low_bits(c) for c in (13, 14, 17, 18)] == [0, 1, 1, 2]
    values_N = torch.tensor([0.0, 1e3, -77.0, 12345.0, -1e9])
    for symbol_class in (-8, 0, 13, 20):
        parts = quantizer.pack(quantizer.quantize(values_N, symbol_class).numpy(), symbol_class)
        found = quantizer.unpack(SymbolReader(encode_symbols(parts)), len(values_N), symbol_class)
        restored_N = quantizer.restore(torch.from_numpy(found), symbol_class)
        torch.testing.assert_close(restored_N[:4], values_N[:4], rtol=1e-3, atol=1.0)
        assert float(restored_N[4]) < -3e4  # clipped; the rest stays in the residual


def spectrum_of(layout: Layout) -> Spectrum:
    return Spectrum(layout, {layout.blocks[0].name: Expected((0, -3) + (-5,) * 6, (8, 6, 4, 0))}, (0, -2, -4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-MAX_CORRECTION, MAX_CORRECTION), min_size=48, max_size=48), st.booleans())
def test_corrections_come_back(layout: Layout, levels: list[int], tilted: bool) -> None:
    spectrum = spectrum_of(layout)
    rows = np.array(levels[:32], np.int16) * (levels[0] % 3 > 0)
    tilt = np.array(levels[32:], np.int16).reshape(2, 8) * tilted
    data = encode_symbols(spectrum.pack(Corrections(tilt, rows)))
    found = spectrum.unpack(SymbolReader(data))
    assert np.array_equal(found.rows, rows)
    assert np.array_equal(found.tilt, tilt)


def test_what_is_expected_needs_no_correction_and_what_is_not_does(layout: Layout) -> None:
    spectrum = spectrum_of(layout)
    generator = torch.Generator().manual_seed(0)
    noise_RC = torch.randn(layout.rank, layout.num_columns, generator=generator)
    levels_RC = torch.stack([*spectrum.levels(spectrum.nothing())]).float()
    as_expected_RC = noise_RC * torch.exp2(levels_RC / 4)
    corrections, loudness = spectrum.fit(spectrum.energies(as_expected_RC), step=1e-3)
    assert loudness == pytest.approx(1.0, abs=0.15)
    assert np.abs(corrections.tilt).max() <= 1
    assert np.abs(corrections.rows).max() <= 3
    as_expected_RC[3] *= 8.0  # 18 dB
    corrections, _ = spectrum.fit(spectrum.energies(as_expected_RC), step=1e-3)
    louder = [corrections.rows[i] - corrections.rows[i - 1] for i, r in enumerate(spectrum.rank_N) if r == 3]
    assert all(8 <= levels <= 16 for levels in louder)


def test_levels_of_every_so_many_th_column_are_those_columns_levels(layout: Layout) -> None:
    spectrum = spectrum_of(layout)
    rows = np.arange(spectrum.num_rows, dtype=np.int16) % 5
    corrections = Corrections(np.arange(16, dtype=np.int16).reshape(2, 8), rows)
    for part, whole in zip(spectrum.levels(corrections, 7), spectrum.levels(corrections), strict=True):
        assert torch.equal(part, whole[::7])


def test_training_is_the_same_every_time(layout: Layout) -> None:
    samples = [Sample(layout.to_blocks(heavy_tailed_update(seed)), None) for seed in range(4)]
    one, other = (fit_learned(samples, layout, directions=8, passes=2).to_tensors() for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_training_on_silence_still_gives_a_codec(layout: Layout) -> None:
    tables = fit_learned([Sample(torch.zeros(layout.rank, layout.num_columns), None)], layout, passes=1)
    update = heavy_tailed_update(1)
    _, residual = encode_update(update, None, codec=LearnedCodec(layout, tables, b"x"))
    assert residual.error_RC.square().sum() < 0.1 * residual.target_RC.square().sum()


def test_a_budget_is_filled_over_the_whole_range() -> None:
    layout = Layout.of({f"{i}.lora_A.weight": (8, 512) for i in range(12)})
    codec = LearnedCodec(layout, UNTRAINED, b"test")
    update = heavy_tailed_update(5, layout.shapes)
    for bits in (0.02, 0.05, 0.1, 0.3, 0.7, 1.0, 1.5, 2.0):
        budget = int(bits * layout.num_parameters / 8)
        payload, _ = encode_update(update, None, codec=codec, max_bytes=budget)
        assert min(0.96 * budget, budget - 8) <= len(payload) <= budget, bits


@pytest.mark.parametrize("name", names_with_a_rate())
def test_a_ratio_asked_for_is_reached_from_above(layout: Layout, learned: LearnedCodec, name: str) -> None:
    codec = learned if name == "learned" else build_codec(CodecSettings(name=name), layout)
    update = heavy_tailed_update(3)
    if name == "b-only":
        update = {key: tensor * (".lora_B." in key) for key, tensor in update.items()}
    sizes = []
    for snr_db in (1.0, 3.0, 6.0):
        payload, residual = encode_update(update, None, codec=codec, max_bytes=2000, snr_db=snr_db)
        found = fidelity(residual.target_RC, residual.target_RC - residual.error_RC)
        assert found.snr_db >= snr_db or len(payload) > 1900
        sizes.append(len(payload))
    assert sizes[0] < sizes[1] < sizes[2]


def test_one_value_among_zeros_arrives(layout: Layout) -> None:
    update = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    name = next(iter(update))
    update[name][2, 5] = 3.0
    codec = LearnedCodec(layout, UNTRAINED, b"test")
    payload, _ = encode_update(update, None, codec=codec, max_bytes=120)
    assert float(decode_update(payload, codec=codec)[name][2, 5]) == pytest.approx(3.0, rel=0.2)


def test_a_wild_shift_is_refused(layout: Layout) -> None:
    codec = LearnedCodec(layout, UNTRAINED, b"test")
    for step, shift in ((0, 1001), (0, -1001), (32767, 0), (-32768, 5)):
        with pytest.raises(CodecError, match="out of range"):
            codec.decode((np.array([step, shift], "<i2").tobytes() + b"abc",), None)


def test_the_golden_payload_of_learned_3_decodes_to_its_symbols() -> None:
    """Integer tables: the same bytes are the same symbols on every machine. A change here is a new codec id."""
    layout = Layout.of({"x.lora_A.weight": (2, 16)})
    blocks = torch.tensor([[math.sin(i) * 4 for i in range(16)], [math.cos(3 * i) for i in range(16)]])
    codec = LearnedCodec(layout, _exact_tables(), b"golden")
    assert codec.encode(blocks, 16, None) == (GOLDEN,)
    symbols_RC = codec.decode((GOLDEN,), None) / 2.0 ** (np.frombuffer(GOLDEN[:2], "<i2")[0] / 64)
    assert symbols_RC.round().int().tolist() == GOLDEN_SYMBOLS
    assert torch.equal(symbols_RC.round(), symbols_RC)


def test_a_payload_decodes_alike_on_any_number_of_threads(layout: Layout, learned: LearnedCodec) -> None:
    """The symbols to the bit, which a codec without bases shows; the matrix products behind them to rounding."""
    update, before = heavy_tailed_update(4), torch.get_num_threads()
    for codec, rounding in ((LearnedCodec(layout, UNTRAINED, b"test"), 0.0), (learned, 1e-6)):
        payload, _ = encode_update(update, None, codec=codec, max_bytes=300)
        try:
            found = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                found.append(layout.to_blocks(decode_update(payload, codec=codec)))
        finally:
            torch.set_num_threads(before)
        for blocks_RC in found[1:]:
            torch.testing.assert_close(blocks_RC, found[0], rtol=0, atol=rounding * float(found[0].abs().max()))


def _exact_tables() -> LearnedTables:
    """Tables of powers of two: no float decides them."""
    tensors = UNTRAINED.to_tensors()
    for c in CLASSES:
        size = largest_magnitude(c)
        sided = [max(1, 1 << max(0, 13 - m)) for m in range(size)]
        tensors[f"frequencies.{c}"] = torch.tensor([*sided[::-1], (1 << 16) - 2 * sum(sided), *sided])
    return LearnedTables.from_tensors(tensors)


GOLDEN = bytes.fromhex("1a0004002c9a4c5b83d43172db0fde49")
GOLDEN_SYMBOLS = [
    [0, 2, 3, 0, -2, -3, -1, 2, 3, 1, -2, -3, -2, 1, 3, 2],
    [1, -1, 1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
]
