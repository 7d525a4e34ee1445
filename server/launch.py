"""Starts a SuperLink with TLS, node keys and a database, registers the nodes' keys, and ends it again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from server.keys import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY
from server.quiet import ENVIRONMENT

CONNECTION = "cg-fedllm"


@dataclass(frozen=True)
class ServerPlace:
    """Where a SuperLink listens and keeps its files: keys, database, log, and Flower's own home."""

    folder: Path
    fleet_address: str = "0.0.0.0:9092"  # gRPC, for the nodes
    control_port: int = 8000  # HTTPS on loopback only: it has no user authentication

    @property
    def flwr_home(self) -> Path:
        return self.folder / "flwr"

    def environment(self) -> dict[str, str]:
        """For every Flower command on this host."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(self.flwr_home), "PATH": path}


def start_superlink(place: ServerPlace) -> subprocess.Popen[bytes]:
    """Starts the SuperLink and waits until both its ports answer.

    Raises:
        ValueError: keys are missing, a port is taken, or it ended at once (its log's last line is in the message).
    """
    for name in (CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY):
        if not (place.folder / name).is_file():
            raise ValueError(f"{place.folder / name} is missing: make keys with `python -m server keys`")
    fleet_host, _, fleet_port = place.fleet_address.rpartition(":")
    if not fleet_host or not fleet_port.isdigit():
        raise ValueError(f"--fleet-address {place.fleet_address!r}: HOST:PORT is expected, as 0.0.0.0:9092")
    for host, port in ((fleet_host, int(fleet_port)), ("127.0.0.1", place.control_port)):
        if _answers(host, port):
            raise ValueError(f"port {port} on {host} is taken: choose another one")
    place.flwr_home.mkdir(parents=True, exist_ok=True)
    (place.flwr_home / "config.toml").write_text(
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{place.control_port}"\n'
        f'root-certificates = "{place.folder.absolute() / CA_CERTIFICATE}"\n'
    )
    log = place.folder / "superlink.log"
    command = [
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(place.control_port)),
        *("--fleet-api-address", place.fleet_address, "--enable-supernode-auth"),
        *("--ssl-ca-certfile", CA_CERTIFICATE, "--ssl-certfile", SERVER_CERTIFICATE, "--ssl-keyfile", SERVER_KEY),
        *("--database", "state.db", "--disable-runtime-dependency-installation"),
    ]
    with log.open("ab") as output:  # a file, not a pipe: a child that outlives it would keep a pipe open
        process = subprocess.Popen(
            command, cwd=place.folder, env=place.environment(), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 60
        while not (_answers(fleet_host, int(fleet_port)) and _answers("127.0.0.1", place.control_port)):
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise ValueError(f"the SuperLink did not start; {log} ends with: {' '.join(last)}")
            time.sleep(0.2)
    except BaseException:  # also Ctrl-C and SIGTERM: nothing is left running
        stop(process)
        raise
    return process


def register_node(place: ServerPlace, public_key: Path) -> None:
    """Lets the node with this public key in. Raises ValueError: the SuperLink refuses the key."""
    command = ["flwr", "supernode", "register", str(public_key), CONNECTION, "--format", "json"]
    done = subprocess.run(command, env=place.environment(), capture_output=True, text=True)
    if done.returncode != 0 or '"success": false' in done.stdout:
        if "already" in done.stdout + done.stderr:
            return
        raise ValueError(f"the SuperLink refused {public_key}: {(done.stdout + done.stderr).strip()}")


def stop(process: subprocess.Popen[bytes], seconds: float = 15) -> None:
    """Ends a process, the hard way if it must."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answers(host: str, port: int) -> bool:
    with socket.socket() as trial:
        trial.settimeout(0.5)
        return trial.connect_ex(("127.0.0.1" if host == "0.0.0.0" else host, port)) == 0
