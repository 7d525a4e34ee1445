"""Flower's side of the server: the ServerApp that a SuperLink starts. Settings in, rounds out."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from conf.schema import Settings
from server.bindings import read_bindings
from server.quiet import quiet
from server.rounds import run_federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    quiet()
    text = str(context.run_config.get("settings", ""))
    if not text:
        raise ValueError("the run has no settings: start it with `python -m server.federate backend=superlink`")
    run_federation(grid, Settings.from_json(text), read_bindings())
