"""Every codec twice: conservation (decoded + residual == target) and fidelity on inputs whose answer is known."""

from __future__ import annotations

import hashlib
import math
import struct

import pytest
import torch
from conftest import SHAPES, heavy_tailed_update
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.build import build_codec
from gradcodec.codec import Codec, IdentityCodec
from gradcodec.errors import BudgetError, CodecError
from gradcodec.exchange import (
    Residual,
    contractive_gain,
    decode_update,
    digest_of,
    encode_update,
    max_payload_bytes,
)
from gradcodec.fidelity import fidelity, gaussian_bound_cosine
from gradcodec.frame import HEADER_BYTES, Frame, pack
from gradcodec.gauge import principal_axes, rotate, unrotate
from gradcodec.layout import Layout
from gradcodec.learned.codec import LearnedCodec
from gradcodec.learned.tables import LearnedTables
from gradcodec.paper.fit import fit_resnet
from gradcodec.paper.networks import ResnetAutoencoder
from gradcodec.paper.picture import picture_shape
from gradcodec.paper.resnet import ResnetCodec
from gradcodec.settings import CodecSettings

RATES = (0.1, 0.25, 0.5, 1.0, 2.0)


@pytest.fixture(scope="session")
def resnet(layout: Layout) -> ResnetCodec:
    torch.manual_seed(0)
    return ResnetCodec(layout, ResnetAutoencoder(literal=False), False, b"test")


@pytest.fixture(scope="session")
def resnet_literal(layout: Layout) -> ResnetCodec:
    torch.manual_seed(0)
    return ResnetCodec(layout, ResnetAutoencoder(literal=True), True, b"test")


@pytest.fixture(params=["identity", "learned", "resnet", "resnet_literal"])
def codec(request: pytest.FixtureRequest, layout: Layout) -> Codec:
    if request.param == "identity":
        return IdentityCodec(layout)
    found: Codec = request.getfixturevalue(request.param)
    return found


def energy(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4])
def test_conservation_and_contraction(codec: Codec, layout: Layout, scale: float) -> None:
    update = {name: tensor * scale for name, tensor in heavy_tailed_update(100).items()}
    carried = layout.to_blocks(heavy_tailed_update(101)) * scale
    payload, residual = encode_update(update, carried, codec=codec)
    decoded = layout.to_blocks(decode_update(payload, codec=codec))
    target = layout.to_blocks(update) + carried
    assert torch.equal(residual.target_RC, target)
    assert torch.equal(residual.error_RC, target - decoded)
    torch.testing.assert_close(decoded + residual.error_RC, target, rtol=1e-6, atol=1e-6 * scale * 1e-3)
    assert energy(residual.error_RC) <= energy(target)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(1e-6, 1e6))
def test_contraction_holds_for_random_weights(layout: Layout, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    network = ResnetAutoencoder(literal=True)
    for parameter in network.parameters():
        parameter.data.mul_(size)
    codec = ResnetCodec(layout, network, True, b"random")
    target = layout.to_blocks(heavy_tailed_update(seed))
    payload, residual = encode_update(layout.to_update(target), None, codec=codec)
    assert energy(residual.error_RC) <= energy(target)
    decode_update(payload, codec=codec)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4), st.floats(-1e6, 1e6))
def test_the_gain_never_adds_energy(values: list[float], factor: float) -> None:
    target = torch.tensor([values])
    decoded = target.flip(1) * factor
    gain = contractive_gain(target, decoded)
    assert energy(target - decoded * gain) <= energy(target)


def test_identity_loses_nothing_not_even_a_bit(layout: Layout) -> None:
    update = heavy_tailed_update(3)
    payload, residual = encode_update(update, None, codec=IdentityCodec(layout), max_bytes=None)
    decoded = decode_update(payload, codec=IdentityCodec(layout))
    assert all(torch.equal(decoded[name], update[name]) for name in update)
    assert not residual.error_RC.any()
    assert len(payload) == HEADER_BYTES + 4 * layout.num_parameters


def test_learned_keeps_to_every_budget_and_gains_with_every_bit(learned: LearnedCodec, layout: Layout) -> None:
    update = heavy_tailed_update(200)
    side = principal_axes(layout.to_blocks(heavy_tailed_update(200)), layout)
    found = []
    for rate in RATES:
        budget = max_payload_bytes(rate, layout.num_parameters)
        payload, _ = encode_update(update, None, codec=learned, max_bytes=budget, side=side)
        assert len(payload) <= budget
        decoded = decode_update(payload, codec=learned, side=side)
        found.append(fidelity(layout.to_blocks(update), layout.to_blocks(decoded)).cosine)
    assert found == sorted(found)
    assert found[-1] > 0.95
    assert found[RATES.index(0.5)] > gaussian_bound_cosine(0.5)  # low-rank input: better than no structure allows


def test_learned_fills_its_budget(learned: LearnedCodec) -> None:
    layout = Layout.of({"wide.lora_A.weight": (8, 4096), "wide.lora_B.weight": (4096, 8)})
    codec = LearnedCodec(layout, learned.tables, b"test")
    update = heavy_tailed_update(5, layout.shapes)
    for rate in (0.1, 0.5, 1.0):
        budget = max_payload_bytes(rate, layout.num_parameters)
        payload, _ = encode_update(update, None, codec=codec, max_bytes=budget)
        assert 0.93 * budget <= len(payload) <= budget


def test_learned_serves_every_geometry(learned_tables: LearnedTables) -> None:
    for rank, width in ((1, 3), (4, 17), (8, 9), (64, 130)):
        layout = Layout.of({"x.lora_A.weight": (rank, width), "x.lora_B.weight": (width + 70, rank)})
        codec = LearnedCodec(layout, learned_tables, b"test")
        update = heavy_tailed_update(rank, layout.shapes)
        payload, residual = encode_update(update, None, codec=codec)
        assert layout.to_blocks(decode_update(payload, codec=codec)).shape == residual.error_RC.shape
        assert energy(residual.error_RC) < 0.05 * energy(residual.target_RC)


def test_learned_of_nothing_is_nothing(learned: LearnedCodec, layout: Layout) -> None:
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    payload, residual = encode_update(zeros, None, codec=learned, max_bytes=60)
    assert not any(tensor.any() for tensor in decode_update(payload, codec=learned).values())
    assert not residual.error_RC.any()


def test_the_same_input_gives_the_same_payload(codec: Codec) -> None:
    update = heavy_tailed_update(7)
    assert encode_update(update, None, codec=codec)[0] == encode_update(update, None, codec=codec)[0]


def test_a_budget_below_the_header_is_refused(learned: LearnedCodec) -> None:
    for budget in (0, HEADER_BYTES, HEADER_BYTES + 2):
        with pytest.raises(BudgetError, match="bytes"):
            encode_update(heavy_tailed_update(0), None, codec=learned, max_bytes=budget)


def test_a_diverged_update_is_refused(codec: Codec) -> None:
    update = heavy_tailed_update(0)
    next(iter(update.values()))[0, 0] = math.nan
    with pytest.raises(CodecError, match="diverged"):
        encode_update(update, None, codec=codec)


def test_payloads_of_others_are_refused_and_say_why(learned: LearnedCodec, layout: Layout) -> None:
    payload, _ = encode_update(heavy_tailed_update(0), None, codec=learned)
    with pytest.raises(CodecError, match="same codec artifact"):
        decode_update(payload, codec=LearnedCodec(layout, learned.tables, b"another"))
    other = Layout.of({**SHAPES, "more.lora_A.weight": (8, 3)})
    with pytest.raises(CodecError, match="same model, rank"):
        decode_update(payload, codec=LearnedCodec(other, learned.tables, b"test"))


@settings(max_examples=120, deadline=None)
@given(body=st.binary(max_size=120), top=st.integers(-32768, 32767), mark=st.integers(-32768, 32767))
def test_learned_decodes_any_codes_or_raises_codec_error(
    learned: LearnedCodec, layout: Layout, body: bytes, top: int, mark: int
) -> None:
    """The checksum is right, so that the bytes reach the codec itself."""
    for start, end in ((-400, 400), (-130, 30)):  # wild headers, and those nearly in range
        head = struct.pack("<hh", max(start, min(end, top)), max(start, min(end, mark)))
        payload = pack(Frame(learned.id, layout.id, 1.0, (head + body,)))
        try:
            update = decode_update(payload, codec=learned)
        except CodecError:
            continue
        assert all(bool(torch.isfinite(tensor).all()) for tensor in update.values())


def test_a_hostile_resnet_payload_is_refused(resnet: ResnetCodec, layout: Layout) -> None:
    scales = struct.pack("<4f", 1, 1, 1, math.inf)
    latent = b"\0" * 4 * 64 * math.prod(side // 64 for side in picture_shape(layout.num_parameters))
    for codes in ((scales, latent), (scales, latent[:-4]), (b"", latent), (scales, b"\xff" * len(latent))):
        with pytest.raises(CodecError):
            decode_update(pack(Frame(resnet.id, layout.id, 1.0, codes)), codec=resnet)


def test_residual_goes_back_whole_when_the_payload_was_not_accepted() -> None:
    residual = Residual(torch.ones(2, 2), torch.full((2, 2), 0.25), "abc")
    assert torch.equal(residual.carried("abc", decay=0.5), torch.full((2, 2), 0.125))
    assert torch.equal(residual.carried("", decay=0.5), torch.ones(2, 2))
    assert torch.equal(residual.carried("older", decay=0.5), torch.ones(2, 2))


def test_error_feedback_delivers_all_mass(learned: LearnedCodec, layout: Layout) -> None:
    """A constant update through half a bit: what was delivered and what is left add up; the mean arrives."""
    num_rounds = 15
    update = heavy_tailed_update(9)
    side = principal_axes(layout.to_blocks(update), layout)
    budget = max_payload_bytes(0.5, layout.num_parameters)
    carried = torch.zeros(layout.rank, layout.num_columns)
    delivered = torch.zeros_like(carried)
    errors = []
    for number in range(1, num_rounds + 1):
        payload, residual = encode_update(update, carried, codec=learned, max_bytes=budget, side=side)
        delivered += layout.to_blocks(decode_update(payload, codec=learned, side=side))
        errors.append(energy(number * layout.to_blocks(update) - delivered) / energy(number * layout.to_blocks(update)))
        carried = residual.carried(digest_of(payload), decay=1.0)
    meant = num_rounds * layout.to_blocks(update)
    torch.testing.assert_close(delivered + carried, meant, rtol=1e-4, atol=1e-6)
    assert errors[-1] < 0.3 * errors[0]  # without feedback the share would stay what it is


def test_rotation_keeps_energy_sorts_it_and_turns_back(layout: Layout) -> None:
    blocks = layout.to_blocks(heavy_tailed_update(11))
    axes = principal_axes(blocks, layout)
    rotated = rotate(blocks, axes, layout)
    torch.testing.assert_close(unrotate(rotated.clone(), axes, layout), blocks, rtol=1e-4, atol=1e-7)
    first = layout.blocks[0]
    energies = rotated[:, first.start : first.stop].square().sum(1)
    assert torch.all(energies[:-1] >= energies[1:])
    assert energies[:2].sum() > 0.9 * energies.sum()


def test_rows_beyond_a_blocks_rank_and_blocks_of_nothing_stay_where_they_are() -> None:
    layout = Layout.of({"a.lora_A.weight": (4, 32), "b.lora_A.weight": (2, 32), "c.lora_A.weight": (4, 32)})
    blocks_RC = layout.to_blocks({name: torch.randn(shape) for name, shape in layout.shapes.items()})
    blocks_RC[:, 64:] = 0
    axes_BRR = principal_axes(blocks_RC, layout)
    assert torch.equal(axes_BRR[1, 2:], torch.eye(4)[2:])
    assert torch.equal(axes_BRR[2], torch.eye(4))
    assert not rotate(blocks_RC, axes_BRR, layout)[2:, 32:64].any()


def test_picture_shape_is_the_papers_at_its_geometry() -> None:
    """[1, 4096, 2048] and a latent of [64, 64, 32] for LLaMA-7B, rank 8, q, k, v, o (the paper, section 3.1)."""
    assert picture_shape(32 * 4 * 2 * 8 * 4096) == (4096, 2048)
    network = ResnetAutoencoder(literal=True)
    assert network.encoder(torch.zeros(1, 1, 256, 128)).shape == (1, 64, 4, 2)
    assert network.decoder(torch.zeros(1, 64, 4, 2)).shape == (1, 1, 256, 128)


def test_resnet_learns_one_picture(layout: Layout) -> None:
    """The network and its training are able to carry something: one smooth picture, seen again and again."""
    smooth = torch.sin(torch.linspace(0, 3, layout.num_parameters))
    blocks = layout.unflatten(smooth)
    network = fit_resnet([blocks], layout, name="resnet", steps=80, seed=0, batch=1)
    codec = ResnetCodec(layout, network, False, b"x")
    decoded = codec.decode(codec.encode(blocks, None, None), None)
    assert fidelity(blocks, decoded).cosine > 0.8


def test_fidelity_of_known_vectors() -> None:
    assert fidelity(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])).snr_db == math.inf
    half = fidelity(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert half.cosine == pytest.approx(1.0)
    assert half.snr_db == pytest.approx(10 * math.log10(4))
    assert fidelity(torch.ones(2), torch.zeros(2)).cosine == 0.0


GOLDEN_CODES = {
    "identity": "446fe02161b6d9d8",
    "bf16": "e238c9d5126122da",
    "int8": "9ceb71d16fb30fe7",
    "nf4": "472e3d56ad1328f2",
    "sign": "eeb1c04ce9c00255",
}


@pytest.mark.parametrize("name", GOLDEN_CODES)
def test_golden_codes_of_the_codecs_that_only_round(name: str, layout: Layout) -> None:
    """Of values that are exact in float32 and made by integers alone, so the same on every machine."""
    values = (torch.arange(layout.num_parameters) * 7919 % 2003 - 1001).float() / 4096
    codes = build_codec(CodecSettings(name), layout).encode(layout.unflatten(values), None, None)
    assert hashlib.sha256(b"".join(codes)).hexdigest()[:16] == GOLDEN_CODES[name]
