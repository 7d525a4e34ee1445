"""A real language model on any machine: SmolLM2-135M, federated over eight clients whose texts really differ.

    python -m bench.demo_real [--seeds 1] [--first-seed 0] [--beside RESULTS] [--output FOLDER] [key=value ...]

Four clients hold the source code of a package each, four worked exam questions of a category each, all of it out of
packages that are installed with the project (bench/real_text.py). Arms: base, dense, coded at the default budget, and
coded both ways at a fifth of it, with the codec that ships with the project. Then the base model and every trained
adapter answer questions that no client holds. Writes results.json and report.html into the output folder; started
again with another number of seeds, it runs those that are missing. Seeds may be run on several machines: ``--beside``
puts an earlier results.json and the new seeds together.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.arms import folder_of, print_tables, run_arm, summary
from bench.demo_page import write_demo_page
from bench.programs import ends_in_a_line
from bench.real_text import Question, write_real_text
from conf.output import open_output, provenance, write_json

ARMS = {
    "base": ["arm=base"],
    "dense": ["arm=dense"],
    "coded": ["arm=coded"],
    "coded both ways, 0.1 bit": ["arm=coded", "codec.bits=0.1", "codec.down_bits=0.1"],
}
"""What it is called -> its settings."""
MOST_TOKENS = 96
STARTS = 15.0
"""Seconds that an arm takes before its run begins to count them, about."""
HOLDINGS = "What every client holds"
ANSWERS = "Questions that no client holds, before and after (first seed)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--beside", type=Path, metavar="RESULTS", help="results.json of other seeds, to put with these")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo-real"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every arm")
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    if args.seeds < 1 or args.first_seed < 0:
        parser.error(f"--seeds {args.seeds} --first-seed {args.first_seed}: at least one seed, from 0 on")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    with ends_in_a_line("stopped; the same command goes on with the arms that are missing"):
        before = earlier_runs(args.beside, seeds) if args.beside is not None else []
        results = run(seeds, open_output(args.output.absolute()), args.overrides, before)
    print_tables(results)
    print_table(results["tables"][HOLDINGS])
    print_answers(results["tables"][ANSWERS])
    print(f"peak memory of a process that was started: {peak_memory_mib()} MiB")
    print(f"results: {args.output / 'results.json'}\nreport:  {args.output / 'report.html'}")


def run(
    seeds: Sequence[int], output: Path, overrides: Sequence[str], before: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """All arms of all seeds, and the answers of the first, beside the runs of before. Raises ValueError: a program
    failed."""
    holdings, aside = write_real_text(output / "text")
    data = ["+experiment=demo_real", "--data", str(output / "text")]
    runs: list[dict[str, Any]] = [{"seed": seed} for seed in seeds]
    names = [*ARMS] * len(seeds)
    seconds: dict[str, float] = {}
    for number, name in enumerate(names):
        run = runs[number // len(ARMS)]
        left = _left(seconds, names[number:])
        Console(stderr=True).rule(f"seed {run['seed']}: {name}, {number + 1} of {len(names)}{left}")
        own = [*data, f"seed={run['seed']}", *ARMS[name], *overrides]
        run[name] = run_arm(name, output / f"seed-{run['seed']}", own)
        seconds[name] = run[name]["seconds"] + STARTS
    Console(stderr=True).rule("questions that no client holds, before and after")
    answers = ask(output / f"seed-{seeds[0]}", aside)
    results = summary(runs, [*ARMS], before) | {
        "title": "CG-FedLLM on SmolLM2-135M",
        "tables": {
            HOLDINGS: [dataclasses.asdict(holding) for holding in holdings],
            ANSWERS: answers,
        },
        "made_with": provenance(),
    }
    # of arms from disk and of earlier runs, too
    results["seconds"] = sum(arm["seconds"] for single in results["runs"] for arm in single["arms"].values())
    write_json(results, output / "results.json")
    write_demo_page(results, output / "report.html")
    return results


def earlier_runs(results: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The single runs of an earlier ``results.json``. Raises ValueError: it is none, or has one of these seeds."""
    try:
        runs: list[dict[str, Any]] = json.loads(results.read_text())["runs"]
        twice = sorted({run["seed"] for run in runs} & {*seeds})
        same = all([*run["arms"]] == [*ARMS] for run in runs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--beside {results} is no results.json of this command: {error!r}") from None
    if twice or not same:
        what = f"has seed {twice[0]}, too: --first-seed begins with another" if twice else "is of other arms"
        raise ValueError(f"--beside {results} {what}")
    return runs


def peak_memory_mib() -> int:
    """Of this command's processes; arms that were run before are not among them."""
    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def ask(runs: Path, questions: Sequence[Question]) -> list[dict[str, str]]:
    """Greedy answers of the base model and of each trained adapter, one row a question."""
    import torch  # here, as it takes seconds

    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, for their developers
    from adapters.base import load_tokenizer
    from adapters.export import load_adapter, lora_settings
    from adapters.model import load_model, set_adapter
    from conf.schema import Settings

    settings = Settings.from_json(_settings_of(runs / "dense"))
    tokenizer = load_tokenizer(settings.model)
    tokenizer.padding_side = "left"
    config, _ = load_adapter(runs / "dense" / "adapter")
    model = load_model(settings.model, lora_settings(config), seed=0).eval()
    rows = [{"question": one.question, "reference": one.answer} for one in questions]
    asked = tokenizer.apply_chat_template(
        [[{"role": "user", "content": row["question"]}] for row in rows],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    for name in ARMS:
        if name != "base":
            set_adapter(model, load_adapter(runs / folder_of(name) / "adapter")[1])
        with torch.no_grad():
            told = model.generate(**asked, max_new_tokens=MOST_TOKENS, do_sample=False)
        for row, tokens in zip(rows, told[:, asked["input_ids"].shape[1] :], strict=True):
            row[name] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return rows


def _settings_of(run: Path) -> str:
    return json.dumps(json.loads((run / "results.json").read_text())["settings"])


def _left(seconds: Mapping[str, float], remaining: Sequence[str]) -> str:
    """About how long the arms that remain take, judged by those that ran; base says nothing of the others."""
    trained = [took for name, took in seconds.items() if name != "base"]
    if not trained:
        return ""
    minutes = sum(seconds.get(name, max(trained)) for name in remaining) / 60
    return f", about {minutes:.0f} minutes left"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=HOLDINGS.lower())
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def print_answers(rows: Sequence[dict[str, str]]) -> None:
    print(ANSWERS)
    for row in rows:
        for name, text in row.items():
            lead = "" if name == "question" else f"  {name:<{max(map(len, ARMS))}}  "
            print(textwrap.fill(text, 100, initial_indent=lead, subsequent_indent=" " * len(lead)))
        print()


if __name__ == "__main__":
    main()
