"""The other half of the fault table: what one client answers in one round, and what becomes of the run.

Partition 1 of three answers something else in round 2 of 3. The run goes on without that reply, says so, and tells the
client in the next round that its payload was not accepted, so that the client sends it again. ``-rP`` prints the
held-out losses beside the undisturbed run's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from conftest import InProcessGrid, heavy_tailed_update
from flwr.app import Message
from test_federation import settings_for

from client.app import app as client_app
from conf.schema import Settings
from gradcodec.artifact import Artifact, save_artifact
from gradcodec.exchange import digest_of, encode_update
from gradcodec.frame import Frame, pack, unpack
from gradcodec.layout import Layout
from gradcodec.learned.codec import LearnedCodec
from gradcodec.learned.tables import LearnedTables
from gradcodec.transfers import context_of
from server.records.results import RunResults
from server.run.federation import run_federation
from strategies.wire import (
    ACCEPTED,
    ARRAYS,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    SERVER_ROUND,
    SETTINGS,
    TRAIN_LOSS,
    unwrap_payload,
    wrap_payload,
)

BAD_NODE, BAD_ROUND = 1007, 2
Change = Callable[[bytes, bytes], bytes]  # payload and its context -> what is sent


class BadGrid(InProcessGrid):
    """Changes the payload of one node in one round, or its metrics, or loses, delays or doubles its reply."""

    change: Change = staticmethod(lambda payload, context: payload)
    nan = late = twice = weightless = False

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        if reply is not None and is_bad(message):
            self.sent_digest = digest_of(unwrap_payload(reply.content))
            settings = Settings.from_json(str(message.content.config_records[CONFIG][SETTINGS]))
            context = context_of(settings.run_id, BAD_ROUND, 1)
            reply.content[ARRAYS] = wrap_payload(self.change(unwrap_payload(reply.content), context))
            if self.weightless:
                reply.content.metric_records[METRICS][NUM_EXAMPLES] = 1e-300
            if self.nan:
                reply.content.metric_records[METRICS][TRAIN_LOSS] = float("nan")
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        bad = [r for r in replies if r.metadata.reply_to_message_id in {m.metadata.message_id for m in self.bad}]
        if self.late:
            return [reply for reply in replies if reply not in bad]
        return [*bad, *replies] if self.twice else replies

    @property
    def bad(self) -> list[Message]:
        return [message for message in self.sent if is_bad(message)]


def is_bad(message: Message) -> bool:
    return (
        message.metadata.message_type == "train"
        and message.metadata.dst_node_id == BAD_NODE
        and int(str(message.content.config_records[CONFIG][SERVER_ROUND])) == BAD_ROUND
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, learned_tables: LearnedTables) -> str:
    folder = tmp_path_factory.mktemp("artifact") / "codec"
    save_artifact(Artifact("learned", learned_tables.to_tensors(), {"codec": {}, "trained": {}}), folder)
    return str(folder)


def run(
    folder: Path, name: str, artifact: str, grid_type: type[BadGrid], rounds: int = 3
) -> tuple[RunResults, BadGrid]:
    changes: dict[str, object] = {"codec__artifact": artifact, "federation__round_seconds": 0.5}
    settings = settings_for(folder, name, **changes, federation__rounds=rounds, federation__clients_per_round=3)
    grid = grid_type(client_app, 3, {"memory": str(folder / "memory")})
    return run_federation(grid, settings), grid


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, artifact: str) -> RunResults:
    results, _ = run(tmp_path_factory.mktemp("undisturbed"), "undisturbed", artifact, BadGrid)
    assert not results.faults
    return results


def of_an_old_artifact(payload: bytes, context: bytes) -> bytes:
    frame = unpack(payload, 1, context)
    return pack(Frame(bytes(4), frame.layout_id, frame.gain, frame.codes), context)


@pytest.fixture(scope="module")
def other_layout(layout: Layout, learned_tables: LearnedTables) -> Change:
    codec = LearnedCodec(layout, learned_tables, b"test")
    other, _ = encode_update(heavy_tailed_update(1), None, codec=codec, max_bytes=200)
    return lambda payload, context: pack(unpack(other, 1), context)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("NaN", "its metrics are not the finite numbers"),
        ("garbage", "payload"),
        ("a bomb", "are the most of this run"),
        ("damaged", "was damaged or cut off"),
        ("no examples", "examples"),
        ("an old artifact", "both ends need the same codec artifact"),
        ("another layout", "both ends need the same"),
        ("too late", "no answer within federation.round_seconds"),
    ],
)
def test_a_bad_reply_costs_itself_and_its_update_stays_with_the_client(
    tmp_path: Path, artifact: str, undisturbed: RunResults, other_layout: Change, fault: str, reason: str
) -> None:
    changes: dict[str, Change] = {
        "garbage": lambda payload, context: b"\xc6\x01 garbage",
        "a bomb": lambda payload, context: payload + bytes(10_000_000),
        "damaged": lambda payload, context: payload[:-1] + bytes([payload[-1] ^ 1]),
        "an old artifact": of_an_old_artifact,
        "another layout": other_layout,
    }

    class Grid(BadGrid):
        change = staticmethod(changes.get(fault, BadGrid.change))
        nan, late, weightless = (fault == name for name in ("NaN", "too late", "no examples"))

    results, grid = run(tmp_path, "bad", artifact, Grid)
    (found,) = results.faults
    assert (found.server_round, found.partition) == (BAD_ROUND, 1)
    assert reason in found.reason
    assert results.heldout_loss[:BAD_ROUND] == undisturbed.heldout_loss[:BAD_ROUND]
    assert len(results.heldout_loss) == len(undisturbed.heldout_loss)
    told = {
        int(str(m.content.config_records[CONFIG][SERVER_ROUND])): m.content.config_records[CONFIG][ACCEPTED]
        for m in grid.sent
        if m.metadata.message_type == "train" and m.metadata.dst_node_id == BAD_NODE
    }
    assert told[BAD_ROUND + 1] != grid.sent_digest, "the client would think that its payload was taken"
    assert told[BAD_ROUND + 1] == told[BAD_ROUND] != ""
    improvement = undisturbed.heldout_loss[0] - undisturbed.heldout_loss[-1]
    assert results.heldout_loss[-1] < undisturbed.heldout_loss[-1] + 0.3 * improvement
    print(f"{fault}: held-out loss {results.heldout_loss[-1]:.4f} beside {undisturbed.heldout_loss[-1]:.4f}")


def test_a_reply_that_comes_twice_counts_once(tmp_path: Path, artifact: str, undisturbed: RunResults) -> None:
    class Grid(BadGrid):
        twice = True

    results, _ = run(tmp_path, "twice", artifact, Grid)
    assert results.heldout_loss == undisturbed.heldout_loss
    assert not results.faults


def test_a_client_whose_payloads_are_never_of_use_rests(tmp_path: Path, artifact: str) -> None:
    class Grid(BadGrid):
        def answer(self, message: Message) -> Message | None:
            reply = InProcessGrid.answer(self, message)
            if reply is not None and message.metadata.message_type == "train" and reply.metadata.src_node_id == 1007:
                reply.content[ARRAYS] = wrap_payload(b"garbage")
            return reply

    results, _ = run(tmp_path, "never", artifact, Grid, rounds=4)
    assert [(fault.server_round, fault.partition) for fault in results.faults] == [(1, 1), (2, 1), (3, 1)]
    assert "failed 3 times in a row and rests" in results.faults[-1].reason
