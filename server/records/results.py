"""What a run has to show, as it goes on: losses, uplinks, seconds."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from conf.output import provenance
from conf.schema import NONE, Settings
from privacy.guarantee import in_words
from server.records.account import NOTHING, Account, CodecCost, account_of, transfer_seconds
from server.records.node_losses import FederatedLoss, federated_losses
from server.records.node_losses import in_words as in_words_of_nodes
from strategies.outcomes import KINDS, Downlink, Fault, NodeLoss, Uplink

T = TypeVar("T")
MAX_EXPONENT = math.log(sys.float_info.max)


SHOWN = 16
"""How many clients, or reasons, a model card names."""


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; infinite where float64 ends."""
    return math.exp(loss) if not loss > MAX_EXPONENT else math.inf


@dataclass(frozen=True)
class NodeRefusal:
    """A node that may not take part, and why."""

    node: int
    reason: str


@dataclass
class RunResults:
    """One run, as it goes on."""

    settings: Settings
    num_parameters: int = 0
    heldout_loss: list[float] = field(default_factory=list)  # before the first round, and after each
    uplinks: list[Uplink] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0.0
    downlinks: list[Downlink] = field(default_factory=list)
    refused_nodes: list[NodeRefusal] = field(default_factory=list)
    delivery_bytes: list[int] = field(default_factory=list)  # after each round: to bring every client to its adapter
    codec_cost: CodecCost = NOTHING
    privacy: dict[str, Any] = field(default_factory=dict)  # what is promised of the clients' data (privacy.guarantee)
    ended_early: str = ""  # before its last round, and why
    node_losses: list[NodeLoss] = field(default_factory=list)  # of evaluations on the nodes
    adapter_round: int | None = None  # that the final adapter is of, if it is the best one; None: the last
    failed: str = ""  # why there are no more rounds; for the report alone: a resumed run begins without it

    def account(self) -> Account:
        """Of the whole run."""
        delivery = self.delivery_bytes[-1] if self.delivery_bytes else 0
        num_clients = self.settings.federation.num_clients
        return account_of(self.uplinks, self.downlinks, delivery, self.codec_cost, num_clients, self.node_losses)

    def accounts_of_clients(self) -> dict[int, Account]:
        """Partition -> what it sent and was sent, in rounds and to be evaluated."""
        partitions = sorted({one.partition for one in self.uplinks} | {one.partition for one in self.downlinks})
        return {
            partition: account_of(
                [one for one in self.uplinks if one.partition == partition],
                [one for one in self.downlinks if one.partition == partition],
                node_losses=[one for one in self.node_losses if one.partition == partition],
            )
            for partition in partitions
        }

    @property
    def federated_loss(self) -> list[FederatedLoss]:
        """Of every evaluation on the nodes."""
        return federated_losses(self.node_losses)

    @property
    def rounds_done(self) -> int:
        """Of a run with clients; of another, how often it was evaluated after the first time."""
        return max(len(self.delivery_bytes), len(self.heldout_loss) - 1, 0)

    @property
    def deciding_losses(self) -> dict[int, float]:
        """Round -> the loss by which adapters are compared: the server's own; of a server without base model, which has
        none, that over all tokens of its nodes. Rounds of which neither is known are missing; 0: before the first."""
        if self.settings.server.base == NONE:
            return {one.server_round: one.loss for one in self.federated_loss}
        return dict(enumerate(self.heldout_loss))

    @property
    def final_loss(self) -> float | None:
        """Of ``deciding_losses`` that of the adapter which is kept, or the last; None: there is none."""
        losses = self.deciding_losses
        return losses.get(max(losses, default=0) if self.adapter_round is None else self.adapter_round)

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
        return [perplexity(loss) for loss in self.heldout_loss]

    def change_of_loss(self) -> str:
        """From the first to that of the final adapter, in words: by the server's text, or else on the nodes."""
        losses, final = [*self.deciding_losses.values()], self.final_loss
        if not losses or final is None:
            return "no loss, as the server holds no base model and no node was asked (federation.evaluate_every)"
        where = "held-out loss" if self.heldout_loss else "loss on the nodes"
        kept = "" if self.adapter_round is None else f" of round {self.adapter_round}"
        before, after = perplexity(losses[0]), perplexity(final)
        return f"{where} {losses[0]:.4f} -> {final:.4f}{kept} (perplexity {before:.2f} -> {after:.2f})"

    def participation(self) -> dict[int, dict[str, int]]:
        """Partition -> in how many rounds it was ``asked``, and what became of that: ``accepted`` or a kind of fault. A
        round that was tried again counts again."""
        table: dict[int, dict[str, int]] = {}
        outcomes = [(uplink.partition, "accepted") for uplink in self.uplinks]
        for partition, outcome in [*outcomes, *((f.partition, f.kind) for f in self.faults if not f.evaluating)]:
            row = table.setdefault(partition, dict.fromkeys(("asked", "accepted", *KINDS), 0))
            row["asked"] += 1
            row[outcome] += 1
        return dict(sorted(table.items()))

    def _who_took_part(self) -> dict[str, str]:
        """For a model card: what was asked for, what came, and what did not."""
        table = self.participation()
        total = {key: sum(row[key] for row in table.values()) for key in ("asked", "accepted", *KINDS)}
        lacking = {partition: row for partition, row in table.items() if row["accepted"] < row["asked"]}
        said = f"{total['accepted']:,} of {total['asked']:,} replies asked for, of {len(table):,} clients"
        facts = {"took part": said + ("" if lacking else ", each in every round that it was asked in")}
        shown = [
            f"client {partition} in {row['accepted']} of {row['asked']} rounds ("
            + ", ".join(f"{row[kind]} {kind}" for kind in KINDS if row[kind])
            + ")"
            for partition, row in sorted(lacking.items(), key=lambda item: item[1]["accepted"] - item[1]["asked"])
        ]
        if shown:
            facts["took part in less"] = _some(shown)
        reasons = Counter(fault.reason.split(";")[0] for fault in self.faults)
        reasons.update(f"a node: {refusal.reason}" for refusal in self.refused_nodes)
        if reasons:
            facts["left out because"] = _some([f"{reason} ({count})" for reason, count in reasons.most_common()])
        return facts

    def facts(self) -> dict[str, str]:
        """What a model card tells of the run, label -> text. Names no path: they are this host's affair."""
        settings, federation = self.settings, self.settings.federation
        done = max(self.uplinks, key=lambda uplink: uplink.server_round).server_round if self.uplinks else 0
        account = self.account().to_json()
        sent = {
            "rounds": f"{done}, {federation.clients_per_round} of {federation.num_clients} clients drawn for each",
            **({} if settings.privacy.secret_sampling else self._who_took_part()),
            "codec": settings.codec.name if settings.arm == "coded" else "none",
            "bytes up per client and round": f"{self.payload_bytes_per_client_round:,.0f}",
            "bits up per parameter": f"{self.bits_per_parameter:.3f}",
            "bytes in all": ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in account.items()),
        }
        return {
            "run": settings.run_id or "-",
            "arm": settings.arm,
            **(sent if self.uplinks else {}),
            "adapter parameters": f"{self.num_parameters:,}",
            **({"ended early": self.ended_early} if self.ended_early else {}),
            **({} if self.adapter_round is None else {"kept": self._kept()}),
            **self._losses(),
            **in_words_of_nodes(self.federated_loss),
            "task": settings.task.name,
            "seed": str(settings.seed),
            "made with": ", ".join(f"{name} {version}" for name, version in provenance().items()),
        }

    def _losses(self) -> dict[str, str]:
        """For a model card: by the server's own text."""
        if not self.heldout_loss:
            return {"held-out loss": "not measured by the server, which held neither base model nor text"}
        first, last = self.heldout_loss[0], self.heldout_loss[-1 if self.adapter_round is None else self.adapter_round]
        return {
            "held-out loss, nats per token": f"{first:.4f} -> {last:.4f}",
            "held-out perplexity": f"{perplexity(first):.3f} -> {perplexity(last):.3f}",
        }

    def _kept(self) -> str:
        return f"the adapter of round {self.adapter_round} of {self.rounds_done}, which had the lowest loss"

    def notes(self) -> dict[str, list[str]]:
        """Sections of a model card, title -> paragraphs."""
        if not self.privacy:
            return {}
        try:
            return {"Privacy": in_words(self.privacy)}
        except (KeyError, TypeError, ValueError, AttributeError):  # results that somebody else wrote
            return {"Privacy": ["What this run promised cannot be read from its results."]}

    def state(self) -> dict[str, Any]:
        """What cannot be derived, as JSON."""
        return {
            "num_parameters": self.num_parameters,
            "heldout_loss": self.heldout_loss,
            "seconds": self.seconds,
            "faults": [dataclasses.asdict(fault) for fault in self.faults],
            "uplinks": [dataclasses.asdict(uplink) for uplink in self.uplinks],
            "downlinks": [dataclasses.asdict(downlink) for downlink in self.downlinks],
            "refused_nodes": [dataclasses.asdict(refusal) for refusal in self.refused_nodes],
            "delivery_bytes": self.delivery_bytes,
            "codec_cost": dataclasses.asdict(self.codec_cost),
            "node_losses": [dataclasses.asdict(one) for one in self.node_losses],
            "privacy": self.privacy,
            "ended_early": self.ended_early,
            "adapter_round": self.adapter_round,
        }

    @classmethod
    def of_state(cls, settings: Settings, state: dict[str, Any]) -> RunResults:
        """Inverse of ``state``; other keys are left aside. Raises KeyError, TypeError or ValueError: it is none."""
        return cls(
            settings,
            _typed(state["num_parameters"], int),
            [_typed(loss, float) for loss in _typed(state["heldout_loss"], list)],
            [_record(Uplink, uplink) for uplink in _typed(state["uplinks"], list)],
            [_record(Fault, fault) for fault in _typed(state["faults"], list)],
            _typed(state["seconds"], float),
            [_record(Downlink, downlink) for downlink in _typed(state["downlinks"], list)],
            [_record(NodeRefusal, refusal) for refusal in _typed(state.get("refused_nodes", []), list)],
            [_typed(size, int) for size in _typed(state["delivery_bytes"], list)],
            _record(CodecCost, state["codec_cost"]),
            _typed(state.get("privacy", {}), dict),
            _typed(state.get("ended_early", ""), str),
            [_record(NodeLoss, one) for one in _typed(state.get("node_losses", []), list)],
            _typed_or_none(state.get("adapter_round"), int | None),
        )

    def to_json(self) -> dict[str, Any]:
        per_client_round = self.payload_bytes_per_client_round
        account, num_clients = self.account(), self.settings.federation.num_clients
        return {
            "arm": self.settings.arm,
            "seed": self.settings.seed,
            **self.state(),
            "heldout_perplexity": self.heldout_perplexity,
            "federated_loss": [one.to_json() for one in self.federated_loss],
            "participation": {str(partition): row for partition, row in self.participation().items()},
            "uplink_payload_bytes_per_client_round": per_client_round,
            "bits_per_parameter": self.bits_per_parameter,
            "uplink_payload_bytes": sum(uplink.payload_bytes for uplink in self.uplinks),
            "bytes": account.to_json(),
            "bytes_of_clients": {str(p): one.to_json() for p, one in self.accounts_of_clients().items()},
            "transfer_seconds_of_a_client": transfer_seconds(
                account.up / num_clients, (account.down + account.delivery) / num_clients
            ),
            "settings": dataclasses.asdict(self.settings),
            "made_with": provenance(),
        }


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")


def _typed(value: Any, kind: type[T]) -> T:
    """The value. Raises TypeError: it is of another kind; whole numbers are floats, too."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:60]!r} is no {kind.__name__}")
    return value


def _record(schema: type[T], content: Any) -> T:
    """A dataclass of plain fields from its JSON. Raises TypeError: it is none."""
    kinds = get_type_hints(schema)
    if not isinstance(content, dict) or not content.keys() <= kinds.keys():
        raise TypeError(f"{str(content)[:60]!r} is no {schema.__name__}")
    return schema(**{key: _typed_or_none(value, kinds[key]) for key, value in content.items()})


def _typed_or_none(value: Any, kind: Any) -> Any:
    """As ``_typed``; of what may be missing None is an answer as well."""
    others = [one for one in get_args(kind) if one is not NoneType]
    return None if others and value is None else _typed(value, others[0] if others else kind)


def load_results(path: Path, settings: Settings) -> RunResults:
    """Inverse of ``to_json``. Raises ValueError: there is no such file here."""
    if not path.is_file():
        raise ValueError(f"the run is finished, but {path} is not on this host: look on the SuperLink's host")
    return RunResults.of_state(settings, json.loads(path.read_text()))


def read_results(run: Path) -> RunResults:
    """What a finished run wrote. Raises ValueError: it cannot be read."""
    path = run / "results.json"
    try:
        settings = Settings.from_json(json.dumps(json.loads(path.read_text())["settings"]))
        return load_results(path, settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not what a run writes ({error!r}): give the run's adapter folder alone") from None
