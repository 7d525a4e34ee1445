"""Hosts of their own on one machine: Linux network namespaces, one for the server and one a node, joined by wires.

Every node has a wire of its own to the server (a veth pair in a subnet of its own), so that one can be cut. Needs
root and iproute2.
"""

from __future__ import annotations

import os
import subprocess
import threading
from types import TracebackType


class Namespaces:
    """A context manager; what runs inside must have ended before it is left."""

    def __init__(self, num_nodes: int) -> None:
        self._server = f"cg{os.getpid()}s"
        self._nodes = [f"cg{os.getpid()}n{i}" for i in range(num_nodes)]

    def __enter__(self) -> Namespaces:
        """Raises ValueError: this user or this machine has no network namespaces."""
        try:
            for name in (self._server, *self._nodes):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            for i, name in enumerate(self._nodes):
                here, there = f"s{i}", f"n{i}"
                _ip("link", "add", here, "netns", self._server, "type", "veth", "peer", "name", there, "netns", name)
                for space, end, address in ((self._server, here, self.server_address(i)), (name, there, _node(i))):
                    _ip("-n", space, "address", "add", f"{address}/30", "dev", end)
                    _ip("-n", space, "link", "set", end, "up")
        except ValueError:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def in_server(self, command: list[str]) -> list[str]:
        """The command, run on the server's host."""
        return ["ip", "netns", "exec", self._server, *command]

    def in_node(self, node: int, command: list[str]) -> list[str]:
        """The command, run on a node's host."""
        return ["ip", "netns", "exec", self._nodes[node], *command]

    def server_address(self, node: int) -> str:
        """By which this node reaches the server."""
        return f"10.77.{node}.1"

    def cut(self, node: int, seconds: float) -> None:
        """Takes a node off the network for so long; returns at once."""
        _ip("-n", self._nodes[node], "link", "set", f"n{node}", "down")
        threading.Timer(seconds, _ip, ("-n", self._nodes[node], "link", "set", f"n{node}", "up")).start()

    def slow(self, node: int, kilobits: int) -> None:
        """Lets so many kilobits a second out of a node; what comes in is as fast as it was."""
        _run("tc", "-n", self._nodes[node], "qdisc", "add", "dev", f"n{node}", "root", *_bucket(kilobits))

    def _remove(self) -> None:
        for name in (self._server, *self._nodes):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _node(node: int) -> str:
    return f"10.77.{node}.2"


def _bucket(kilobits: int) -> list[str]:
    return ["tbf", "rate", f"{kilobits}kbit", "burst", "4kb", "latency", "4s"]


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"there is no `{command[0]}` here: install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{' '.join(command)}: {error.stderr.strip()}") from None
