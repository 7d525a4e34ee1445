"""Instruction and dialogue data: formats, templates, which tokens count, partitions, epochs, and the preview."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from adapters.base import load_tokenizer, max_positions
from adapters.finetune import finetune
from adapters.model import get_adapter, load_model, on_host
from adapters.settings import LoraSettings, ModelSettings, TrainSettings, check_training, num_examples, num_steps
from adapters.windows import Windows, next_token_loss
from client.app import app as client_app
from client.trainer import Trainer
from client.work import Work
from conf.schema import Settings
from server.holdings import example_text, holdings_of, holdings_table
from server.run.evaluate import Evaluator
from server.run.federation import run_federation
from tasks.corpora import read_records
from tasks.examples import Example
from tasks.exams import read_exam
from tasks.settings import TaskSettings, check_task, check_window, is_hub_name
from tasks.shards import Shard, client_records, load_shard, load_shards
from tasks.templates import Renderer
from tasks.windows import heldout_loss, padded, tokens_of

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DOLLY = [
    {
        "instruction": f"What is {i}?",
        "context": f"Context {i}." if i % 3 == 0 else "",
        "response": f"It is {i}." + " Indeed." * (i % 5),
        "category": ("closed_qa", "open_qa", "open_qa")[i % 3],
    }
    for i in range(60)
]
ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hi"},
]
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return load_model(ModelSettings(), LoraSettings(), seed=0)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSettings())


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def dolly(tmp_path: Path) -> str:
    return written(tmp_path / "dolly.jsonl", DOLLY)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def task(path: str, **changes: Any) -> TaskSettings:
    settings = TaskSettings("dolly", path, loss_on="response", packing=False, window=160)
    return dataclasses.replace(settings, **changes)


def example_of(record: dict[str, Any], template: str, loss_on: str, tokenizer: Any) -> Example:
    [example] = Renderer(template, loss_on, "keep", tokenizer).examples(record)
    return example


def text_of(record: dict[str, Any], template: str, tokenizer: Any, loss_on: str = "response") -> tuple[str, list[str]]:
    """The whole text of a record, and its parts that count."""
    parts = example_of(record, template, loss_on, tokenizer).parts
    return "".join(part.text for part in parts), [part.text for part in parts if part.counts]


def test_the_alpaca_prompt_is_stanfords_to_the_letter(tokenizer: Any) -> None:
    with_input, without = (text_of(row, "alpaca", tokenizer) for row in ALPACA)
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:3",
        ["3"],
    )
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nGreet.\n\n### Response:Hi",
        ["Hi"],
    )


def test_dollys_names_and_braces_give_the_same_prompt(tokenizer: Any) -> None:
    dolly = {"instruction": "Add {x}.", "context": "1 {and} 2", "response": "3", "category": "qa", "output": None}
    alpaca = {"instruction": "Add {x}.", "input": "1 {and} 2", "output": "3", "text": "rendered by someone else"}
    assert text_of(dolly, "alpaca", tokenizer) == text_of(alpaca, "alpaca", tokenizer)
    assert "### Instruction:\nAdd {x}.\n\n### Input:\n1 {and} 2\n" in text_of(dolly, "alpaca", tokenizer)[0]


def test_none_joins_the_fields_and_text_is_left_alone(tokenizer: Any) -> None:
    assert text_of(ALPACA[0], "none", tokenizer) == ("Add.\n\n1 and 2\n\n3", ["3"])
    for template in ("alpaca", "none", "chat"):
        assert text_of({"text": "as it is"}, template, tokenizer, "all") == ("as it is", ["as it is"])


def test_every_turn_of_the_assistant_counts_and_nothing_else(chat_tokenizer: Any) -> None:
    whole, counted = text_of({"messages": DIALOGUE}, "chat", chat_tokenizer)
    assert whole == chat_tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert counted == ["Two.<|end|>", "Four.<|end|>"]
    whole, counted = text_of(ALPACA[0], "chat", chat_tokenizer)
    assert whole == "<|user|>\nAdd.\n\n1 and 2<|end|>\n<|assistant|>\n3<|end|>\n"
    assert counted == ["3<|end|>"]


def test_a_dialogue_that_the_assistant_opens_is_rendered_where_the_template_can(chat_tokenizer: Any) -> None:
    opened = {"messages": [{"role": "assistant", "content": "Hello."}, *DIALOGUE[1:3]]}
    for before in ("", "<|system|>\nBe kind.<|end|>\n"):
        chat_tokenizer.chat_template = before + CHATML
        whole, counted = text_of(opened, "chat", chat_tokenizer)
        assert whole == chat_tokenizer.apply_chat_template(opened["messages"], tokenize=False)
        assert counted == ["Hello.<|end|>", "Two.<|end|>"]
    for template, said in (
        ("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "the assistant opens a dialogue"),
        ("{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML, "user first"),
    ):
        chat_tokenizer.chat_template = template
        with pytest.raises(ValueError, match=said):
            text_of(opened, "chat", chat_tokenizer)


@pytest.mark.parametrize(("template", "end"), [("alpaca", "<|end|>"), ("none", "<|end|>"), ("chat", "<|end|>")])
def test_the_tokens_that_count_are_the_response_and_its_end(
    chat_tokenizer: PreTrainedTokenizerBase, dolly: str, template: str, end: str
) -> None:
    shard = load_shard(task(dolly, template=template, split="all", heldout_fraction=0.01), chat_tokenizer, 0, 1)
    decoded = [chat_tokenizer.decode(ids[counted]) for ids, counted in zip_windows(shard.train)]
    held = [chat_tokenizer.decode(ids[counted]) for ids, counted in zip_windows(shard.heldout)]
    assert sorted(decoded + held) == sorted(row["response"] + end for row in DOLLY)
    labels = shard.train.labels
    assert torch.equal(labels != -100, shard.train.counted)
    assert torch.equal(labels[shard.train.counted], shard.train.ids[shard.train.counted])


def zip_windows(windows: Windows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(windows.ids, windows.counted, strict=True))


def test_packed_responses_count_in_the_same_stream(tokenizer: PreTrainedTokenizerBase, dolly: str) -> None:
    changes = {"packing": True, "window": 16, "split": "all", "heldout_fraction": 0.01}
    everything = load_shard(task(dolly, loss_on="all", **changes), tokenizer, 0, 1)
    responses = load_shard(task(dolly, **changes), tokenizer, 0, 1)
    assert everything.train.counted.all()
    assert 0 < responses.train.num_counted < everything.train.num_counted / 2
    assert responses.train.counted[:, 1:].any(1).all()
    windows = {tuple(ids) for ids in everything.train.ids.tolist() + everything.heldout.ids.tolist()}
    assert {tuple(ids) for ids in responses.train.ids.tolist()} <= windows


def test_a_tokenizers_own_beginning_comes_first(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = next(tokens_of([example_of({"text": "a"}, "none", "all", tokenizer)], tokenizer)).ids
    tokenizer.bos_token = "<|end|>"
    assert next(tokens_of([example_of({"text": "a"}, "none", "all", tokenizer)], tokenizer)).ids == plain
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    begun = next(tokens_of([example_of({"text": "a"}, "none", "all", tokenizer)], tokenizer)).ids
    assert begun == [tokenizer.bos_token_id, *plain]


def test_padding_changes_no_loss(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, dolly: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an attention mask: what stands behind a token cannot reach it."""
    model.eval()
    examples = [example_of(row, "alpaca", "response", tokenizer) for row in DOLLY[:3]]
    tokens = list(tokens_of(examples, tokenizer))
    windows = padded(tokens, tokenizer, 128).windows
    assert len({len(token.ids) for token in tokens}) > 1
    losses, counts = [], []
    with torch.no_grad():
        for row, (ids, counted, _) in enumerate(tokens):
            alone = Windows(torch.tensor([ids]), torch.tensor([counted]))
            losses.append(next_token_loss(model, alone))
            counts.append(alone.num_counted)
            torch.testing.assert_close(next_token_loss(model, windows[row : row + 1]), losses[-1])
        together = next_token_loss(model, windows.trimmed())
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, mean)
    for batch_size in (1, 2, 16):
        assert heldout_loss(model, windows, batch_size) == pytest.approx(float(mean), abs=1e-5)


def test_padding_is_the_end_token_where_there_is_no_other(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = None
    tokens = list(tokens_of([example_of(row, "none", "all", tokenizer) for row in ALPACA], tokenizer))
    windows = padded(tokens, tokenizer, 40).windows
    for (ids, counted), token in zip(zip_windows(windows), tokens, strict=True):
        assert counted.tolist() == [True] * len(token.ids) + [False] * (40 - len(token.ids))
        assert set(ids[len(token.ids) :].tolist()) == {tokenizer.eos_token_id}


def test_what_max_windows_leaves_out_is_counted(tokenizer: PreTrainedTokenizerBase, dolly: str) -> None:
    """Padded, a record is a window; packed, the stream ends somewhere in a record."""
    for most, num_over in ((60, 0), (61, 0), (25, 35)):
        assert load_shard(task(dolly, max_windows=most), tokenizer, 0, 1).num_over == num_over
    records = client_records(task(dolly), 1)(0)
    examples = (example_of(dict(record.fields), "alpaca", "all", tokenizer) for record in records)
    ends = list(accumulate(len(tokens.ids) for tokens in tokens_of(examples, tokenizer)))
    for most in (5, 20, 10_000):
        settings = task(dolly, loss_on="all", packing=True, window=32, max_windows=most)
        num_whole = sum(end <= 32 * most for end in ends)
        assert load_shard(settings, tokenizer, 0, 1).num_over == 60 - num_whole


def test_long_records_are_cut_counted_and_said(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"instruction": "a", "output": "b"}] * 8
    rows += [{"instruction": "a", "output": "word " * 200}, {"instruction": "word " * 200, "output": "b"}]
    path = written(tmp_path / "long.jsonl", rows)
    settings = Settings(task=task(path, template="none", window=16, split="all"))
    settings.federation.num_clients = 1
    shard = load_shard(settings.task, tokenizer, 0, 1)
    assert (len(shard.train) + len(shard.heldout), shard.num_cut, shard.num_empty) == (9, 2, 1)
    Evaluator(settings)
    assert "2 records are longer than task.window=16 tokens" in caplog.text
    assert "1 records are left out" in caplog.text


def test_where_every_token_counts_the_losses_are_the_plain_ones_to_the_bit(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    windows = load_shard(TaskSettings(window=100), tokenizer, 0, 10).heldout
    model.eval()
    total = 0.0
    with torch.no_grad():
        for ids in windows.ids.to(model.device).split(5):
            logits = model(input_ids=ids).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            assert torch.equal(next_token_loss(model, Windows.whole(ids)), loss)
            total += float(loss) * len(ids)
    assert heldout_loss(model, windows, batch_size=5) == total / len(windows)


def test_micro_batches_weigh_the_tokens_that_count(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, dolly: str
) -> None:
    windows = load_shard(task(dolly, split="all"), tokenizer, 0, 1).train
    assert len(set(windows.counted.sum(1).tolist())) > 2
    start = get_adapter(load_model(ModelSettings(), LoraSettings(), 0))
    whole = TrainSettings(steps=1, batch_size=8, micro_batch_size=8, lr=1.0, clip=1e6)
    (first, loss), (second, same) = (
        finetune(model, start, windows, dataclasses.replace(whole, micro_batch_size=size), seed=3) for size in (8, 1)
    )
    assert loss == pytest.approx(same, rel=1e-5)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-6)


def test_an_epoch_trains_on_every_window_once_in_a_seeded_order(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = Windows.whole(torch.arange(11)[:, None].expand(11, 4).contiguous())
    settings = TrainSettings(update="delta", lr=1e-3, epochs=2, batch_size=4, micro_batch_size=2, schedule="cosine")
    start = get_adapter(model)

    def order(seed: int) -> list[int]:
        seen: list[int] = []

        def noting(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.extend(kwargs["input_ids"][:, 0].tolist())

        hook = model.register_forward_pre_hook(noting, with_kwargs=True)
        finetune(model, start, windows, settings, seed)
        hook.remove()
        return seen

    seen = order(1)
    assert len(seen) == num_examples(settings, 11) == 22
    assert num_steps(settings, 11) == 6
    assert sorted(seen[:11]) == sorted(seen[11:]) == list(range(11))
    assert seen[:11] != seen[11:]
    assert order(1) == seen != order(2)


def test_epochs_are_checked_and_steps_are_the_default() -> None:
    settings = TrainSettings(steps=3, batch_size=8)
    assert (num_steps(settings, 100), num_examples(settings, 100)) == (3, 24)
    with pytest.raises(ValueError, match=r"train\.epochs=0"):
        check_training(TrainSettings(epochs=0))


def federation(folder: Path, dolly: str, **changes: Any) -> Settings:
    settings = Settings(output=str(folder / "out"), run_id="data", arm="dense")
    settings.model.path = str(Path("assets/tiny-llama").absolute())
    settings.task = task(dolly, partition="column", partition_by="category", **changes)
    settings.train = TrainSettings(update="delta", lr=0.01, epochs=1, batch_size=8, micro_batch_size=4)
    settings.federation.num_clients = settings.federation.clients_per_round = 2
    settings.federation.rounds, settings.federation.wait_seconds = 2, 5.0
    return settings


def test_clients_of_unequal_size_train_for_an_epoch_and_weigh_what_they_hold(tmp_path: Path, dolly: str) -> None:
    settings = federation(tmp_path, dolly)
    trainer = Trainer(settings)
    adapter = {name: tensor.numpy() for name, tensor in on_host(get_adapter(trainer.model)).items()}
    done = [trainer.train(Work(adapter, None, i, 1, "", tmp_path)) for i in (0, 1)]
    sizes = [len(trainer.shard(i).train) for i in (0, 1)]
    assert sizes[1] > 1.5 * sizes[0]
    assert [trained.num_examples for trained in done] == sizes
    results = run_federation(InProcessGrid(client_app, 2, {"memory": str(tmp_path / "memory")}), settings)
    assert not results.faults
    assert results.heldout_loss[-1] < results.heldout_loss[0] - 0.1


def test_formats_hold_the_same_records(tmp_path: Path) -> None:
    table = Dataset.from_list(DOLLY)
    table.to_parquet(tmp_path / "data.parquet")
    table.to_csv(tmp_path / "data.csv", index=False)
    (tmp_path / "data.json").write_text(json.dumps(DOLLY, indent=1))
    written(tmp_path / "data.jsonl", DOLLY)
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "a.jsonl", DOLLY[:20])
    written(tmp_path / "folder" / "b.jsonl", DOLLY[20:])
    for name in ("data.jsonl", "data.json", "data.parquet", "data.csv", "folder"):
        records = read_records(str(tmp_path / name))
        read = [{key: value or "" for key, value in record.fields.items()} for record in records]
        assert read == DOLLY, name


def test_reading_leaves_no_copy_of_the_data(tmp_path: Path, dolly: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"from tasks.corpora import read_records; print(len(read_records({dolly!r})))"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "60\n"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize(
    ("partition", "column", "num_clients"), [("iid", None, 7), ("dirichlet", "category", 4), ("column", "category", 2)]
)
def test_every_record_goes_to_one_client(dolly: str, partition: str, column: str | None, num_clients: int) -> None:
    settings = task(dolly, partition=partition, partition_by=column)
    holdings = [client_records(settings, num_clients)(client) for client in range(num_clients)]
    dealt = [record.fields["instruction"] for records in holdings for record in records]
    assert len(dealt) == len(set(dealt)) == 60
    assert all(len(records) for records in holdings)
    if partition == "column":
        held = [{record.fields["category"] for record in records} for records in holdings]
        assert held == [{"closed_qa"}, {"open_qa"}]


def test_local_clients_read_their_own_file_and_no_other(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    written(tmp_path / "client-0.jsonl", DOLLY[:20])
    written(tmp_path / "client-10.jsonl", DOLLY[20:])
    (tmp_path / "client-1").mkdir()
    written(tmp_path / "client-1" / "part.jsonl", DOLLY[20:40])
    (tmp_path / "client-2.jsonl").write_text("broken")
    settings = task(str(tmp_path), partition="local")
    held = [sorted(record.fields["instruction"] for record in client_records(settings, 4)(client)) for client in (0, 1)]
    assert held == [sorted(row["instruction"] for row in rows) for rows in (DOLLY[:20], DOLLY[20:40])]
    assert isinstance(load_shard(settings, tokenizer, 0, 4), Shard)
    with pytest.raises(ValueError, match=r"client-2\.jsonl, line 1: no JSON"):
        load_shard(settings, tokenizer, 2, 4)
    with pytest.raises(ValueError, match=r"client-3, as in client-3\.jsonl; there is nothing of that name"):
        load_shard(settings, tokenizer, 3, 4)


def test_a_nodes_own_file_is_not_dealt_out_whatever_the_partition(tmp_path: Path, dolly: str) -> None:
    settings = federation(tmp_path, dolly)
    settings.task.split = "all"
    shard = Trainer(settings, own_data=True).shard(1)
    assert len(shard.train) + len(shard.heldout) == 60


def test_shards_of_all_clients_are_those_of_each(tokenizer: PreTrainedTokenizerBase, dolly: str) -> None:
    settings = task(dolly, partition="dirichlet", partition_by="category", alpha=1.0)
    for client, shard in enumerate(load_shards(settings, tokenizer, range(3), 3)):
        alone = load_shard(settings, tokenizer, client, 3)
        assert torch.equal(shard.train.ids, alone.train.ids) and torch.equal(
            shard.heldout.counted, alone.heldout.counted
        )


@pytest.mark.parametrize(
    ("record", "changes", "said"),
    [
        ({"poem": "x"}, {}, "or 'instruction' and 'output', or 'prompt' and 'completion', or 'question' and"),
        ({"text": "x"}, {}, "use task.loss_on=all"),
        ({"messages": DIALOGUE}, {}, "task.template=alpaca has no system turn"),
        ({"messages": [{"role": "user"}]}, {"template": "none"}, "needs a 'role' and a 'content'"),
        ({"messages": []}, {"template": "none"}, "'messages' must be a list of at least one turn"),
        ({"messages": []}, {"template": "chat"}, "'messages' must be a list of at least one turn"),
        ({"messages": 3}, {"template": "none"}, "'messages' must be a list of at least one turn"),
        ({"messages": DIALOGUE[1:]}, {"template": "chat"}, "refuses a dialogue: no system turn"),
    ],
)
def test_a_record_that_cannot_be_rendered_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ messages | length }}" + CHATML
    )
    path = written(tmp_path / "bad.jsonl", [record])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_shard(task(path, **changes), tokenizer, 0, 1)
    assert said in str(error.value) and "bad.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2: no JSON"),
        (b'{"text": "a"}\n[1]\n', "line 2: a JSON object is expected, not list"),
        (b'{"text": "\xff"}\n', "line 1: no UTF-8"),
        (b"", "holds no record"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        client_records(task(str(tmp_path / "bad.jsonl")), 1)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "num_clients", "said"),
    [
        ({"partition": "column", "partition_by": "colour"}, 2, "'colour' is no column of"),
        ({"partition": "column", "partition_by": "category"}, 3, "set federation.num_clients=2, not 3"),
        ({"partition": "dirichlet", "partition_by": "category", "alpha": 0.001}, 30, "a larger task.alpha"),
        ({}, 61, "holds 60 records for 61 clients"),
        ({"partition": "local"}, 1, "there is nothing of that name"),
        ({"path": "somebody/something.jsonl"}, 1, "no data set's name on the hub"),
    ],
)
def test_a_deal_that_cannot_be_made_is_named(dolly: str, changes: dict[str, Any], num_clients: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        client_records(task(**{"path": dolly, **changes}), num_clients)(0)


def test_files_of_several_kinds_or_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it holds none of them"):
        read_records(str(tmp_path))
    written(tmp_path / "a.jsonl", DOLLY)
    (tmp_path / "b.csv").write_text("instruction,output\na,b\n")
    with pytest.raises(ValueError, match=r"it holds \.csv, \.jsonl"):
        read_records(str(tmp_path))
    (tmp_path / "c.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"it holds \.xlsx"):
        read_records(str(tmp_path / "c.xlsx"))


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from tasks.corpora import read_records; read_records('databricks/databricks-dolly-15k')"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", "/nowhere")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: task.path='databricks/databricks-dolly-15k' is no file here")
    assert "HF_HUB_OFFLINE=0" in last


def test_a_hub_name_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("databricks/databricks-dolly-15k") and is_hub_name("tatsu-lab/alpaca")
    for path in ("data/dolly.jsonl", "./data/dolly", "/data/dolly", "dolly", "../data", "a/b/c"):
        assert not is_hub_name(path), path
    (tmp_path / "data" / "dolly").mkdir(parents=True)
    assert not is_hub_name("data/dolly")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"template": "vicuna"}, r"task\.template='vicuna' is none of alpaca, chat, none"),
        ({"loss_on": "prompt"}, r"task\.loss_on='prompt'"),
        ({"partition": "shards"}, r"task\.partition='shards'"),
        ({"partition_by": "category"}, "do not go together"),
        ({"partition": "dirichlet"}, "do not go together"),
        ({"partition": "dirichlet", "partition_by": "category", "alpha": 0.0}, r"task\.alpha=0\.0"),
        ({"name": "text"}, r"task\.loss_on=response needs records with a response"),
        ({"name": "stdlib", "loss_on": "all"}, r"task\.name=stdlib is one text a client"),
        ({"max_windows": 0}, r"task\.max_windows=0"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_task(task("somewhere", **changes))


def test_a_tokenizer_without_chat_template_is_named(tokenizer: PreTrainedTokenizerBase, dolly: str) -> None:
    with pytest.raises(ValueError, match=r"task\.template=chat needs a tokenizer with a chat template"):
        load_shard(task(dolly, template="chat"), tokenizer, 0, 1)


@pytest.mark.parametrize("build", [Evaluator, lambda settings: Trainer(settings).check(0)])
def test_a_window_longer_than_the_model_reads_is_refused(
    tmp_path: Path, dolly: str, build: Callable[[Settings], object]
) -> None:
    assert max_positions(ModelSettings()) == 512
    check_window(task(dolly, window=512), 512)
    check_window(task(dolly, window=10**6), None)
    with pytest.raises(ValueError, match=r"task\.window=513 is more than the 512 tokens"):
        build(federation(tmp_path, dolly, window=513))


def test_the_preview_counts_what_clients_hold_and_shows_an_example(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, dolly: str
) -> None:
    settings = federation(tmp_path, dolly)
    holdings = holdings_of(settings, tokenizer)
    console = Console(width=120, file=io.StringIO())
    with console.capture() as printed:
        console.print(holdings_table(settings, holdings))
    rows = [line.split() for line in printed.get().splitlines()]
    sizes = [len(holding.shard.train) for holding in holdings]
    steps = [-(-size // 8) for size in sizes]
    counted = [holding.shard.train.num_counted for holding in holdings]
    assert [
        "0",
        "20",
        "0",
        "0",
        "0",
        "0",
        str(sizes[0]),
        str(counted[0]),
        str(steps[0]),
        "2",
        "closed_qa",
        "100%",
    ] in rows
    assert [
        "1",
        "40",
        "0",
        "0",
        "0",
        "0",
        str(sizes[1]),
        str(counted[1]),
        str(steps[1]),
        "4",
        "open_qa",
        "100%",
    ] in rows
    assert rows[-1][:7] == ["all", "60", "0", "0", "0", "0", str(sum(sizes))]
    shown = example_text(holdings[0].shard.train, tokenizer).plain
    record = next(row for row in DOLLY if f"\n{row['instruction']}\n" in shown)
    assert shown == text_of(record, "alpaca", tokenizer)[0].replace(
        record["response"], f"[{record['response']}<|end|>]"
    )


def test_the_preview_counts_what_max_windows_leaves_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, dolly: str
) -> None:
    settings = federation(tmp_path, dolly, max_windows=25)
    console = Console(width=120, file=io.StringIO())
    with console.capture() as printed:
        console.print(holdings_table(settings, holdings_of(settings, tokenizer)))
    assert printed.get().splitlines()[-1].split()[:6] == ["all", "60", "0", "0", "0", "15"]
    settings.federation.num_clients = 0
    with pytest.raises(ValueError, match=r"federation\.num_clients=0 must be at least 1"):
        holdings_of(settings, tokenizer)


def test_the_preview_shows_markup_and_control_characters_as_they_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """In the data, in the column's name and in its values."""
    rows = [{"instruction": "a", "output": f"[/b]\x1b]0;title\x07{i}", "[red]c[/": "[/u]\x1b[2J"} for i in range(20)]
    settings = federation(tmp_path, written(tmp_path / "d.jsonl", rows))
    settings.task = dataclasses.replace(settings.task, partition="dirichlet", partition_by="[red]c[/")
    settings.federation.num_clients = 1
    holdings = holdings_of(settings, tokenizer)
    console = Console(width=120, file=io.StringIO())
    with console.capture() as printed:
        console.print(holdings_table(settings, holdings))
        console.print(example_text(holdings[0].shard.train, tokenizer))
    for shown in ("[red]c[/", "[/u]\\x1b[2J 100%", "[/b]\\x1b]0;title\\x07"):
        assert shown in printed.get()
    assert "\x1b" not in printed.get()


def test_the_preview_needs_no_weights_and_leaves_no_files(tmp_path: Path, dolly: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((Path("assets/tiny-llama") / name).read_bytes())
    before = sorted(tmp_path.rglob("*"))
    preview = [sys.executable, "-m", "server.preview", "task=dolly", f"model.path={model}", "federation.num_clients=3"]
    done = subprocess.run([*preview, f"task.path={dolly}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "One example of client 0" in done.stdout and "[It is " in done.stdout
    assert not done.stderr and sorted(tmp_path.rglob("*")) == before
    done = subprocess.run([*preview, f"task.path={tmp_path / 'no.jsonl'}"], capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.startswith("error: task.path=") and done.stderr.count("\n") == 1


def test_exams_are_questions_with_their_letter(tmp_path: Path) -> None:
    """The original files: C-Eval names its columns, MMLU does not."""
    ceval, mmlu = tmp_path / "ceval", tmp_path / "mmlu"
    ceval.mkdir()
    mmlu.mkdir()
    header = "id,question,A,B,C,D,answer,explanation\n"
    (ceval / "logic_dev.csv").write_text(f"{header}0,下列哪项？,甲,乙,丙,丁,B,因为\n", encoding="utf-8")
    (mmlu / "high_school_physics_val.csv").write_text('"What falls, and why?",up,down,left,right,B\n')
    ((record, *_),) = read_exam("ceval", str(ceval))
    assert record["input"] == "下列哪项？\nA. 甲\nB. 乙\nC. 丙\nD. 丁"
    assert (record["output"], record["subject"]) == ("B", "logic")
    ((record, *_),) = read_exam("mmlu", str(mmlu))
    assert "high school physics" in record["instruction"]
    assert record["input"].startswith("What falls, and why?\nA. up\nB. down")
    assert record["output"] == "B"
    with pytest.raises(ValueError, match="give the folder of one split of mmlu"):
        read_exam("mmlu", str(tmp_path))
    (mmlu / "astronomy_val.csv").write_text("a question,1,2,3,4,E\n")
    with pytest.raises(ValueError, match=r"astronomy_val\.csv, record 1: the answer 'E' is none of A, B, C, D"):
        read_exam("mmlu", str(mmlu))
