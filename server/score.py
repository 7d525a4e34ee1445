"""What adapters are worth on C-Eval, MMLU and any other task of lm-eval, beside their base model.

python -m server.score outputs/federate/dense outputs/federate/coded --tasks ceval,mmlu --shots 5 --json scores.json
python -m server.score RUN --tasks ceval --data /data/ceval-exam       # from the original CSV files, without the hub
python -m server.score RUN --tasks ceval --subjects law,logic          # of C-Eval and MMLU these subjects alone
python -m server.score ADAPTER --tasks arc_easy,hellaswag --limit 200  # any task or group of lm-eval, by its name
python -m server.score ADAPTER --set model.path=/models/llama-7b --set model.dtype=bfloat16

RUN_OR_ADAPTER is a run's output folder, or any PEFT directory of plain LoRA. The first row is always the base model.
Scores are percentages of right answers, with standard errors; for C-Eval of its validation split (the answers of its
test split are not public), for MMLU of its test split. Four choices make 25 % by chance: look at the base row, at the
paired tests (exact McNemar, all questions of a benchmark) and at the held-out loss before a difference is believed.

--data FOLDER holds val/<subject>_val.csv and dev/<subject>_dev.csv with the columns question, A, B, C, D, answer
(C-Eval), or test/<subject>_test.csv and dev/<subject>_dev.csv with the same without a header (MMLU); for both at once,
a folder `ceval` and a folder `mmlu` with these in it. With --subjects the files of these subjects are enough; a
benchmark that has none of them is left out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.settings import for_evaluation
from adapters.text import one_line
from conf.output import open_output, provenance, write_json
from server.records.places import adapter_folder

if TYPE_CHECKING:  # slow to import, and not needed for --help or to refuse an argument
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from server.records.trained import TrainedAdapter
    from tasks.benchmarks import Answers, Benchmark
    from tasks.paired import Comparison, Values


@dataclass(frozen=True)
class Row:
    """One model: the base, or the base with an adapter."""

    name: str
    path: str  # of the base model, the run or the adapter
    heldout_loss: float | None  # nats per token
    answers: dict[str, Answers]  # benchmark -> its answers


def main() -> None:
    """The program: prints tables, or ends with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m server.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", nargs="+", metavar="RUN_OR_ADAPTER", help="run folders or PEFT adapter directories")
    parser.add_argument("--tasks", default="ceval,mmlu", help="ceval, mmlu, or any of lm-eval's (default ceval,mmlu)")
    parser.add_argument("--subjects", metavar="NAMES", help="of ceval and mmlu these alone, as law,logic (default all)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="original CSV files; default: the hub")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of every subject")
    parser.add_argument("--shots", type=int, metavar="N", help="examples in the prompt (default: the task's own, or 0)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default 8)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write scores and tests as JSON")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: model.path, model.dtype ..."
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of lm-eval's use of transformers
    try:
        score(args)
    except ValueError as error:
        sys.exit(f"error: {one_line(error, 2000)}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def score(args: argparse.Namespace) -> None:
    """Reads, asks, prints. Raises ValueError: something cannot be done as asked for."""
    check_arguments(args)
    for path in args.adapters:
        adapter_folder(path)  # what is missing is refused before anything slow is loaded
    from adapters.base import load_tokenizer
    from server.records.trained import read_trained
    from tasks.benchmarks import load_benchmarks

    adapters = [read_trained(path, args.set) for path in args.adapters]
    check_one_base(adapters)
    tokenizer = load_tokenizer(adapters[0].settings.model)
    subjects = None if args.subjects is None else names_in(args.subjects)
    benchmarks = load_benchmarks(names_in(args.tasks), args.data, args.shots, subjects)
    rows = ask_all(adapters, tokenizer, benchmarks, args.limit, args.batch_size)
    for benchmark in benchmarks:
        print_scores(benchmark, rows)
        print_comparisons(benchmark, rows)
    if args.json is not None:
        asked = {
            "model": asdict(adapters[0].settings.model),
            "subjects": subjects,
            "shots": args.shots,
            "limit": args.limit,
        }
        made_with = provenance() | {"lm_eval": version("lm-eval")}
        write_json({**asked, "benchmarks": [as_json(b, rows) for b in benchmarks], "made_with": made_with}, args.json)


def names_in(text: str) -> list[str]:
    """Those between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError naming the first argument that cannot be served."""
    if find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install --constraint constraints.txt '.[eval]'")
    for name, least in (("limit", 1), ("shots", 0), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"--data {args.data} is no folder")
    if args.json is not None:
        open_output(args.json.absolute().parent)


def check_one_base(adapters: Sequence[TrainedAdapter]) -> None:
    """Raises ValueError: the adapters are not of one base model, so that a base row would stand for none of them."""
    for adapter in adapters[1:]:
        first, other = (asdict(for_evaluation(a.settings.model)) for a in (adapters[0], adapter))
        if key := next((key for key in first if first[key] != other[key] and key != "device"), None):
            raise ValueError(
                f"{adapter.path} has model.{key}={other[key]}, {adapters[0].path} has {first[key]}: score them apart, "
                f"or give one for all with --set model.{key}=..."
            )


def base_loss(adapters: Sequence[TrainedAdapter]) -> float | None:
    """The base model's held-out loss, if all runs that started from it saw the same."""
    runs = [adapter.results for adapter in adapters if adapter.results is not None]
    losses = {results.heldout_loss[0] for results in runs if results.heldout_loss and not results.settings.lora.start}
    return losses.pop() if len(losses) == 1 else None


def ask_all(
    adapters: Sequence[TrainedAdapter],
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[Benchmark],
    limit: int | None,
    batch_size: int,
) -> list[Row]:
    """The base model's row, and one for every adapter. Raises ValueError: an adapter does not fit the base model."""
    from tasks.benchmarks import ask

    def answers(model: PeftModel) -> dict[str, Answers]:
        by_benchmark = {}
        for benchmark in benchmarks:
            by_benchmark[benchmark.name], num_cut = ask(model, tokenizer, benchmark, limit, batch_size)
            if num_cut:
                note = f"{num_cut} prompts exceed the model's context and lost their beginning: fewer --shots?"
                print(f"{benchmark.name}: {note}", file=sys.stderr)
        return by_benchmark

    rows: list[Row] = []
    for adapter in adapters:
        model = adapter.load_model()
        if not rows:
            with model.disable_adapter():
                rows.append(Row("base", adapter.settings.model.path, base_loss(adapters), answers(model)))
        loss = None if adapter.results is None else adapter.results.final_loss
        rows.append(Row(label(adapter, adapters), adapter.path, loss, answers(model)))
        del model  # or two would be held while the next one is loaded
    return rows


def label(adapter: TrainedAdapter, adapters: Sequence[TrainedAdapter]) -> str:
    """The adapter's name, with its place where several have the same."""
    alone = [other.name for other in adapters].count(adapter.name) == 1
    return adapter.name if alone else f"{adapter.name} {adapter.path}"


def values_of(row: Row, benchmark: Benchmark, category: str = "average") -> Values:
    """[Q] float64: the answers to all questions of a category, in an order that all rows share."""
    answers = row.answers[benchmark.name]
    return np.concatenate([answers[task] for task in benchmark.categories[category]])


def comparisons(benchmark: Benchmark, rows: Sequence[Row]) -> list[tuple[Row, Row, Comparison]]:
    """Every two rows, each pair on the same questions of the benchmark."""
    from tasks.paired import compare

    pairs = itertools.combinations(rows, 2)
    return [(a, b, compare(values_of(a, benchmark), values_of(b, benchmark))) for a, b in pairs]


def print_scores(benchmark: Benchmark, rows: Sequence[Row]) -> None:
    """A row a model, a column a category."""
    from tasks.paired import score_of

    num_questions = len(values_of(rows[0], benchmark))
    table = Table(title=f"{benchmark.name}: % right ± standard error, {num_questions:,} questions")
    table.add_column("model", overflow="fold")
    for column in (*benchmark.categories, "held-out loss", "perplexity"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        scores = [score_of(values_of(row, benchmark, category)) for category in benchmark.categories]
        loss = row.heldout_loss
        heldout = ("", "") if loss is None else (f"{loss:.4f}", f"{math.exp(loss):.2f}")
        table.add_row(
            Text(one_line(row.name)), *(f"{100 * s.mean:.1f} ± {100 * s.stderr:.1f}" for s in scores), *heldout
        )
    print_wide(table)


def print_comparisons(benchmark: Benchmark, rows: Sequence[Row]) -> None:
    """A row for every two models: the difference of their scores, and how sure it is."""
    table = Table(title=f"{benchmark.name}: paired, on the same questions")
    for column in ("first", "second"):
        table.add_column(column, overflow="fold")
    for column in ("second - first, points", "only first right", "only second right", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for first, second, c in comparisons(benchmark, rows):
        difference = f"{100 * c.difference:+.1f} ± {100 * c.stderr:.1f}"
        table.add_row(
            *(Text(one_line(row.name)) for row in (first, second)),
            difference,
            str(c.num_first_better),
            str(c.num_second_better),
            f"{c.p_value:.2g}",
        )
    print_wide(table)


def print_wide(table: Table) -> None:
    """As wide as the terminal; into a file or a pipe 140 columns."""
    Console(width=140 if not sys.stdout.isatty() else None).print(table)


def as_json(benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, Any]:
    """The scores of every model by category and task, from 0 to 1, and the paired tests, as --json writes them."""
    from tasks.paired import score_of

    def scores(row: Row) -> dict[str, Any]:
        answers = row.answers[benchmark.name]
        return {
            "categories": {name: score_of(values_of(row, benchmark, name)).to_json() for name in benchmark.categories},
            "tasks": {task: score_of(values).to_json() for task, values in answers.items()},
        }

    return {
        "name": benchmark.name,
        "rows": [{"name": row.name, "path": row.path, "heldout_loss": row.heldout_loss, **scores(row)} for row in rows],
        "pairs": [{"first": a.name, "second": b.name, **asdict(c)} for a, b, c in comparisons(benchmark, rows)],
    }


if __name__ == "__main__":
    main()
