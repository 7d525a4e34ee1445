"""What the back ends of this machine have in common: the clients' app, and what it is told by the environment."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.supercore.object_ref import load_app

from conf.schema import Settings
from server.quiet import engine_log
from strategies.wire import MEMORY_VARIABLE, TRUST_VARIABLE


def clients_here(settings: Settings) -> ClientApp:
    """The app, its memory and the engine's log in the run's folder."""
    output = Path(settings.output)
    os.environ[MEMORY_VARIABLE] = str(output / "memory")
    os.environ[TRUST_VARIABLE] = "1" if settings.model.trust_remote_code else ""
    engine_log(output)
    client_app = load_app("client.app:app", ImportError)  # by name: the server does not import the client's program
    assert isinstance(client_app, ClientApp)
    return client_app
