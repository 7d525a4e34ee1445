"""What a run has to show, as it goes on: losses, uplinks, seconds."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.output import provenance
from conf.schema import Settings
from strategies.ledger import Uplink
from strategies.sampling import Fault

MAX_EXPONENT = math.log(sys.float_info.max)


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

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.payload_bytes_per_client_round / self.num_parameters if self.num_parameters else 0.0

    @property
    def heldout_perplexity(self) -> list[float]:
        """Infinite where float64 ends: a run that diverged still gets its results."""
        return [math.exp(loss) if not loss > MAX_EXPONENT else math.inf for loss in self.heldout_loss]

    def facts(self) -> dict[str, str]:
        """What a model card tells of the run, label -> text. Names no path: they are this host's affair."""
        settings, federation = self.settings, self.settings.federation
        rounds = f"{federation.rounds}, {federation.clients_per_round} of {federation.num_clients} clients each"
        sent = {
            "rounds": rounds,
            "codec": settings.codec.name if settings.arm == "coded" else "none",
            "bytes up per client and round": f"{self.payload_bytes_per_client_round:,.0f}",
            "bits up per parameter": f"{self.bits_per_parameter:.3f}",
        }
        return {
            "run": settings.run_id or "-",
            "arm": settings.arm,
            **(sent if self.uplinks else {}),
            "adapter parameters": f"{self.num_parameters:,}",
            "held-out loss, nats per token": f"{self.heldout_loss[0]:.4f} -> {self.heldout_loss[-1]:.4f}",
            "held-out perplexity": f"{self.heldout_perplexity[0]:.3f} -> {self.heldout_perplexity[-1]:.3f}",
            "task": settings.task.name,
            "seed": str(settings.seed),
            "made with": ", ".join(f"{name} {version}" for name, version in provenance().items()),
        }

    def state(self) -> dict[str, Any]:
        """What cannot be derived, as JSON."""
        return {
            "num_parameters": self.num_parameters,
            "heldout_loss": self.heldout_loss,
            "downlink_array_bytes": self.downlink_bytes,
            "seconds": self.seconds,
            "faults": [dataclasses.asdict(fault) for fault in self.faults],
            "uplinks": [dataclasses.asdict(uplink) for uplink in self.uplinks],
        }

    @classmethod
    def of_state(cls, settings: Settings, state: dict[str, Any]) -> RunResults:
        """Inverse of ``state``; other keys are left aside."""
        return cls(
            settings,
            state["num_parameters"],
            state["heldout_loss"],
            [Uplink(**uplink) for uplink in state["uplinks"]],
            [Fault(**fault) for fault in state["faults"]],
            state["seconds"],
            state["downlink_array_bytes"],
        )

    def to_json(self) -> dict[str, Any]:
        per_client_round = self.payload_bytes_per_client_round
        return {
            "arm": self.settings.arm,
            "seed": self.settings.seed,
            **self.state(),
            "heldout_perplexity": self.heldout_perplexity,
            "uplink_payload_bytes_per_client_round": per_client_round,
            "bits_per_parameter": self.bits_per_parameter,
            "uplink_payload_bytes": sum(uplink.payload_bytes for uplink in self.uplinks),
            "settings": dataclasses.asdict(self.settings),
            "made_with": provenance(),
        }


def load_results(path: Path, settings: Settings) -> RunResults:
    """Inverse of ``to_json``. Raises ValueError: there is no such file here."""
    if not path.is_file():
        raise ValueError(f"the run is finished, but {path} is not on this host: look on the SuperLink's host")
    return RunResults.of_state(settings, json.loads(path.read_text()))
