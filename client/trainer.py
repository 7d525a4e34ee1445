"""What a node holds between messages: base model, tokenised data, codec; and the work of one message.

Knows settings, libraries and the disk; must not know Flower's messages (``app.py`` does).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adapters.finetune import finetune, num_examples
from adapters.model import Adapter, get_adapter, load_model, load_tokenizer
from client.memory import load_residual, save_residual
from client.trained import Arrays, Overrides, Trained
from conf.schema import Settings, check_settings
from gradcodec.build import build_codec, byte_budget
from gradcodec.codec import Codec
from gradcodec.exchange import encode_update
from gradcodec.layout import Layout
from tasks.shards import Shard, load_shard


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
        layout = Layout.of({name: tuple(tensor.shape) for name, tensor in get_adapter(self.model).items()})
        return build_codec(self.settings.codec, layout, self.model.device)

    def shard(self, partition: int) -> Shard:
        if partition not in self._shards:
            client, sharers = (0, 1) if self.own_data else (partition, self.settings.federation.num_clients)
            self._shards[partition] = load_shard(self.settings.task, self.tokenizer, client, sharers)
        return self._shards[partition]

    def check(self, partition: int) -> None:
        """Loads everything that training needs. Raises ValueError: something is missing or does not fit."""
        self.shard(partition)
        _ = self.model
        if self.settings.arm == "coded":
            layout = self.codec.layout
            nothing = {name: torch.zeros(shape) for name, shape in layout.shapes.items()}
            encode_update(nothing, None, codec=self.codec, max_bytes=byte_budget(self.settings.codec, layout))

    def train(
        self,
        arrays: Mapping[str, NDArray[np.float32]],
        *,
        partition: int,
        server_round: int,
        side: NDArray[np.float32] | None,
        accepted: str,
        memory: Path,
    ) -> Trained:
        """Trains on this partition and encodes what changed.

        Args:
            arrays: the global adapter, float32.
            side: the codec's side information of this round, float32.
            accepted: digest of this client's last payload that the server took.
            memory: folder of this run's residuals.
        """
        settings = self.settings
        adapter = {name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.set_num_threads(settings.train.threads)
        start = time.perf_counter()
        seed = training_seed(settings.seed, server_round, partition)
        update, loss = finetune(self.model, adapter, self.shard(partition).train, settings.train, seed)
        trained = time.perf_counter()
        payload = None
        if settings.arm == "coded":
            axes = None if side is None else torch.from_numpy(side)
            payload = self._encode(update, partition, server_round, axes, accepted, memory)
        new: Arrays = {name: (tensor + update[name]).numpy() for name, tensor in adapter.items()}
        return Trained(
            adapter=None if payload is not None else new,
            payload=payload,
            num_examples=num_examples(settings.train),
            train_loss=loss,
            seconds_train=trained - start,
            seconds_encode=time.perf_counter() - trained,
        )

    def _encode(
        self, update: Adapter, partition: int, server_round: int, side: Tensor | None, accepted: str, memory: Path
    ) -> bytes:
        layout, feedback = self.codec.layout, self.settings.codec.feedback
        carried = None
        if feedback > 0 and (old := load_residual(memory, partition, layout, server_round)) is not None:
            carried = old.carried(accepted, feedback)
        budget = byte_budget(self.settings.codec, layout)
        payload, residual = encode_update(
            update, carried, codec=self.codec, max_bytes=budget, snr_db=self.settings.codec.snr_db, side=side
        )
        if feedback > 0:
            save_residual(memory, partition, layout, server_round, residual)
        return payload


def training_seed(seed: int, server_round: int, partition: int) -> int:
    """The same for the same run seed, round and partition, on every back end."""
    return (seed * 1_000_003 + server_round) * 1_000_003 + partition


@lru_cache(maxsize=2)
def trainer_for(settings_json: str, overrides: Overrides) -> Trainer:
    """The trainer of these settings in this process, made at the first call.

    Args:
        settings_json: the run's settings, as the server sent them.
        overrides: this node's own paths.
    """
    settings = Settings.from_json(settings_json)
    own = dict(overrides)
    settings.model = dataclasses.replace(settings.model, path=own.get("model-path", settings.model.path))
    settings.task = dataclasses.replace(settings.task, path=own.get("task-path", settings.task.path))
    settings.codec = dataclasses.replace(settings.codec, artifact=own.get("codec-artifact", settings.codec.artifact))
    return Trainer(settings, own_data="task-path" in own)
