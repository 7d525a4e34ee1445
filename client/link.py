"""From a ClientApp's process to its node's resident trainer, over a Unix socket.

Flower starts a fresh process for every message: so nothing here loads torch, which takes longer than many a round's
training. Both directions are frames:

    offset  size  field
    0       8     bytes of the head (little-endian)
    8       8     bytes of the body
    16      -     head: JSON; then body: arrays as safetensors, or a payload as it is

Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save

from client.work import Evaluated, Overrides, Summed, Trained, Work
from gradcodec.transfers import Broadcast
from privacy.errors import BudgetSpentError, PrivacyError

if TYPE_CHECKING:
    from client.trainer import Trainer

SIDE, BUNDLE, ADAPTER = "side", "bundle", "adapter/"
RESTART_SECONDS = 60.0
"""How long a client waits for a trainer that died to come back, before it fails."""
MOST_DEATHS = 3
"""How often a trainer may die of one question, before its client fails."""
_FRAME = struct.Struct("<QQ")
_MAX_HEAD, _MAX_BODY = 1 << 24, 1 << 38
_KINDS: dict[str, type[ValueError]] = {one.__name__: one for one in (PrivacyError, BudgetSpentError)}
"""Errors that a ClientApp tells apart."""
_LOG = logging.getLogger(__name__)


class ResidentTrainer:
    """What a ``Trainer`` does, done by the process at the other end of the socket."""

    def __init__(self, path: Path, settings_json: str, overrides: Overrides) -> None:
        self._path = path
        self._settings_json = settings_json
        self._overrides = overrides

    def check(self, partition: int, memory: Path | None = None) -> None:
        """As ``Trainer.check``."""
        self._ask({"verb": "check", "partition": partition, "memory": None if memory is None else str(memory)}, b"")

    def train(self, work: Work) -> Trained:
        """As ``Trainer.train``."""
        head, body = pack_work(work)
        return unpack_trained(*self._ask({"verb": "train", **head}, body))

    def evaluate(self, work: Work) -> Evaluated:
        """As ``Trainer.evaluate``."""
        head, body = pack_work(work)
        answer, _ = self._ask({"verb": "evaluate", **head}, body)
        return Evaluated(**answer)

    def _ask(self, head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """Asks until a trainer answers. The same question again does no harm: residuals are kept by round.

        Raises:
            ValueError: the trainer refuses; PrivacyError and BudgetSpentError as such.
            ConnectionError: there was none for ``RESTART_SECONDS``, or it died ``MOST_DEATHS`` times.
        """
        question = {**head, "settings": self._settings_json, "overrides": self._overrides}
        gone_since: float | None = None  # when it first could not be reached or died, since it last could
        times_asked = 0
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(self._path))
                    gone_since, times_asked = None, times_asked + 1
                    send(connection, question, body)
                    answer, content = receive(connection)
                break
            except (OSError, EOFError) as error:
                if times_asked >= MOST_DEATHS:
                    raise ConnectionError(
                        f"the resident trainer at {self._path} died {times_asked} times of one message: see its log"
                    ) from None
                now = time.monotonic()
                gone_since = now if gone_since is None else gone_since
                if now > gone_since + RESTART_SECONDS:
                    raise ConnectionError(f"no resident trainer at {self._path}: {error}") from None
                _LOG.warning("the resident trainer at %s is gone (%r): asking again", self._path, error)
                time.sleep(0.5)
        if "error" in answer:
            kind = RuntimeError if answer.get("fatal") else _KINDS.get(answer["kind"], ValueError)
            raise kind(answer["error"])
        return answer, content


def trainer_at(path: Path | None, settings_json: str, overrides: Overrides) -> Trainer | ResidentTrainer:
    """The node's resident trainer, or one in this process if there is none."""
    if path is not None and path.is_socket():
        return ResidentTrainer(path, settings_json, overrides)
    if path is not None:
        _LOG.warning("there is no resident trainer at %s: training in this process", path)
    from client.trainer import trainer_for  # here, as it loads torch

    return trainer_for(settings_json, overrides)


def pack_work(work: Work) -> tuple[dict[str, Any], bytes]:
    arrays: dict[str, Any] = {ADAPTER + name: array for name, array in (work.adapter or {}).items()}
    if work.side is not None:
        arrays[SIDE] = work.side
    if work.broadcast is not None:
        arrays[BUNDLE] = np.frombuffer(work.broadcast.bundle, np.uint8)
    head = {
        "partition": work.partition,
        "server_round": work.server_round,
        "names": None if work.adapter is None else list(work.adapter),
        "accepted": work.accepted,
        "memory": str(work.memory),
        "sum": None if work.sum is None else [work.sum.announced.hex(), work.sum.clients, work.sum.identity],
        "secret": work.secret.hex(),  # to the node's own trainer, over a socket that its owner alone can open
        "held": None if work.broadcast is None else [work.broadcast.held_before, work.broadcast.held],
    }
    return head, save(arrays)


def unpack_work(head: Mapping[str, Any], body: bytes) -> Work:
    """Inverse of ``pack_work``; safetensors sorts names, so their order comes apart."""
    arrays, names = load(body), head["names"]
    return Work(
        adapter=None if names is None else {str(name): arrays[ADAPTER + str(name)] for name in names},
        side=arrays.get(SIDE),
        partition=int(head["partition"]),
        server_round=int(head["server_round"]),
        accepted=str(head["accepted"]),
        memory=Path(str(head["memory"])),
        sum=None if head["sum"] is None else Summed(bytes.fromhex(head["sum"][0]), *head["sum"][1:]),
        secret=bytes.fromhex(str(head["secret"])),
        broadcast=None if head["held"] is None else Broadcast(arrays[BUNDLE].tobytes(), *map(str, head["held"])),
    )


def pack_trained(done: Trained) -> tuple[dict[str, Any], bytes]:
    figures = {field.name: getattr(done, field.name) for field in dataclasses.fields(done)}
    adapter, payload = figures.pop("adapter"), figures.pop("payload")
    if payload is not None or adapter is None:
        return {**figures, "names": None}, payload or b""
    return {**figures, "names": list(adapter)}, save(adapter)


def unpack_trained(head: Mapping[str, Any], body: bytes) -> Trained:
    """Inverse of ``pack_trained``."""
    figures = {key: value for key, value in head.items() if key != "names"}
    if head["names"] is None:
        return Trained(adapter=None, payload=body if figures["lacks"] is None else None, **figures)
    arrays = load(body)
    return Trained(adapter={name: arrays[name] for name in head["names"]}, payload=None, **figures)


def send(connection: socket.socket, head: Mapping[str, Any], body: bytes) -> None:
    text = json.dumps(head).encode()
    connection.sendall(_FRAME.pack(len(text), len(body)) + text)
    if body:  # sending nothing fails too, if the other end has answered and gone by now
        connection.sendall(body)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Inverse of ``send``. Raises EOFError: the other end is gone; ValueError: that is no frame of ours."""
    head_size, body_size = _FRAME.unpack(b"".join(_pieces(connection, _FRAME.size)))
    if head_size > _MAX_HEAD or body_size > _MAX_BODY:
        raise ValueError(f"a frame of {head_size} and {body_size} bytes is too large")
    head = json.loads(b"".join(_pieces(connection, head_size)))
    if not isinstance(head, dict):
        raise ValueError("a frame's head is no JSON object")
    return head, b"".join(_pieces(connection, body_size))


def _pieces(connection: socket.socket, size: int) -> Iterator[bytes]:
    while size > 0:
        piece = connection.recv(min(size, 1 << 20))
        if not piece:
            raise EOFError("the connection was closed")
        size -= len(piece)
        yield piece
