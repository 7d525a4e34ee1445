"""A reply is judged here, and only here: ``receive`` gives what it holds, or why it is of no use.

Nothing that a client sends may end the run, and nothing of a reply is used before all of it has been checked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from gradcodec.errors import CodecError
from gradcodec.exchange import digest_of
from gradcodec.layout import rank_first
from gradcodec.state import State
from strategies.outcomes import ABSENT, FAILED, REFUSED, Uplink
from strategies.peer_text import clean
from strategies.tensors import distance
from strategies.wire import (
    ARRAYS,
    CONFIG,
    LACKS,
    METRICS,
    NUM_EXAMPLES,
    PARTITION,
    PRIVATE_METRICS,
    RANK,
    REPLY_METRICS,
    SECONDS_ENCODE,
    SECONDS_TRAIN,
    SERVER_ROUND,
    SPENT,
    TRAIN_LOSS,
    metric,
)

Adapter = dict[str, Tensor]
MOST_RANK = 2**16


@dataclass(frozen=True)
class Asked:
    """Whom the server asked for what."""

    server_round: int
    partition: int
    max_examples: float  # a client's weight in the mean is its own word: this bounds it
    says_loss: bool = True  # else the loss is withheld, and how many examples there were


@dataclass(frozen=True)
class Decoded:
    """A reply that can be used. Without ``adapter`` it takes no more memory than what was sent: see ``without``."""

    asked: Asked
    content: RecordDict
    uplink: Uplink
    adapter: Adapter | None

    def without(self) -> Decoded:
        """The same, its adapter to be decoded again."""
        return replace(self, adapter=None)


@dataclass(frozen=True)
class Refused:
    """A reply that cannot be used, or none. ``kind`` as in ``outcomes.py``; ``reason`` is clean."""

    kind: str
    reason: str
    claims_another: bool = False  # it says that it holds another partition
    has_spent: bool = False  # it says that its privacy budget allows no more answers


class Receiver(Protocol):
    """What the arm decides: how an adapter comes out of a reply, and what goes out beside the next one."""

    side: Tensor | None  # the codec's side information of the next round

    def outgoing(self, partition: int) -> tuple[RecordDict, ConfigRecord]:
        """Records and config entries for one client, beside the adapter."""
        ...

    def adapter_of(self, content: RecordDict, asked: Asked, current: Mapping[str, Tensor]) -> Adapter:
        """The adapter that a reply stands for, with the names and shapes of the one that the round started from, in
        their order, all values finite. Raises CodecError: it stands for none."""
        ...

    def foresee(self, step: Adapter) -> None:
        """What the first global update may be like, before there is any."""
        ...

    def averaged(self, uplinks: Iterable[Uplink], step: Adapter) -> None:
        """The round is done: these are settled, used or never to be used, and the adapter changed by ``step``."""
        ...

    def state(self) -> State: ...

    def load_state(self, state: State) -> None:
        """Inverse of ``state``. Raises ValueError or KeyError: it is none."""
        ...


def lacks_of(reply: Message) -> str | None:
    """What a client claims to hold that cannot take in what it was sent; None: the reply says nothing of it."""
    lacks = _said(reply, LACKS)
    return lacks if isinstance(lacks, str) else None


def _said(reply: Message, key: str) -> object:
    """What a reply says instead of an update; None: nothing of the kind."""
    if reply.has_error() or not reply.has_content():
        return None
    config = reply.content.config_records.get(CONFIG)
    return None if config is None else config.get(key)


def receive(
    reply: Message | None, asked: Asked, receiver: Receiver, current: Mapping[str, Tensor]
) -> Decoded | Refused:
    """Judges one reply; None: there was none in the round's time."""
    metrics = checked(reply, asked)
    if isinstance(metrics, Refused):
        return metrics
    assert reply is not None
    uplink = uplink_of(reply.content, metrics, asked)
    try:
        started = time.perf_counter()
        adapter = decoded(reply.content, asked, receiver, current, uplink.rank)
        seconds_decode = time.perf_counter() - started
    except (CodecError, ValueError) as error:
        return Refused(REFUSED, clean(error))
    uplink = replace(uplink, update_norm=distance(adapter, current), seconds_decode=seconds_decode)
    return Decoded(asked, reply.content, uplink, adapter)


def decoded(
    content: RecordDict, asked: Asked, receiver: Receiver, current: Mapping[str, Tensor], rank: int | None
) -> Adapter:
    """The adapter that a reply stands for. Rows beyond the rank that it trained are as they were, whatever came out of
    its code there. Raises CodecError: as ``Receiver.adapter_of``."""
    adapter = receiver.adapter_of(content, asked, current)
    if rank is not None:
        for name, tensor in adapter.items():
            rank_first(name, tensor)[rank:] = rank_first(name, current[name])[rank:]
    return adapter


def checked(reply: Message | None, asked: Asked) -> MetricRecord | Refused:
    """The metrics of a reply that is there, whole, and of this client and round; its arrays are not looked at."""
    if reply is None:
        return Refused(FAILED, "no answer within federation.round_seconds")
    if reply.has_error():
        return failure_of(reply.error)
    if _said(reply, SPENT) is True:
        return Refused(REFUSED, "its own count says that its privacy budget in this run is spent", has_spent=True)
    if lacks_of(reply) is not None:
        reason = "it does not come to hold the adapter that the server holds: another base model, or another PyTorch?"
        return Refused(REFUSED, reason)
    try:
        metrics = _metrics_of(reply.content, asked)
        partition, server_round = metric(metrics, PARTITION), metric(metrics, SERVER_ROUND)
        if (partition, server_round) != (asked.partition, asked.server_round):
            reason = f"it answers for partition {partition:g} and round {server_round:g}"
            return Refused(REFUSED, reason, claims_another=partition != asked.partition)
    except ValueError as error:
        return Refused(REFUSED, clean(error))
    return metrics


def failure_of(error: Error) -> Refused:
    """Why there is no answer, by a node's word or Flower's."""
    kind = ABSENT if error.code == ErrorCode.NODE_UNAVAILABLE else FAILED
    return Refused(kind, clean(error.reason or "") or f"Flower's error {error.code}")


def _metrics_of(content: RecordDict, asked: Asked) -> MetricRecord:
    """Raises ValueError: the reply is not made of one record of arrays and one of the metrics that are wanted."""
    arrays, metrics = content.array_records.get(ARRAYS), content.metric_records.get(METRICS)
    if not arrays or metrics is None or len(content) != 2:
        names = ", ".join(sorted(str(name)[:20] for name in content)[:8])
        raise ValueError(f"its reply holds no arrays, no metrics, or more: {names}")
    keys = REPLY_METRICS if asked.says_loss else PRIVATE_METRICS
    values = [metric(metrics, key) for key in keys]
    if len(metrics) != len(values) + (RANK in metrics) or not all(map(math.isfinite, values)):
        raise ValueError(f"its metrics are not the finite numbers {', '.join(keys)}")
    if RANK in metrics and not 1 <= metric(metrics, RANK) <= MOST_RANK:
        raise ValueError(f"it says that it trained rank {metric(metrics, RANK):g}")
    examples = metric(metrics, NUM_EXAMPLES)
    if not 1 <= examples <= asked.max_examples:
        raise ValueError(f"it says {examples:g} examples: between 1 and {asked.max_examples:g} are expected")
    return metrics


def uplink_of(content: RecordDict, metrics: MetricRecord, asked: Asked) -> Uplink:
    """What a reply took and says of itself; its norm and the seconds of its decoding are not known yet."""
    arrays = content.array_records[ARRAYS]
    data = [arrays[name].data for name in sorted(arrays)]
    return Uplink(
        asked.server_round,
        asked.partition,
        sum(map(len, data)),
        digest_of(data[0] if len(data) == 1 else b"".join(data)),
        metric(metrics, TRAIN_LOSS) if asked.says_loss else None,
        metric(metrics, SECONDS_TRAIN),
        metric(metrics, SECONDS_ENCODE),
        num_examples=int(metric(metrics, NUM_EXAMPLES)) if asked.says_loss else None,
        rank=int(metric(metrics, RANK)) if RANK in metrics else None,
    )
