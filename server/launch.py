"""Starts a SuperLink with TLS, node keys and a database, and its executor; lets nodes in and out.

The executor (``flower-superexec``), which runs the ServerApp, is a process of its own: so a SuperLink that is killed
comes back, and the run goes on without losing a round.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.output import write_json
from conf.processes import Child, end_all, last_line, path_with_binaries
from server.keys import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, write_private
from server.quiet import ENVIRONMENT

CONNECTION = "cg-fedllm"
SECRET, NODE_IDS = "superexec.secret", "nodes.json"
START_SECONDS = 60.0


@dataclass(frozen=True)
class ServerPlace:
    """Where a SuperLink listens and keeps its files: keys, database, logs, and Flower's own home."""

    folder: Path
    fleet_address: str = "0.0.0.0:9092"  # gRPC, for the nodes
    control_port: int = 8000  # HTTPS on loopback only: it has no user authentication
    insecure: bool = False  # no TLS and no node keys: for closed networks and experiments

    @property
    def flwr_home(self) -> Path:
        return self.folder / "flwr"

    def environment(self) -> dict[str, str]:
        """For every Flower command on this host."""
        return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(self.flwr_home), "PATH": path_with_binaries()}


def start_server(place: ServerPlace) -> list[Child]:
    """Starts SuperLink and executor and waits until the SuperLink's ports answer.

    Raises:
        ValueError: keys are missing, a port is taken, or it ended at once (its log's last line is in the message).
    """
    needed = () if place.insecure else (CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY)
    for name in needed:
        if not (place.folder / name).is_file():
            raise ValueError(f"{place.folder / name} is missing: make keys with `python -m server keys`")
    fleet_host, _, fleet_port = place.fleet_address.rpartition(":")
    if not fleet_host or not fleet_port.isdigit():
        raise ValueError(f"--fleet-address {place.fleet_address!r}: HOST:PORT is expected, as 0.0.0.0:9092")
    for host, port in ((fleet_host, int(fleet_port)), ("127.0.0.1", place.control_port)):
        if _answers(host, port):
            raise ValueError(f"port {port} on {host} is taken: choose another one")
    place.flwr_home.mkdir(parents=True, exist_ok=True)
    trust = "insecure = true" if place.insecure else f'root-certificates = "{place.folder.absolute() / CA_CERTIFICATE}"'
    (place.flwr_home / "config.toml").write_text(
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{place.control_port}"\n{trust}\n'
    )
    (place.folder / SECRET).unlink(missing_ok=True)
    write_private(place.folder / SECRET, secrets.token_bytes(32))
    superlink, executor = children = [_superlink(place), _executor(place)]
    try:
        superlink.start()
        deadline = time.monotonic() + START_SECONDS
        while not (_answers(fleet_host, int(fleet_port)) and _answers("127.0.0.1", place.control_port)):
            assert superlink.process is not None
            if superlink.process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"the SuperLink did not start; {superlink.log} ends with: {last_line(superlink.log)}")
            time.sleep(0.2)
        executor.start()
    except BaseException:  # also Ctrl-C and SIGTERM: nothing is left running
        end_all(children)
        raise
    return children


def _superlink(place: ServerPlace) -> Child:
    tls = ["--ssl-ca-certfile", CA_CERTIFICATE, "--ssl-certfile", SERVER_CERTIFICATE, "--ssl-keyfile", SERVER_KEY]
    command = [
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(place.control_port)),
        *("--fleet-api-address", place.fleet_address),
        *(["--insecure"] if place.insecure else [*tls, "--enable-supernode-auth"]),
        *("--isolation", "process", "--superexec-auth-secret-file", SECRET),
        *("--database", "state.db", "--disable-runtime-dependency-installation"),
    ]
    return Child("the SuperLink", command, place.folder / "superlink.log", place.environment(), place.folder)


def _executor(place: ServerPlace) -> Child:
    command = [
        *("flower-superexec", "--runtime-api-address", f"127.0.0.1:{place.control_port}"),
        *(["--insecure"] if place.insecure else ["--root-certificates", CA_CERTIFICATE]),
        *("--superexec-auth-secret-file", SECRET),
    ]
    return Child("the executor", command, place.folder / "superexec.log", place.environment(), place.folder)


def register_node(place: ServerPlace, public_key: Path) -> None:
    """Lets the node with this public key in. Raises ValueError: the SuperLink refuses the key."""
    try:
        answer = _supernode(place, "register", str(public_key))
    except ValueError as error:
        if "already" not in str(error):
            raise
    else:
        write_json({**_node_ids(place), _key_of(public_key): str(answer["node-id"])}, place.folder / NODE_IDS)


def revoke_node(place: ServerPlace, public_key: Path) -> str:
    """Shuts the node with this public key out, now and from now on; gives its node id.

    The file becomes ``NODE.pub.revoked``, so that ``python -m server start`` does not let it in again.

    Raises:
        ValueError: no node of that key is registered.
    """
    known = _node_ids(place)
    node_id = known.pop(_key_of(public_key), None)
    if node_id is None:
        raise ValueError(f"no node with the key {public_key} is registered at this SuperLink")
    _supernode(place, "unregister", node_id)
    write_json(known, place.folder / NODE_IDS)
    public_key.rename(public_key.with_name(public_key.name + ".revoked"))
    return node_id


def _node_ids(place: ServerPlace) -> dict[str, str]:
    """Flower's node id by public key: its own list names no keys."""
    path = place.folder / NODE_IDS
    found: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _key_of(public_key: Path) -> str:
    return " ".join(public_key.read_text().split()[:2])


def list_nodes(place: ServerPlace) -> list[dict[str, Any]]:
    """The registered nodes as Flower lists them: ``node-id``, ``status`` and times."""
    nodes = _supernode(place, "list").get("nodes", [])
    assert isinstance(nodes, list)
    return nodes


def _supernode(place: ServerPlace, verb: str, *arguments: str) -> dict[str, Any]:
    if not (place.flwr_home / "config.toml").is_file():
        raise ValueError(f"{place.folder} is no folder of a SuperLink: `python -m server start --folder ...` makes one")
    command = ["flwr", "supernode", verb, *arguments, CONNECTION, "--format", "json"]
    done = subprocess.run(command, env=place.environment(), capture_output=True, text=True, timeout=60)
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {}
    if done.returncode != 0 or not isinstance(answer, dict) or not answer.get("success", False):
        reason = answer.get("error-message") if isinstance(answer, dict) else None
        raise ValueError(f"`flwr supernode {verb}` failed: {reason or (done.stdout + done.stderr).strip()}")
    return answer


def _answers(host: str, port: int) -> bool:
    with socket.socket() as trial:
        trial.settimeout(0.5)
        return trial.connect_ex(("127.0.0.1" if host == "0.0.0.0" else host, port)) == 0
