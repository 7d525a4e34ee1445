"""The original CSV files of C-Eval (Huang et al. 2023) and MMLU (Hendrycks et al. 2021), as they are and to train on.

A folder holds one split, ``<subject>_<split>.csv`` each. Knows files; must not know models, prompts of benchmarks or
clients.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks.records import Corpus, Record

LETTERS = "ABCD"
Row = dict[str, Any]


def read_exam(name: str, path: str) -> Corpus:
    """All questions of a folder: ``instruction``, ``input`` (question and choices), ``output`` (the right letter) and
    ``subject``.

    Args:
        name: ``ceval`` or ``mmlu``.
        path: folder with the files of one split, as ``ceval/dev``.

    Raises:
        ValueError: no such files, or one that is broken.
    """
    files = sorted(Path(path).glob("*_*.csv"))
    if not files:
        raise ValueError(f"task.path={path!r} holds no <subject>_<split>.csv: give the folder of one split of {name}")
    rows, instruction = _EXAMS[name]
    records = []
    for file in files:
        subject = file.stem.rpartition("_")[0]
        for number, row in enumerate(rows(file), 1):
            choices = row["choices"] if "choices" in row else [row[letter] for letter in LETTERS]
            answer = row["answer"] if isinstance(row["answer"], str) else LETTERS[row["answer"]]
            lines = [row["question"], *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))]
            asked = instruction.format(subject=subject.replace("_", " "))
            fields = {"instruction": asked, "input": "\n".join(lines), "output": answer, "subject": subject}
            records.append(Record(fields, str(file), f"record {number}"))
    return Corpus(records)


def ceval_rows(path: Path) -> Iterator[Row]:
    """``question``, ``A`` to ``D`` and ``answer``, a letter. Raises ValueError: the file is not C-Eval's."""
    columns = ("question", *LETTERS, "answer")
    for number, row in enumerate(_records(path)):
        if number == 0:
            header = row
            if lacking := [column for column in columns if column not in header]:
                raise ValueError(f"{path} has no column {lacking[0]!r}: its first line is to name {', '.join(columns)}")
            continue
        if len(row) != len(header):
            raise ValueError(f"{path}, record {number}: {len(row)} values for {len(header)} columns")
        record = {column: text for column, text in zip(header, row, strict=True) if column in columns}
        _letter(record["answer"], path, number)
        yield record


def mmlu_rows(path: Path) -> Iterator[Row]:
    """``question``, ``choices`` and ``answer``, 0 to 3. Raises ValueError: the file is not MMLU's."""
    for number, row in enumerate(_records(path), 1):
        if len(row) != 6:
            raise ValueError(f"{path}, record {number}: {len(row)} values, not question, A, B, C, D, answer")
        question, *choices, answer = row
        yield {"question": question, "choices": choices, "answer": _letter(answer, path, number)}


def _records(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from filter(None, csv.reader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV in UTF-8: {error}") from None


def _letter(answer: str, path: Path, number: int) -> int:
    if answer not in tuple(LETTERS):
        raise ValueError(f"{path}, record {number}: the answer {answer!r} is none of {', '.join(LETTERS)}")
    return LETTERS.index(answer)


_EXAMS: dict[str, tuple[Callable[[Path], Iterator[Row]], str]] = {
    "ceval": (ceval_rows, "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。"),
    "mmlu": (mmlu_rows, "The following is a multiple choice question about {subject}. Answer with its letter."),
}
