"""What a node holds between messages: base model, tokenised data, codec; and the work of one message.

Knows settings, libraries and the disk; must not know Flower's messages (``app.py`` does).
"""

from __future__ import annotations

import dataclasses
import os
import time
from functools import cached_property, lru_cache

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from adapters.base import max_positions, resolve_device
from adapters.finetune import finetune, num_examples
from adapters.memory import check_fits
from adapters.model import Adapter, adapter_parts, adapter_shapes, load_model, load_tokenizer
from adapters.team import Team
from client.memory import load_residual, save_residual
from client.work import TRUST, Arrays, Overrides, Trained, Work
from conf.memory import client_memory
from conf.schema import Settings, check_settings
from gradcodec.build import build_codec, byte_budget
from gradcodec.codec import Codec
from gradcodec.exchange import encode_update
from gradcodec.layout import Layout
from strategies.records import TRUST_VARIABLE
from tasks.shards import Shard, check_window, load_shard


class Trainer:
    """One per process and settings; serves any partition."""

    def __init__(self, settings: Settings, own_data: bool = False) -> None:
        """With ``own_data`` the task's file or folder is this client's alone and is not dealt out."""
        check_settings(settings)
        self.settings = settings
        self.own_data = own_data
        self._shards: dict[int, Shard] = {}

    @cached_property
    def model(self) -> PeftModel:
        return load_model(self.settings.model, self.settings.lora, self.settings.seed)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings.model)

    @cached_property
    def codec(self) -> Codec:
        layout = Layout.of(adapter_shapes(self.model), adapter_parts(self.model))
        return build_codec(self.settings.codec, layout, self.model.device)

    def shard(self, partition: int) -> Shard:
        if partition not in self._shards:
            task, client, sharers = self.settings.task, partition, self.settings.federation.num_clients
            if self.own_data:
                task, client, sharers = dataclasses.replace(task, partition="iid", partition_by=None), 0, 1
            check_window(task, max_positions(self.settings.model))
            self._shards[partition] = load_shard(task, self.tokenizer, client, sharers)
        return self._shards[partition]

    def check(self, partition: int) -> None:
        """Loads everything that training needs. Raises ValueError: something is missing or does not fit."""
        self.shard(partition)
        if "model" not in self.__dict__:  # once it is loaded, its memory is no longer free
            check_fits(client_memory(self.settings), resolve_device(self.settings.model))
        _ = self.model
        if self.settings.arm == "coded":
            layout = self.codec.layout
            nothing = {name: torch.zeros(shape) for name, shape in layout.shapes.items()}
            encode_update(nothing, None, codec=self.codec, max_bytes=byte_budget(self.settings.codec, layout))

    def train(self, work: Work, team: Team | None = None) -> Trained:
        """Trains on a partition, alone or with a team whose others call ``finetune``, and encodes what changed."""
        settings = self.settings
        start = time.perf_counter()
        update, loss = self.finetune(work, team or Team())
        trained = time.perf_counter()
        payload = self._encode(update, work) if settings.arm == "coded" else None
        new: Arrays = {name: array + update[name].numpy() for name, array in work.adapter.items()}
        return Trained(
            adapter=None if payload is not None else new,
            payload=payload,
            num_examples=num_examples(settings.train, len(self.shard(work.partition).train)),
            train_loss=loss,
            seconds_train=trained - start,
            seconds_encode=time.perf_counter() - trained,
        )

    def finetune(self, work: Work, team: Team) -> tuple[Adapter, float]:
        """The part of ``train`` that all of a team do: the update and the mean loss."""
        torch.set_num_threads(self.settings.train.threads)
        return finetune(
            self.model,
            {name: torch.from_numpy(array) for name, array in work.adapter.items()},
            self.shard(work.partition).train,
            self.settings.train,
            training_seed(self.settings.seed, work.server_round, work.partition),
            team=team,
        )

    def _encode(self, update: Adapter, work: Work) -> bytes:
        layout, feedback, place = self.codec.layout, self.settings.codec.feedback, (work.memory, work.partition)
        carried = None
        if feedback > 0 and (old := load_residual(*place, layout, work.server_round)) is not None:
            carried = old.carried(work.accepted, feedback)
        payload, residual = encode_update(
            update,
            carried,
            codec=self.codec,
            max_bytes=byte_budget(self.settings.codec, layout),
            snr_db=self.settings.codec.snr_db,
            side=None if work.side is None else torch.from_numpy(work.side),
        )
        if feedback > 0:
            save_residual(*place, layout, work.server_round, residual)
        return payload


def training_seed(seed: int, server_round: int, partition: int) -> int:
    """The same for the same run seed, round and partition, on every back end."""
    return (seed * 1_000_003 + server_round) * 1_000_003 + partition


@lru_cache(maxsize=2)
def trainer_for(settings_json: str, overrides: Overrides) -> Trainer:
    """The trainer of these settings in this process, made at the first call.

    Args:
        settings_json: the run's settings, as the server sent them.
        overrides: this node's own paths, and whether it runs a model's own code.
    """
    settings = Settings.from_json(settings_json)
    own = dict(overrides)
    if settings.model.trust_remote_code and not (own.get(TRUST) == "true" or os.environ.get(TRUST_VARIABLE)):
        raise ValueError(
            "the run wants model.trust_remote_code=true, which runs the model's own Python code on this node: start it "
            "with --trust-remote-code if its owner agrees"
        )
    settings.model = dataclasses.replace(settings.model, path=own.get("model-path", settings.model.path))
    settings.task = dataclasses.replace(settings.task, path=own.get("task-path", settings.task.path))
    settings.codec = dataclasses.replace(settings.codec, artifact=own.get("codec-artifact", settings.codec.artifact))
    return Trainer(settings, own_data="task-path" in own)
