"""What both ends call a transfer by: the places where payloads count, and the states between which broadcasts lead.

Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Broadcast:
    """A bundle of ``broadcast.py``, and the digests of what a client holds before and after it."""

    bundle: bytes
    held_before: str  # empty: whatever it is
    held: str


def broadcast_context(run_id: str) -> bytes:
    """What the checksums of a run's broadcasts are made with, beside the state that each starts from."""
    return run_id.encode()


def context_of(run_id: str, server_round: int, client: int) -> bytes:
    """What a payload's checksum is made with, so that it counts in its own run, round and place alone."""
    return f"{run_id}/{server_round}/{client}".encode()
