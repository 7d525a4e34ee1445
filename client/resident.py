"""The resident trainer: one process a node that keeps base model, tokenised data and codec between messages.

Flower starts a fresh process for every message, and loading a base model takes longer than a round's training. So the
ClientApp hands the work to this process over a Unix socket of its node. Both directions are frames:

    offset  size  field
    0       8     bytes of the head (little-endian)
    8       8     bytes of the body
    16      -     head: JSON; then body: tensors as safetensors, or a payload as it is

Nothing is unpickled, and the socket lies in a folder that only its owner can enter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from client.trainer import Overrides, Trained, Trainer, trainer_for
from conf.processes import exit_on_sigterm
from conf.schema import Settings

_FRAME = struct.Struct("<QQ")
_MAX_HEAD, _MAX_BODY = 1 << 24, 1 << 38
_SIDE, _ADAPTER = "side", "adapter/"
RESTART_SECONDS = 60.0
"""How long a client waits for a trainer that died to come back, before it does the work itself."""
_LOG = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m client.resident", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--socket", type=Path, required=True, help="Unix socket to listen at; its folder is made private"
    )
    args = parser.parse_args()
    exit_on_sigterm()
    try:
        serve(args.socket)
    except (KeyboardInterrupt, SystemExit):
        pass
    except OSError as error:
        sys.exit(f"error: {args.socket}: {error.strerror}")
    finally:
        args.socket.unlink(missing_ok=True)


def serve(path: Path) -> None:
    """Answers one message after the other, until its parent is gone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(8)
        listener.settimeout(1.0)
        print(f"trainer up at {path}", flush=True)
        while os.getppid() == parent:  # an orphan gives its GPU back
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(None)
                    _answer(connection)


def _answer(connection: socket.socket) -> None:
    try:
        head, body = _receive(connection)
        try:
            answer, content = _done(head, body)
        except ValueError as error:
            answer, content = {"error": str(error)}, b""
        except Exception as error:  # the node's ClientApp tells the server; the trainer lives on
            _LOG.exception("a message failed")
            answer, content = {"error": f"local training failed: {error!r}", "fatal": True}, b""
        _send(connection, answer, content)
    except (OSError, ValueError) as error:
        _LOG.warning("a client went away: %s", error)


def _done(head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """One message's work."""
    trainer = trainer_for(str(head["settings"]), tuple((str(k), str(v)) for k, v in head["overrides"]))
    if head["verb"] == "check":
        trainer.check(int(head["partition"]))
        return {}, b""
    tensors = load(body)
    done = trainer.train(
        {key.removeprefix(_ADAPTER): tensor for key, tensor in tensors.items() if key.startswith(_ADAPTER)},
        partition=int(head["partition"]),
        server_round=int(head["server_round"]),
        side=tensors.get(_SIDE),
        accepted=str(head["accepted"]),
        memory=Path(str(head["memory"])),
    )
    figures = {field.name: getattr(done, field.name) for field in dataclasses.fields(done)}
    del figures["adapter"], figures["payload"]
    if done.payload is not None:
        return {**figures, "coded": True}, done.payload
    assert done.adapter is not None
    return {**figures, "coded": False, "order": list(done.adapter)}, save(done.adapter)


class ResidentTrainer:
    """What a ``Trainer`` does, done by the process at the other end of the socket."""

    def __init__(self, path: Path, settings_json: str, overrides: Overrides) -> None:
        self.settings = Settings.from_json(settings_json)
        self._path = path
        self._settings_json = settings_json
        self._overrides = overrides

    def check(self, partition: int) -> None:
        """As ``Trainer.check``."""
        self._ask({"verb": "check", "partition": partition}, b"")

    def train(
        self,
        adapter: Mapping[str, Tensor],
        *,
        partition: int,
        server_round: int,
        side: Tensor | None,
        accepted: str,
        memory: Path,
    ) -> Trained:
        """As ``Trainer.train``."""
        tensors = {_ADAPTER + name: tensor.contiguous() for name, tensor in adapter.items()}
        if side is not None:
            tensors[_SIDE] = side.contiguous()
        head = {"partition": partition, "server_round": server_round, "accepted": accepted, "memory": str(memory)}
        answer, body = self._ask({"verb": "train", **head}, save(tensors))
        coded, order = answer.pop("coded"), answer.pop("order", [])
        if coded:
            return Trained(adapter=None, payload=body, **answer)
        trained = load(body)
        return Trained(adapter={name: trained[name] for name in order}, payload=None, **answer)

    def _ask(self, head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """Asks until a trainer answers. The same question again does no harm: residuals are kept by round.

        Raises:
            ValueError: the trainer refuses.
            ConnectionError: there was none for ``RESTART_SECONDS``.
        """
        question = {**head, "settings": self._settings_json, "overrides": self._overrides}
        deadline = time.monotonic() + RESTART_SECONDS
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(self._path))
                    _send(connection, question, body)
                    answer, content = _receive(connection)
                break
            except (OSError, EOFError) as error:
                if time.monotonic() > deadline:
                    raise ConnectionError(f"no resident trainer at {self._path}: {error}") from None
                _LOG.warning("the resident trainer at %s is gone (%r): asking again", self._path, error)
                time.sleep(0.5)
        if "error" in answer:
            raise (RuntimeError if answer.get("fatal") else ValueError)(answer["error"])
        return answer, content


def trainer_at(path: Path | None, settings_json: str, overrides: Overrides) -> Trainer | ResidentTrainer:
    """The node's resident trainer, or one in this process if there is none."""
    if path is None:
        return trainer_for(settings_json, overrides)
    if not path.is_socket():
        _LOG.warning("there is no resident trainer at %s: training in this process", path)
        return trainer_for(settings_json, overrides)
    return ResidentTrainer(path, settings_json, overrides)


def _send(connection: socket.socket, head: Mapping[str, Any], body: bytes) -> None:
    text = json.dumps(head).encode()
    connection.sendall(_FRAME.pack(len(text), len(body)) + text)
    connection.sendall(body)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Inverse of ``_send``. Raises EOFError: the other end is gone; ValueError: that is no frame of ours."""
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


if __name__ == "__main__":
    main()
