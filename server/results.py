"""What a run has to show, as it goes on: losses, uplinks, seconds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.output import provenance
from conf.schema import Settings
from strategies.ledger import Uplink
from strategies.sampling import Fault


@dataclass
class RunResults:
    """One run, as it goes on."""

    settings: Settings
    num_parameters: int = 0
    heldout_loss: list[float] = field(default_factory=list)  # before the first round, and after each
    uplinks: list[Uplink] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0.0
    downlink_bytes: int = 0  # of the arrays that went to clients

    @property
    def payload_bytes_per_client_round(self) -> float:
        sizes = [uplink.payload_bytes for uplink in self.uplinks]
        return sum(sizes) / len(sizes) if sizes else 0.0

    def to_json(self) -> dict[str, Any]:
        per_client_round = self.payload_bytes_per_client_round
        return {
            "arm": self.settings.arm,
            "seed": self.settings.seed,
            "heldout_loss": self.heldout_loss,
            "num_parameters": self.num_parameters,
            "uplink_payload_bytes_per_client_round": per_client_round,
            "bits_per_parameter": 8 * per_client_round / self.num_parameters if self.num_parameters else 0.0,
            "uplink_payload_bytes": sum(uplink.payload_bytes for uplink in self.uplinks),
            "downlink_array_bytes": self.downlink_bytes,
            "seconds": self.seconds,
            "faults": [dataclasses.asdict(fault) for fault in self.faults],
            "uplinks": [dataclasses.asdict(uplink) for uplink in self.uplinks],
            "settings": dataclasses.asdict(self.settings),
            "made_with": provenance(),
        }


def load_results(path: Path, settings: Settings) -> RunResults:
    """Inverse of ``to_json``. Raises ValueError: there is no such file here."""
    if not path.is_file():
        raise ValueError(f"the run is finished, but {path} is not on this host: look on the SuperLink's host")
    content = json.loads(path.read_text())
    return RunResults(
        settings,
        content["num_parameters"],
        content["heldout_loss"],
        [Uplink(**uplink) for uplink in content["uplinks"]],
        [Fault(**fault) for fault in content["faults"]],
        content["seconds"],
        content["downlink_array_bytes"],
    )
