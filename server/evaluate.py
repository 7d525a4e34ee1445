"""Central evaluation: the global adapter's loss on the held-out windows of all clients."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from adapters.base import check_vocabulary, load_config, load_tokenizer, max_positions, resolve_device
from adapters.export import load_start, save_adapter, served_by_vllm, what_to_know
from adapters.footprint import check_fits
from adapters.model import Adapter, adapter_shapes, get_adapter, load_model, on_host, set_adapter
from adapters.settings import for_evaluation
from adapters.windows import Windows
from conf.footprint import server_memory
from conf.schema import Settings
from tasks.settings import check_window
from tasks.shards import Shard, load_shards, what_is_lost
from tasks.windows import heldout_loss

_LOG = logging.getLogger(__name__)


class Evaluator:
    """Base model, every client's shard and the initial adapter, on the server's side.

    Raises:
        ValueError: the server cannot read the task's text or has too little memory, or ``lora.start`` does not fit.
    """

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.train.threads)
        check_window(settings.task, max_positions(settings.model))
        self.tokenizer = tokenizer = load_tokenizer(settings.model)
        check_vocabulary(settings.model, tokenizer)
        num_clients = settings.federation.num_clients
        self.shards: list[Shard] = list(load_shards(settings.task, tokenizer, range(num_clients), num_clients))
        for warning in what_is_lost(self.shards, settings.task):
            _LOG.warning(warning)
        self.heldout = Windows.cat([shard.heldout for shard in self.shards])
        check_fits(server_memory(settings), resolve_device(settings.model), training=settings.arm == "centralised")
        model_settings = settings.model if settings.arm == "centralised" else for_evaluation(settings.model)
        self.model: PeftModel = load_model(model_settings, settings.lora, settings.seed)
        config = load_config(settings.model)
        self.served_by_vllm = served_by_vllm(config, adapter_shapes(self.model))
        for warning in what_to_know(self.model, config, settings.lora):
            _LOG.warning(warning)
        self.batch_size = settings.train.micro_batch_size  # what fits into memory in training fits here
        start = settings.lora.start
        self.initial: Adapter = (
            on_host(get_adapter(self.model)) if start is None else load_start(Path(start), self.model)
        )

    def loss(self, adapter: Mapping[str, Tensor]) -> float:
        """Held-out loss in nats per token."""
        set_adapter(self.model, adapter)
        return self.loss_as_it_is()

    def loss_as_it_is(self) -> float:
        """The same, with the adapter that is in the model."""
        return heldout_loss(self.model, self.heldout, self.batch_size)

    def save(self, adapter: Mapping[str, Tensor], facts: Mapping[str, str], folder: Path) -> None:
        """Writes the adapter as a PEFT directory, its card telling the facts of the run."""
        config = self.model.peft_config["default"]
        save_adapter(adapter, config, facts, folder, self.tokenizer, self.served_by_vllm)
