"""A node's own adapter: what a run exported, and the layers that stayed on the node (lora.local), as one PEFT folder.

    python -m client.personal --adapter ADAPTER --run RUN_ID --partition 0 --output DIR [--memory FOLDER]

ADAPTER is the adapter folder of the run or of an export, which the server's host gives away; RUN_ID is the run's
run_id, by which the node's memory has a folder. Nothing leaves the node.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from client.local import read_local
from conf.output import open_output


def main() -> None:
    """The program: ends with one line that says what was written, or what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m client.personal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, required=True, metavar="ADAPTER", help="the run's adapter, PEFT folder")
    parser.add_argument("--run", required=True, metavar="RUN_ID", help="its run_id, as results.json and the card say")
    parser.add_argument("--partition", type=int, required=True, help="which partition's layers")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty or new folder")
    parser.add_argument(
        "--memory",
        type=Path,
        default=Path.home() / ".cache" / "cg-fedllm" / "memory",
        help="the node's memory (default ~/.cache/cg-fedllm/memory)",
    )
    args = parser.parse_args()
    try:
        join(args.adapter, args.memory / args.run, args.partition, args.output)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"adapter of partition {args.partition} in {args.output}")


def join(adapter: Path, memory: Path, partition: int, output: Path) -> None:
    """Writes the whole adapter of a partition.

    Raises:
        ValueError: a part is missing, damaged, or of another adapter, or ``output`` holds files already.
    """
    from adapters.export import load_adapter, save_adapter  # slow to load, and not needed for --help
    from adapters.model import layer_of

    config, shared = load_adapter(adapter)
    if not config.exclude_modules:
        raise ValueError(f"{adapter} is whole: its run kept no layers on the nodes (lora.local)")
    local = read_local(memory, partition)
    layers = {layer_of(name) for name in local}
    if layers != set(config.exclude_modules):
        raise ValueError(f"the layers of partition {partition} in {memory} are not those that {adapter} lacks")
    if any(open_output(output).iterdir()):
        raise ValueError(f"output={output} holds files already: give a new folder")
    config.exclude_modules = None
    facts = {"layers of one node": f"{len(layers)} of {len(layers) + sum('.lora_A.' in name for name in shared)}"}
    save_adapter({**shared, **local}, config, facts, output)


if __name__ == "__main__":
    main()
