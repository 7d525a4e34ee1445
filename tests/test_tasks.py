from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adapters.base import load_tokenizer
from adapters.settings import ModelSettings
from adapters.windows import Windows
from tasks.settings import TaskSettings, check_task
from tasks.shards import client_records, load_shard
from tasks.stdlib import packages, prose
from tasks.windows import heldout_loss, windows_of


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_tokenizer(ModelSettings())


def texts(name: str, path: Path | None, client: int, num_clients: int, partition_by: str | None = None) -> list[str]:
    settings = TaskSettings(name, None if path is None else str(path), partition_by=partition_by)
    settings.partition = "iid" if partition_by is None else "dirichlet"
    return [
        str(fields.get("text", fields.get("output"))) for fields, *_ in client_records(settings, num_clients)(client)
    ]


def test_every_client_of_the_embedded_task_holds_another_package() -> None:
    held = [texts("stdlib", None, client, 10)[0] for client in range(10)]
    assert len(set(held)) == 10
    assert min(map(len, held)) > 40_000


def test_more_clients_than_packages_share_them_without_overlap() -> None:
    count = len(packages())
    first, second = (texts("stdlib", None, client, 2 * count)[0] for client in (0, count))
    whole = "\n".join(path.read_text() for path in next(iter(packages().values())))
    assert first + second == whole


def test_prose_is_text_without_repetition() -> None:
    found = prose()
    assert len(found) == len(set(found)) > 3000
    assert not any("site-packages" in str(path) for paths in packages().values() for path in paths)


def test_windows_hold_the_text_in_order(tokenizer: object) -> None:
    windows = windows_of(["def f(x): return x\n" * 50], tokenizer, 16)  # type: ignore[arg-type]
    assert windows.ids.shape[1] == 16 and windows.counted.all()
    text = tokenizer.decode(windows.ids.flatten())  # type: ignore[attr-defined]
    assert text.startswith("def f(x): return x\ndef f(x)")
    assert windows_of([], tokenizer, 16).ids.shape == (0, 16)  # type: ignore[arg-type]


def test_splits_are_three_to_seven_and_share_nothing(tokenizer: object) -> None:
    parts = {s: load_shard(TaskSettings(split=s), tokenizer, 3, 10) for s in ("tgap", "faf", "all")}  # type: ignore[arg-type]
    rows = {s: {tuple(w) for w in part.train.ids.tolist()} for s, part in parts.items()}
    held = {tuple(w) for w in parts["all"].heldout.ids.tolist()}
    assert len(parts["tgap"].train) / len(parts["all"].train) == pytest.approx(0.3, abs=0.01)
    assert len(parts["tgap"].train) + len(parts["faf"].train) == len(parts["all"].train)
    assert rows["tgap"] | rows["faf"] == rows["all"]
    assert len(rows["tgap"] & rows["faf"]) <= 2  # equal windows of repeated source lines
    assert torch.equal(parts["tgap"].heldout.ids, parts["faf"].heldout.ids)
    assert len(rows["all"] & held) <= 2


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    rows = [
        {"instruction": f"Say {i}", "input": "", "output": f"{i} " * 40, "category": "odd" if i % 2 else "even"}
        for i in range(40)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.mark.parametrize("partition_by", [None, "category"])
def test_jsonl_is_dealt_out_whole_and_without_overlap(jsonl: Path, partition_by: str | None) -> None:
    parts = [texts("jsonl", jsonl, client, 4, partition_by) for client in range(4)]
    assert all(parts)
    dealt = [text for part in parts for text in part]
    assert len(dealt) == len(set(dealt)) == 40
    assert parts == [texts("jsonl", jsonl, client, 4, partition_by) for client in range(4)]


def test_a_shard_of_the_embedded_task_is_made_once_and_reads_no_more_than_it_keeps(tokenizer: object) -> None:
    settings = TaskSettings(max_windows=20, window=64, split="all")
    shard = load_shard(settings, tokenizer, 2, 10)  # type: ignore[arg-type]
    assert (
        load_shard(TaskSettings(max_windows=20, window=64, split="all"), load_tokenizer(ModelSettings()), 2, 10)
        is shard
    )
    (text,) = texts("stdlib", None, 2, 10)
    whole = windows_of([text], tokenizer, 64)[:20]  # type: ignore[arg-type]
    assert torch.equal(shard.heldout.ids, whole.ids[-2:])
    assert {tuple(ids) for ids in shard.train.ids.tolist()} == {tuple(ids) for ids in whole.ids[:-2].tolist()}


def test_a_folder_of_texts_is_dealt_out(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"file {i}")
    assert sorted(texts("text", tmp_path, 0, 2) + texts("text", tmp_path, 1, 2)) == [f"file {i}" for i in range(4)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: no JSON"),
        ('{"text": "a"}\n[1]\n', "line 2: a JSON object is expected, not list"),
        ("", "holds no record"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"broken\.jsonl") as error:
        texts("jsonl", path, 0, 1)
    assert said in str(error.value)


def test_a_missing_file_folder_or_column_is_named(tmp_path: Path, jsonl: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl' is no file, no folder"):
        texts("jsonl", tmp_path / "nowhere.jsonl", 0, 1)
    with pytest.raises(ValueError, match="nowhere' is no folder"):
        texts("text", tmp_path / "nowhere", 0, 1)
    with pytest.raises(ValueError, match="'colour' is no column"):
        texts("jsonl", jsonl, 0, 2, partition_by="colour")
    with pytest.raises(ValueError, match="fewer clients"):
        texts("jsonl", jsonl, 0, 41)


def test_a_client_with_too_little_text_is_named(tmp_path: Path, tokenizer: object) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "hello"}\n')
    with pytest.raises(ValueError, match="client 0 of 1 has 0 windows"):
        load_shard(TaskSettings(name="jsonl", path=str(path)), tokenizer, 0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "poems"}, "task.name='poems'"),
        ({"name": "jsonl"}, "needs task.path"),
        ({"split": "d3"}, "task.split='d3'"),
        ({"window": 1}, "task.window=1"),
        ({"tgap_fraction": 1.0}, "task.tgap_fraction=1.0"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("'", ".")):
        check_task(TaskSettings(**change))  # type: ignore[arg-type]


def test_no_heldout_windows_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"task\.window"):
        heldout_loss(torch.nn.Linear(1, 1), Windows.whole(torch.empty(0, 8, dtype=torch.int64)))
