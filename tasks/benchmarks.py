"""Multiple-choice benchmarks through lm-eval (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness).

Prompts, few-shot examples and metrics are lm-eval's own task definitions; its documents come from the hub, or for
C-Eval (Huang et al. 2023) and MMLU (Hendrycks et al. 2021) from the original CSV files. Knows models and tasks; must
not know runs or adapters. Scores are means over questions, as lm-eval's groups weigh them. Q: questions of a task.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.tasks
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tasks.exams import Row, ceval_rows, mmlu_rows

lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)  # else a bar for each of a hundred subjects
FEWSHOT_SEED = 1234  # lm-eval's own
Answers = dict[str, NDArray[np.float64]]
"""Task -> [Q] float64: what the task's metric gives each question, 1 for right and 0 for wrong where it is accuracy."""


@dataclass(frozen=True)
class Benchmark:
    """Some tasks of lm-eval, by category; ``average`` is all of them."""

    name: str
    tasks: Mapping[str, Task]
    categories: Mapping[str, Sequence[str]]  # category -> names of its tasks


@dataclass(frozen=True)
class _Original:
    """A benchmark whose original files can be read: ``<split>/<subject>_<split>.csv``."""

    folder: str  # of its definitions in lm-eval
    prefix: str  # of its tasks' names, before the subject
    split: str  # that is asked; the few-shot examples are those of `dev`
    rows: Callable[[Path], Iterator[Row]]
    categories: Mapping[str, frozenset[str]] | None  # category -> subjects; None: by lm-eval's tags


def load_benchmarks(
    names: Sequence[str],
    data: Path | None = None,
    num_shots: int | None = None,
    subjects: Sequence[str] | None = None,
) -> list[Benchmark]:
    """The benchmarks with their documents.

    Args:
        names: ``ceval``, ``mmlu``, or the name of any task or group of lm-eval.
        data: folder of the original CSV files of C-Eval and MMLU, or with a folder ``ceval`` and ``mmlu`` in it; None:
            the hub.
        num_shots: examples in the prompt; None: as many as the task says itself, else none.
        subjects: of C-Eval and MMLU these alone, without the benchmark that has none of them; None: all.

    Raises:
        ValueError: an unknown task or subject, subjects beside a task that is neither C-Eval nor MMLU, documents that
            are missing or not as they should be, too few examples, or a task whose score is no mean over its questions.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    managers = {name: _definitions(_ORIGINALS[name]) for name in names if name in _ORIGINALS}
    if subjects is not None:
        _check_subjects(names, subjects, {name: _tasks_of(name, manager) for name, manager in managers.items()})
    benchmarks = []
    for name in names:
        if name in managers:
            asked = _tasks_of(name, managers[name])
            asked = {subject: task for subject, task in asked.items() if subjects is None or subject in subjects}
            if not asked:
                continue
            benchmark = _load_original(name, managers[name], asked, data)
        else:
            benchmark = Benchmark(name, tasks := _load_any(name), {"average": list(tasks)})
        for task in benchmark.tasks.values():
            metric_of(task)
            _set_shots(task, num_shots)
        benchmarks.append(benchmark)
    return benchmarks


def ask(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    limit: int | None = None,
    batch_size: int = 8,
) -> tuple[Answers, int]:
    """Asks a model every question, or the first ``limit`` of every task.

    Returns:
        The answers, and how many prompts were longer than the model's context and lost their beginning. The same
        questions come in the same order, with the same examples, at every call.
    """
    exact = torch.float32  # bfloat16 likelihoods of four letters would often tie
    lm = _CountingLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype=exact
    )
    for task in benchmark.tasks.values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    results = evaluate(lm, {"tasks": dict(benchmark.tasks)}, limit=limit, bootstrap_iters=0)
    answers = {}
    for name, task in benchmark.tasks.items():
        samples = results["samples"][name]
        first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        answers[name] = np.array([sample[metric_of(task)] for sample in first], dtype=np.float64)
    return answers, lm.num_cut


def metric_of(task: Task) -> str:
    """The metric that a task is scored by: its first. Raises ValueError: none of its metrics is a mean."""
    for metric, aggregation in task.aggregation().items():
        if aggregation is mean:
            return str(metric)
    raise ValueError(f"task {task.task_name}: no metric of it is a mean over questions: it is not served")


class _CountingLM(HFLM):  # type: ignore[misc]
    """lm-eval cuts what is too long from the left and goes on: this counts it. Shows its bar to people only."""

    num_cut = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]]
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.num_cut += sum(len(prompt) + len(choice) > self.max_length + 1 for _, prompt, choice in requests)
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return answers


def _load_any(name: str) -> dict[str, Task]:
    manager = TaskManager()
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, [*_ORIGINALS, *manager.all_tasks])
        raise ValueError(f"task {name!r} is none of lm-eval's{_did_you_mean(near)}")
    return _load(manager, [name], name)


def _definitions(original: _Original) -> TaskManager:
    folder = Path(lm_eval.tasks.__file__).parent / original.folder
    return TaskManager(include_path=folder, include_defaults=False)  # all of lm-eval's would take seconds


def _tasks_of(name: str, manager: TaskManager) -> dict[str, str]:
    """Subject -> the name of its task."""
    return {task.removeprefix(_ORIGINALS[name].prefix): task for task in manager.all_subtasks}


def _check_subjects(names: Sequence[str], subjects: Sequence[str], known: Mapping[str, Mapping[str, str]]) -> None:
    if other := next((name for name in names if name not in known), None):
        raise ValueError(f"--subjects are those of {' and '.join(_ORIGINALS)}: task {other!r} has none: score it apart")
    everything = [subject for tasks in known.values() for subject in tasks]
    if unknown := next((subject for subject in subjects if subject not in everything), None):
        near = difflib.get_close_matches(unknown, everything)
        raise ValueError(f"--subjects: {unknown!r} is none of {' or '.join(known)}{_did_you_mean(near)}")


def _did_you_mean(near: Sequence[str]) -> str:
    return f": {', '.join(near)}?" if near else ""


def _load_original(name: str, manager: TaskManager, asked: Mapping[str, str], data: Path | None) -> Benchmark:
    """The tasks of ``asked``, subject -> the name of its task, with their documents."""
    original = _ORIGINALS[name]
    configs: dict[str, Row] = {subject: dict(manager.task_index[task].cfg) for subject, task in asked.items()}
    if data is not None:
        documents = _read_documents(name, data / name if (data / name).is_dir() else data, list(asked))
        for subject, config in configs.items():
            config["custom_dataset"] = _source(documents[subject])
    tasks = _load(manager, list(configs.values()), name)
    return Benchmark(name, tasks, _categories(original, manager, list(tasks)))


def _categories(original: _Original, manager: TaskManager, tasks: Sequence[str]) -> dict[str, list[str]]:
    """Category -> those of the tasks that are in it, without categories that have none; ``average`` is all."""
    prefix, members = original.prefix, {}
    if original.categories is not None:
        members = {name: {prefix + subject for subject in subjects} for name, subjects in original.categories.items()}
    for tag in manager.all_tags if original.categories is None else []:
        name = tag.removeprefix(prefix).removesuffix("_tasks").replace("_", " ")
        members[name] = set(manager.task_index[tag].tags)
    found = {name: [task for task in tasks if task in of_it] for name, of_it in members.items()}
    hard = found.pop("hard", [])
    return {name: some for name, some in {**found, "average": list(tasks), "hard": hard}.items() if some}


def _load(manager: TaskManager, specifications: list[Any], name: str) -> dict[str, Task]:
    try:
        tasks: dict[str, Task] = manager.load(specifications)["tasks"]
    except Exception as error:  # whatever the hub, a reader of data sets or a task's own code comes to
        reason = str(error).split("\n")[0]
        original = " or give --data with the original CSV files" if name in _ORIGINALS else ""
        raise ValueError(f"task {name}: its questions cannot be loaded ({reason}): go online{original}") from None
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ValueError(f"task {task.task_name} runs generated code or needs more than text: it is not served")
    return tasks


def _set_shots(task: Task, num_shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    shots = own if own == 0 or num_shots is None else num_shots
    task.set_config(key="num_fewshot", value=shots or 0)
    held = len(task.sampler.df) if hasattr(task, "sampler") else 0
    if (shots or 0) > held:
        raise ValueError(f"task {task.task_name} holds {held} examples for {shots} shots: fewer shots?")


def _source(documents: DatasetDict) -> Callable[..., DatasetDict]:
    def custom_dataset(**_: object) -> DatasetDict:
        return documents

    return custom_dataset


def _read_documents(name: str, folder: Path, subjects: Sequence[str]) -> dict[str, DatasetDict]:
    """Subject -> its documents by split, with the hub's fields."""
    original = _ORIGINALS[name]
    files = {(s, split): folder / split / f"{s}_{split}.csv" for s in subjects for split in (original.split, "dev")}
    if missing := [path for path in files.values() if not path.is_file()]:
        what = f"{len(missing)} of {len(files)} files of {name}, the first is {missing[0].relative_to(folder)}"
        raise ValueError(f"--data {folder} lacks {what}")
    documents = {subject: DatasetDict() for subject in subjects}
    for (subject, split), path in files.items():
        rows = list(original.rows(path))
        if not rows:
            raise ValueError(f"{path} holds no question")
        documents[subject][split] = Dataset.from_list(rows)
    return documents


def _subjects(*texts: str) -> frozenset[str]:
    return frozenset(" ".join(texts).split())


_CEVAL = {  # Huang et al. 2023, table 1 and section 2.3
    "STEM": _subjects(
        "computer_network operating_system computer_architecture college_programming college_physics",
        "college_chemistry advanced_mathematics probability_and_statistics discrete_mathematics electrical_engineer",
        "metrology_engineer high_school_mathematics high_school_physics high_school_chemistry high_school_biology",
        "middle_school_mathematics middle_school_biology middle_school_physics middle_school_chemistry",
        "veterinary_medicine",
    ),
    "social science": _subjects(
        "college_economics business_administration marxism mao_zedong_thought education_science",
        "teacher_qualification high_school_politics high_school_geography middle_school_politics",
        "middle_school_geography",
    ),
    "humanities": _subjects(
        "modern_chinese_history ideological_and_moral_cultivation logic law chinese_language_and_literature",
        "art_studies professional_tour_guide legal_professional high_school_chinese high_school_history",
        "middle_school_history",
    ),
    "other": _subjects(
        "civil_servant sports_science plant_protection basic_medicine clinical_medicine urban_and_rural_planner",
        "accountant fire_engineer environmental_impact_assessment_engineer tax_accountant physician",
    ),
    "hard": _subjects(
        "advanced_mathematics discrete_mathematics probability_and_statistics college_chemistry college_physics",
        "high_school_mathematics high_school_chemistry high_school_physics",
    ),
}
_ORIGINALS = {
    "ceval": _Original("ceval", "ceval-valid_", "val", ceval_rows, _CEVAL),
    "mmlu": _Original("mmlu/default", "mmlu_", "test", mmlu_rows, None),
}
