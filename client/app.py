"""Flower's side of the client: message in, message out. Adaptation only; the work is in ``trainer.py``."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.link import ResidentTrainer, trainer_at
from client.sums import Member
from client.work import LINE, MAX_BITS, MAX_EPSILON, MAX_RANK, NODE_KEY, PEER_KEYS, TRUST, UPLOAD_SECONDS, Summed, Work
from gradcodec.transfers import Broadcast
from privacy.errors import BudgetSpentError, PrivacyError
from privacy.secagg import Invitation, least_stay
from privacy.settings import PrivacySettings
from strategies.folding import fold, unfold
from strategies.wire import (
    ACCEPTED,
    ANNOUNCED,
    ARRAYS,
    CONFIG,
    HELD,
    HELD_BEFORE,
    HELDOUT_LOSS,
    HELDOUT_TOKENS,
    HELDOUT_WINDOWS,
    INVITATION,
    LACKS,
    MEMORY_VARIABLE,
    METRICS,
    NUM_EXAMPLES,
    PARTITION,
    PUBLISHED,
    RANK,
    REFUSAL,
    REQUEST,
    RUN_ID,
    SECONDS_ENCODE,
    SECONDS_EVALUATE,
    SECONDS_TRAIN,
    SERVER_ROUND,
    SETTINGS,
    SIDE,
    SPENT,
    TRAIN_LOSS,
    UNMASK,
    UNMASKED,
    arrays_of,
    config_of,
    unwrap_adapter,
    unwrap_bundle,
    wrap_adapter,
    wrap_payload,
)

if TYPE_CHECKING:
    from client.trainer import Trainer

_LOG = logging.getLogger(__name__)

NODE_KEYS = (
    *("model-path", "task-path", "codec-artifact", TRUST),
    *(MAX_EPSILON, MAX_BITS, MAX_RANK, LINE, UPLOAD_SECONDS),
)
"""Keys of a node's config by which it says where its own copies lie, whom it trusts, and what it gives away."""

TRAINER_SOCKET = "trainer-socket"
"""Where the node's resident trainer listens."""

app = ClientApp()


@app.query()
def answer_roll_call(message: Message, context: Context) -> Message:
    """Loads what training will need, and says which partition this node holds, or why it cannot take part."""
    partition = int(context.node_config[PARTITION])
    refusal, published = "", b""
    try:
        content = unfold(message.content)
        settings = _settings(content)
        privacy = _privacy(settings, context)
        _trainer(content, context).check(partition, _memory(settings["run_id"], context))
        if privacy.secure_aggregation:
            published = _member(settings["run_id"], context).publish(_node_key(context))
    except ValueError as error:
        refusal = str(error)
    config = ConfigRecord({REFUSAL: refusal, **({PUBLISHED: published} if published else {})})
    answer = RecordDict({METRICS: MetricRecord({PARTITION: partition}), CONFIG: config})
    return Message(fold(answer), reply_to=message)


@app.query(UNMASK.partition(".")[2])
def help_to_open(message: Message, context: Context) -> Message:
    """What opens a round's sum: this client's shares of others' seeds, once."""
    config = config_of(unfold(message.content))
    request = config.get(REQUEST)
    if not isinstance(request, bytes):
        raise ValueError("a message that asks to open a sum and does not say which")
    answer = ConfigRecord({UNMASKED: _member(str(config[RUN_ID]), context).answer(request)})
    return Message(fold(RecordDict({CONFIG: answer})), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: the global adapter in, this client's payload (or dense adapter) out."""
    content = unfold(message.content)
    config = config_of(content)
    settings = _settings(content)
    privacy = _privacy(settings, context)
    trainer = _trainer(content, context)
    invitation = _invitation(config) if privacy.secure_aggregation else None
    work = _work(content, context, None if invitation is None else _summed(config, invitation))
    try:
        done = trainer.train(work)
    except BudgetSpentError:
        return _instead(SPENT, True, message)
    except PrivacyError:
        raise
    except Exception as error:
        if not privacy.protects:
            raise
        _LOG.warning("local training failed: %r", error)
        raise ValueError("local training failed; why its own log says alone, as it may tell of the data") from None
    if done.lacks is not None:
        return _instead(LACKS, done.lacks, message)
    if done.payload is not None and invitation is not None:
        member = _member(settings["run_id"], context)
        stay = least_stay(privacy, len(invitation.members), int(settings["federation"]["min_replies"]))
        arrays = wrap_payload(member.contribute(done.payload, invitation, stay))
    elif done.payload is not None:
        arrays = wrap_payload(done.payload)
    else:
        assert done.adapter is not None
        arrays = wrap_adapter(done.adapter)
    metrics = MetricRecord(
        {
            NUM_EXAMPLES: done.num_examples,
            PARTITION: work.partition,
            SERVER_ROUND: work.server_round,
            SECONDS_TRAIN: 0.0 if privacy.protects else done.seconds_train,  # how long it took tells how much there is
            SECONDS_ENCODE: 0.0 if privacy.protects else done.seconds_encode,
        }
    )
    if not privacy.protects:
        metrics[TRAIN_LOSS] = done.train_loss
    if done.rank is not None:
        metrics[RANK] = done.rank
    return Message(fold(RecordDict({ARRAYS: arrays, METRICS: metrics})), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The global adapter in, its loss on this client's own held-out windows out: a few numbers."""
    content = unfold(message.content)
    settings = _settings(content)
    _privacy(settings, context)
    work = _work(content, context)
    done = _trainer(content, context).evaluate(work)
    if done.lacks is not None:
        return _instead(LACKS, done.lacks, message)
    metrics = MetricRecord(
        {
            PARTITION: work.partition,
            SERVER_ROUND: work.server_round,
            HELDOUT_LOSS: done.loss,
            HELDOUT_TOKENS: done.tokens,
            HELDOUT_WINDOWS: done.windows,
            SECONDS_EVALUATE: done.seconds,
        }
    )
    return Message(fold(RecordDict({METRICS: metrics})), reply_to=message)


def _instead(key: str, value: str | bool, message: Message) -> Message:
    """The reply of a client that sends no update."""
    return Message(fold(RecordDict({CONFIG: ConfigRecord({key: value})})), reply_to=message)


def _work(content: RecordDict, context: Context, summed: Summed | None = None) -> Work:
    """What a message brings to train from, or to evaluate."""
    config, side, bundle = config_of(content), content.array_records.get(SIDE), unwrap_bundle(content)
    return Work(
        adapter=unwrap_adapter(content) if bundle is None else None,
        side=arrays_of(side)[SIDE] if side else None,
        partition=int(context.node_config[PARTITION]),
        server_round=int(str(config[SERVER_ROUND])),
        accepted=str(config.get(ACCEPTED, "")),
        memory=_memory(_settings(content)["run_id"], context),
        broadcast=None if bundle is None else Broadcast(bundle, str(config[HELD_BEFORE]), str(config[HELD])),
        sum=summed,
    )


def _trainer(content: RecordDict, context: Context) -> Trainer | ResidentTrainer:
    own = tuple((key, str(context.node_config[key])) for key in NODE_KEYS if key in context.node_config)
    socket = context.node_config.get(TRAINER_SOCKET)
    path = Path(str(socket)) if socket else None
    return trainer_at(path, str(config_of(content)[SETTINGS]), own)


def _settings(content: RecordDict) -> dict[str, Any]:
    """The run's, of which this process needs a few alone."""
    return dict(json.loads(str(config_of(content)[SETTINGS])))


def _folder_name(run_id: object) -> str:
    """Raises ValueError: the server names a run so that its folder would lie elsewhere."""
    if not isinstance(run_id, str) or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", run_id) is None:
        raise ValueError(f"run_id {run_id!r} is no name for a folder")
    return run_id


def _memory(run_id: object, context: Context) -> Path:
    """Where this node keeps what it must remember of a run."""
    return _memory_root(context) / _folder_name(run_id)


def _member(run_id: object, context: Context) -> Member:
    peers = context.node_config.get(PEER_KEYS)
    folder = None if peers is None else Path(str(peers))
    return Member(_memory(run_id, context), str(run_id), int(context.node_config[PARTITION]), folder)


def _node_key(context: Context) -> Path | None:
    path = context.node_config.get(NODE_KEY)
    return None if path is None else Path(str(path))


def _privacy(settings: dict[str, Any], context: Context) -> PrivacySettings:
    """The run's. Raises ValueError: they are none of ours, or this node's owner wants its updates in masked sums alone
    and the run wants them as they are."""
    try:
        privacy = PrivacySettings(**settings["privacy"])
    except (KeyError, TypeError):
        raise ValueError("the run's settings of privacy are none that this release knows") from None
    if PEER_KEYS in context.node_config and not privacy.secure_aggregation:
        raise ValueError(
            "this node takes part in masked sums alone (--peer-keys): the run needs privacy.secure_aggregation=true"
        )
    return privacy


def _invitation(config: ConfigRecord) -> Invitation:
    packed = config.get(INVITATION)
    if not isinstance(packed, bytes):
        raise ValueError("the run asks for masked sums, and this message holds no invitation to one")
    return Invitation.unpack(packed)


def _summed(config: ConfigRecord, invitation: Invitation) -> Summed:
    announced = config.get(ANNOUNCED)
    if not isinstance(announced, bytes):
        raise ValueError("the message does not say how strong the sum is expected to be")
    return Summed(announced, len(invitation.members), invitation.tag.hex())


def _memory_root(context: Context) -> Path:
    """Where residuals are kept: the node config's ``memory``, else what a simulation set, else the user's cache."""
    default = os.environ.get(MEMORY_VARIABLE, Path.home() / ".cache" / "cg-fedllm" / "memory")
    return Path(str(context.node_config.get("memory", default)))
