import pytest
import torch
from conftest import SHAPES, heavy_tailed_update

from gradcodec.errors import CodecError
from gradcodec.layout import Layout


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


@pytest.mark.parametrize("shapes", [{}, {"a": (3,)}, {"a": (0, 3)}])
def test_an_adapter_that_is_not_made_of_matrices_is_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CodecError):
        Layout.of(shapes)
