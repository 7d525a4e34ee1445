"""Nodes on slow lines send fewer bits than the others of their round: they count alike, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid
from flwr.app import UserConfig
from test_federation import run, settings_for

from client.app import app as client_app
from client.work import MAX_BITS
from conf.schema import Settings
from gradcodec.client import ClientEnd
from gradcodec.exchange import decode_blocks
from gradcodec.transfers import context_of
from server.records.results import RunResults
from server.run.federation import run_federation

RATES = {0: 0.1, 1: 0.3, 2: 1.0}
"""Partition -> bits a parameter."""


class OwnRates(InProcessGrid):
    """Every node says its own rate."""

    rates = RATES

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for partition, context in enumerate(self.contexts.values()):
            context.node_config = UserConfig({**context.node_config, MAX_BITS: str(self.rates[partition])})


def coded(folder: Path, name: str, bits: float | None = 1.0, codec: str = "learned") -> Settings:
    settings = settings_for(folder, name, arm="coded")
    settings.codec.name, settings.codec.bits, settings.codec.down_bits = codec, bits, 0.5
    settings.federation.clients_per_round = settings.federation.num_clients
    settings.federation.sample_answers = 0
    return settings


def test_each_sends_what_its_line_bears_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all rounds, what a client's updates add up to is what was decoded of its payloads, and what is left."""
    updates: dict[int, torch.Tensor] = {}
    decoded: dict[int, torch.Tensor] = {}
    left: dict[int, torch.Tensor] = {}
    true = ClientEnd.encode

    def watched(end: Any, update: Any, memory: Any, place: Any, codec: Any) -> bytes:
        payload = true(end, update, memory, place, codec)
        blocks_RC = end.layout.to_blocks(update).double()
        context = context_of(end.run_id, place.server_round, place.client)
        seen_RC = decode_blocks(payload, codec=codec, side=place.side, context=context).double()
        updates[place.client] = updates.get(place.client, 0) + blocks_RC
        decoded[place.client] = decoded.get(place.client, 0) + seen_RC
        left[place.client] = memory.load_residual(end.layout, place.server_round + 1).error_RC.double()
        return payload

    monkeypatch.setattr(ClientEnd, "encode", watched)
    settings = coded(tmp_path, "own", bits=2.0)
    settings.codec.feedback = 1.0
    results = run(settings, tmp_path, OwnRates)
    assert not results.faults and len(results.uplinks) == 9
    for partition, bits in RATES.items():
        sizes = [uplink.payload_bytes for uplink in results.uplinks if uplink.partition == partition]
        assert all(0.8 * bits < 8 * size / results.num_parameters <= bits for size in sizes), (partition, sizes)
        torch.testing.assert_close(decoded[partition] + left[partition], updates[partition], rtol=1e-4, atol=1e-6)


def test_they_end_between_the_uniform_runs(tmp_path: Path) -> None:
    """By loss, as by bytes: better than all at the lowest rate, and near all at the mean rate."""

    def ended(name: str, bits: float, grid: type[InProcessGrid] = InProcessGrid) -> RunResults:
        settings = coded(tmp_path / name, name, bits)
        settings.run_id, settings.train.steps, settings.federation.rounds = "same", 4, 4
        return run(settings, tmp_path / name, grid)

    own, least = ended("own", 1.0, OwnRates), ended("least", 0.1)
    mean = ended("mean", sum(RATES.values()) / len(RATES))
    won = mean.heldout_loss[0] - mean.heldout_loss[-1]
    assert own.heldout_loss[-1] < least.heldout_loss[-1]
    assert abs(own.heldout_loss[-1] - mean.heldout_loss[-1]) < 0.2 * won
    assert abs(own.payload_bytes_per_client_round / mean.payload_bytes_per_client_round - 1) < 0.05


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arm": "dense"}, "needs arm=coded"),
        (
            {"codec__name": "sign", "codec__bits": None, "codec__down_bits": None},
            "codec=sign, which has one rate alone",
        ),
    ],
)
def test_a_run_that_has_no_other_rate_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    settings = settings_for(tmp_path, "run", **({"arm": "coded"} | changes))
    grid = InProcessGrid(client_app, settings.federation.num_clients, {MAX_BITS: "0.1", "memory": str(tmp_path)})
    with pytest.raises(ValueError, match=said):
        run_federation(grid, settings)
