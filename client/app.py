"""Flower's side of the client: message in, message out. Adaptation only; the work is in ``trainer.py``."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.link import ResidentTrainer, trainer_at
from client.work import MAX_EPSILON, TRUST, Work
from gradcodec.transfers import Broadcast
from strategies.folding import fold, unfold
from strategies.wire import (
    ACCEPTED,
    ARRAYS,
    CONFIG,
    HELD,
    HELD_BEFORE,
    LACKS,
    MEMORY_VARIABLE,
    METRICS,
    NUM_EXAMPLES,
    PARTITION,
    REFUSAL,
    SECONDS_ENCODE,
    SECONDS_TRAIN,
    SERVER_ROUND,
    SETTINGS,
    SIDE,
    TRAIN_LOSS,
    arrays_of,
    config_of,
    unwrap_adapter,
    unwrap_bundle,
    wrap_adapter,
    wrap_payload,
)

if TYPE_CHECKING:
    from client.trainer import Trainer

NODE_KEYS = ("model-path", "task-path", "codec-artifact", TRUST, MAX_EPSILON)
"""Keys of a node's config by which it says where its own copies lie, whom it trusts, and what it gives away."""

TRAINER_SOCKET = "trainer-socket"
"""Where the node's resident trainer listens."""

app = ClientApp()


@app.query()
def answer_roll_call(message: Message, context: Context) -> Message:
    """Loads what training will need, and says which partition this node holds, or why it cannot take part."""
    partition = int(context.node_config[PARTITION])
    refusal = ""
    try:
        content = unfold(message.content)
        memory = _memory_root(context) / _folder_name(_settings(content)["run_id"])
        _trainer(content, context).check(partition, memory)
    except ValueError as error:
        refusal = str(error)
    answer = RecordDict({METRICS: MetricRecord({PARTITION: partition}), CONFIG: ConfigRecord({REFUSAL: refusal})})
    return Message(fold(answer), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: the global adapter in, this client's payload (or dense adapter) out."""
    content = unfold(message.content)
    config = config_of(content)
    settings = _settings(content)
    partition = int(context.node_config[PARTITION])
    trainer = _trainer(content, context)
    side = content.array_records.get(SIDE)
    bundle = unwrap_bundle(content)
    work = Work(
        adapter=unwrap_adapter(content) if bundle is None else None,
        side=arrays_of(side)[SIDE] if side else None,
        partition=partition,
        server_round=int(str(config[SERVER_ROUND])),
        accepted=str(config.get(ACCEPTED, "")),
        memory=_memory_root(context) / _folder_name(settings["run_id"]),
        broadcast=None if bundle is None else Broadcast(bundle, str(config[HELD_BEFORE]), str(config[HELD])),
    )
    done = trainer.train(work)
    if done.lacks is not None:
        return Message(fold(RecordDict({CONFIG: ConfigRecord({LACKS: done.lacks})})), reply_to=message)
    if done.payload is not None:
        arrays = wrap_payload(done.payload)
    else:
        assert done.adapter is not None
        arrays = wrap_adapter(done.adapter)
    metrics = MetricRecord(
        {
            NUM_EXAMPLES: done.num_examples,
            PARTITION: partition,
            SERVER_ROUND: work.server_round,
            SECONDS_TRAIN: done.seconds_train,
            SECONDS_ENCODE: done.seconds_encode,
        }
    )
    if settings["privacy"]["name"] == "none":
        metrics[TRAIN_LOSS] = done.train_loss
    return Message(fold(RecordDict({ARRAYS: arrays, METRICS: metrics})), reply_to=message)


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


def _memory_root(context: Context) -> Path:
    """Where residuals are kept: the node config's ``memory``, else what a simulation set, else the user's cache."""
    default = os.environ.get(MEMORY_VARIABLE, Path.home() / ".cache" / "cg-fedllm" / "memory")
    return Path(str(context.node_config.get("memory", default)))
