"""How long a round takes over gRPC, with the resident trainer and with Flower's fresh process for every message.

    python -m bench.rounds [--rounds 10] [--layers 24] [--quantization nf4] [--json OUT] [key=value ...]

Two deployments on loopback, one after the other, each with TLS, node keys and two nodes, train the same model on the
same data with the same seeds: random weights in the geometry of Qwen2.5-0.5B. The table has, as medians over rounds:
the whole round; what training and encoding took in it (the slower client's, with the loading of the model if it was
left for then); and what is left, which is loading, Flower and its polling. Flower's own share is measured beside it:
rounds of one training step on the embedded model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from adapters.base import load_tokenizer
from adapters.model import load_model
from adapters.settings import LoraSettings, ModelSettings
from bench.deployment import deployment
from bench.programs import ends_in_a_line, run_program
from conf.output import provenance, write_json

TRAINERS = {"resident trainer": [], "fresh process": ["--no-trainer"]}
"""What the table calls them, and the options of their nodes."""
TINY = Path("assets/tiny-llama")
LIGHT = ["train.steps=1", "train.batch_size=1", "train.micro_batch_size=1", "task.window=32", "task.max_windows=64"]
COMMON = ["backend=superlink", "federation.num_clients=2"]
COMMON += ["federation.clients_per_round=2", "task.heldout_windows=2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=24, help="of the random model")
    parser.add_argument("--quantization", default="nf4", help="of the random model: nf4 as in QLoRA, int8 or none")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with (
        ends_in_a_line("stopped; all processes are ended"),
        tempfile.TemporaryDirectory(prefix="bench-rounds-") as name,
    ):
        folder = Path(name)
        make_model(folder / "model", args.layers)
        random = ModelSettings(path=str(folder / "model"), quantization=args.quantization)
        start = time.perf_counter()
        load_model(random, LoraSettings(), seed=0)
        load_seconds = time.perf_counter() - start
        rows = []
        for label, options in TRAINERS.items():
            with deployment(folder / label.split()[0], 2, options) as place:
                for model, about in (("random", random), ("embedded", ModelSettings(path=str(TINY.absolute())))):
                    own = [f"model.path={about.path}", f"model.quantization={about.quantization}"]
                    own += [*COMMON, *LIGHT, f"federation.rounds={args.rounds}"]
                    output = folder / f"{label.split()[0]}-{model}"
                    where = [f"output={output}", f"hydra.run.dir={output}"]
                    run_program("server.federate", [*where, *own, *args.overrides], place.flwr_home)
                    rows.append({"trainer": label, "model": model, **medians(output)})
    resident, fresh = (next(r for r in rows if r["trainer"] == t and r["model"] == "random") for t in TRAINERS)
    loads = f"the random model ({args.quantization}) loads in {load_seconds:.1f} s"
    title = f"a round over gRPC, medians of {args.rounds - 1}; {loads}"
    table = Table(title=title)
    for column in ("trainer", "model", "round s", "train + encode s", "rest s"):
        table.add_column(column, justify="right" if column.endswith(" s") else "left")
    for row in rows:
        table.add_row(row["trainer"], row["model"], *(f"{row[key]:.2f}" for key in ("round", "work", "rest")))
    console = Console(width=100 if not sys.stdout.isatty() else None)
    console.print(table)
    console.print(f"a round is {fresh['round'] / resident['round']:.1f} times faster with the resident trainer")
    if args.json is not None:
        loaded = {"quantization": args.quantization, "load_seconds": load_seconds}
        figures = {"rounds": args.rounds, "random_model": loaded, "speedup": fresh["round"] / resident["round"]}
        write_json({"rows": rows, **figures, "made_with": provenance()}, args.json)


def make_model(folder: Path, layers: int) -> None:
    """Qwen2.5-0.5B's geometry with the embedded model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(ModelSettings(path=str(TINY)))
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def medians(output: Path) -> dict[str, Any]:
    """Of all rounds but the first, in which trainers load; from the end of one to the end of the next."""
    ends: list[float] = []
    work: dict[int, float] = {}
    for entry in map(json.loads, (output / "events.jsonl").read_text().splitlines()):
        if entry["event"] == "round_finished":
            ends.append(entry["time"])
        elif entry["event"] == "uplink":
            spent = entry["seconds_train"] + entry["seconds_encode"]
            work[entry["server_round"]] = max(work.get(entry["server_round"], 0.0), spent)
    rounds = [end - start for start, end in itertools.pairwise(ends)]
    whole, busy = median(rounds), median(spent for number, spent in work.items() if number > 1)
    return {"round": whole, "work": busy, "rest": whole - busy, "rounds": rounds}


if __name__ == "__main__":
    main()
