"""The server: it hands out the first adapter, and measures what rounds come to on records that nobody trains on."""

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flowertune.dataset import heldout, in_order
from flowertune.models import evaluate, get_model
from flowertune.strategy import FlowerTuneLlm

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    config = context.run_config
    torch.manual_seed(config["seed"])
    model = get_model(config)
    start = ArrayRecord({name: tensor.cpu() for name, tensor in get_peft_model_state_dict(model).items()})
    losses: list[float] = []

    def evaluate_adapter(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        losses.append(evaluate(model, in_order(heldout(config), config)))
        return MetricRecord({"heldout_loss": losses[-1]})

    began = time.monotonic()
    strategy = FlowerTuneLlm(fraction_train=config["strategy.fraction-train"], fraction_evaluate=0.0)
    strategy.start(grid, start, config["num-server-rounds"], evaluate_fn=evaluate_adapter)
    if config["output"]:
        results = {
            "parameters": sum(array.numpy().size for array in start.values()),
            "megabytes": strategy.comm_tracker.megabytes,
            "heldout_loss": losses,
            "seconds": time.monotonic() - began,
        }
        folder = Path(config["output"])
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder / "adapter")
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
