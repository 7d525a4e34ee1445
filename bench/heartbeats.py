"""When a node's heartbeat comes back after a cut of its network, and how near Flower was to counting the node as gone.

    python -m bench.heartbeats [--cuts 6] [--seconds 20]

A deployment of one node on loopback; every cut begins when the next heartbeat is about due, which is the worst time.
``strategies.sampling.RETURN_SECONDS`` and the fault table of docs/deployment.md rest on it. Takes a minute a cut.
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import tempfile
import time
from pathlib import Path

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE

from bench.deployment import deployment
from bench.programs import ends_in_a_line

COUNTED_SECONDS = HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL
"""So long after its last heartbeat Flower counts a node as gone."""
DUE_SECONDS = 20.0
"""Heartbeats come every 17.5 to 22.5 s."""
LONGEST_SECONDS = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each cut lasts")
    args = parser.parse_args()
    with (
        ends_in_a_line(),
        tempfile.TemporaryDirectory(prefix="heartbeats-") as folder,
        deployment(Path(folder) / "server", 1) as place,
    ):
        state = place.folder / "state.db"
        for _ in range(args.cuts):
            last = next_heartbeat(state, last_heartbeat(state))
            time.sleep(max(0.0, last + DUE_SECONDS - time.time()))
            last, cut = last_heartbeat(state), time.time()
            place.relays[0].cut(args.seconds)
            back = next_heartbeat(state, last)
            left = COUNTED_SECONDS - (back - last)
            print(f"first heartbeat {back - cut:.1f} s after the cut began, {left:.1f} s before the node is gone")


def last_heartbeat(state: Path) -> float:
    """Seconds since the epoch, from the SuperLink's own state; 0 before the node is there."""
    with contextlib.closing(sqlite3.connect(f"file:{state}?mode=ro", uri=True)) as connection:
        row = connection.execute("SELECT online_until FROM node").fetchone()
    return row[0] - COUNTED_SECONDS if row is not None and row[0] is not None else 0.0


def next_heartbeat(state: Path, last: float) -> float:
    """Waits for it.

    Raises:
        ValueError: none came.
    """
    deadline = time.monotonic() + LONGEST_SECONDS
    while (now := last_heartbeat(state)) == last:
        if time.monotonic() > deadline:
            raise ValueError(f"no heartbeat in {LONGEST_SECONDS:.0f} s")
        time.sleep(0.1)
    return now


if __name__ == "__main__":
    main()
