"""Bytes of the whole exchange of a run, both ways, and the seconds that links take for them.

Payloads and arrays alone: what Flower and gRPC add is in docs/deployment.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.schema import CHECKOUT
from gradcodec.artifact import SETTINGS, WEIGHTS, size_of_artifact
from strategies.outcomes import Downlink, Uplink

LINKS = {
    "1 Mbit/s": (1e6, 1e6),
    "10 Mbit/s": (10e6, 10e6),
    "100 Mbit/s": (100e6, 100e6),
    "1 Gbit/s": (1e9, 1e9),
    "10 Mbit/s down, 1 up": (10e6, 1e6),
}
"""Name -> bits a second down and up."""


@dataclass(frozen=True)
class Account:
    """``down`` counts all that went to clients in rounds, with what of it they had missed (``catch_up``,
    ``snapshots``); ``delivery`` what would bring every client to the final adapter; ``artifact`` a copy of the codec's
    for each, unless it ships with the project."""

    up: int = 0
    down: int = 0
    catch_up: int = 0
    snapshots: int = 0
    delivery: int = 0
    artifact: int = 0

    @property
    def total(self) -> int:
        """Of ``up``, ``down``, ``delivery`` and ``artifact``; the others are parts of ``down``."""
        return self.up + self.down + self.delivery + self.artifact

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def bytes_to_hand_out(artifact: str | None) -> int:
    """What a copy of the codec's artifact takes; 0 of one that every node has, as it ships with the project, of none,
    and where none is yet."""
    folder, shipped = Path(artifact or ""), CHECKOUT / "assets" / "codec"
    if artifact is None or not all((folder / name).is_file() for name in (WEIGHTS, SETTINGS)):
        return 0
    ships = (folder / SETTINGS).read_bytes() == (shipped / SETTINGS).read_bytes()
    return 0 if ships else size_of_artifact(folder)


def account_of(
    uplinks: Sequence[Uplink], downlinks: Sequence[Downlink], delivery: int = 0, artifact: int = 0
) -> Account:
    """What these come to."""
    return Account(
        up=sum(one.payload_bytes for one in uplinks),
        down=sum(one.total_bytes for one in downlinks),
        catch_up=sum(one.catch_up_bytes for one in downlinks),
        snapshots=sum(one.snapshot_bytes for one in downlinks),
        delivery=delivery,
        artifact=artifact,
    )


def transfer_seconds(up: float, down: float) -> dict[str, float]:
    """Link -> seconds for so many bytes, one after the other."""
    return {name: 8 * (down / speed_down + up / speed_up) for name, (speed_down, speed_up) in LINKS.items()}
