"""A federation whose broadcast is coded, too: the real ClientApp and round loop, without Flower's engines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import InProcessGrid, apply_changes
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.torch import load_file

from adapters.model import adapter_parts, adapter_shapes, get_adapter, load_model
from client.app import app as client_app
from client.holdings import load_held
from conf.checks import check_settings
from conf.schema import FederationSettings, Settings
from gradcodec.artifact import RECORDED, Artifact, save_artifact
from gradcodec.layout import Layout
from gradcodec.learned.tables import LearnedTables
from server.records.events import read_status
from server.records.results import RunResults
from server.run.checkpoint import load_checkpoint
from server.run.federation import run_federation
from strategies.wire import ARRAYS, CONFIG, LACKS

TINY = Path("assets/tiny-llama").absolute()
RECORDED_BYTES = 12_345


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, learned_tables: LearnedTables) -> str:
    folder = tmp_path_factory.mktemp("artifact") / "codec"
    trained = {RECORDED: RECORDED_BYTES}
    save_artifact(Artifact("learned", learned_tables.to_tensors(), {"codec": {}, "trained": trained}), folder)
    return str(folder)


def settings_for(folder: Path, artifact: str, **changes: object) -> Settings:
    settings = Settings(output=str(folder / "run"), run_id="both-ways")
    settings.model.path, settings.codec.artifact, settings.codec.down_bits = str(TINY), artifact, 0.5
    settings.task.window, settings.task.heldout_windows, settings.task.max_windows = 32, 4, 200
    settings.train.update, settings.train.lr, settings.train.steps = "delta", 0.005, 2
    settings.train.batch_size = settings.train.micro_batch_size = 4
    settings.federation = FederationSettings(rounds=4, num_clients=4, clients_per_round=2, wait_seconds=5.0)
    apply_changes(settings, changes)
    return settings


class Counting(InProcessGrid):
    """Notes how many bytes of arrays training messages bring."""

    def bytes_down(self) -> int:
        sent = [m.content.array_records for m in self.sent if ARRAYS in m.content.array_records]
        return sum(len(a.data) for records in sent for record in records.values() for a in record.values())


def run(settings: Settings, folder: Path, grid_type: type[Counting] = Counting) -> tuple[RunResults, Counting]:
    grid = grid_type(client_app, settings.federation.num_clients, {"memory": str(folder / "memory")})
    return run_federation(grid, settings), grid


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory, artifact: str) -> tuple[RunResults, Counting, Path]:
    folder = tmp_path_factory.mktemp("smooth")
    return *run(settings_for(folder, artifact), folder), folder


def layout_and_start(settings: Settings) -> tuple[Layout, torch.Tensor]:
    model = load_model(settings.model, settings.lora, settings.seed)
    layout = Layout.of(adapter_shapes(model), adapter_parts(model))
    return layout, layout.to_blocks(get_adapter(model))


def test_both_ways_fit_their_budgets_and_all_of_it_is_counted(smooth: tuple[RunResults, Counting, Path]) -> None:
    results, grid, folder = smooth
    assert not results.faults
    assert results.heldout_loss[-1] < results.heldout_loss[0] - 0.02
    most = results.num_parameters / 16
    assert all(uplink.payload_bytes <= most for uplink in results.uplinks)
    account = results.account()
    assert account.down == grid.bytes_down()
    status = read_status(folder / "run")
    assert (status.bytes_down, status.bytes_missed) == (account.down, account.catch_up + account.snapshots)
    steps = [one for one in results.downlinks if one.step_bytes > 16]
    assert all(one.step_bytes <= most + 8 for one in steps)
    assert {one.server_round for one in steps} <= {2, 3, 4}
    assert account.down < 8 * 4 * results.num_parameters / 8
    assert 0 < account.delivery < 4 * 4 * results.num_parameters
    sizes = [path.stat().st_size for path in Path(str(results.settings.codec.artifact)).iterdir()]
    assert account.artifact == 4 * sum(sizes)
    assert account.recording == RECORDED_BYTES
    assert account.total == account.up + account.down + account.delivery + account.artifact + RECORDED_BYTES


def test_a_client_holds_what_the_server_held(smooth: tuple[RunResults, Counting, Path]) -> None:
    """To the bit: each of the last round's clients the adapter that the round started from."""
    results, _, folder = smooth
    layout, start_RC = layout_and_start(results.settings)
    before = load_checkpoint(folder / "run", 3).adapter
    for uplink in results.uplinks[-2:]:
        held = load_held(folder / "memory" / "both-ways", uplink.partition, layout, start_RC)
        for name, tensor in layout.to_update(held.adapter_RC).items():
            assert torch.equal(tensor, before[name])


class Forgetful(Counting):
    """In round 3 all clients have lost their disks; in round 4 they are damaged."""

    def answer(self, message: Message) -> Message | None:
        config = message.content.config_records[CONFIG]
        memory = Path(str(self.contexts[message.metadata.dst_node_id].node_config["memory"]))
        if config.get("server-round") == 3:
            for path in memory.rglob("*.adapter.safetensors"):
                path.unlink()
        if config.get("server-round") == 4:
            for path in memory.rglob("*.adapter.safetensors"):
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(data)
        return super().answer(message)


def test_lost_and_damaged_disks_cost_snapshots_and_nothing_else(
    tmp_path: Path, artifact: str, smooth: tuple[RunResults, Counting, Path]
) -> None:
    results, grid = run(settings_for(tmp_path, artifact), tmp_path, Forgetful)
    assert not results.faults
    assert results.heldout_loss == smooth[0].heldout_loss
    assert results.account().down == grid.bytes_down()
    assert results.account().snapshots > smooth[0].account().snapshots
    assert all(one.total_bytes < 4 * results.num_parameters for one in results.downlinks), "the seed gives the start"


def test_a_resumed_run_finds_clients_ahead_of_it(
    tmp_path: Path, artifact: str, smooth: tuple[RunResults, Counting, Path]
) -> None:
    results, _, folder = smooth
    shutil.copytree(folder, tmp_path / "copy")
    for memory in ((tmp_path / "copy"), tmp_path / "new"):  # clients that are ahead; clients that hold nothing
        settings = settings_for(tmp_path / "copy", artifact, resume=str(tmp_path / "copy" / "run"), from_round=3)
        again, _ = run(settings, memory)
        assert not again.faults
        assert all(one.total_bytes < 4 * again.num_parameters for one in again.downlinks), "the seed gives the start"
        if memory.name == "copy":
            assert again.heldout_loss == results.heldout_loss


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
def test_every_strategy_starts_from_what_all_hold(tmp_path: Path, artifact: str, strategy: str) -> None:
    """At 0.1 bit much of a step is left out, and a strategy that went on from the uncoded adapter would come elsewhere
    than one that is resumed."""
    changes: dict[str, object] = {
        "codec__down_bits": 0.1,
        "strategy__name": strategy,
        "strategy__lr": 0.03 if strategy == "fedadam" else 1.3,
    }
    whole, _ = run(settings_for(tmp_path, artifact, **changes), tmp_path)
    changes |= {"resume": str(tmp_path / "run"), "from_round": 3}
    again, _ = run(settings_for(tmp_path, artifact, **changes), tmp_path)
    assert again.heldout_loss == whole.heldout_loss


def test_a_run_that_goes_on_from_an_adapter_sends_it_once(
    tmp_path: Path, artifact: str, smooth: tuple[RunResults, Counting, Path]
) -> None:
    results, _, folder = smooth
    settings = settings_for(tmp_path, artifact, lora__start=str(folder / "run" / "adapter"), federation__rounds=3)
    further, grid = run(settings, tmp_path)
    assert not further.faults
    assert further.heldout_loss[0] == pytest.approx(results.heldout_loss[-1], abs=1e-6)
    assert further.heldout_loss[-1] < further.heldout_loss[0]
    sent = {one.partition for one in further.downlinks if one.snapshot_bytes > 2 * further.num_parameters}
    assert sent == {one.partition for one in further.downlinks}
    assert further.account().snapshots < (len(sent) + 0.9) * 4 * further.num_parameters
    assert further.account().down == grid.bytes_down()


def test_identity_both_ways_is_nearly_the_dense_run(tmp_path: Path, artifact: str) -> None:
    """But for the grid, which each step makes up for in the next one."""
    dense, _ = run(settings_for(tmp_path, artifact, output=str(tmp_path / "dense"), arm="dense"), tmp_path)
    changes: dict[str, object] = {"codec__name": "identity", "codec__artifact": None}
    coded, _ = run(
        settings_for(tmp_path, artifact, output=str(tmp_path / "identity"), **changes), tmp_path / "identity"
    )
    assert coded.heldout_loss == pytest.approx(dense.heldout_loss, abs=2e-3)
    final = load_file(tmp_path / "identity" / "adapter" / "adapter_model.safetensors")
    assert final.keys() == load_file(tmp_path / "dense" / "adapter" / "adapter_model.safetensors").keys()


def test_a_budget_that_cannot_be_is_refused(tmp_path: Path, artifact: str) -> None:
    with pytest.raises(ValueError, match=r"codec.down_bits=0\.0 bits per parameter"):
        check_settings(settings_for(tmp_path, artifact, codec__down_bits=0.0))


@pytest.mark.parametrize("key", ["bits", "down_bits"])
def test_a_budget_that_no_payload_fits_into_is_refused_before_any_work(tmp_path: Path, artifact: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"codec\.{key}=0\.001 of [0-9,]+ parameters: .* bytes"):
        run(settings_for(tmp_path, artifact, **{f"codec__{key}": 0.001}), tmp_path)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


class Lying(Counting):
    """Partition 0 says in every round, twice, that it holds something else; partition 1 answers nothing at all."""

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        if reply is None or message.metadata.message_type != "train":
            return reply
        if message.metadata.dst_node_id == 1000:
            lie = ConfigRecord({LACKS: "x" * 100_000})
            return Message(RecordDict({CONFIG: lie}), reply_to=message)
        if message.metadata.dst_node_id == 1007:
            reply.__dict__["_content"] = None
        return reply


@pytest.mark.parametrize("arm", ["coded", "dense"])
def test_a_client_that_always_lacks_something_is_left_out_and_the_run_goes_on(
    tmp_path: Path, artifact: str, arm: str
) -> None:
    changes: dict[str, object] = {"arm": arm, "federation__clients_per_round": 4, "federation__rounds": 2}
    results, grid = run(settings_for(tmp_path, artifact, **changes), tmp_path, Lying)
    assert [(fault.server_round, fault.partition) for fault in results.faults] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert "does not come to hold" in results.faults[0].reason
    asked = [m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"]
    assert asked.count(1000) == (4 if arm == "coded" else 2)  # a repair a round, and no more
    assert asked.count(1014) == 2
    assert results.heldout_loss[-1] < results.heldout_loss[0]


def test_a_step_that_cannot_be_coded_ends_the_run_as_diverged(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(tmp_path, artifact, strategy__lr=1e38)
    with pytest.raises(ValueError, match=r"training diverged: the step of round 1 cannot be coded.*Lower train\.lr"):
        run(settings, tmp_path)
