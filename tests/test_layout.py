from pathlib import Path

import pytest
import torch
from conftest import SHAPES, heavy_tailed_update

from gradcodec.build import build_codec
from gradcodec.errors import CodecError
from gradcodec.exchange import decode_update, encode_update
from gradcodec.fidelity import fidelity
from gradcodec.layout import Layout
from gradcodec.learned.codec import LearnedCodec
from gradcodec.learned.fit import Sample, fit_learned
from gradcodec.learned.tables import LearnedTables
from gradcodec.registry import codec_names, entry_of
from gradcodec.settings import CodecSettings
from gradcodec.training.recording import load_recording, save_recording


def test_blocks_and_update_are_inverse_to_the_bit(layout: Layout) -> None:
    update = heavy_tailed_update(0)
    blocks = layout.to_blocks(update)
    assert blocks.shape == (layout.rank, layout.num_columns) == (8, 64 + 64 + 64 + 48)
    back = layout.to_update(blocks)
    assert back.keys() == update.keys()
    assert all(torch.equal(back[name], update[name]) for name in update)


def test_values_and_blocks_are_inverse_with_mixed_ranks() -> None:
    layout = Layout.of({"a.lora_A.weight": (4, 10), "a.lora_B.weight": (12, 4), "b.lora_A.weight": (2, 6)})
    values = torch.arange(layout.num_parameters, dtype=torch.float32)
    blocks = layout.unflatten(values)
    assert torch.equal(layout.flatten(blocks), values)
    assert torch.equal(layout.to_blocks(layout.to_update(blocks)), blocks)


def test_square_factors_are_cut_by_name() -> None:
    layout = Layout.of({"x.lora_A.weight": (8, 8), "x.lora_B.weight": (8, 8)})
    assert [block.transposed for block in layout.blocks] == [False, True]


def test_id_depends_on_names_and_shapes_and_not_on_order() -> None:
    assert Layout.of(SHAPES).id == Layout.of(dict(reversed(SHAPES.items()))).id
    assert Layout.of(SHAPES).id != Layout.of({**SHAPES, "layers.1.v.lora_B.weight": (49, 8)}).id


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda u: u.pop("layers.0.q.lora_A.weight"), "lacks tensor 'layers.0.q.lora_A.weight'"),
        (lambda u: u.update(extra=torch.zeros(1, 1)), "unknown tensor 'extra'"),
        (lambda u: u.update({"layers.0.q.lora_A.weight": torch.zeros(8, 65)}), "expected (8, 64)"),
    ],
)
def test_an_update_of_another_shape_is_refused_by_name(layout: Layout, change: object, said: str) -> None:
    update = heavy_tailed_update(0)
    change(update)  # type: ignore[operator]
    with pytest.raises(CodecError) as error:
        layout.to_blocks(update)
    assert said in str(error.value)


@pytest.mark.parametrize("shapes", [{}, {"a": ()}, {"a": (0,)}, {"a": (0, 3)}, {"a": (2, 3, 4)}])
def test_an_adapter_that_is_not_made_of_matrices_and_vectors_is_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CodecError):
        Layout.of(shapes)


FUSED = {"x.qkv.lora_A.weight": (2, 5), "x.qkv.lora_B.weight": (12, 2), "y.lora_B.weight": (7, 2)}
HEADS = {
    "x.qkv.lora_B.weight": {
        part: (range(2 * i, 2 * i + 2), range(6 + 2 * i, 8 + 2 * i)) for i, part in enumerate("qkv")
    }
}


def test_a_fused_tensor_is_one_block_a_part_and_comes_back_to_the_bit() -> None:
    layout = Layout.of(FUSED, HEADS)
    assert [b.name.partition(".weight")[2] for b in layout.blocks] == ["", "#k", "#q", "#v", ""]
    update = {name: torch.randn(shape) for name, shape in FUSED.items()}
    blocks = layout.to_blocks(update)
    q = next(block for block in layout.blocks if block.name.endswith("#q"))
    assert torch.equal(blocks[:, q.start : q.stop].T, update["x.qkv.lora_B.weight"][[0, 1, 6, 7]])
    back = layout.to_update(blocks)
    assert list(back) == sorted(FUSED)
    assert all(torch.equal(back[name], update[name]) for name in update)
    assert torch.equal(layout.unflatten(layout.flatten(blocks)), blocks)


def test_shapes_and_parts_of_a_layout_make_it_again() -> None:
    layout = Layout.of(FUSED, HEADS)
    assert (layout.shapes, layout.parts) == (FUSED, HEADS)
    assert Layout.of(layout.shapes, layout.parts) == layout
    assert Layout.of(FUSED, {}) == Layout.of(FUSED)


def test_id_depends_on_the_parts_and_is_what_it_was_without_them() -> None:
    stacked = {"x.qkv.lora_B.weight": {part: (range(4 * i, 4 * i + 4),) for i, part in enumerate("qkv")}}
    ids = {Layout.of(FUSED).id, Layout.of(FUSED, HEADS).id, Layout.of(FUSED, stacked).id}
    assert len(ids) == 3
    assert Layout.of(SHAPES).id.hex() == "745e1c22"


def test_a_part_narrower_than_the_rank_leaves_its_tensor_whole() -> None:
    narrow = {"y.lora_B.weight": {"q": (range(6),), "k": (range(6, 7),)}}
    assert Layout.of(FUSED, narrow) == Layout.of(FUSED)


@pytest.mark.parametrize("rows", [(range(4), range(3, 7)), (range(3), range(4, 7)), (range(3), range(3, 9))])
def test_parts_that_do_not_share_out_the_rows_are_refused(rows: tuple[range, range]) -> None:
    with pytest.raises(CodecError, match=r"'y\.lora_B\.weight' has 7 rows"):
        Layout.of(FUSED, {"y.lora_B.weight": {"q": rows[:1], "k": rows[1:]}})


def test_a_recording_keeps_the_parts(tmp_path: Path) -> None:
    layout = Layout.of(FUSED, HEADS)
    updates = {(1, c): {name: torch.randn(shape) for name, shape in FUSED.items()} for c in range(2)}
    save_recording(updates, layout.parts, tmp_path / "updates.safetensors")
    recording = load_recording(tmp_path / "updates.safetensors")
    assert recording.layout == layout
    assert torch.equal(recording.updates[1].blocks_RC, layout.to_blocks(updates[1, 1]))


@pytest.mark.parametrize("name", [name for name in codec_names() if not entry_of(name).needs_artifact])
def test_every_codec_serves_fused_tensors(name: str) -> None:
    parts = {"a.lora_B.weight": {"q": (range(40),), "k": (range(40, 60),), "v": (range(60, 80),)}}
    layout = Layout.of({"a.lora_A.weight": (8, 64), "a.lora_B.weight": (80, 8)}, parts)
    update = heavy_tailed_update(0, layout.shapes)
    codec = build_codec(CodecSettings(name), layout)
    side = codec.side_information(layout.to_blocks(heavy_tailed_update(1, layout.shapes)))
    payload, _ = encode_update(update, None, codec=codec, max_bytes=layout.num_parameters // 2, side=side)
    decoded = decode_update(payload, codec=codec, side=side)
    # projection keeps a quarter of the energy, about; which update a seed gives depends on the CPU
    assert fidelity(layout.to_blocks(update), layout.to_blocks(decoded)).cosine > 0.45


def test_the_learned_codec_keeps_a_spectrum_and_a_basis_for_every_part() -> None:
    parts = {"a.lora_B.weight": {"q": (range(40),), "k": (range(40, 60),), "v": (range(60, 80),)}}
    layout = Layout.of({"a.lora_A.weight": (8, 64), "a.lora_B.weight": (80, 8)}, parts)
    samples = [Sample(layout.to_blocks(heavy_tailed_update(seed, layout.shapes)), None) for seed in range(6)]
    tables = LearnedTables.from_tensors(fit_learned(samples, layout, directions=8, passes=1).to_tensors())
    assert tables.expected.keys() == tables.leading.keys() == {block.name for block in layout.blocks}
    codec = LearnedCodec(layout, tables, b"test")
    update = heavy_tailed_update(9, layout.shapes)
    payload, _ = encode_update(update, None, codec=codec, max_bytes=layout.num_parameters // 4)
    assert fidelity(layout.to_blocks(update), layout.to_blocks(decode_update(payload, codec=codec))).cosine > 0.8
