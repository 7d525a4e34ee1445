"""A deployment on loopback for demo, tests and benches: the programs a user would start, ended on every way out."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.namespaces import Namespaces
from bench.relay import CountingRelay

FLEET_PORT, NODE_PORT = 9092, 9094
"""The programs' defaults."""


@dataclass
class Deployment:
    """Running programs: the server, its nodes by partition, each node behind a relay of its own."""

    folder: Path
    fleet_port: int
    server: subprocess.Popen[bytes]
    relays: list[CountingRelay]
    nodes: list[subprocess.Popen[bytes]]
    stack: contextlib.ExitStack  # ends all of them

    def start_again(self) -> None:
        """Starts those of the programs that are gone, as an init system would."""
        if self.server.poll() is not None:
            self.server = self.stack.enter_context(running(self.server.args, self.folder / "server.log"))
        for i, node in enumerate(self.nodes):
            if node.poll() is not None:
                self.nodes[i] = self.stack.enter_context(running(node.args, self.folder / f"node-{i}.log"))

    @property
    def flwr_home(self) -> Path:
        """Flower's home for ``backend=superlink``."""
        return self.folder / "flwr"


def node_command(folder: Path, partition: int, num_nodes: int, address: str, port: int) -> list[str]:
    """``python -m client`` for a node whose keys, memory and logs lie in the deployment's folder."""
    keys = ["--ca", str(folder / "ca.crt"), "--key", str(folder / f"node-{partition}")]
    own = ["--partition", str(partition), "--partitions", str(num_nodes), "--gpus", "none"]
    kept = ["--memory", str(folder / f"memory-{partition}"), "--logs", str(folder / f"logs-{partition}")]
    return [sys.executable, "-m", "client", "--server", address, "--port", str(port), *keys, *own, *kept]


@contextlib.contextmanager
def deployment_on_hosts(
    folder: Path, num_nodes: int, hosts: Namespaces, node_options: Sequence[str] = ()
) -> Iterator[Deployment]:
    """The same with a host and addresses of its own for the server and every node."""
    shutil.rmtree(folder, ignore_errors=True)
    server, names = [sys.executable, "-m", "server"], ",".join(map(hosts.server_address, range(num_nodes)))
    subprocess.run([*server, "keys", "--folder", str(folder), "--nodes", str(num_nodes), "--hosts", names], check=True)
    with contextlib.ExitStack() as stack:
        start = hosts.in_server([*server, "start", "--folder", str(folder)])
        link = stack.enter_context(running(start, folder / "server.log"))
        wait_for("SuperLink up", folder / "server.log", link)
        nodes = []
        for i in range(num_nodes):
            command = node_command(folder, i, num_nodes, f"{hosts.server_address(i)}:{FLEET_PORT}", NODE_PORT)
            nodes.append(
                stack.enter_context(running(hosts.in_node(i, [*command, *node_options]), folder / f"node-{i}.log"))
            )
        yield Deployment(folder, FLEET_PORT, link, [], nodes, stack)


@contextlib.contextmanager
def deployment(folder: Path, num_nodes: int, node_options: Sequence[str] = ()) -> Iterator[Deployment]:
    """A SuperLink and its nodes with TLS and node keys on loopback; ended on every way out."""
    shutil.rmtree(folder, ignore_errors=True)
    fleet_port, control_port, *node_ports = free_ports(2 + num_nodes)
    server = [sys.executable, "-m", "server"]
    subprocess.run([*server, "keys", "--folder", str(folder), "--nodes", str(num_nodes)], check=True)
    with contextlib.ExitStack() as stack:
        start = ["--fleet-address", f"127.0.0.1:{fleet_port}", "--control-port", str(control_port)]
        link = stack.enter_context(running([*server, "start", "--folder", str(folder), *start], folder / "server.log"))
        wait_for("SuperLink up", folder / "server.log", link)
        relays = [stack.enter_context(CountingRelay("127.0.0.1", fleet_port)) for _ in range(num_nodes)]
        nodes = []
        for i, relay in enumerate(relays):
            command = node_command(folder, i, num_nodes, f"127.0.0.1:{relay.port}", node_ports[i])
            nodes.append(stack.enter_context(running([*command, *node_options], folder / f"node-{i}.log")))
        yield Deployment(folder, fleet_port, link, relays, nodes, stack)


@contextlib.contextmanager
def running(command: Any, log: Path, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts, ended on every way out. It logs to a file, as a pipe could block it."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while text not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ValueError(f"{log} never said {text!r}; it ends with:\n{log.read_text(errors='replace')[-1000:]}")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
