"""What a model reads, in parts. Knows nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that renders dialogues."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        /,
        *,
        tools: list[Any] | None,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> Any: ...


class Part(NamedTuple):
    """A piece of an example's text, and whether its tokens count in the loss."""

    text: str
    counts: bool


@dataclass(frozen=True)
class Example:
    """One record, or one turn of a dialogue, as a model reads it."""

    parts: Sequence[Part]
    complete: bool = False  # the template has written the beginning and the end itself
    last: bool = True  # of its record
