"""A message's records in one object: as they were, and nothing that a node makes up is taken for them."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from conftest import InProcessGrid
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from strategies.folding import FOLDED, LARGE, fold, unfold
from strategies.messages import Mailbox
from strategies.wire import ARRAYS, CONFIG, METRICS, unwrap_payload, wrap_payload


def content_of(payload: bytes) -> RecordDict:
    metrics = MetricRecord({"num-examples": 7, "train-loss": 2.5, "many": [1.0, 2.0]})
    config = ConfigRecord({"settings": '{"seed": 0}' * 100, "accepted": "", "flag": True, "bytes": b"\0\1"})
    return RecordDict({ARRAYS: wrap_payload(payload), METRICS: metrics, CONFIG: config})


@given(st.binary(max_size=300))
def test_records_come_back_as_they_were(payload: bytes) -> None:
    content = content_of(payload)
    folded = fold(content)
    assert [*folded] == [FOLDED]
    back = unfold(folded)
    assert back == content
    assert unwrap_payload(back) == payload
    assert unfold(content) is content
    assert fold(folded) is folded


def test_a_large_record_travels_by_itself_and_the_others_in_one() -> None:
    content = content_of(bytes(LARGE + 1))
    folded = fold(content)
    assert {*folded} == {ARRAYS, FOLDED}
    assert folded[ARRAYS] is content[ARRAYS]  # all messages of a round share it
    assert unfold(folded) == content
    config = ConfigRecord({f"key-{i}": "x" * 1000 for i in range(300)})
    assert [*fold(RecordDict({CONFIG: config}))] == [CONFIG]


def test_settings_are_deflated_and_a_payload_costs_little_beside_itself() -> None:
    payload = np.random.default_rng(0).bytes(3000)
    (record,) = fold(content_of(payload)).config_records.values()
    folded = record[FOLDED]
    assert isinstance(folded, bytes)
    assert len(payload) < len(folded) < len(payload) + 500


@given(st.binary(max_size=200))
def test_bytes_of_anybody_are_records_or_an_error(data: bytes) -> None:
    for folded in (data, zlib.compress(data)):
        try:
            unfold(RecordDict({FOLDED: ConfigRecord({FOLDED: folded})}))
        except ValueError:
            continue


def test_a_bomb_and_other_things_are_refused() -> None:
    bomb = zlib.compress(bytes(1 << 26), 9)
    with pytest.raises(ValueError, match="take more than"):
        unfold(RecordDict({FOLDED: ConfigRecord({FOLDED: bomb})}))
    for record in (ConfigRecord({FOLDED: "text"}), ConfigRecord({}), MetricRecord({FOLDED: 1})):
        with pytest.raises(ValueError, match="no folded records"):
            unfold(RecordDict({FOLDED: record}))


class Echo(InProcessGrid):
    """Answers what it is told to."""

    reply: RecordDict

    def answer(self, message: Message) -> Message | None:
        return Message(self.reply, reply_to=message)


@pytest.mark.parametrize("garbage", [b"", b"garbage", zlib.compress(b"garbage")])
def test_a_reply_that_cannot_be_unfolded_is_an_error_reply_and_the_others_are_read(garbage: bytes) -> None:
    mailbox = Mailbox(grid := Echo(ClientApp(), 1))
    replies: list[Message] = []
    for content in (RecordDict({FOLDED: ConfigRecord({FOLDED: garbage})}), fold(content_of(b"payload"))):
        grid.reply = content
        mailbox.send([Message(content_of(b""), 1000, "train")])
        replies += mailbox.arrived()
    bad, good = replies
    assert "folded records" in str(bad.error.reason)
    assert unwrap_payload(good.content) == b"payload"
