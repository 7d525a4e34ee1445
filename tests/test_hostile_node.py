"""A node with a valid key that does harm in every round: the others lose next to nothing, and it is named.

``-rP`` prints the held-out losses beside the undisturbed run's. What no test of norms can notice, a wrong direction of
the usual length, is not in here (``strategies/norms.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import InProcessGrid
from flwr.app import ArrayRecord, Error, Message
from test_federation import settings_for

from client.app import app as client_app
from conf.schema import Settings
from gradcodec.artifact import Artifact, save_artifact
from gradcodec.frame import pack, unpack
from gradcodec.learned.tables import LearnedTables
from gradcodec.transfers import context_of
from server.records.events import read_status
from server.records.results import RunResults
from server.run.federation import run_federation
from strategies.wire import (
    ARRAYS,
    CONFIG,
    METRICS,
    PARTITION,
    SERVER_ROUND,
    unwrap_adapter,
    unwrap_payload,
    wrap_adapter,
    wrap_payload,
)

NODE, PARTITION_OF_NODE, ROUNDS = 1007, 1, 7


class HostileGrid(InProcessGrid):
    """The node trains as it should and then sends something else, another thing in each round."""

    settings: Settings

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        if reply is None or message.metadata.message_type != "train":
            return reply
        server_round = int(str(message.content.config_records[CONFIG][SERVER_ROUND]))
        sent = self.__dict__.setdefault("kept", {})
        sent[server_round, reply.metadata.src_node_id] = reply.content.array_records[ARRAYS]
        if message.metadata.dst_node_id != NODE:
            return reply
        if server_round == 4:
            return Message(Error(0, "\x1b]0;owned\x07" + "x" * 101_000_000), reply_to=message)
        if server_round == 5:
            reply.content.metric_records[METRICS][PARTITION] = 0
        replaced: dict[int, Callable[[], ArrayRecord]] = {
            1: lambda: self.scaled(message, reply, 2.0**14),
            2: lambda: sent[1, NODE if self.settings.arm == "coded" else 1000],  # one of round 1; dense: that was taken
            3: lambda: sent[3, 1000],  # another's of this round
            6: lambda: self.scaled(
                message, reply, 2.5 if self.settings.arm == "coded" else 6.0
            ),  # it kept what was refused
            7: lambda: sent[6, 1000],  # another's of an earlier round
        }
        if server_round in replaced:
            reply.content[ARRAYS] = replaced[server_round]()
        return reply

    def scaled(self, message: Message, reply: Message, factor: float) -> ArrayRecord:
        """The honest update times a factor, in a frame that is valid in every byte."""
        if self.settings.arm == "coded":
            server_round = int(str(message.content.config_records[CONFIG][SERVER_ROUND]))
            context = context_of(self.settings.run_id, server_round, PARTITION_OF_NODE)
            frame = unpack(unwrap_payload(reply.content), 1, context)
            gain = min(frame.gain * factor, 65504.0)
            return wrap_payload(pack(dataclasses.replace(frame, gain=gain), context))
        old, new = unwrap_adapter(message.content), unwrap_adapter(reply.content)
        factor = min(factor, 1e5 / max(float(np.abs(new[name] - old[name]).max()) for name in new))
        return wrap_adapter({name: old[name] + np.float32(factor) * (new[name] - old[name]) for name in new})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, learned_tables: LearnedTables) -> str:
    folder = tmp_path_factory.mktemp("artifact") / "codec"
    save_artifact(Artifact("learned", learned_tables.to_tensors(), {"codec": {}, "trained": {}}), folder)
    return str(folder)


def run(folder: Path, artifact: str, arm: str, grid_type: type[InProcessGrid], **changes: object) -> RunResults:
    settings = settings_for(folder, grid_type.__name__, arm=arm, codec__artifact=artifact, **changes)
    settings.federation.num_clients = settings.federation.clients_per_round = 4
    settings.federation.rounds, settings.federation.rest_rounds = ROUNDS, 0  # it is let in again every round
    grid = grid_type(client_app, 4, {"memory": str(folder / "memory")})
    grid.__dict__["settings"] = settings
    return run_federation(grid, settings)


@pytest.mark.parametrize("arm", ["coded", "dense"])
def test_a_hostile_node_in_every_round_costs_next_to_nothing_and_is_named(
    tmp_path: Path, artifact: str, arm: str
) -> None:
    undisturbed = run(tmp_path, artifact, arm, InProcessGrid)
    assert not undisturbed.faults, "honest clients are never refused"
    assert all(uplink.scale == 1 for uplink in undisturbed.uplinks), "nor scaled"
    results = run(tmp_path, artifact, arm, HostileGrid)
    print(f"{arm}: held-out loss {results.heldout_loss[-1]:.4f} beside {undisturbed.heldout_loss[-1]:.4f}")
    assert results.heldout_loss[-1] < 1.02 * undisturbed.heldout_loss[-1]
    assert {(fault.node, fault.partition) for fault in results.faults} == {(NODE, PARTITION_OF_NODE)}
    reasons = {fault.server_round: fault.reason for fault in results.faults}
    assert reasons.keys() == {1, 2, 3, 4, 5, 7}
    assert "strategy.max_norm_ratio" in reasons[1]
    said = "partition 1 in round 1, sent again" if arm == "coded" else "one of round 1, sent again"
    assert said in reasons[2]
    said = "partition 0 in round 3, sent again" if arm == "coded" else "what partition 0 sent in this round"
    assert said in reasons[3]
    assert len(reasons[4]) < 700 and "\x1b" not in reasons[4] and "owned" not in reasons[4]
    assert "answers for partition 0" in reasons[5]
    (scaled,) = (uplink for uplink in results.uplinks if uplink.scale < 1)
    assert (scaled.server_round, scaled.partition) == (6, PARTITION_OF_NODE)
    output = Path(results.settings.output)
    assert all(path.stat().st_size < 3_000_000 for path in output.rglob("*") if path.is_file())
    assert read_status(output).state == "finished"
    assert results.participation()[PARTITION_OF_NODE] == {
        "asked": 7, "accepted": 1, "absent": 0, "failed": 1, "refused": 5,
    }  # fmt: skip
    assert "client 1 in 1 of 7 rounds (1 failed, 5 refused)" in results.facts()["took part in less"]
