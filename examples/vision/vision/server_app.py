"""The server: federated averaging, coded or not, and the accuracy on digits that nobody trains on."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from gradcodec.flower import Coded
from vision.task import evaluate, heldout, make_network

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    config = context.run_config
    torch.manual_seed(config["seed"])
    network = make_network()
    start = ArrayRecord(network.state_dict())
    found: list[tuple[float, float]] = []

    def evaluate_network(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        network.load_state_dict(arrays.to_torch_state_dict())
        found.append(evaluate(network, heldout()))
        return MetricRecord({"loss": found[-1][0], "accuracy": found[-1][1]})

    strategy = FedAvg(fraction_evaluate=0.0)
    if config["coded"]:
        strategy = Coded(strategy, bits=config["bits"], down_bits=config["bits"], codec=config["codec"])
    began, traffic = time.monotonic(), Traffic(grid)
    strategy.start(traffic, start, config["num-server-rounds"], evaluate_fn=evaluate_network)
    if config["output"]:
        results = {
            "parameters": sum(one.numel() for one in network.parameters()),
            "bytes_up": traffic.up,
            "bytes_down": traffic.down,
            "loss": [loss for loss, _ in found],
            "accuracy": [accuracy for _, accuracy in found],
            "seconds": time.monotonic() - began,
        }
        folder = Path(config["output"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


class Traffic:
    """A grid that counts the bytes of all records of each round, both ways."""

    def __init__(self, grid: Grid):
        self._grid = grid
        self.up: list[int] = []
        self.down: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """As the grid's own."""
        messages = list(messages)
        if not messages:  # nothing is evaluated on clients
            return []
        self.down.append(_bytes_of(messages))
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        self.up.append(_bytes_of(replies))
        return replies


def _bytes_of(messages: list[Message]) -> int:
    contents = [message.content for message in messages if message.has_content()]
    return sum(record.count_bytes() for content in contents for record in content.values())
