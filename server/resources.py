"""What a federation takes, by model: memory of a node's and of the server's device, disk and bytes, as dry runs say.

python -m server.resources                                       # every geometry that comes along, as bfloat16 and nf4
python -m server.resources task.window=1024 lora.rank=16         # with other settings
python -m server.resources --model PATH                          # of one model alone; its config.json is enough

The table is Markdown. Reads config.json alone: no weights, no data, no clients; leaves no files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from adapters.settings import ModelSettings
from conf import CHECKOUT
from conf.arguments import run_program
from conf.console import bytes_text, visible
from conf.schema import Settings, register_schemas, settings_of
from server.quiet import quiet

if TYPE_CHECKING:
    from server.plan import Plan

register_schemas()

EMBEDDED, GEOMETRIES = "tiny-llama", CHECKOUT / "assets" / "geometries"
HELD = {"bfloat16": "none", "nf4": "nf4"}
"""How the base weights are held -> ``model.quantization``."""
USUAL = (
    "task.window=512",
    "train.batch_size=8",
    "train.micro_batch_size=2",
    "model.gradient_checkpointing=true",
    "codec.down_bits=0.5",
)
"""What a model of billions is trained with, unless the command line says otherwise."""
COLUMNS = ("model", "held as", "adapter", "a node's GPU", "the server's device", "node's disk", "up", "down", "dense")
_DISK = 5 * 4
"""Bytes a parameter on a node's disk: residual and target of two rounds, and the adapter that is held."""


@hydra.main(version_base="1.3", config_path="../conf", config_name="preview")
def main(config: DictConfig) -> None:
    quiet()
    try:
        print("\n".join(table_of(settings_of(config))))
    except ValueError as error:
        sys.exit(f"error: {visible(str(error))}")


def table_of(settings: Settings) -> Iterator[str]:
    """Lines of Markdown, a row for every model and way to hold it, smaller models first; of one model alone, where the
    settings name another than the embedded one. Raises ValueError: no such model, or settings that cannot be served."""
    from server.plan import plan_of

    path = Path(settings.model.path)
    plans = {
        (model, held): plan_of(replace(settings, model=_held(settings, model, quantization)))
        for model in (GEOMETRIES.iterdir() if path.name == EMBEDDED else [path])
        for held, quantization in HELD.items()
    }
    yield row_of(COLUMNS)
    yield row_of(("---",) * len(COLUMNS))
    for (_, held), plan in sorted(plans.items(), key=lambda entry: entry[1].num_base_parameters):
        yield row_of(cells_of(plan, held))


def _held(settings: Settings, model: Path, quantization: str) -> ModelSettings:
    return replace(settings.model, path=str(model), sha256=None, dtype="bfloat16", quantization=quantization)


def cells_of(plan: Plan, held: str) -> tuple[str, ...]:
    assert plan.payload_bytes is not None and plan.step_bytes is not None
    return (
        f"{Path(plan.settings.model.path).name} ({plan.num_base_parameters / 1e9:.2f} B)",
        held,
        f"{plan.layout.num_parameters / 1e6:.1f} M",
        *(f"{memory.total / 2**30:.1f} GiB" for memory in (plan.client_memory, plan.server_memory)),
        *map(bytes_text, (_DISK * plan.layout.num_parameters, plan.payload_bytes, plan.step_bytes, plan.dense_bytes)),
    )


def row_of(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.argv[1:1] = USUAL
    run_program(main, output=False)
