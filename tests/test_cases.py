"""Data that went wrong once, each with what it should give: ``tests/cases/README.md``, and more of the same kinds."""

from __future__ import annotations

import dataclasses
import datetime
import gzip
import json
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adapters.base import load_tokenizer
from adapters.settings import ModelSettings
from adapters.windows import Windows
from tasks.settings import TaskSettings, check_task, format_of, is_hub_name
from tasks.shards import Shard, load_shards, what_is_lost
from tasks.templates import Renderer
from tasks.windows import tokens_of

CASES = Path("tests/cases")
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>\n{% endif %}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT_ARGUMENTS = TOOLS.replace("c.function.arguments | tojson", "'' + c.function.arguments")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
REWRITES = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{{ m['content'] if loop.last or m['role'] == 'user' else 'earlier' }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PARTS_ALONE = CHATML.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p.text }}{% endfor %}")
THINKS = CHATML.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}")
SAID = [f"This is number {i}, said in words." for i in range(24)]
ANSWERS = [f"Answer {i}." for i in range(24)]


@pytest.fixture(scope="module")
def loaded() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSettings())


@dataclasses.dataclass
class Shown:
    """What is trained on: whole texts, in no order, what counts of each, and the warnings."""

    texts: list[str]
    counted: list[str]
    warnings: str


Show = Callable[..., Shown]


@pytest.fixture
def show(loaded: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Show:
    def show(path: Path | str, chat_template: str = "", **changes: Any) -> Shown:
        monkeypatch.setattr(loaded, "chat_template", chat_template or None)
        settings = TaskSettings("jsonl", str(path), packing=False, loss_on="response", window=256, split="all")
        settings = dataclasses.replace(settings, template="chat" if chat_template else "alpaca", **changes)
        check_task(settings)
        shards = list(load_shards(settings, loaded, range(1), 1))
        return Shown(*decoded(shards, loaded), "\n".join(what_is_lost(shards, settings)))

    return show


def decoded(shards: list[Shard], tokenizer: Any) -> tuple[list[str], list[str]]:
    windows = Windows.cat([part for shard in shards for part in (shard.train, shard.heldout)])
    texts, counted = [], []
    for ids, counts in zip(windows.ids, windows.counted, strict=True):
        texts.append(re.sub(r"(<\|end\|>\n?)+$", "", tokenizer.decode(ids)))
        counted.append(tokenizer.decode(ids[counts]).replace("<|end|>", "|"))
    return texts, counted


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def question(answer: Any, **others: Any) -> dict[str, Any]:
    return {"instruction": "Say it.", "output": answer, **others}


def ended(answers: list[str]) -> list[str]:
    return sorted(f"{answer}|" for answer in answers)


WEATHER = [f'<call>weather {{"town": {i}}}</call>|It rains in town {i}.|' for i in range(24)]


@pytest.mark.parametrize(
    ("case", "chat_template", "changes", "answers"),
    [
        ("date-answers", "", {}, ended([f"2021-08-{i + 1:02}" for i in range(24)])),
        ("csv-codes", "", {}, ended([f"{i:05}" for i in range(24)])),
        ("csv-none-answers", "", {}, ended((["None"] + ["Nuts and milk."] * 2) * 8)),
        ("parts-content", CHATML, {}, ended([f"A number, {i}." for i in range(24)])),
        ("parts-content", PARTS_ALONE, {}, ended([f"A number, {i}." for i in range(24)])),
        ("parts-content", "", {}, ended([f"A number, {i}." for i in range(24)])),
        ("dict-answer", "", {}, ended([json.dumps({"name": f"n{i}", "age": i}) for i in range(24)])),
        ("nan-input-all", "", {}, ended(SAID)),
        ("reasoning", TOOLS, {}, ended([f"<think>Let me think of {i}.</think>Answer {i}." for i in range(24)])),
        ("reasoning", CHATML, {}, ended(ANSWERS)),
        ("checkpoints-folder", "", {}, ended(SAID)),
        ("train-test-folder", "", {}, ended(SAID)),
        ("hub-folder", "", {}, ended(SAID)),
        ("data-wrapper", "", {}, ended(SAID)),
        ("role-gpt", CHATML, {}, ended(ANSWERS)),
        ("bom-json", "", {}, ended(SAID)),
        ("prompt-completion", "", {}, ended([f"A {i}" for i in range(24)])),
        ("question-answer", "", {}, ended([f"A {i}" for i in range(24)])),
        ("sharegpt", CHATML, {}, ended(ANSWERS)),
        ("sharegpt", "", {}, ended(ANSWERS)),
        ("multi-turn", CHATML, {}, sorted(f"Answer {i}.|Also {i}.|" for i in range(24))),
        ("multi-turn", "", {}, sorted(f"Answer {i}.|Also {i}.|" for i in range(24))),
        ("multi-turn", REWRITES, {}, ended([*ANSWERS, *(f"Also {i}." for i in range(24))])),
        ("system-some", NO_SYSTEM, {"system": "merge"}, ended(ANSWERS)),
        ("system-some", NO_SYSTEM, {"system": "drop"}, ended(ANSWERS)),
        ("system-some", "", {"system": "merge"}, ended(ANSWERS)),
        ("missing-answer", "", {"on_bad_record": "skip"}, ended([said for i, said in enumerate(SAID) if i != 13])),
        ("empty-answers", "", {}, ended(SAID[::2])),
    ],
)
def test_a_case_is_trained_as_its_readme_says(
    show: Show, case: str, chat_template: str, changes: dict[str, Any], answers: list[str]
) -> None:
    assert sorted(show(CASES / case, chat_template, **changes).counted) == answers


@pytest.mark.parametrize("case", ["tool-empty", "tool-null"])
@pytest.mark.parametrize("chat_template", [TOOLS, TEXT_ARGUMENTS])
def test_calls_are_trained_as_the_template_writes_them(show: Show, case: str, chat_template: str) -> None:
    assert sorted(show(CASES / case, chat_template).counted) == sorted(WEATHER)


@pytest.mark.parametrize(
    ("case", "chat_template", "said"),
    [
        ("tool-empty", CHATML, r"d\.jsonl, line \d+: an answer of nothing but 'tool_calls', which the chat template"),
        ("tool-null", CHATML, r"d\.jsonl, line \d+: an answer of nothing but 'tool_calls', which the chat template"),
        ("tool-null", "", r"'tool_calls', which task\.template=alpaca leaves out"),
        ("missing-answer", "", r"d\.jsonl, line 14: a record with 'instruction' needs 'output' or 'response' too"),
        ("system-some", NO_SYSTEM, r"d\.jsonl, line 8: .* refuses a dialogue: no system role; .* task\.system=merge"),
        ("system-some", "", r"d\.jsonl, line 8: task\.template=alpaca has no system turn: task\.system=merge"),
    ],
)
def test_a_case_is_refused_as_its_readme_says(show: Show, case: str, chat_template: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        show(CASES / case, chat_template)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "chat_template", "changes", "said"),
    [
        ("reasoning", CHATML, {}, "24 records: the chat template leaves out 'reasoning_content'"),
        ("reasoning", "", {}, "24 records: task.template=alpaca leaves out 'reasoning_content'"),
        ("train-test-folder", "", {}, "test.jsonl in tests/cases/train-test-folder: named as held out"),
        ("multi-turn", REWRITES, {}, "24 records: the chat template writes earlier turns anew: one example"),
        ("multi-turn", NO_END, {}, "24 records: the chat template writes no mark behind an answer: <|end|> is put"),
        ("missing-answer", "", {"on_bad_record": "skip"}, "1 records are left out by task.on_bad_record=skip; the fir"),
        ("empty-answers", "", {}, "12 records are left out: an empty answer"),
    ],
)
def test_what_is_not_trained_as_it_stands_is_said(
    show: Show, case: str, chat_template: str, changes: dict[str, Any], said: str
) -> None:
    assert said in show(CASES / case, chat_template, **changes).warnings


@pytest.mark.parametrize("case", ["date-answers", "csv-codes", "role-gpt", "checkpoints-folder", "dict-answer"])
def test_nothing_is_said_where_nothing_is_lost(show: Show, case: str) -> None:
    assert not show(CASES / case, CHATML).warnings


PROMPTED = {"prompt": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "before"}]}
PROMPTED["prompt"].append({"role": "user", "content": "R"})


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (question("true"), "true|"),
        ('{"instruction": "i", "output": true}', "true|"),
        ('{"instruction": "i", "output": 1.50}', "1.50|"),
        ('{"instruction": "i", "output": 1e5}', "1e5|"),
        ('{"instruction": "i", "output": {"a": [1.0, null, "ü"]}}', '{"a": [1.0, null, "ü"]}|'),
        ('{"instruction": "i", "output": ["a", "b"]}', '["a", "b"]|'),
        ('{"instruction": "i", "output": [{"name": "n"}]}', '[{"name": "n"}]|'),
        (f'{{"instruction": "i", "output": 1{"0" * 30}}}', f"1{'0' * 30}|"),
        (question("N/A"), "N/A|"),
        (question(" 00:10 "), " 00:10 |"),
        ({"question": "q", "answer": "a", "context": "c"}, "a|"),
        ({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}, "a|"),
        ({**PROMPTED, "completion": [{"role": "assistant", "content": "behind"}]}, "behind|"),
        ({"messages": [{"role": "User", "content": "q"}, {"role": "Assistant", "content": "a"}]}, "a|"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]}, "a|"),
        ({"messages": json.dumps([{"from": "human", "value": "q"}, {"from": "BOT", "value": "a"}])}, "a|"),
    ],
)
def test_an_answer_is_trained_as_it_stands(show: Show, tmp_path: Path, row: Any, answer: str) -> None:
    path = written(tmp_path / "d.jsonl", *[row] * 3)
    for chat_template in ("", CHATML):
        assert show(path, chat_template).counted == [answer] * 3


def test_a_turn_of_no_weight_is_read_and_not_trained_on(show: Show, tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "wrong"))]
    turns[1]["weight"] = 0  # type: ignore[assignment]
    turns += [{"role": "user", "content": "sure?"}, {"role": "assistant", "content": "right"}]
    path = written(tmp_path / "d.jsonl", *[{"messages": turns}] * 3)
    for chat_template in ("", CHATML, REWRITES):
        assert show(path, chat_template).counted == ["right|"] * 3
    shown = show(path, CHATML, loss_on="all")
    assert "wrong" in shown.texts[0] and "wrong" not in shown.counted[0] and "sure?" in shown.counted[0]


def test_where_a_template_rewrites_each_answer_has_its_own_prompt(show: Show) -> None:
    shown = show(CASES / "multi-turn", REWRITES)
    pairs = dict(zip(shown.counted, shown.texts, strict=True))
    assert pairs["Answer 3.|"] == "<|user|>\nQuestion 3?<|end|>\n<|assistant|>\nAnswer 3."
    assert pairs["Also 3.|"].endswith("<|assistant|>\nearlier<|end|>\n<|user|>\nAnd 3?<|end|>\n<|assistant|>\nAlso 3.")


def test_the_system_text_goes_before_the_first_question(show: Show) -> None:
    merged = show(CASES / "system-some", CHATML, system="merge").texts
    kept, dropped = (show(CASES / "system-some", CHATML, system=system).texts for system in ("keep", "drop"))
    system = next(text for text in kept if text.startswith("<|system|>"))
    said = system.split("\n", 1)[1].split("<|end|>")[0]
    assert any(text.startswith(f"<|user|>\n{said}\n\nQuestion") for text in merged)
    assert not any(said in text for text in dropped)


def test_tools_reach_the_template(show: Show, tmp_path: Path) -> None:
    row = question("It rains.", tools=[{"type": "function", "function": {"name": "weather"}}])
    path = written(tmp_path / "d.jsonl", *[row] * 3)
    assert '<|tools|>[{"type": "function"' in show(path, TOOLS).texts[0]
    assert "3 records: the chat template leaves out 'tools'" in show(path, CHATML).warnings


def test_a_history_stands_before_its_question(show: Show, tmp_path: Path) -> None:
    """Pairs, as LLaMA-Factory has them; an empty one is none."""
    row = question("Now.", system="Be brief.", history=[["When?", "Then."], ["And?", "Later."]])
    shown = show(written(tmp_path / "d.jsonl", *[row] * 3, *[question("Now.", history=[])] * 3), CHATML)
    turns = (
        ("system", "Be brief."),
        ("user", "When?"),
        ("assistant", "Then."),
        ("user", "And?"),
        ("assistant", "Later."),
    )
    before = "".join(f"<|{role}|>\n{said}<|end|>\n" for role, said in turns)
    own = "<|user|>\nSay it.<|end|>\n<|assistant|>\nNow."
    assert sorted(set(shown.texts)) == sorted({before + own, own})
    assert sorted(set(shown.counted)) == ["Now.|", "Then.|Later.|Now.|"]


def test_a_prompt_that_goes_beyond_what_stands_before_an_answer_is_said(show: Show) -> None:
    shown = show(CASES / "role-gpt", THINKS)
    assert sorted(shown.counted) == ended(ANSWERS)
    assert "ends a prompt with what it does not write before an answer" in shown.warnings


MANY = [question(f"answer {i}") for i in range(6)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            json.dumps({"messages": [{"role": "narrator", "content": "x"}]}),
            "the role 'narrator': roles are system, dev",
        ),
        (json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "of type 'image_url'"),
        (json.dumps({"messages": [{"role": "user", "content": "x"}]}), "without a turn of the assistant"),
        (json.dumps({"messages": [{"role": "assistant", "content": "x", "weight": 3}]}), "'weight' is 0 or 1, not 3"),
        (json.dumps({"prompt": "x", "chosen": "y"}), "a record with 'prompt' needs 'completion' or 'response' too"),
        (json.dumps(question(None)), "needs 'output' or 'response' too; it has instruction"),
        ('{"instruction": "x", "output": NaN}', "needs 'output' or 'response' too; it has instruction"),
        (json.dumps(question("x", history=[["alone"]])), "'history' must be a list of pairs"),
        (
            json.dumps({"messages": [{"role": "user", "content": "a"}], "history": [["b", "c"]]}),
            "'messages' holds turns and so does 'history'",
        ),
        (json.dumps(question("\ud800")), "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"instruction": "x", "output": "y"', "no JSON (Expecting"),
        ('"only text"', "a JSON object is expected, not str"),
    ],
)
def test_one_bad_record_stops_with_file_and_row_or_is_skipped_and_counted(
    show: Show, tmp_path: Path, content: str, said: str
) -> None:
    path = written(tmp_path / "d.jsonl", *MANY[:3], content, *MANY[3:])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        show(path)
    assert f"{path}, line 4: " in str(error.value) and said in str(error.value) and "\n" not in str(error.value)
    shown = show(path, on_bad_record="skip")
    assert sorted(shown.counted) == [f"answer {i}|" for i in range(6)]
    assert f"1 records are left out by task.on_bad_record=skip; the first: {path}, line 4: " in shown.warnings


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("d.csv", b"instruction,output\na,b\n\na,b,c\nc,d\n", "line 4: 3 values for 2 columns"),
        ("d.csv", b'instruction,output\na,b\nc,"d" e\nc,d\n', "line 3: no CSV"),
        ("d.csv", b'instruction,output\n"a\nb",c\nd,\nc,d\n', "line 4: a record with 'instruction' needs 'output'"),
        ("d.tsv", b"instruction\toutput\na\tb\nc\nc\td\n", "line 3: 1 values for 2 columns"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: no UTF-8"),
        ("d.json", b'[{"instruction": "a", "output": "b"}, 3]', "record 2: a JSON object is expected, not int"),
    ],
)
def test_a_bad_row_of_any_format_is_named(show: Show, tmp_path: Path, name: str, content: bytes, row: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        show(tmp_path / name)
    assert f"{tmp_path / name}, {row}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.csv", b'instruction,output\na,"b\nc,d\n', "line 2: no CSV (unexpected end of data)"),
        ("d.csv", b"a,a\n1,2\n", "names the column 'a' twice"),
        ("d.csv", b"a,b\n\xff,2\n", "no UTF-8"),
        ("d.json", b'[{"a": 1},\n{"b"}]', "line 2: no JSON"),
        ("d.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "one list of objects in it, and there is a, b"),
        ("d.json", b'{"a": 3}', "and there is none"),
        ("d.json", b"[" * 100_000, "nested too deeply"),
        ("d.json.gz", b"no gzip", "cannot be read"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cannot be read"),
        ("d.parquet", b"no parquet", "cannot be read as parquet"),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_named(
    show: Show, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        show(tmp_path / name, on_bad_record="skip")
    assert name in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_every_format_in_any_case_and_zipped(show: Show, tmp_path: Path) -> None:
    lines = "".join(f"{json.dumps(row)}\n" for row in MANY)
    table = "instruction,output\n" + "".join(f"Say it.,answer {i}\n" for i in range(6))
    files = {
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "b.ndjson": lines.encode(),
        "C.JSONL": b"\xef\xbb\xbf" + lines.encode(),
        "d.json": lines.encode(),
        "e.JSON.GZ": gzip.compress(json.dumps({"version": 1, "rows": MANY}).encode()),
        "f.tsv": table.replace(",", "\t").encode(),
        "g.csv.gz": gzip.compress(b"\xef\xbb\xbf" + table.encode()),
        "h.Csv": table.replace("\n", "\r\n").encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert sorted(show(tmp_path / name).counted) == [f"answer {i}|" for i in range(6)], name
        assert format_of(name) and not is_hub_name(f"owner/{name}")
    assert format_of("a.parquet.gz") == format_of("a.gz") == format_of(".jsonl") == ""


def test_parquets_values_are_not_changed(show: Show, tmp_path: Path) -> None:
    day = datetime.date(2021, 8, 1)
    answers = [day, Decimal("1.50"), 7, True, "x", {"a": [1]}, datetime.datetime(2021, 8, 1, 2, 3)]
    said = ["2021-08-01", "1.50", "7", "true", "x", '{"a": [1]}', "2021-08-01T02:03:00"]
    for i, (answer, text) in enumerate(zip(answers, said, strict=True)):
        rows = {"instruction": ["i"] * 4, "input": [None, float("nan"), None, None], "output": [answer] * 4}
        pyarrow.parquet.write_table(pyarrow.table(rows), path := tmp_path / f"{i}.parquet")
        shown = show(path)
        assert shown.counted == [f"{text}|"] * 4 and not any("### Input" in whole for whole in shown.texts)


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        (["train-0.jsonl", "validation-0.jsonl"], ["validation-0.jsonl"]),
        (["data/train/0.jsonl", "data/Test/0.jsonl", "data/dev.jsonl"], ["data/Test/0.jsonl", "data/dev.jsonl"]),
        (["a.jsonl", "held-out.jsonl"], ["held-out.jsonl"]),
        (["a.jsonl", "latest.jsonl", "developers.jsonl"], []),
        (["train_eval.jsonl", "train.jsonl"], []),
    ],
)
def test_held_out_files_are_not_trained_on(show: Show, tmp_path: Path, files: list[str], left_out: list[str]) -> None:
    for name in (*files, "._x.jsonl", ".cache/x.jsonl", "__MACOSX/x.jsonl", "state.json", "dataset_info.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path / name, *[question(name)] * 2)
    shown = show(tmp_path)
    assert set(shown.counted) == {f"{name}|" for name in files if name not in left_out}
    assert all(name in shown.warnings for name in left_out) and bool(shown.warnings) == bool(left_out)


def test_a_folder_of_held_out_files_alone_is_read_and_said(show: Show, tmp_path: Path) -> None:
    written(tmp_path / "test.jsonl", *MANY)
    shown = show(tmp_path)
    assert len(shown.counted) == 6 and "nothing but files named as held out (test.jsonl)" in shown.warnings


def test_the_same_data_twice_is_refused(show: Show, tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", *MANY)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with pytest.raises(ValueError, match=r"a\.jsonl and a\.jsonl\.gz, which seem to be the same data twice"):
        show(tmp_path)


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
STUCK = LLAMA2.replace("[/INST]", "[/INST] ").replace("{% else %} {{", "{% else %}{{")  # the answer behind a space


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before a text's first word, spaces part of the word behind them."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    legacy = scheme == "legacy"  # not cut into words before merging
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if legacy else scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme="always" if legacy else scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=150,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[chr(i) for i in (10, *range(32, 127))],
    )
    backend.train_from_iterator(["It is one. It is two. [INST] What is it? [/INST] And that?"] * 9, trainer)
    if legacy:
        backend.pre_tokenizer = pre_tokenizers.Sequence([])
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["legacy", "first", "always"])
@pytest.mark.parametrize("chat_template", [LLAMA2, STUCK])
def test_the_tokens_before_an_answer_are_those_at_inference(scheme: str, chat_template: str) -> None:
    tokenizer = sentencepiece_like(scheme)
    tokenizer.chat_template = chat_template
    turns = ["What is it?", "It is one.", "And that?", "It is two."]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    examples = Renderer("chat", "response", "keep", tokenizer).examples({"messages": messages})
    ((ids, counted, _),) = tokens_of(examples, tokenizer)
    for i in (1, 3) if chat_template == LLAMA2 else (1,):  # read again, an answer may melt with the space before it
        prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        at_inference = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids[: len(at_inference)] == at_inference
        assert counted[len(at_inference)] and not counted[len(at_inference) - 1]
    said = tokenizer.decode([token for token, counts in zip(ids, counted, strict=True) if counts])
    assert said.split("</s>")[0].replace(" ", "") == "Itisone." and ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("scheme", ["legacy", "first", "always"])
def test_the_tokens_of_a_plain_prompt_are_those_at_inference(scheme: str) -> None:
    tokenizer = sentencepiece_like(scheme)
    renderer = Renderer("alpaca", "response", "keep", tokenizer)
    [example] = renderer.examples({"instruction": "What is it?", "output": "It is one."})
    ((ids, counted, _),) = tokens_of([example], tokenizer)
    at_inference = tokenizer(example.parts[0].text)["input_ids"]
    assert ids[: len(at_inference)] == at_inference and counted.index(True) == len(at_inference)
    assert tokenizer.convert_ids_to_tokens(ids[len(at_inference)])[0] == "I"
