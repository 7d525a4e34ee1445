"""Benchmarks: lm-eval's prompts on files that the test writes, against log-likelihoods computed without lm-eval."""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from adapters.base import load_tokenizer
from adapters.export import save_adapter
from adapters.model import get_adapter, load_model
from adapters.settings import LoraSettings, ModelSettings
from conf.schema import Settings
from server.records.results import RunResults
from server.score import main
from tasks.benchmarks import Benchmark, ask, load_benchmarks, metric_of
from tasks.paired import compare, score_of

LETTERS = "ABCD"
Question = tuple[str, list[str], str]


def question(rng: random.Random, subject: str) -> Question:
    """With what a CSV has to quote, and what a data frame would take for a missing value or a number."""
    choices = [rng.choice(["None", "0.10", 'yes, "but"', "两者", f"{rng.randint(0, 99)}"]) for _ in LETTERS]
    return f" {subject}, {rng.randint(0, 999)}?\n", choices, rng.choice(LETTERS)


def write_ceval(folder: Path, subjects: Sequence[str], rng: random.Random) -> dict[str, dict[str, list[Question]]]:
    written: dict[str, dict[str, list[Question]]] = {subject: {} for subject in subjects}
    for split, extra in (("val", []), ("dev", ["explanation"])):
        (folder / split).mkdir(parents=True)
        for subject in subjects:
            written[subject][split] = [question(rng, subject[:9]) for _ in range(2)]
            with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "question", *LETTERS, "answer", *extra])
                for number, (text, choices, answer) in enumerate(written[subject][split]):
                    writer.writerow([number, text, *choices, answer, *extra])
    return written


def write_mmlu(folder: Path, subjects: Sequence[str], rng: random.Random) -> dict[str, dict[str, list[Question]]]:
    written: dict[str, dict[str, list[Question]]] = {subject: {} for subject in subjects}
    for split in ("test", "dev"):
        (folder / split).mkdir(parents=True)
        for subject in subjects:
            written[subject][split] = [question(rng, subject[:9]) for _ in range(2)]
            with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(
                    [text, *choices, answer] for text, choices, answer in written[subject][split]
                )
    return written


FORMATS: dict[str, tuple[str, str, str, Callable[..., dict[str, dict[str, list[Question]]]]]] = {
    "ceval": ("ceval-valid_", "val", "答案：", write_ceval),
    "mmlu": ("mmlu_", "test", "Answer:", write_mmlu),
}


def subjects_of(name: str) -> list[str]:
    """Those that lm-eval defines, read from the names of its files."""
    import lm_eval.tasks

    prefix = FORMATS[name][0]
    folder = Path(lm_eval.tasks.__file__).parent / {"ceval": "ceval", "mmlu": "mmlu/default"}[name]
    return sorted(path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def written(data: Path) -> dict[str, dict[str, dict[str, list[Question]]]]:
    rng = random.Random(0)
    return {name: FORMATS[name][3](data / name, subjects_of(name), rng) for name in FORMATS}


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """With an adapter that changes many answers."""
    model = load_model(ModelSettings(), LoraSettings(), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSettings())


@pytest.fixture
def adapter(model: PeftModel, tmp_path: Path) -> Path:
    save_adapter(get_adapter(model), model.peft_config["default"], {}, tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def direct(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The letter of the highest log-likelihood after the prompt."""
    before = tokenizer(prompt)["input_ids"]
    likelihoods = []
    for letter in LETTERS:
        ids = tokenizer(f"{prompt} {letter}")["input_ids"]
        assert ids[: len(before)] == before
        logs = torch.log_softmax(model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float(), dim=-1)
        likelihoods.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(before), len(ids))))
    return LETTERS[int(np.argmax(likelihoods))]


def prompt_of(name: str, description: str, asked: Question, examples: Sequence[Question]) -> str:
    def block(text: str, choices: list[str]) -> str:
        lines = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=True))
        return f"{text.strip()}\n{lines}{FORMATS[name][2]}"

    shown = "".join(f"{block(text, choices)} {answer}\n\n" for text, choices, answer in examples)
    return description + shown + block(asked[0], asked[1])


@pytest.mark.parametrize(("name", "num_shots"), [("ceval", 0), ("ceval", 2), ("mmlu", 0), ("mmlu", 1)])
def test_scores_are_those_of_a_direct_computation(
    written: dict[str, Any], data: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase, name: str, num_shots: int
) -> None:
    (whole,) = load_benchmarks([name], data, num_shots)
    prefix, split = FORMATS[name][:2]
    some = {task: whole.tasks[task] for task in list(whole.tasks)[::6]}
    answers, num_cut = ask(model, tokenizer, Benchmark(name, some, {"average": list(some)}))
    assert num_cut == 0
    right = {}
    for task, definition in some.items():
        files = written[name][task.removeprefix(prefix)]
        described = definition.get_config("description")
        prompts = [prompt_of(name, described, asked, files["dev"][:num_shots]) for asked in files[split]]
        right[task] = [
            float(direct(model, tokenizer, prompt) == asked[2])
            for prompt, asked in zip(prompts, files[split], strict=True)
        ]
    for task in some:
        assert answers[task].tolist() == right[task]
    score = score_of(np.concatenate([answers[task] for task in some])).mean
    assert score == pytest.approx(np.mean(list(right.values())), abs=1e-4)
    assert 0 < score < 1


def test_the_descriptions_are_lm_evals_own(written: dict[str, Any], data: Path) -> None:
    ceval, mmlu = load_benchmarks(["ceval", "mmlu"], data)
    law = ceval.tasks["ceval-valid_law"].get_config("description")
    assert law == "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
    anatomy = mmlu.tasks["mmlu_anatomy"].get_config("description")
    assert anatomy == "The following are multiple choice questions (with answers) about anatomy.\n\n"


def test_every_subject_has_its_category(written: dict[str, Any], data: Path) -> None:
    ceval, mmlu = load_benchmarks(["ceval", "mmlu"], data)
    sizes = {category: len(tasks) for category, tasks in ceval.categories.items()}
    expected = {"STEM": 20, "social science": 10, "humanities": 11, "other": 11, "average": 52, "hard": 8}
    assert sizes == expected and list(sizes) == list(expected)
    assert set(mmlu.categories) == {"stem", "social sciences", "humanities", "other", "average"}
    for benchmark, num_subjects in ((ceval, 52), (mmlu, 57)):
        parts = [
            task for name, tasks in benchmark.categories.items() if name not in ("average", "hard") for task in tasks
        ]
        assert sorted(parts) == sorted(benchmark.tasks) and len(parts) == num_subjects


def test_of_some_subjects_their_files_alone_are_read(tmp_path: Path) -> None:
    write_ceval(tmp_path, ["law", "logic"], random.Random(3))
    (ceval,) = load_benchmarks(["ceval", "mmlu"], tmp_path, subjects=["logic", "law"])  # MMLU has neither
    both = ["ceval-valid_law", "ceval-valid_logic"]
    assert {name: sorted(tasks) for name, tasks in ceval.categories.items()} == {"humanities": both, "average": both}
    assert sorted(ceval.tasks) == both
    write_mmlu(tmp_path / "mmlu", ["anatomy"], random.Random(3))
    (mmlu,) = load_benchmarks(["mmlu"], tmp_path, subjects=["anatomy"])
    assert mmlu.categories == {"stem": ["mmlu_anatomy"], "average": ["mmlu_anatomy"]}


@pytest.mark.parametrize(
    ("tasks", "subjects", "said"),
    [
        (["ceval"], ["law", "logics"], "--subjects: 'logics' is none of ceval: logic"),
        (["ceval", "mmlu"], ["anatomi"], "--subjects: 'anatomi' is none of ceval or mmlu: anatomy"),
        (["mmlu"], ["law"], "--subjects: 'law' is none of mmlu"),
        (["ceval", "arc_easy"], ["law"], "task 'arc_easy' has none: score it apart"),
    ],
)
def test_unknown_subjects_are_refused_with_near_ones(tasks: list[str], subjects: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_benchmarks(tasks, None, subjects=subjects)


def test_a_prompt_beyond_the_context_is_counted(
    tmp_path: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    subjects = subjects_of("mmlu")
    write_mmlu(tmp_path, subjects, random.Random(1))
    path = tmp_path / "test" / f"{subjects[0]}_test.csv"
    path.write_text(f"{'long ' * 900},1,2,3,4,A\n1+1?,1,2,3,4,B\n")
    (whole,) = load_benchmarks(["mmlu"], tmp_path)
    task = f"mmlu_{subjects[0]}"
    few = Benchmark("mmlu", {task: whole.tasks[task]}, {"average": [task]})
    answers, num_cut = ask(model, tokenizer, few)
    assert (len(answers[task]), num_cut) == (2, 4)  # one of two questions, four choices
    answers, _ = ask(model, tokenizer, few, limit=1)
    assert len(answers[task]) == 1


def test_a_task_that_generates_has_its_own_metric(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with torch.no_grad():
        ids = torch.tensor([tokenizer("import os")["input_ids"]], device=model.device)
        following = model(input_ids=ids).logits[0, -1].argmax()
    rows = [
        {"asked": "import os", "wanted": tokenizer.decode([int(following)])},
        {"asked": "def f(", "wanted": "never"},
    ]
    documents = DatasetDict({"test": Dataset.from_list(rows)})

    def custom_dataset(**_: object) -> DatasetDict:
        return documents

    config = {
        "task": "local",
        "custom_dataset": custom_dataset,
        "test_split": "test",
        "doc_to_text": "asked",
        "doc_to_target": "wanted",
        "num_fewshot": 0,
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["<never>"], "max_gen_toks": 1, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    task = ConfigurableTask(config=config)
    assert metric_of(task) == "exact_match"
    answers, _ = ask(model, tokenizer, Benchmark("local", {"local": task}, {"average": ["local"]}))
    assert answers["local"].tolist() == [1.0, 0.0]


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["score", *arguments])
    main()


def test_the_program_prints_and_writes_scores_and_tests(
    written: dict[str, Any],
    data: Path,
    model: PeftModel,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    save_adapter(get_adapter(model), model.peft_config["default"], {}, run / "adapter")
    settings = Settings(arm="dense")
    results = RunResults(settings, num_parameters=1, heldout_loss=[3.5, 3.25])
    (run / "results.json").write_text(json.dumps(results.to_json()))
    out = tmp_path / "scores.json"
    base = "--set=model.path=assets/tiny-llama"  # a run's own is absolute, an adapter's as others name it
    run_main(monkeypatch, str(run), str(adapter), base, "--data", str(data), "--limit", "1", "--json", str(out))
    printed = capsys.readouterr().out
    for text in ("hard", "social sciences", "3.2500", "25.79", "only second right", "52 questions", "57 questions"):
        assert text in printed
    content = json.loads(out.read_text())
    ceval, mmlu = content["benchmarks"]
    assert [row["name"] for row in ceval["rows"]] == ["base", "dense", "adapter"]
    assert [row["heldout_loss"] for row in mmlu["rows"]] == [3.5, 3.25, None]
    first, _, same = mmlu["pairs"]
    assert (first["first"], first["second"]) == ("base", "dense")
    scores = [row["categories"]["average"]["mean"] for row in mmlu["rows"]]
    assert first["difference"] == pytest.approx(scores[1] - scores[0])
    assert first["num_first_better"] + first["num_second_better"] > 0
    assert (same["difference"], same["p_value"]) == (0.0, 1.0)  # the same adapter twice
    assert content["made_with"]["lm_eval"].startswith("0.4")
    stem = [row["tasks"][task]["mean"] for row in ceval["rows"][:1] for task in row["tasks"] if "law" in task]
    assert stem and all(value in (0.0, 1.0) for value in stem)
    assert content["subjects"] is None
    run_main(monkeypatch, str(run), base, "--data", str(data), "--subjects", "law, logic", "--json", str(out))
    content = json.loads(out.read_text())
    assert (content["subjects"], [benchmark["name"] for benchmark in content["benchmarks"]]) == (
        ["law", "logic"],
        ["ceval"],
    )
    assert content["benchmarks"][0]["rows"][0]["tasks"].keys() == {"ceval-valid_law", "ceval-valid_logic"}


def test_adapters_of_two_base_models_are_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/else"}))
    with pytest.raises(SystemExit, match=r"other has model\.path=someone/else.*score them apart"):
        run_main(monkeypatch, str(adapter), str(other))


def broken(data: Path, damage: str) -> None:
    law = data / "ceval" / "val" / "law_val.csv"
    anatomy = data / "mmlu" / "test" / "anatomy_test.csv"
    if damage == "missing":
        law.unlink()
    elif damage == "column":
        law.write_text("id,question,A,B,C,answer\n0,q,1,2,3,A\n")
    elif damage == "letter":
        law.write_text("id,question,A,B,C,D,answer\n0,q,1,2,3,4,E\n")
    elif damage == "empty":
        law.write_text("id,question,A,B,C,D,answer\n")
    elif damage == "width":
        anatomy.write_text("q,1,2,3,4,A\nq,1,2,3,4\n")
    elif damage == "bytes":
        anatomy.write_bytes(b"\xff\xfe\x00q,1,2")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", r"lacks 1 of 104 files of ceval, the first is val/law_val\.csv"),
        ("column", r"law_val\.csv has no column 'D'"),
        ("letter", r"law_val\.csv, record 1: the answer 'E' is none of A, B, C, D"),
        ("empty", r"law_val\.csv holds no question"),
        ("width", r"anatomy_test\.csv, record 2: 5 values, not question, A, B, C, D, answer"),
        ("bytes", r"anatomy_test\.csv is no CSV in UTF-8"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, damage: str, said: str) -> None:
    for name in FORMATS:
        FORMATS[name][3](tmp_path / name, subjects_of(name), random.Random(2))
    broken(tmp_path, damage)
    with pytest.raises(ValueError, match=said):
        load_benchmarks(["ceval", "mmlu"], tmp_path)


def test_too_many_shots_are_refused(written: dict[str, Any], data: Path) -> None:
    with pytest.raises(ValueError, match="holds 2 examples for 5 shots"):
        load_benchmarks(["mmlu"], data, 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "mmlu_anatomi"], "task 'mmlu_anatomi' is none of lm-eval's: mmlu_anatomy"),
        (["--subjects", "law,logics"], "--subjects: 'logics' is none of ceval or mmlu: logic"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--data", "nowhere"], "--data nowhere is no folder"),
        (["--set", "model.size=7"], "settings: .*size"),
    ],
)
def test_wrong_arguments_are_named_before_the_model_is_loaded(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    (adapter / "adapter_config.json").write_text(
        (adapter / "adapter_config.json").read_text().replace('"k_proj"', '"not_there"')
    )  # loading the model would say another thing
    with pytest.raises(SystemExit, match=said):
        run_main(monkeypatch, str(adapter), *arguments)


def test_mcnemar_counts_what_only_one_model_knew() -> None:
    first = np.array([1.0] * 10 + [0.0] * 2 + [1.0] * 8 + [0.0] * 80)
    second = np.array([0.0] * 10 + [1.0] * 2 + [1.0] * 8 + [0.0] * 80)
    comparison = compare(first, second)
    assert (comparison.num_first_better, comparison.num_second_better) == (10, 2)
    assert comparison.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert comparison.difference == pytest.approx(-0.08)
    assert compare(first, first).p_value == 1.0


def test_scores_between_right_and_wrong_are_permuted() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(60)
    assert compare(first, first + 0.05 + 0.01 * rng.random(60)).p_value < 0.001
    assert compare(first, first + 0.1 * rng.standard_normal(60)).p_value > 0.01


def test_standard_errors_are_those_of_a_mean() -> None:
    score = score_of(np.array([1.0, 0.0, 0.0, 1.0]))
    assert (score.mean, score.num_questions) == (0.5, 4)
    assert score.stderr == pytest.approx((1 / 3) ** 0.5 / 2)
    assert score_of(np.array([1.0])).to_json()["stderr"] is None
