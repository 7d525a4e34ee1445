"""A record -> an example: the text that a model reads, in parts, and which of them count in the loss.

``alpaca`` is the prompt of Stanford Alpaca (Taori et al. 2023), to the letter; ``chat`` is the tokenizer's own chat
template; ``none`` joins the fields by blank lines. Knows records and templates; must not know token ids, files or who
holds a record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from jinja2.exceptions import TemplateError

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

Record = Mapping[str, Any]
Message = dict[str, str]
"""One turn of a dialogue: ``role`` and ``content``."""


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def apply_chat_template(
        self, conversation: list[Message], /, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


class Part(NamedTuple):
    text: str
    counts: bool


@dataclass(frozen=True)
class Example:
    """One record as a model reads it."""

    parts: Sequence[Part]
    complete: bool = False  # the template has written the beginning and the end itself


def check_template(template: str, tokenizer: object) -> None:
    """Raises ValueError: the tokenizer has no chat template, and one is asked for."""
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "task.template=chat needs a tokenizer with a chat template, and that of model.path has none: "
            "use task.template=alpaca or none, or the model's instruct version"
        )


def example_of(record: Record, template: str, loss_on: str, tokenizer: ChatTokenizer) -> Example:
    """Renders one record.

    Args:
        record: with ``instruction`` and ``output`` (``input`` if there is one; Dolly's names are ``response`` and
            ``context``), with ``messages``, each of a ``role`` and a ``content``, or with ``text``, which no template
            touches. Other keys are left aside.
        template: one of ``TEMPLATES``.
        loss_on: ``response``: only what the assistant says counts; ``all``: every token.

    Raises:
        ValueError: the record has none of these keys, or none that the template can render.
    """
    example = _rendered(record, template, tokenizer)
    if loss_on == "all":
        return Example([Part(text, True) for text, _ in example.parts], example.complete)
    if record.get("text") is not None and not any(part.counts for part in example.parts):
        raise ValueError("a record with nothing but 'text' has no response: use task.loss_on=all")
    return example


def _rendered(record: Record, template: str, tokenizer: ChatTokenizer) -> Example:
    """With the parts that are responses marked."""
    instruction, response = record.get("instruction"), _first(record, "output", "response")
    if instruction is not None and response is not None:
        given = str(_first(record, "input", "context") or "")
        if template == "alpaca":
            prompt = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT
            return Example(
                [Part(prompt.format(instruction=instruction, input=given), False), Part(str(response), True)]
            )
        question = f"{instruction}\n\n{given}" if given else str(instruction)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": str(response)}]
    elif record.get("messages") is not None:
        messages = _messages(record["messages"])
        if template == "alpaca":
            raise ValueError("task.template=alpaca cannot render a record with 'messages': use task.template=chat")
    elif record.get("text") is not None:
        return Example([Part(str(record["text"]), False)])
    else:
        keys = ", ".join(sorted(key for key, value in record.items() if value is not None)) or "none"
        raise ValueError(
            f"a record needs 'text', 'messages', or 'instruction' and 'output' (or 'response'); it has {keys}"
        )
    return _chat(messages, tokenizer) if template == "chat" else _joined(messages)


def _first(record: Record, *keys: str) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _messages(turns: Any) -> list[Message]:
    if not isinstance(turns, Sequence) or not turns:
        raise ValueError("'messages' must be a list of at least one turn: leave records without a dialogue out")
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") is None or turn.get("content") is None:
            raise ValueError("every entry of 'messages' needs a 'role' and a 'content'")
    return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]


def _joined(messages: Sequence[Message]) -> Example:
    parts: list[Part] = []
    for message in messages:
        if parts:
            parts.append(Part("\n\n", False))
        parts.append(Part(message["content"], message["role"] == "assistant"))
    return Example(parts)


def _chat(messages: list[Message], tokenizer: ChatTokenizer) -> Example:
    """An assistant's turn is what the template writes behind the prompt for it, with the mark of the turn's end."""
    whole = _render(messages, tokenizer)
    parts: list[Part] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:i], tokenizer, add_generation_prompt=True) if i else _opening(whole, tokenizer)
        turn = whole if i + 1 == len(messages) else _render(messages[: i + 1], tokenizer)
        if not (whole.startswith(prompt) and whole.startswith(turn)):
            raise ValueError(
                "the chat template of model.path writes a dialogue's earlier turns anew, so its responses cannot be "
                "told apart: use task.template=none, or dialogues of one question and one answer"
            )
        said = turn[len(prompt) :].rstrip()  # the white space behind the turn's end is the template's
        parts += [Part(whole[done : len(prompt)], False), Part(said, True)]
        done = len(prompt) + len(said)
    return Example([*parts, Part(whole[done:], False)], complete=True)


def _opening(whole: str, tokenizer: ChatTokenizer) -> str:
    """What stands before the first turn of a dialogue that the assistant opens: nothing comes before it, and templates
    do not render nothing, so the mark of its turn is that which they write behind a question."""
    question = [{"role": "user", "content": "?"}]
    asked = _render(question, tokenizer)
    prompt = _render(question, tokenizer, add_generation_prompt=True)
    mark = prompt.removeprefix(asked)
    if mark in ("", prompt) or mark not in whole:
        raise ValueError(
            "the assistant opens a dialogue, and in the chat template of model.path its turn cannot be told apart: "
            "begin dialogues with a turn of the user, or use task.template=none"
        )
    return whole[: whole.index(mark) + len(mark)]


def _render(messages: list[Message], tokenizer: ChatTokenizer, add_generation_prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        raise ValueError(f"the chat template of model.path refuses a dialogue: {error}") from None
