"""Clients of lower ranks train and send fewer rows: the server takes those alone, weighs every row by who trained it,
and nothing is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import InProcessGrid, apply_changes
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from test_federation import run, settings_for
from torch import Tensor

from adapters.finetune import finetune, trained_parts
from adapters.model import get_adapter, load_model
from client.app import app as client_app
from client.trainer import Trainer
from client.work import MAX_RANK
from conf.checks import check_settings
from conf.limits import ClientLimits, limits_of
from conf.schema import Settings
from gradcodec.client import ClientEnd
from gradcodec.exchange import decode_blocks
from gradcodec.layout import Layout, rank_first
from gradcodec.transfers import context_of
from server.records.results import RunResults
from server.run.federation import run_federation
from strategies.mean import MeanStrategy
from strategies.tensors import to_record
from strategies.wire import ARRAYS, CONFIG, METRICS, NUM_EXAMPLES, RANK

RANKS = [2, 4, 8]
"""Of partitions 0, 1, 2; the adapter has 8."""


def ranked(folder: Path, name: str, **changes: Any) -> Settings:
    settings = settings_for(folder, name, **({"arm": "coded"} | changes))
    settings.lora.rank = 8
    settings.federation.clients_per_round = settings.federation.num_clients
    settings.federation.client_ranks, settings.federation.sample_answers = [*RANKS], 0
    if settings.arm == "coded":
        settings.codec.bits, settings.codec.down_bits = 0.5, 0.5
    return settings


def test_nothing_is_lost_and_bytes_go_by_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all rounds, what a client's updates add up to is what the server takes of its payloads, and what is left."""
    sums: dict[str, dict[int, Tensor]] = {"updates": {}, "taken": {}, "left": {}}
    true = ClientEnd.encode

    def watched(end: Any, update: Any, memory: Any, place: Any, codec: Any) -> bytes:
        payload = true(end, update, memory, place, codec)
        blocks_RC = end.layout.to_blocks(update).double()
        rank = RANKS[place.client]
        assert float(blocks_RC[rank:].abs().sum()) == 0 < float(blocks_RC[rank - 1].abs().sum())
        context = context_of(end.run_id, place.server_round, place.client)
        taken_RC = decode_blocks(payload, codec=codec, side=place.side, context=context).double()
        taken_RC[rank:] = 0
        sums["updates"][place.client] = sums["updates"].get(place.client, 0) + blocks_RC
        sums["taken"][place.client] = sums["taken"].get(place.client, 0) + taken_RC
        sums["left"][place.client] = memory.load_residual(end.layout, place.server_round + 1).error_RC.double()
        return payload

    monkeypatch.setattr(ClientEnd, "encode", watched)
    settings = ranked(tmp_path, "own")
    settings.codec.feedback = 1.0
    results = run(settings, tmp_path)
    assert not results.faults and len(results.uplinks) == 9
    for partition, rank in enumerate(RANKS):
        own = [uplink for uplink in results.uplinks if uplink.partition == partition]
        assert {uplink.rank for uplink in own} == {rank if rank < 8 else None}
        trained = results.num_parameters * rank / 8
        assert all(0.8 * 0.5 < 8 * uplink.payload_bytes / trained <= 0.5 for uplink in own), partition
        both = sums["taken"][partition] + sums["left"][partition]
        torch.testing.assert_close(both, sums["updates"][partition], rtol=1e-4, atol=1e-6)


def test_they_end_between_all_low_and_all_high(tmp_path: Path) -> None:
    def ended(name: str, ranks: list[int]) -> float:
        settings = ranked(tmp_path / name, name, arm="dense", train__steps=4, federation__rounds=4)
        settings.run_id, settings.lora.rank, settings.federation.client_ranks = "same", 16, ranks
        settings.federation.num_clients = settings.federation.clients_per_round = 6
        return run(settings, tmp_path / name).heldout_loss[-1]

    low, own, high = ended("low", [4]), ended("own", [4, 8, 16]), ended("high", [])
    assert high < own < low, (high, own, low)


@pytest.mark.parametrize("changes", [{"arm": "dense"}, {"lora__dora": True}, {"lora__train": "b"}])
def test_with_other_arms_and_adapters(tmp_path: Path, changes: dict[str, Any]) -> None:
    results = run(ranked(tmp_path, "run", federation__rounds=2, **changes), tmp_path)
    assert not results.faults and results.heldout_loss[-1] < results.heldout_loss[0]
    assert {uplink.rank for uplink in results.uplinks} == {2, 4, None}
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    tables = [part for section in content["sections"] for part in section["parts"] if part.get("title") == "By client"]
    assert [row[-1] for row in tables[0]["rows"]] == [2, 4, 8]


def test_a_recorded_run_is_the_same_run(tmp_path: Path) -> None:
    plain, recorded = (
        ranked(tmp_path / name, name, arm="dense", federation__rounds=2) for name in ("plain", "recorded")
    )
    plain.run_id = recorded.run_id = "same"
    recorded.record = str(tmp_path / "updates.safetensors")
    assert run(recorded, tmp_path / "recorded").heldout_loss == run(plain, tmp_path / "plain").heldout_loss


def test_the_owner_of_a_node_has_the_last_word(tmp_path: Path) -> None:
    class OneLow(InProcessGrid):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            context = list(self.contexts.values())[2]
            context.node_config = UserConfig({**context.node_config, MAX_RANK: "1"})

    results = run(ranked(tmp_path, "run", federation__rounds=1), tmp_path, OneLow)
    assert {(uplink.partition, uplink.rank) for uplink in results.uplinks} == {(0, 2), (1, 4), (2, 1)}
    settings = ranked(tmp_path, "run")
    settings.codec.bits, settings.federation.client_bits = 0.5, [0.1, 2.0]
    assert limits_of(settings, 1, ClientLimits(rank=16)) == ClientLimits(None, 4)
    assert limits_of(settings, 3, ClientLimits(bits=0.2)) == ClientLimits(0.2, 2)
    assert limits_of(settings, 2, ClientLimits(bits=0.2)) == ClientLimits(0.1, 8)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_with_a_server_that_remembers(tmp_path: Path, kind: str) -> None:
    settings = ranked(tmp_path, kind, strategy__name=kind, federation__rounds=2)
    settings.strategy.lr = 0.02 if kind == "fedadam" else 0.5
    assert run(settings, tmp_path).heldout_loss[-1] < 3.7


def test_every_row_is_the_mean_of_those_who_train_it_and_as_long_as_the_others() -> None:
    shapes = {"x.lora_A.weight": (3, 5), "x.lora_B.weight": (6, 3)}
    origin = {name: torch.randn(shape) for name, shape in shapes.items()}
    updates = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)]
    ranks, weights = (1, None, 2), (4.0, 1.0, 3.0)
    nodes: dict[str, Any] = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}
    strategy = MeanStrategy(FedAvg(**nodes, weighted_by_key=NUM_EXAMPLES, arrayrecord_key=ARRAYS))
    grid = cast(Grid, SimpleNamespace(get_node_ids=lambda: [1]))

    def reply(update: Mapping[str, Tensor], rank: int | None, weight: float) -> Message:
        adapter = {name: origin[name] + moved for name, moved in update.items()}
        if rank is not None:
            for name, tensor in adapter.items():
                rank_first(name, tensor)[rank:] = rank_first(name, origin[name])[rank:]
        content = RecordDict({ARRAYS: to_record(adapter), METRICS: MetricRecord({NUM_EXAMPLES: weight})})
        if rank is not None:
            content[CONFIG] = ConfigRecord({RANK: rank})
        return Message(content, 1, "train")

    def mean(ranks: tuple[int | None, ...]) -> dict[str, Tensor]:
        list(strategy.configure_train(1, to_record(origin), ConfigRecord(), grid))
        replies = [reply(*one) for one in zip(updates, ranks, weights, strict=True)]
        arrays, _ = strategy.aggregate_train(1, replies)
        assert arrays is not None
        return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}

    found = mean(ranks)
    for name in shapes:
        moved = rank_first(name, found[name] - origin[name])
        each = [rank_first(name, update[name]) for update in updates]
        torch.testing.assert_close(moved[0], (4 * each[0][0] + each[1][0] + 3 * each[2][0]) / 8)
        torch.testing.assert_close(moved[1], (each[1][1] + 3 * each[2][1]) / 4 * math.sqrt(4 / 8))
        torch.testing.assert_close(moved[2], each[1][2] * math.sqrt(1 / 8))
    nobody = mean((1, 2, 2))
    for name in shapes:
        assert torch.equal(rank_first(name, nobody[name])[2], rank_first(name, origin[name])[2])


def test_rows_of_the_rank_alone_are_trained_and_remembered(tmp_path: Path) -> None:
    settings = ranked(tmp_path, "run")
    settings.train.weight_decay = 0.1  # which would move rows that have no gradient
    trainer = Trainer(settings)
    model, windows = load_model(settings.model, settings.lora, 0), trainer.shard(0).train
    adapter = {name: tensor.normal_(std=0.02) for name, tensor in get_adapter(model).items()}
    update, _ = finetune(model, adapter, windows, settings.train, 0, trained_rank=3)
    for name, change in update.items():
        rows = rank_first(name, change)
        assert bool((rows[:3].abs().sum(1) > 0).all()) and float(rows[3:].abs().max()) == 0, name
    layout = Layout.of({name: tuple(tensor.shape) for name, tensor in adapter.items()})
    parts = trained_parts(model, 3)
    assert sum(one.part.numel() for one in parts) == layout.num_parameters_of(3) == layout.num_parameters * 3 // 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"federation__client_ranks": [4, 16]}, "holds 16: each must be greater than 0 and at most 8"),
        ({"federation__client_ranks": [0]}, "holds 0"),
        ({"federation__client_bits": [0.5, -1.0]}, "client_bits holds -1"),
        ({"arm": "base"}, "arm=base asks no clients"),
        ({"strategy__name": "fedmedian"}, "strategy=fedmedian, which compares whole updates"),
        ({"arm": "dense", "federation__client_bits": [0.1]}, "needs arm=coded"),
        ({"privacy__secure_aggregation": True, "federation__min_replies": 3}, "do not tell who trained which rows"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    settings = ranked(tmp_path, "run")
    apply_changes(settings, changes)
    with pytest.raises(ValueError, match=said):
        check_settings(settings)


def test_a_node_says_why_it_cannot_take_part(tmp_path: Path) -> None:
    settings = ranked(tmp_path, "run", strategy__name="fedmedian")
    settings.federation.client_ranks = []
    grid = InProcessGrid(client_app, settings.federation.num_clients, {MAX_RANK: "2", "memory": str(tmp_path)})
    with pytest.raises(ValueError, match=r"trains at most rank 2 .*compares whole updates"):
        run_federation(grid, settings)


def test_a_node_too_small_for_the_model_says_so_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_small(*_: Any) -> None:
        raise ValueError("the model does not fit")

    monkeypatch.setattr("client.trainer.check_fits", too_small)
    trainer = Trainer(ranked(tmp_path, "run"), own_limits=ClientLimits(rank=2))
    with pytest.raises(ValueError, match="does not fit"):
        trainer.check(0)
    assert "model" not in trainer.__dict__


@pytest.mark.parametrize("rank", [0, -1, float("nan"), 1e9])
def test_a_rank_that_is_none_is_refused(tmp_path: Path, rank: float) -> None:
    class Liar(InProcessGrid):
        def answer(self, message: Message) -> Message | None:
            reply = super().answer(message)
            if reply is not None and reply.has_content() and RANK in reply.content.metric_records.get(METRICS, {}):
                reply.content.metric_records[METRICS][RANK] = rank
            return reply

    results: RunResults = run(ranked(tmp_path, "run", federation__rounds=1), tmp_path, Liar)
    assert [uplink.partition for uplink in results.uplinks] == [2] and len(results.faults) == 2
    assert all("rank" in fault.reason for fault in results.faults)
