"""What the directions along the width take that both ends derive from the base model, once a model and adapter.

    python -m bench.spaces [--geometry assets/geometries/llama-7b] [--layers 2] [--device cpu] [--json OUT]

Makes a model of random weights with so many of the geometry's layers, reads its checkpoint as a node would, and says
seconds and peak memory; what all layers would take follows from two such models of different depth. The weights'
values do not matter for either.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from adapters.model import adapter_parts, adapter_shapes, empty_model
from adapters.settings import LoraSettings, ModelSettings
from adapters.spaces import Wanted, computed_spaces
from bench.programs import ends_in_a_line
from conf.output import provenance, write_json
from gradcodec.layout import Layout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", type=Path, default=Path("assets/geometries/llama-7b"))
    parser.add_argument("--layers", type=int, default=2, help="of the deeper of two models (default 2)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    with ends_in_a_line(also=(OSError,)):
        if args.layers < 2:
            raise ValueError(f"--layers {args.layers}: at least 2")
        config = AutoConfig.from_pretrained(args.geometry)
        whole = config.num_hidden_layers
        rows = [measure(config, layers, args.device) for layers in (1, args.layers)]
    a_layer = (rows[1]["seconds"] - rows[0]["seconds"]) / (args.layers - 1)
    rows.append({"layers": whole, "seconds": rows[0]["seconds"] + (whole - 1) * a_layer, "extrapolated": True})
    table = Table(title=f"directions from {args.geometry.name}, LoRA on q, k, v, o, {args.device}")
    for column in ("layers", "seconds", "peak, GiB", "kept, MiB"):
        table.add_column(column, justify="right")
    for row in rows:
        sizes = [f"{row[key]:.1f}" if key in row else "-" for key in ("peak_gib", "kept_mib")]
        table.add_row(str(row["layers"]), f"{'about ' if row.get('extrapolated') else ''}{row['seconds']:.0f}", *sizes)
    Console().print(table)
    if args.json is not None:
        about = {"geometry": args.geometry.name, "device": args.device, "threads": torch.get_num_threads()}
        write_json({"rows": rows, **about, "made_with": provenance()}, args.json)


def measure(config: PreTrainedConfig, layers: int, device: str) -> dict[str, Any]:
    """One model. Raises ValueError: its checkpoint cannot be read."""
    config.num_hidden_layers = layers
    with tempfile.TemporaryDirectory(prefix="bench-spaces-") as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        settings = ModelSettings(path=folder, device=device)
        model = empty_model(settings, LoraSettings())
        layout = Layout.of(adapter_shapes(model), adapter_parts(model))
        wanted = [Wanted(block.name, block.tensor, block.rows) for block in layout.blocks]
        started = time.perf_counter()
        found = computed_spaces(settings, wanted)
        seconds = time.perf_counter() - started
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = {id(space): space.directions_WK.nbytes + space.shares_K.nbytes for space in found.values()}
    return {"layers": layers, "seconds": seconds, "peak_gib": peak / 2**30, "kept_mib": sum(kept.values()) / 2**20}


if __name__ == "__main__":
    main()
