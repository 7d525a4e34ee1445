"""Runs a Flower app as its user would: ``flwr run`` in a simulation whose SuperLink is its own, in any environment.

Knows no app; ``local_app.py`` runs one without an engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from bench.deployment import free_ports, running

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # clients run beside each other
}
REPOSITORY = Path(__file__).parents[1]


def run_app(app: Path, run_config: Mapping[str, str | int | float | bool], num_nodes: int, python: Path) -> Any:
    """All rounds of an app that writes ``results.json`` into the folder that its ``output`` names: what that holds.

    Args:
        app: its folder, with pyproject.toml.
        run_config: in place of what stands there.
        num_nodes: of the simulation, each on one core.
        python: of the environment whose Flower and libraries are used.

    Raises:
        ValueError: the run failed; Flower itself exits with 0 then.
    """
    with tempfile.TemporaryDirectory(prefix="flower-app-", ignore_cleanup_errors=True) as scratch:
        folder, bin_folder = Path(scratch), python.parent
        port, control_port = free_ports(2)
        home = folder / "home"
        home.mkdir()
        connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (home / "config.toml").write_text(connection)
        path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
        ours = str(REPOSITORY) if python == Path(sys.executable) else ""
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path, "PYTHONPATH": ours}
        server = [str(bin_folder / "flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
        server += ["--host", "127.0.0.1", "--port", str(port), "--control-api-address", f"127.0.0.1:{control_port}"]
        log = folder / "superlink.log"
        given = {**run_config, "output": str(folder / "output")}
        resources = f"num-supernodes={num_nodes} client-resources-num-cpus=1 init-args-num-cpus={os.cpu_count()}"
        command = [str(bin_folder / "flwr"), "run", str(app), "here", "--stream", "--federation-config", resources]
        command += ["--run-config", " ".join(f"{key}={json.dumps(value)}" for key, value in given.items())]
        with running([*server, "--database", str(folder / "state.db")], log, environment) as process:
            _wait_until_healthy(port, process)
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        results = folder / "output" / "results.json"
        if not results.is_file():
            raise ValueError(
                f"the app failed; it ends with:\n{(done.stdout + log.read_text(errors='replace'))[-6000:]}"
            )
        return json.loads(results.read_text())


def _wait_until_healthy(port: int, server: subprocess.Popen[bytes], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.2)


def versions_in(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Those of an environment that it has as packages."""
    ask = f"""
import json
from importlib.metadata import distributions
found = {{one.name: one.version for one in distributions()}}
print(json.dumps({{name: found[name] for name in {list(packages)!r} if name in found}}))"""
    done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions
