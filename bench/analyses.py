"""The paper's analyses on two models: makes the recordings and runs ``python -m server.analyse``, as a user would.

    python -m bench.analyses [--output outputs/analyses] [--results docs/results] [key=value ...]

The embedded model with rank 8 and rank 4, six rounds of three clients out of six, dense and coded both ways; and
SmolLM2-135M on text that really differs (bench/real_text.py), three rounds of four clients out of eight with four
steps each. ``analyses.json`` and ``analyses.html`` go to the results' folder, the CSV files stay in the output folder.
A bench that was stopped goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.arms import folder_of, run_arm
from bench.programs import TAKEN_UP_AGAIN, ends_in_a_line, run_program
from bench.real_text import write_real_text
from conf.arguments import hydra_value
from conf.output import open_output

TOY = ("federation.rounds=6", "federation.num_clients=6", "federation.clients_per_round=3")
SMOLLM2 = (
    "+experiment=demo_real",
    "federation.rounds=3",
    "federation.clients_per_round=4",
    "train.steps=4",
    "task.window=64",
    "task.heldout_windows=2",
)
RECORDED = ("arm=dense",)
BOTH_WAYS = ("arm=coded", "codec.down_bits=0.5")
RUNS: dict[str, tuple[str, ...]] = {
    "smollm2": (*SMOLLM2, *RECORDED),
    "embedded": (*TOY, *RECORDED),
    "embedded, rank 4": (*TOY, *RECORDED, "lora.rank=4"),
    "embedded, coded": (*TOY, *BOTH_WAYS),
}
"""What it is called -> its settings."""
ASKED = ("--updates", "2", "--network-steps", "30", "--link", "10mbit/50ms", "--link", "100mbit:10mbit/20ms")
FILES = ("analyses.json", "analyses.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/analyses"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="where JSON and page go")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    began = time.monotonic()
    with ends_in_a_line(TAKEN_UP_AGAIN):
        output, results = open_output(args.output.absolute()), open_output(args.results)
        runs = record(output, args.overrides)
        run_program("server.analyse", [*map(str, runs), "--output", str(output / "analyses"), *ASKED])
        for name in FILES:
            shutil.copyfile(output / "analyses" / name, results / name)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; {', '.join(FILES)} in {args.results}")


def record(output: Path, overrides: Sequence[str]) -> list[Path]:
    """Makes all runs, two at a time, each on a thread; their folders. Raises ValueError: one failed."""
    write_real_text(output / "text")
    with ThreadPoolExecutor(max_workers=2) as pool:
        done = [pool.submit(run_arm, name, output, settings_of(name, output, overrides)) for name in RUNS]
    for one in done:
        one.result()
    return [output / folder_of(name) for name in RUNS]


def settings_of(name: str, output: Path, overrides: Sequence[str]) -> list[str]:
    own = ["backend=inprocess", *RUNS[name], *overrides]
    if name == "smollm2":
        own += ["--data", str(output / "text")]
    if "arm=dense" in own:
        own.append(f"record={hydra_value(str(output / f'{folder_of(name)}.safetensors'))}")
    return own


if __name__ == "__main__":
    main()
