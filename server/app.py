"""Flower's side of the server: the ServerApp that a SuperLink starts. Settings in, rounds out."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from conf.output import open_output
from conf.schema import Settings
from server.host.bindings import read_bindings
from server.quiet import engine_log, quiet
from server.run.federation import run_federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    quiet()
    text = str(context.run_config.get("settings", ""))
    if not text:
        raise ValueError("the run has no settings: start it with `python -m server.federate backend=superlink`")
    settings = Settings.from_json(text)
    engine_log(open_output(Path(settings.output)))
    run_federation(grid, settings, read_bindings())
