"""The hand-made peers: conservation and contraction, known inputs, budgets, hostile bytes."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from conftest import heavy_tailed_update
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.artifact import Artifact
from gradcodec.build import build_codec, byte_budget
from gradcodec.codec import Codec
from gradcodec.errors import BudgetError, CodecError
from gradcodec.exchange import Residual, decode_update, digest_of, encode_update, max_payload_bytes
from gradcodec.fidelity import fidelity, gaussian_bound_cosine
from gradcodec.frame import HEADER_BYTES, Frame, pack
from gradcodec.gauge import principal_axes
from gradcodec.layout import Layout
from gradcodec.paper.fit import fit_resnet
from gradcodec.paper.networks import ARCHITECTURES
from gradcodec.paper.resnet import ResnetCodec
from gradcodec.peers.casts import NF4_RUN, NF4_TABLE
from gradcodec.peers.eden import rotate_randomly, unrotate_randomly
from gradcodec.peers.packing import gaussian_codebook, nearest, pack_indices, unpack_indices
from gradcodec.settings import CodecSettings

FIXED = {"bf16": 16.0, "int8": 8.02, "nf4": 4.51, "sign": 1.03}
RATED = ("eden", "projection", "topk", "powersgd", "b-only", "rotated")
PEERS = (*FIXED, *RATED)
RATES = (0.02, 0.1, 0.5, 1.0, 2.0)
ODD_SHAPES = {
    "a.lora_A.weight": (3, 17),
    "a.lora_B.weight": (70, 3),
    "b.lora_A.weight": (1, 5),
    "b.lora_B.weight": (9, 5),
}


def wide_layout() -> Layout:
    """Two layers of q, k, v and o, width 320, rank 8: 40,960 parameters."""
    names = [
        f"layers.{layer}.{module}.lora_{factor}.weight" for layer in (0, 1) for module in "qkvo" for factor in "AB"
    ]
    return Layout.of({name: (8, 320) if "_A" in name else (320, 8) for name in names})


WIDE = wide_layout()


def peer(name: str, layout: Layout) -> Codec:
    return build_codec(CodecSettings(name=name), layout)


def sent(
    codec: Codec, update: dict[str, Tensor], bits: float | None, side: Tensor | None = None
) -> tuple[bytes, Residual]:
    budget = None if bits is None else max_payload_bytes(bits, codec.layout.num_parameters)
    return encode_update(update, None, codec=codec, max_bytes=budget, side=side)


def cosine(codec: Codec, update: dict[str, Tensor], bits: float | None, side: Tensor | None = None) -> float:
    payload, residual = sent(codec, update, bits, side)
    decoded = decode_update(payload, codec=codec, side=side)
    return fidelity(residual.target_RC, codec.layout.to_blocks(decoded)).cosine


def gaussian_update(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in layout.shapes.items()}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4])
def test_conservation_and_contraction(name: str, layout: Layout, scale: float) -> None:
    codec = peer(name, layout)
    update = {key: tensor * scale for key, tensor in heavy_tailed_update(100).items()}
    carried = layout.to_blocks(heavy_tailed_update(101)) * scale
    side = codec.side_information(carried)
    for bits in (0.3, 1.0):
        budget = max_payload_bytes(bits, layout.num_parameters) if name in RATED else None
        payload, residual = encode_update(update, carried, codec=codec, max_bytes=budget, side=side)
        decoded = layout.to_blocks(decode_update(payload, codec=codec, side=side))
        assert torch.equal(residual.error_RC, residual.target_RC - decoded)
        torch.testing.assert_close(decoded + residual.error_RC, residual.target_RC, rtol=1e-6, atol=1e-9 * scale)
        assert residual.error_RC.double().square().sum() < residual.target_RC.double().square().sum()


@pytest.mark.parametrize("name", PEERS)
def test_odd_shapes_zeros_and_the_codecs_own_rate(name: str) -> None:
    layout = Layout.of(ODD_SHAPES)
    codec = peer(name, layout)
    for update in (heavy_tailed_update(1, ODD_SHAPES), {key: torch.zeros(shape) for key, shape in ODD_SHAPES.items()}):
        payload, residual = encode_update(update, None, codec=codec)
        decoded = layout.to_blocks(decode_update(payload, codec=codec))
        assert decoded.shape == residual.target_RC.shape
        assert residual.error_RC.square().sum() <= residual.target_RC.square().sum()


@pytest.mark.parametrize("name", PEERS)
def test_the_same_input_gives_the_same_payload(name: str, layout: Layout) -> None:
    update = heavy_tailed_update(7)
    assert sent(peer(name, layout), update, 0.5)[0] == sent(peer(name, layout), update, 0.5)[0]


@pytest.mark.parametrize("name", RATED)
def test_budgets_are_kept_and_filled_and_every_bit_helps(name: str) -> None:
    codec, update = peer(name, WIDE), heavy_tailed_update(5, WIDE.shapes)
    found = []
    for bits in RATES:
        payload, residual = sent(codec, update, bits)
        budget = max_payload_bytes(bits, WIDE.num_parameters)
        assert len(payload) <= budget
        least = 0.6 if bits < 0.05 else 0.9 if name == "powersgd" and bits < 0.5 else 0.95  # a row is 40 bytes
        assert len(payload) >= least * budget
        found.append(float(residual.error_RC.square().sum()))
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("name", RATED)
def test_a_budget_of_next_to_nothing_is_kept_or_refused(name: str, layout: Layout) -> None:
    codec, update = peer(name, layout), heavy_tailed_update(5)
    for more in (1, 2, 5, 8, 13, 14, 20, 40):
        try:
            payload, _ = encode_update(update, None, codec=codec, max_bytes=HEADER_BYTES + more)
        except BudgetError:
            continue
        assert len(payload) <= HEADER_BYTES + more


@pytest.mark.parametrize(("name", "bits"), FIXED.items())
def test_fixed_rates_ignore_the_budget(name: str, bits: float) -> None:
    assert byte_budget(CodecSettings(name=name, bits=0.5), WIDE) is None
    payload, _ = encode_update(heavy_tailed_update(5, WIDE.shapes), None, codec=peer(name, WIDE))
    assert math.floor(bits) < 8 * len(payload) / WIDE.num_parameters < bits + 0.02


def test_casts_have_the_errors_of_their_steps() -> None:
    update = gaussian_update(WIDE)
    blocks = WIDE.to_blocks(update)
    for name, bound in (("bf16", 2**-8), ("int8", 0.0)):
        codec = peer(name, WIDE)
        error = (codec.decode(codec.encode(blocks, None, None), None) - blocks).abs()
        assert torch.all(error <= bound * blocks.abs() + (0 if bound else blocks.abs().max() / 254 * 1.001))
    assert cosine(peer("nf4", WIDE), update, None) > 0.99


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(64 * NF4_RUN, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(values, blocksize=NF4_RUN, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state).flatten()
    layout = Layout.of({"x": (NF4_RUN, 64)})
    codec = peer("nf4", layout)
    ours = layout.flatten(codec.decode(codec.encode(layout.unflatten(values), None, None), None))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(NF4_TABLE) == 16


def test_sign_of_a_vector_of_one_magnitude_is_exact() -> None:
    update = {name: torch.sign(tensor) * 0.25 for name, tensor in gaussian_update(WIDE).items()}
    assert cosine(peer("sign", WIDE), update, None) == pytest.approx(1)
    assert cosine(peer("sign", WIDE), gaussian_update(WIDE), None) == pytest.approx(math.sqrt(2 / math.pi), abs=0.01)


def test_eden_reaches_the_cosine_of_its_scalar_quantiser() -> None:
    """1 bit: sqrt(2 / pi), whatever the input; a part of the coordinates: the root of that share (DRIVE, EDEN)."""
    for update in (gaussian_update(WIDE), heavy_tailed_update(3, WIDE.shapes)):
        codec = peer("eden", WIDE)
        assert cosine(codec, update, 1 + 8 * 28 / WIDE.num_parameters) == pytest.approx(
            math.sqrt(2 / math.pi), abs=0.01
        )
        assert cosine(codec, update, 0.25) == pytest.approx(math.sqrt(0.25 * 2 / math.pi), abs=0.03)
        assert cosine(codec, update, 2.01) == pytest.approx(math.sqrt(1 - 0.1175), abs=0.01)


def test_eden_leaves_out_other_coordinates_in_every_round(layout: Layout) -> None:
    """A constant update through a quarter of a bit with error feedback: all of it arrives."""
    codec, update = peer("eden", layout), heavy_tailed_update(9)
    meant, carried, delivered = layout.to_blocks(update), None, torch.zeros(layout.rank, layout.num_columns)
    for _ in range(60):
        budget = max_payload_bytes(0.25, layout.num_parameters) + 12
        payload, residual = encode_update(update, carried, codec=codec, max_bytes=budget)
        delivered += layout.to_blocks(decode_update(payload, codec=codec))
        carried = residual.carried(digest_of(payload), decay=1.0)
    assert fidelity(60 * meant, delivered).cosine > 0.98


@pytest.mark.parametrize("count", [1, 2, 63, 64, 100, 4097])
def test_the_random_rotation_keeps_lengths_and_turns_back(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    turned = rotate_randomly(values, 5)
    assert float(turned.norm()) == pytest.approx(float(values.norm()), rel=1e-5)
    torch.testing.assert_close(unrotate_randomly(turned, 5), values, rtol=1e-4, atol=1e-5)


def test_topk_of_few_values_is_nearly_exact() -> None:
    values = torch.zeros(WIDE.num_parameters)
    values[torch.arange(0, WIDE.num_parameters, 800)] = torch.tensor([1.0, -2.0, 3.0]).repeat(18)[:52]
    update = WIDE.to_update(WIDE.unflatten(values))
    payload, _ = sent(peer("topk", WIDE), update, 0.05)
    entropy_bits = 52 * math.log2(math.e * 800)  # places alone
    assert cosine(peer("topk", WIDE), update, 0.05) > 0.9999
    assert 8 * (len(payload) - HEADER_BYTES) < entropy_bits + 52 * 4 + 250


def test_powersgd_of_rank_one_is_nearly_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    update = {
        name: torch.randn(rows, 1, generator=generator) @ torch.randn(1, columns, generator=generator)
        for name, (rows, columns) in WIDE.shapes.items()
    }
    assert cosine(peer("powersgd", WIDE), update, 0.7) > 0.99
    assert gaussian_bound_cosine(0.7) < 0.8


def test_b_only_sends_b_and_nothing_of_a() -> None:
    update = gaussian_update(WIDE)
    codec = peer("b-only", WIDE)
    decoded = decode_update(sent(codec, update, 1.0)[0], codec=codec)
    assert all(bool(tensor.any()) == (".lora_B." in name) for name, tensor in decoded.items())
    target = torch.cat([tensor.flatten() for name, tensor in update.items() if ".lora_B." in name])
    reached = torch.cat([tensor.flatten() for name, tensor in decoded.items() if ".lora_B." in name])
    assert fidelity(target, reached).cosine > 0.94  # two bits for each
    with pytest.raises(CodecError, match="lora_B"):
        peer("b-only", Layout.of({"x.lora_A.weight": (2, 3)}))


def test_rotated_beats_the_gaussian_bound_on_low_rank_and_every_other_peer() -> None:
    update = heavy_tailed_update(200, WIDE.shapes)
    side = principal_axes(WIDE.to_blocks(heavy_tailed_update(200, WIDE.shapes)), WIDE)
    for bits in (0.1, 0.5, 1.0):
        reached = cosine(peer("rotated", WIDE), update, bits, side)
        assert reached > gaussian_bound_cosine(bits)
        assert reached > max(cosine(peer(name, WIDE), update, bits) for name in ("eden", "topk", "powersgd"))


def test_rotated_is_near_the_best_scalar_quantiser_of_a_gaussian() -> None:
    """Oracle: uniform thresholds, centroids, ideal entropy coder: 0.618, 0.806 and 0.955 at half, one and two bits."""
    for bits, oracle in ((0.5, 0.618), (1.0, 0.806), (2.0, 0.955)):
        assert cosine(peer("rotated", WIDE), gaussian_update(WIDE), bits) > oracle - 0.012


def test_rotated_finds_its_step_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradcodec.peers.rotated._PILOT_VALUES", 1 << 13)
    update = heavy_tailed_update(5, WIDE.shapes)
    for bits in (0.1, 1.0):
        budget = max_payload_bytes(bits, WIDE.num_parameters)
        assert 0.95 * budget < len(sent(peer("rotated", WIDE), update, bits)[0]) <= budget


def test_rotated_writes_outliers_far_beyond_its_tables() -> None:
    update = gaussian_update(WIDE)
    update[WIDE.blocks[0].name][0, 0] = 3000.0
    _, residual = sent(peer("rotated", WIDE), update, 2.0)
    assert residual.error_RC.abs().max() < 5


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("scale", [1e-38, 1e30])
def test_values_at_the_ends_of_float32(name: str, layout: Layout, scale: float) -> None:
    update = {key: tensor * scale for key, tensor in gaussian_update(layout).items()}
    assert cosine(peer(name, layout), update, 1.0) > (0.2 if scale > 1 else -0.1)


@pytest.mark.parametrize("width", range(1, 9))
def test_indices_and_codebooks(width: int) -> None:
    values = torch.randn(999, generator=torch.Generator().manual_seed(width)).numpy()
    indices = nearest(values, gaussian_codebook(width))
    packed = pack_indices(indices, width)
    assert len(packed) == math.ceil(999 * width / 8)
    assert (unpack_indices(packed, width, 999) == indices).all()
    assert gaussian_codebook(width) == pytest.approx(-gaussian_codebook(width)[::-1], abs=1e-4)


@pytest.mark.parametrize("name", PEERS)
def test_any_codes_decode_or_raise_codec_error(name: str, layout: Layout) -> None:
    """Random bytes, truncated and changed codes; the checksum is right, so that the bytes reach the codec itself."""
    codec = peer(name, layout)
    honest = codec.encode(layout.to_blocks(heavy_tailed_update(1)), 300, None)[0]

    @settings(max_examples=60, deadline=None)
    @given(st.binary(max_size=400), st.integers(0, len(honest)), st.sampled_from(["alone", "after", "over"]))
    def check(body: bytes, cut: int, how: str) -> None:
        codes = {"alone": body, "after": honest[:cut] + body, "over": honest[:cut] + body + honest[cut + len(body) :]}[
            how
        ]
        try:
            update = decode_update(pack(Frame(codec.id, layout.id, 1.0, (codes,))), codec=codec)
            assert bool(torch.isfinite(codec.decode((codes,), None)).all())
        except CodecError:
            return
        assert all(bool(torch.isfinite(tensor).all()) for tensor in update.values())

    check()


def test_scales_out_of_range_are_refused(layout: Layout) -> None:
    nan = struct.pack("<f", math.nan)
    sign = bytearray(peer("sign", layout).encode(layout.to_blocks(heavy_tailed_update(1)), None, None)[0])
    eden = bytearray(peer("eden", layout).encode(layout.to_blocks(heavy_tailed_update(1)), None, None)[0])
    sign[:4], eden[4:12] = nan, nan + nan
    for name, codes in (("sign", sign), ("eden", eden)):
        with pytest.raises(CodecError):
            peer(name, layout).decode((bytes(codes),), None)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_papers_autoencoders_have_one_rate_and_learn(architecture: str, layout: Layout) -> None:
    blocks = layout.unflatten(torch.sin(torch.linspace(0, 3, layout.num_parameters)))
    losses: list[float] = []
    network = fit_resnet(
        [blocks],
        layout,
        name=architecture,
        steps=200,
        seed=0,
        batch=1,
        progress=lambda step, steps, loss: losses.append(loss),
    )
    assert losses[-1] < 0.6 * losses[0]
    settings = {"codec": {"layout": layout.id.hex(), "literal": False}}
    codec = ResnetCodec.from_artifact(Artifact(architecture, network.state_dict(), settings), layout)
    codes = codec.encode(blocks, None, None)
    assert len(codes[1]) == 4 * 64 * 64 // 64  # the picture of 1,920 parameters has 64 x 64 places
    assert codec.decode(codes, None).shape == blocks.shape
    with pytest.raises(CodecError):
        codec.decode((codes[0], codes[1][:-4]), None)
