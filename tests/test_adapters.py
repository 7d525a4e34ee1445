from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from adapters.base import load_tokenizer
from adapters.finetune import DivergedError, finetune
from adapters.model import add, get_adapter, load_model, set_adapter, subtract
from adapters.settings import LoraSettings, ModelSettings, TrainSettings, check_lora, check_model, check_training
from adapters.windows import Windows
from client.trainer import training_seed
from conf.checks import check_settings
from conf.schema import Settings
from tasks.settings import TaskSettings
from tasks.shards import load_shard
from tasks.windows import heldout_loss

TRAINING = TrainSettings(update="delta", lr=0.005, steps=3, batch_size=4, micro_batch_size=4)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return load_model(ModelSettings(), LoraSettings(), seed=0)


@pytest.fixture(scope="module")
def windows() -> Windows:
    return load_shard(TaskSettings(window=64), load_tokenizer(ModelSettings()), 0, 10).train[:64]


def test_the_embedded_model_is_small_and_its_adapter_is_lora_on_attention(model: PeftModel) -> None:
    size = (Path("assets/tiny-llama") / "model.safetensors").stat().st_size
    assert size <= 4_000_000
    adapter = get_adapter(model)
    assert len(adapter) == 4 * 4 * 2
    assert {tuple(t.shape) for t in adapter.values()} == {(8, 192), (192, 8)}
    assert all(t.dtype == torch.float32 for t in adapter.values())


def test_adapter_in_is_adapter_out(model: PeftModel) -> None:
    adapter = {name: torch.randn_like(tensor) for name, tensor in get_adapter(model).items()}
    set_adapter(model, adapter)
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in get_adapter(model).items())


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (get_adapter(load_model(ModelSettings(), LoraSettings(), seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_finetuning_is_reproducible_and_lowers_the_loss(model: PeftModel, windows: Windows) -> None:
    start = get_adapter(load_model(ModelSettings(), LoraSettings(), 0))
    longer = dataclasses.replace(TRAINING, steps=12)
    update, _ = finetune(model, start, windows, longer, seed=5)
    again, _ = finetune(model, start, windows, longer, seed=5)
    assert all(torch.equal(update[name], again[name]) for name in update)
    set_adapter(model, start)
    before = heldout_loss(model, windows)
    set_adapter(model, add(start, update))
    assert heldout_loss(model, windows) < before - 0.1


def test_gradient_mode_is_the_sum_of_clipped_steps(model: PeftModel, windows: Windows) -> None:
    start = get_adapter(load_model(ModelSettings(), LoraSettings(), 0))
    one = dataclasses.replace(TRAINING, update="gradient", lr=0.5, clip=1e-3, steps=1)
    update, _ = finetune(model, start, windows, one, seed=1)
    norm = torch.cat([t.flatten() for t in update.values()]).norm().item()
    assert norm == pytest.approx(0.5 * 1e-3, rel=1e-2)  # learning rate times the clipped norm


def test_micro_batches_give_the_same_gradients(model: PeftModel, windows: Windows) -> None:
    start = get_adapter(load_model(ModelSettings(), LoraSettings(), 0))
    whole = dataclasses.replace(TRAINING, update="gradient", lr=1.0)
    small = dataclasses.replace(whole, micro_batch_size=1)
    first, second = (finetune(model, start, windows, how, seed=3)[0] for how in (whole, small))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 3, 9])
@pytest.mark.parametrize(
    ("schedule", "of_transformers"),
    [
        ("constant", lambda optimizer, warmup: get_constant_schedule_with_warmup(optimizer, warmup)),
        ("cosine", lambda optimizer, warmup: get_cosine_schedule_with_warmup(optimizer, warmup, 10)),
    ],
)
def test_the_learning_rates_are_those_of_transformers(
    model: PeftModel,
    windows: Windows,
    monkeypatch: pytest.MonkeyPatch,
    warmup: int,
    schedule: str,
    of_transformers: Callable[..., LambdaLR],
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, wanted = of_transformers(optimizer, warmup), []
    for _ in range(10):
        wanted.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    taken: list[float] = []
    plain = torch.optim.SGD.step

    def spy(self: torch.optim.SGD) -> None:
        taken.append(self.param_groups[0]["lr"])
        plain(self)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    how = TrainSettings(lr=0.5, steps=10, batch_size=1, micro_batch_size=1, schedule=schedule, warmup_steps=warmup)
    finetune(model, get_adapter(model), Windows(windows.ids[:2, :8], windows.counted[:2, :8]), how, 0)
    assert taken == pytest.approx(wanted)


def test_training_that_diverges_says_so(model: PeftModel, windows: Windows) -> None:
    start = get_adapter(load_model(ModelSettings(), LoraSettings(), 0))
    with pytest.raises(DivergedError, match=r"the loss is nan in step \d+: lower train\.lr"):
        finetune(model, start, windows, dataclasses.replace(TRAINING, lr=1e30, steps=8), seed=1)


def test_seeds_of_rounds_and_partitions_are_distinct_and_serve_torch() -> None:
    asked = list(itertools.product((0, 1, 18_000_001, 2**32 - 1), range(5), range(5)))
    seeds = {training_seed(*values) for values in asked}
    assert len(seeds) == len(asked)
    for seed in seeds:
        torch.Generator().manual_seed(seed)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed={seed} must lie between 0 and 4294967295"):
            check_settings(Settings(seed=seed))


def test_an_adapter_of_another_model_is_refused_by_name(model: PeftModel) -> None:
    adapter = get_adapter(model)
    name = next(iter(adapter))
    with pytest.raises(ValueError, match=r"another lora\.rank"):
        set_adapter(model, {**adapter, name: adapter[name][:4]})
    with pytest.raises(ValueError, match="another base model"):
        set_adapter(model, {n: t for n, t in adapter.items() if n != name})


def test_add_undoes_subtract() -> None:
    old, new = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([1.5, -2.0])}
    assert torch.equal(add(old, subtract(new, old))["a"], new["a"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"update": "momentum"}, r"train\.update='momentum'"),
        ({"schedule": "linear"}, r"train\.schedule='linear'"),
        ({"steps": 0}, r"train\.steps=0"),
        ({"batch_size": 5, "micro_batch_size": 2}, r"train\.batch_size=5, train\.micro_batch_size=2"),
        ({"lr": 0.0}, r"train\.lr=0\.0"),
        ({"lr": math.inf}, r"train\.lr=inf"),
        ({"clip": math.nan}, r"train\.clip=nan"),
        ({"weight_decay": -0.1}, r"train\.weight_decay=-0\.1"),
        ({"weight_decay": math.nan}, r"train\.weight_decay=nan"),
        ({"warmup_steps": -1}, r"train\.warmup_steps=-1"),
        ({"warmup_steps": 10}, r"train\.warmup_steps=10 must be less than train\.steps=10"),
    ],
)
def test_wrong_training_settings_are_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_training(TrainSettings(**change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": math.nan}, r"lora\.alpha=nan"),
        ({"alpha": 0.0}, r"lora\.alpha=0"),
        ({"dropout": 1.0}, r"lora\.dropout=1"),
        ({"dropout": -0.1}, r"lora\.dropout=-0\.1"),
        ({"dropout": math.nan}, r"lora\.dropout=nan"),
    ],
)
def test_wrong_lora_settings_are_named(change: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_lora(LoraSettings(**change))  # type: ignore[arg-type]


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere' is neither a directory"):
        check_model(ModelSettings(path="nowhere"))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        check_model(ModelSettings(path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"model\.dtype='int3'"):
        check_model(ModelSettings(dtype="int3"))


def test_a_saved_adapter_loads_with_peft_alone(model: PeftModel, tmp_path: Path, windows: Windows) -> None:
    set_adapter(model, {name: 0.1 * torch.randn_like(tensor) for name, tensor in get_adapter(model).items()})
    model.save_pretrained(str(tmp_path))
    base = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert heldout_loss(loaded, windows) == pytest.approx(heldout_loss(model, windows), abs=1e-5)
