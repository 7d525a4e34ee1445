"""The whole story on one machine: TGAP, then base, centralised, dense, coded and coded both ways, and a table.

    python -m bench.demo [--seeds 1] [--output outputs/demo] [key=value ...]

Every arm is the program that a user would start, as a process of its own. Further ``key=value`` go to all of them.
Writes results.json and a page, report.html, which needs no network, into the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.arms import print_tables, run_arm, summary
from bench.demo_page import write_demo_page
from bench.programs import ends_in_a_line, run_program
from conf.output import open_output, provenance, write_json

ARMS = {
    "base": ["arm=base"],
    "centralised": ["arm=centralised"],
    "dense": ["arm=dense"],
    "coded": ["arm=coded"],
    "coded both ways": ["arm=coded", "codec.down_bits=0.5"],
}
"""What it is called -> its settings. ``coded`` codes the way up, with the codec that TGAP trained; both ways it is the
one that ships with the project: one of one's own costs more bytes than it saves in so short a run."""
TGAP = ("tgap.codecs=[learned,resnet]", "tgap.bits=[0.1,0.5]")
"""What it trains and at which rates it measures that; TGAP has more by default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, starting at 0 (default 1)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every arm")
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least one seed")
    with ends_in_a_line():
        output = open_output(args.output.absolute())
        start = time.monotonic()
        runs = [run_seed(seed, output / f"seed-{seed}", args.overrides) for seed in range(args.seeds)]
    results = summary(runs, [*ARMS]) | {"seconds": time.monotonic() - start, "made_with": provenance()}
    write_json(results, output / "results.json")
    write_demo_page(results, output / "report.html")
    print_tables(results)
    print(f"results: {output / 'results.json'}\nreport:  {output / 'report.html'}")


def run_seed(seed: int, output: Path, overrides: list[str]) -> dict[str, Any]:
    """TGAP and all arms of one seed: their results by arm, and TGAP's report."""
    start = time.monotonic()
    codec = output / "codec"
    shown = Console(stderr=True)
    shown.rule(f"seed {seed}: TGAP records gradients on D1 and trains the codec")
    own = ["--output", str(output / "tgap"), "--artifact", str(codec), *TGAP]
    run_program("tgap", [f"seed={seed}", *own, *overrides])
    run: dict[str, Any] = {
        "seed": seed,
        "tgap_fidelity": json.loads((output / "tgap" / "report.json").read_text())["fidelity"],
        "tgap_seconds": time.monotonic() - start,
    }
    for name, settings in ARMS.items():
        shown.rule(f"seed {seed}: {name}")
        trained = ["--codec-artifact", str(codec)] if name == "coded" else []
        own = [*settings, f"seed={seed}", *trained, *overrides]
        run[name] = run_arm(name, output, own, anew=True)
    return run


if __name__ == "__main__":
    main()
