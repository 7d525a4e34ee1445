"""Bytes of the whole exchange of a run, both ways, and the seconds that links take for them.

Payloads and arrays alone: what Flower and gRPC add is in docs/deployment.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gradcodec.artifact import missing_files, recorded_bytes, said_digest, size_of_artifact
from strategies.outcomes import Downlink, NodeLoss, Uplink

SHIPPED_DIGEST = "711df18c262db15ca7feea2f9b1db57a2916a3dbe5b5372533045a77321bec12"
"""Of the general artifact (gradcodec/general), by which it is known where it lies in another checkout, or in none."""
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
    """``down`` counts all that went to clients in rounds, with what of it they had missed (``catch_up``: steps;
    ``snapshots``, and keys); ``evaluation`` what of both ways was for evaluation on the nodes; ``delivery`` what would
    bring every client to the final adapter; ``artifact`` a copy of the codec's for each, and ``recording`` what TGAP
    recorded for it, unless it ships with the project."""

    up: int = 0
    down: int = 0
    catch_up: int = 0
    snapshots: int = 0
    delivery: int = 0
    artifact: int = 0
    recording: int = 0
    evaluation: int = 0

    @property
    def total(self) -> int:
        """Of all but ``catch_up``, ``snapshots`` and ``evaluation``, which are parts of ``down`` and ``up``."""
        return self.up + self.down + self.delivery + self.artifact + self.recording

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class CodecCost:
    """Bytes that a trained codec takes before a run begins."""

    artifact: int = 0  # a copy of it; every client needs one
    recording: int = 0  # TGAP's: every recorded update, and the adapter that it started from

    @classmethod
    def of(cls, artifact: str | None) -> CodecCost:
        """Nothing for the artifact that ships with the project, which every node has, and where there is none (yet)."""
        folder = Path(artifact or "")
        if artifact is None or missing_files(folder):
            return cls()
        if said_digest(folder) == SHIPPED_DIGEST:
            return cls()
        return cls(size_of_artifact(folder), recorded_bytes(folder))


NOTHING = CodecCost()


def account_of(
    uplinks: Sequence[Uplink],
    downlinks: Sequence[Downlink],
    delivery: int = 0,
    codec: CodecCost = NOTHING,
    num_clients: int = 0,
    node_losses: Sequence[NodeLoss] = (),
) -> Account:
    """What these come to, with a copy of the codec's artifact for so many clients."""
    answers = sum(one.answer_bytes for one in node_losses)
    return Account(
        up=sum(one.payload_bytes for one in uplinks) + answers,
        down=sum(one.total_bytes for one in downlinks),
        catch_up=sum(one.catch_up_bytes for one in downlinks),
        snapshots=sum(one.snapshot_bytes for one in downlinks),
        delivery=delivery,
        artifact=num_clients * codec.artifact,
        recording=codec.recording,
        evaluation=answers + sum(one.total_bytes for one in downlinks if one.evaluating),
    )


def transfer_seconds(up: float, down: float) -> dict[str, float]:
    """Link -> seconds for so many bytes, one after the other."""
    return {name: 8 * (down / speed_down + up / speed_up) for name, (speed_down, speed_up) in LINKS.items()}
