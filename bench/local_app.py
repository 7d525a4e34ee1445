"""Runs a Flower app in this process, its clients one after another: what Flower's simulation gives, without its start.

Knows no app; what it runs must be a package in its folder, as ``pyproject.toml`` there says.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.task_identity import TaskIdentity


def run_app_here(app: Path, run_config: Mapping[str, str | int | float | bool], num_nodes: int) -> Any:
    """As ``flower_app.run_app``. Raises ValueError: a client failed."""
    torch.set_num_threads(1)  # as in the simulation, where clients run beside each other
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # else no message can be made
    described = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    with tempfile.TemporaryDirectory(prefix="flower-app-") as output, _on_path(app, described["components"]) as parts:
        config = {**dict(_flat(described["config"])), **run_config, "output": output}
        server: ServerApp = parts["serverapp"]
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
        server(LocalGrid(parts["clientapp"], num_nodes, config), context)  # type: ignore[arg-type]
        return json.loads((Path(output) / "results.json").read_text())


class LocalGrid:
    """What a strategy asks of Flower's grid, over a ClientApp of this process."""

    def __init__(self, app: ClientApp, num_nodes: int, config: dict[str, Any]) -> None:
        self.app = app
        self.contexts = {
            100 + i: Context(
                run_id=1,
                node_id=100 + i,
                node_config={"partition-id": i, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=config,
            )
            for i in range(num_nodes)
        }

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Raises ValueError: a client failed."""
        replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"message-{number}"  # as Flower's own grids do
            try:
                replies.append(self.app(message, self.contexts[message.metadata.dst_node_id]))
            except Exception as error:
                raise ValueError(f"a client failed: {error!r}") from error
        return replies


def _flat(config: dict[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value


@contextmanager
def _on_path(app: Path, components: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Server and client app, imported anew; afterwards another copy of the same package can be."""
    sys.path.insert(0, str(app))
    try:
        found = {}
        for part, place in components.items():
            module, _, name = place.partition(":")
            found[part] = getattr(importlib.import_module(module), name)
        yield found
    finally:
        sys.path.remove(str(app))
        packages = {place.partition(".")[0] for place in components.values()}
        for module in [one for one in sys.modules if one.partition(".")[0] in packages]:
            del sys.modules[module]
        importlib.invalidate_caches()
