"""The resident trainer: one process a node that keeps base model, tokenised data and codec between messages.

Flower starts a fresh process for every message, and loading a base model takes longer than a round's training. So the
ClientApp hands the work to this process over a Unix socket of its node (``link.py``), which lies in a folder that only
its owner can enter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from client.link import ADAPTER, SIDE, receive, send
from client.trainer import trainer_for
from conf.processes import exit_on_sigterm

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
        head, body = receive(connection)
        try:
            answer, content = _done(head, body)
        except ValueError as error:
            answer, content = {"error": str(error)}, b""
        except Exception as error:  # the node's ClientApp tells the server; the trainer lives on
            _LOG.exception("a message failed")
            answer, content = {"error": f"local training failed: {error!r}", "fatal": True}, b""
        send(connection, answer, content)
    except (OSError, EOFError, ValueError) as error:
        _LOG.warning("a client went away: %s", error)


def _done(head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """One message's work."""
    trainer = trainer_for(str(head["settings"]), tuple((str(k), str(v)) for k, v in head["overrides"]))
    if head["verb"] == "check":
        trainer.check(int(head["partition"]))
        return {}, b""
    tensors = load(body)
    done = trainer.train(
        {key.removeprefix(ADAPTER): tensor for key, tensor in tensors.items() if key.startswith(ADAPTER)},
        partition=int(head["partition"]),
        server_round=int(head["server_round"]),
        side=tensors.get(SIDE),
        accepted=str(head["accepted"]),
        memory=Path(str(head["memory"])),
    )
    figures = {field.name: getattr(done, field.name) for field in dataclasses.fields(done)}
    del figures["adapter"], figures["payload"]
    if done.payload is not None:
        return {**figures, "coded": True}, done.payload
    assert done.adapter is not None
    return {**figures, "coded": False}, save(done.adapter)


if __name__ == "__main__":
    main()
