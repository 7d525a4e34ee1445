"""Central evaluation: the global adapter's loss on the held-out windows of all clients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from adapters.model import Adapter, get_adapter, load_model, load_tokenizer, set_adapter
from conf.schema import Settings
from tasks.shards import Shard, load_shard
from tasks.windows import heldout_loss


class Evaluator:
    """Base model, every client's shard and the initial adapter, on the server's side.

    Raises:
        ValueError: the server cannot read the task's text.
    """

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.train.threads)
        tokenizer = load_tokenizer(settings.model)
        num_clients = settings.federation.num_clients
        self.shards: list[Shard] = [load_shard(settings.task, tokenizer, i, num_clients) for i in range(num_clients)]
        self.heldout = torch.cat([shard.heldout for shard in self.shards])
        self.model: PeftModel = load_model(settings.model, settings.lora, settings.seed)
        self.initial: Adapter = get_adapter(self.model)

    def loss(self, adapter: Mapping[str, Tensor]) -> float:
        """Held-out loss in nats per token."""
        set_adapter(self.model, adapter)
        return heldout_loss(self.model, self.heldout)

    def save(self, adapter: Mapping[str, Tensor], folder: Path) -> None:
        """Writes the adapter as a PEFT directory, which ``PeftModel.from_pretrained`` loads."""
        set_adapter(self.model, adapter)
        self.model.save_pretrained(str(folder))
