"""The resident trainer: one process a node that keeps base model, tokenised data and codec between messages.

Flower starts a fresh process for every message, and loading a base model takes longer than a round's training. So the
ClientApp hands the work to this process over a Unix socket of its node (``link.py``), which lies in a folder that only
its owner can enter. Under torchrun several of it train together, one GPU each; the first one listens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

from adapters.team import Team
from client.console import note, write_notes
from client.link import pack_trained, pack_work, receive, send, unpack_work
from client.trainer import Trainer, trainer_for
from client.work import Trained
from conf.processes import exit_on_sigterm
from gradcodec.client import LacksError

_LOG = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m client.resident", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--socket", type=Path, required=True, help="Unix socket to listen at; its folder is made private"
    )
    args = parser.parse_args()
    team = Team.of_torchrun()
    if team.rank > 0:
        follow(team)
    write_notes()
    exit_on_sigterm()
    try:
        serve(args.socket, team)
    except (KeyboardInterrupt, SystemExit):
        pass
    except OSError as error:
        sys.exit(f"error: {args.socket}: {error.strerror}")
    finally:
        args.socket.unlink(missing_ok=True)


def serve(path: Path, team: Team) -> None:
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
        note("its trainer is up")
        while os.getppid() == parent:  # an orphan gives its GPU back
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(None)
                    _answer(connection, team)


def _answer(connection: socket.socket, team: Team) -> None:
    try:
        head, body = receive(connection)
        try:
            answer, content = _work_on(head, body, team)
        except ValueError as error:
            note(f"cannot take part: {error}")
            answer, content = {"error": str(error), "kind": type(error).__name__}, b""
        except Exception as error:  # the node's ClientApp tells the server; the trainer lives on
            note(f"training failed: {error!r}")
            _LOG.exception("a message failed")
            answer, content = {"error": f"local training failed: {error!r}", "fatal": True}, b""
        send(connection, answer, content)
        if "fatal" in answer and team.size > 1:
            sys.exit(1)  # the others may wait for gradients in vain: torchrun ends them, the node starts all anew
    except EOFError:
        pass  # a client that was killed, or a health check, which asks nothing
    except (OSError, ValueError) as error:
        _LOG.warning("a client went away: %s", error)


def follow(team: Team) -> None:
    """The others of a team: what the first one is asked for, they do as well, until it is gone."""
    while True:
        question, body = json.loads(team.told()), team.told()
        with contextlib.suppress(ValueError):  # the first one gives it as the answer
            _take_part(question, body, team)


def _take_part(question: dict[str, Any], body: bytes, team: Team) -> None:
    """On its own, so that nothing holds the trainer between two messages: the next may need its memory."""
    trainer = _trainer(question)
    if question["verb"] == "check":
        trainer.check(int(question["partition"]))
    else:
        trainer.finetune(unpack_work(question, body), team)


def _work_on(head: dict[str, Any], body: bytes, team: Team) -> tuple[dict[str, Any], bytes]:
    """One message's work. A team is told of an adapter, not of what leads to it."""
    if head["verb"] == "evaluate":  # the first of a team alone: the others wait for what comes next
        return dataclasses.asdict(_trainer(head).evaluate(unpack_work(head, body))), b""
    if head["verb"] == "train" and head["names"] is None:
        try:
            work = _trainer(head).resolved(unpack_work(head, body))
        except LacksError as error:
            return pack_trained(Trained.nothing(error.holds))
        own, body = pack_work(work)
        head = {**head, **own}
    if head["verb"] == "train":
        _trainer(head).allow(unpack_work(head, body))  # before the team begins what must not be done
    team.tell(json.dumps(head).encode())
    team.tell(body)
    trainer = _trainer(head)
    if head["verb"] == "check":
        trainer.check(int(head["partition"]), Path(head["memory"]) if head["memory"] else None)
        note("asked by a run: ready")
        return {}, b""
    return pack_trained(trainer.train(unpack_work(head, body), team))


def _trainer(head: dict[str, Any]) -> Trainer:
    return trainer_for(str(head["settings"]), tuple((str(k), str(v)) for k, v in head["overrides"]))


if __name__ == "__main__":
    main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)  # taking torch apart takes seconds, for which the end of a node need not wait
