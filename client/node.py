"""The programs of a node: for every partition a trainer, a SuperNode, and the executor of its messages."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from client.console import PartitionConsole, print_event
from client.line import Meter
from client.own_app import APP_VARIABLE
from client.work import LINE, MAX_BITS, MAX_EPSILON, MAX_RANK, NODE_KEY, PEER_KEYS, TRUST, UPLOAD_SECONDS
from conf import CHECKOUT
from conf.processes import Child, path_with_binaries

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
}
ON_THE_NODE = ("model-path", "task-path", "codec-artifact", "memory")
"""Keys of the node's config that are paths on it."""
NOT_ACTIVATED = "[code: 2004]"
LAST_PORT = 65535


@dataclass(frozen=True)
class NodeConfig:
    """What all partitions of a host share."""

    server: str  # HOST:PORT
    num_partitions: int  # in the federation
    paths: dict[str, Path]  # this node's own, by ``ON_THE_NODE``
    private: Path  # a folder of this process, which its owner alone can enter
    logs: Path
    ca: Path | None  # None: without TLS and key
    gpus_per_client: int = 1
    resident_trainer: bool = True
    trust_remote_code: bool = False  # a model's own Python code
    trust_server_code: bool = False  # any app that the server sends
    peer_keys: Path | None = None  # all nodes' public keys; None: in masked sums the server's word is taken for them
    max_epsilon: float | None = None  # of all runs on this node's data together; None: its owner sets no bound
    max_bits: float | None = None  # a parameter, that is sent at most; None: as many as the run says
    upload_seconds: float | None = None  # that a payload takes at most, as its line was measured; None: what it takes
    max_rank: int | None = None  # of what is trained; None: the run's


@dataclass(frozen=True)
class PartitionConfig:
    """What is one partition's alone."""

    partition: int
    port: int  # on loopback, between its SuperNode and its executor
    gpus: str  # what CUDA_VISIBLE_DEVICES holds
    key: Path | None


@dataclass(frozen=True)
class PartitionPrograms:
    """A partition's programs, and what its owner reads of them."""

    partition: int
    port: int
    trainer: Path | None  # its socket
    children: list[Child]
    console: PartitionConsole


def write_private_files(private: Path, own_app: dict[str, str]) -> None:
    """What SuperNodes and executors share: the digests of the only app that runs, and a secret between the two."""
    (private / "app.json").write_text(json.dumps(own_app))
    (private / "executor.secret").write_text(secrets.token_urlsafe(48))


def programs_of(node: NodeConfig, own: PartitionConfig) -> PartitionPrograms:
    """The programs of one partition; none is started yet."""
    environment = {**ENVIRONMENT, **os.environ, "PATH": path_with_binaries(), "CUDA_VISIBLE_DEVICES": own.gpus}
    children = []
    if node.resident_trainer:
        children.append(_trainer(node, own.partition, environment))
    children += [_supernode(node, own, environment), _executor(node, own, environment)]
    meter = None if node.upload_seconds is None else Meter(_line(node, own.partition))
    console = PartitionConsole(own.partition, [child.log for child in children], print_event, meter)
    trainer = _socket(node, own.partition) if node.resident_trainer else None
    return PartitionPrograms(own.partition, own.port, trainer, children, console)


def _line(node: NodeConfig, partition: int) -> Path:
    """Where it stands how fast the partition's line is."""
    return node.private / f"line-{partition}.json"


def _trainer(node: NodeConfig, partition: int, environment: dict[str, str]) -> Child:
    team = ["torch.distributed.run", "--standalone", f"--nproc-per-node={node.gpus_per_client}", "-m"]
    command = [
        *(sys.executable, "-m", *(team if node.gpus_per_client > 1 else []), "client.resident"),
        *("--socket", str(_socket(node, partition))),
    ]
    log = node.logs / f"trainer-{partition}.log"
    return Child(f"trainer {partition}", command, log, environment, CHECKOUT)


def _supernode(node: NodeConfig, own: PartitionConfig, environment: dict[str, str]) -> Child:
    config = [f"partition-id={own.partition}", f"num-partitions={node.num_partitions}"]
    config += [f'{key}="{path.absolute()}"' for key, path in node.paths.items()]
    if node.trust_remote_code:
        config.append(f'{TRUST}="true"')
    if node.peer_keys is not None:
        config.append(f'{PEER_KEYS}="{node.peer_keys.absolute()}"')
    for key, bound in ((MAX_EPSILON, node.max_epsilon), (MAX_BITS, node.max_bits), (MAX_RANK, node.max_rank)):
        if bound is not None:
            config.append(f'{key}="{bound}"')
    if node.upload_seconds is not None:
        config += [f'{UPLOAD_SECONDS}="{node.upload_seconds}"', f'{LINE}="{_line(node, own.partition)}"']
    if node.resident_trainer:
        config.append(f'trainer-socket="{_socket(node, own.partition)}"')
    trust = ["--insecure"]
    if node.ca is not None:
        trust = ["--root-certificates", str(node.ca.absolute())]
        trust += ["--auth-supernode-private-key", str(own.key.absolute())] if own.key is not None else []
        config += [f'{NODE_KEY}="{own.key.absolute()}"'] if own.key is not None else []
    command = [
        *(sys.executable, "-m", "client.supernode", "--superlink", node.server, *trust),
        *("--host", "127.0.0.1", "--port", str(own.port), "--node-config", " ".join(config)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(node.private / "executor.secret")),
    ]
    log = node.logs / f"supernode-{own.partition}.log"
    name = f"SuperNode {own.partition}"
    return Child(name, command, log, environment, CHECKOUT, may_refuse=True, explain=explanation)


def _executor(node: NodeConfig, own: PartitionConfig, environment: dict[str, str]) -> Child:
    program = ["flower-superexec"] if node.trust_server_code else [sys.executable, "-m", "client.executor"]
    command = [
        *(*program, "--runtime-api-address", f"127.0.0.1:{own.port}", "--insecure"),
        *("--superexec-auth-secret-file", str(node.private / "executor.secret")),
    ]
    environment = {**environment, APP_VARIABLE: str(node.private / "app.json")}
    log = node.logs / f"executor-{own.partition}.log"
    return Child(f"executor {own.partition}", command, log, environment, CHECKOUT)


def _socket(node: NodeConfig, partition: int) -> Path:
    return node.private / f"trainer-{partition}.sock"


def free_ports(first: int, count: int) -> list[int]:
    """The first free ports on loopback from ``first`` on. Raises ValueError: there are not so many."""
    found: list[int] = []
    for port in range(first, LAST_PORT + 1):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed a moment ago is free
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ValueError(f"--port {first}: {count} free ports are needed from there on, and there are {len(found)}")


def explanation(log: Path) -> str:
    """Why a SuperNode ended, where Flower's log has a number or a trace in place of a cause."""
    text = log.read_text(errors="replace")[-2000:] if log.is_file() else ""
    if NOT_ACTIVATED in text:
        return (
            "the server refuses this key. Either it is not registered or was revoked (on the server: `python -m server "
            "register NODE.pub`), or another SuperNode uses it now (one that was killed is forgotten after a minute)"
        )
    if "address already in use" in text.lower():
        return "another program took its port on this host in the same moment: start the node again"
    return ""
