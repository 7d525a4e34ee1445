"""The back end ``simulation``: Flower's own engine (Ray) runs both apps on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.supercore.object_ref import load_app

from conf.schema import Settings
from server.results import RunResults
from server.rounds import run_federation
from strategies.wire import MEMORY_VARIABLE, TRUST_VARIABLE


def run_in_simulation(settings: Settings) -> RunResults:
    """Runs all rounds with one virtual node a client.

    Raises:
        ValueError: as ``run_federation`` does.
    """
    os.environ[MEMORY_VARIABLE] = str(Path(settings.output) / "memory")
    os.environ[TRUST_VARIABLE] = "1" if settings.model.trust_remote_code else ""
    finished: list[RunResults] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        finished.append(run_federation(grid, settings))

    client_app = load_app("client.app:app", ImportError)  # by name: the server does not import the client's program
    assert isinstance(client_app, ClientApp)
    resources: dict[str, Any] = {"num_cpus": settings.backend.client_cpus, "num_gpus": settings.backend.client_gpus}
    run_simulation(
        server_app,
        client_app,
        settings.federation.num_clients,
        backend_config={
            "client_resources": resources,
            "init_args": {
                "num_cpus": os.cpu_count() or 1,
                "include_dashboard": False,
                "log_to_driver": False,
                "logging_level": "error",
            },
        },
    )
    if not finished:
        raise ValueError("the simulation ended before its last round; the reason stands above")
    return finished[0]
