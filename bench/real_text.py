"""Text that really differs from client to client, out of packages that are installed with the project.

Four clients hold the source code of a package each, four the worked questions of an MMLU category each, which
lm-evaluation-harness carries for its prompts. Every package's licence is written down with its text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import yaml

from conf.output import write_text

SOURCES = {"rich": "rich", "flwr": "flwr", "peft": "peft", "networkx": "networkx"}
"""Distribution -> its package, whose source code one client holds."""
CATEGORIES = ("stem", "humanities", "social_sciences", "other")
NUM_CLIENTS = len(SOURCES) + len(CATEGORIES)
_SPDX = {"Apache": "Apache-2.0"}
_SIZES = range(2_000, 16_000)
_FILES = 40
_QUESTIONS = "tasks/mmlu/flan_cot_fewshot"
_ASIDE = ("mmlu_high_school_biology", "mmlu_philosophy", "mmlu_sociology", "mmlu_nutrition")
"""Of a subject of every category the last worked question is kept from all clients, to be asked before and after."""


@dataclass(frozen=True)
class Holding:
    """What one client holds, and whose it is."""

    client: int
    what: str
    package: str
    version: str
    licence: str
    records: int


@dataclass(frozen=True)
class Question:
    """A worked question that no client holds."""

    subject: str
    question: str
    answer: str


def write_real_text(folder: Path) -> tuple[list[Holding], list[Question]]:
    """One file of records a client, ``client-0.jsonl`` and so on; who holds what, and the questions kept from all.

    Raises:
        ValueError: a package is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holdings: list[Holding] = []
    for client, (name, package) in enumerate(SOURCES.items()):
        records = [
            {"instruction": f"Write {path}, a file of the package {package}.", "output": text}
            for path, text in _sources(_folder_of(name, package))
        ]
        holdings.append(_write(folder, client, f"source code of {package}", name, records))
    worked = _worked_questions(_folder_of("lm_eval", "lm_eval") / _QUESTIONS)
    aside = [worked[name][1].pop() for name in _ASIDE]
    for client, category in enumerate(CATEGORIES, len(SOURCES)):
        questions = dict.fromkeys(one for of, of_subject in worked.values() if of == category for one in of_subject)
        records = [{"question": one.question, "answer": one.answer} for one in questions]
        holdings.append(_write(folder, client, f"worked MMLU questions, {category}", "lm_eval", records))
    return holdings, aside


def _write(folder: Path, client: int, what: str, name: str, records: list[dict[str, str]]) -> Holding:
    write_text("".join(json.dumps(record) + "\n" for record in records), folder / f"client-{client}.jsonl")
    about = distribution(name)
    said = str(about.metadata["License-Expression"] or about.metadata["License"]).splitlines()[0]
    return Holding(client, what, name, about.version, _SPDX.get(said, said), len(records))


def _folder_of(name: str, package: str) -> Path:
    """Raises ValueError: it is not installed."""
    try:
        distribution(name)
    except PackageNotFoundError:
        raise ValueError(f"the package {name}, whose text is trained on, is not installed: make demo-real") from None
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _sources(folder: Path) -> list[tuple[Path, str]]:
    """Some files of a package, by a draw that is the same everywhere; neither tests nor tables of data."""
    paths = [
        path
        for path in folder.rglob("*.py")
        if path.stat().st_size in _SIZES and "_pb2" not in path.name and not {"tests", "_unicode_data"} & {*path.parts}
    ]
    paths.sort(key=lambda path: sha256(path.relative_to(folder).as_posix().encode()).digest())
    return [(path.relative_to(folder.parent), path.read_text(encoding="utf-8")) for path in paths[:_FILES]]


def _worked_questions(folder: Path) -> dict[str, tuple[str, list[Question]]]:
    """Subject's file -> its category and its worked questions."""
    found = {}
    for path in sorted(folder.glob("mmlu_*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        samples = content["fewshot_config"]["samples"]
        category = content["tag"].removeprefix("mmlu_flan_cot_fewshot_")
        subject = str(content["dataset_name"]).replace("_", " ")
        found[path.stem] = (category, [Question(subject, one["question"], one["target"]) for one in samples])
    return found


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The records of one client, as ``write_real_text`` wrote them."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
