"""What a server knows without base model and text: shapes, the adapter that the seed gives, and how adapters are kept.

``server.base=none`` needs no more of ``model.path`` than its config.json. ``evaluate.py`` adds weights and text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adapters.base import load_config, max_positions
from adapters.export import Sections, load_start, save_adapter, served_by_vllm, what_to_know
from adapters.model import Adapter, adapter_parts, adapter_shapes, freeze_local, get_adapter, on_host, outline_model
from conf.schema import Settings
from gradcodec.layout import Layout
from tasks.settings import check_window

_LOG = logging.getLogger(__name__)


class Outline:
    """The model by its shapes, and the initial adapter.

    Raises:
        ValueError: there is no config.json, or ``lora.start`` does not fit.
    """

    tokenizer: PreTrainedTokenizerBase | None = None

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.train.threads)
        self.model: PeftModel = self._load(settings)
        freeze_local(self.model)
        config = load_config(settings.model)
        self.served_by_vllm = served_by_vllm(config, adapter_shapes(self.model))
        for warning in what_to_know(self.model, config, settings.lora):
            _LOG.warning(warning)
        start = settings.lora.start
        self.seeded: Adapter = on_host(get_adapter(self.model))
        self.initial: Adapter = self.seeded if start is None else load_start(Path(start), self.model)
        self.layout = Layout.of(adapter_shapes(self.model), adapter_parts(self.model))

    def _load(self, settings: Settings) -> PeftModel:
        check_window(settings.task, max_positions(settings.model))
        return outline_model(settings.model, settings.lora, settings.seed)

    @property
    def device(self) -> torch.device:
        """Where the codec works."""
        found: torch.device = self.model.device
        return found

    @property
    def blind_loss(self) -> float:
        """Of guessing blindly, nats per token."""
        return math.log(self.model.config.get_text_config().vocab_size)

    def save(self, adapter: Mapping[str, Tensor], facts: Mapping[str, str], folder: Path, sections: Sections) -> None:
        """Writes the adapter as a PEFT directory, its card telling the facts of the run."""
        config = self.model.peft_config["default"]
        save_adapter(adapter, config, facts, folder, self.tokenizer, self.served_by_vllm, sections)
