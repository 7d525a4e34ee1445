"""What the server can read out of what it is sent: inversion of updates, and membership in the trained adapter.

    python -m bench.leakage [--quick] [--sections tokens,control] [--json OUT] [--page OUT]

Published attacks at their own strength, by an attacker that knows codec, side information and recipe, on updates of the
embedded model and of SmolLM2-135M: as they are, coded, coded with noise, and averaged with other clients'. Writes the
rows as JSON, and the page that docs/results has; sections that are not run stay as they are in an earlier JSON.
SmolLM2 and its text come with `make demo-real`. About half an hour on one core; ``--quick`` tries every part on the
embedded model in a minute or two, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.programs import ends_in_a_line
from conf.output import open_output, provenance, write_json, write_text

SECTIONS = ("tokens", "control", "sentences", "learned", "members")
RESULTS = Path("bench/results/leakage.json")
PAGE = Path("docs/results/leakage.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every part once, in a minute or two; no figures")
    known = ",".join(SECTIONS)
    parser.add_argument("--sections", default=known, help=f"which (default {known}); none: the page alone")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="OUT")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="OUT")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    sections = [] if args.sections == "none" else args.sections.split(",")
    if unknown := sorted({*sections} - {*SECTIONS}):
        parser.error(f"--sections holds {unknown[0]!r}, which is none of {', '.join(SECTIONS)}")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, for their developers
    with ends_in_a_line("stopped; sections that ended are kept, --sections goes on with the others"):
        open_output(args.json.absolute().parent)
        open_output(args.page.absolute().parent)
        results = run(sections, args.quick, args.threads, earlier(args.json, sections), args.json)
    from bench.leakage.page import page_of

    write_text(page_of(results), args.page)
    print(f"page:    {args.page}")
    print(f"results: {args.json}")


def earlier(place: Path, sections: Sequence[str]) -> dict[str, Any]:
    """The sections of an earlier run that are not run now. Raises ValueError: the file is none of this command's."""
    if not place.is_file() or {*sections} == {*SECTIONS}:
        return {}
    try:
        found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))["sections"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--json {place} is no result of this command: {error!r}; give another place") from None
    return {name: section for name, section in found.items() if name not in sections}


def run(sections: Sequence[str], quick: bool, threads: int, before: dict[str, Any], place: Path) -> dict[str, Any]:
    """The sections in their order, each kept in the file as soon as it ends. Raises ValueError: a model or its text is
    not installed."""
    import torch  # here, as it takes seconds

    from bench.leakage import sections as parts
    from bench.leakage.page import means_of
    from bench.leakage.victim import Victim

    torch.set_num_threads(threads)
    sizes = parts.QUICK if quick else parts.FULL
    victims = cache(Victim)
    console = Console(stderr=True)

    def say(what: str) -> None:
        console.print(what, style="dim")

    what: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "tokens": lambda: parts.tokens(sizes, victims, say),
        "control": lambda: parts.control(sizes, say),
        "sentences": lambda: parts.sentences(sizes, victims, say),
        "learned": lambda: parts.learned(sizes, victims, say),
        "members": lambda: parts.members(sizes, victims, say),
    }
    results: dict[str, Any] = {
        "command": "python -m bench.leakage --quick" if quick else "python -m bench.leakage",
        "sizes": dataclasses.asdict(sizes),
        "noise": parts.noise_rows(),
        "sections": before,
    }

    def keep() -> None:
        write_json(results | {"means": means_of(results["sections"])}, place)

    for section in sections:
        console.rule(section)
        started = time.perf_counter()
        rows = what[section]()
        seconds = time.perf_counter() - started
        results["sections"][section] = {"rows": rows, "seconds": seconds, "quick": quick, "made_with": provenance()}
        keep()
    keep()
    return results


if __name__ == "__main__":
    main()
