"""Whether a node runs: what its container's health check asks.

    python -m client.health /node/logs

The node writes a file into its logs' folder every few seconds; here it is read, and the programs that it names are
asked for an answer. Well is a node whose programs answer, also while its server is away: it waits. Standard library
only, so that a check costs next to nothing.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.output import write_text

if TYPE_CHECKING:
    from client.node import PartitionPrograms

NAME = "health.json"
WRITE_SECONDS = 5.0
STALE_SECONDS = 30.0
ANSWER_SECONDS = 2.0


def write_health(folder: Path, programs: Sequence[PartitionPrograms]) -> None:
    """What ``problems_of`` reads."""
    partitions = {
        str(one.partition): {"state": one.console.state, "port": one.port, "trainer": str(one.trainer or "")}
        for one in programs
    }
    write_text(json.dumps({"written": time.time(), "partitions": partitions}) + "\n", folder / NAME)


def problems_of(folder: Path) -> list[str]:
    """Why the node whose logs are in the folder is not well, one line each; empty: it is."""
    path = folder / NAME
    try:
        health: dict[str, Any] = json.loads(path.read_text())
        age = time.time() - float(health["written"])
        partitions = {str(key): (int(one["port"]), str(one["trainer"])) for key, one in health["partitions"].items()}
    except OSError as error:
        return [f"no node runs with its logs in {folder}: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path} is damaged: {error!r}"]
    if age > STALE_SECONDS:
        return [f"the node was last seen {age:.0f} s ago"]
    problems = []
    for partition, (port, trainer) in partitions.items():
        if not _answers(socket.AF_INET, ("127.0.0.1", port)):
            problems.append(f"partition {partition}: its SuperNode does not answer at port {port}")
        if trainer and not _answers(socket.AF_UNIX, trainer):
            problems.append(f"partition {partition}: its trainer does not answer at {trainer}")
    return problems


def _answers(family: socket.AddressFamily, address: Any) -> bool:
    with socket.socket(family) as trial:
        trial.settimeout(ANSWER_SECONDS)
        try:
            trial.connect(address)
        except OSError:
            return False
    return True


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("python -m client.health FOLDER-OF-THE-LOGS")
    problems = problems_of(Path(sys.argv[1]))
    if problems:
        sys.exit("\n".join(problems))
    states = json.loads((Path(sys.argv[1]) / NAME).read_text())["partitions"]
    print("; ".join(f"partition {partition}: {one['state']}" for partition, one in states.items()))


if __name__ == "__main__":
    main()
