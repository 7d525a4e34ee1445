"""A dialogue -> examples, by the tokenizer's own chat template: what it writes is what is trained on.

An answer is what the template writes behind the prompt for it, with the mark of the turn's end. Knows dialogues and
chat templates; must not know token ids or files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from os.path import commonprefix
from typing import Any, NamedTuple

from tasks.examples import ChatTokenizer, Example, Part
from tasks.prompts import Dialogue, Turn

CARRIED = ("name", "id", "tool_call_id")
"""What a turn carries besides what it says: no template must write these."""
Messages = list[dict[str, Any]]


class Answer(NamedTuple):
    """Where an answer stands in the dialogue up to its turn."""

    turn: Turn
    text: str  # the dialogue up to and with the turn
    start: int
    end: int


class ChatTemplate:
    """A tokenizer's own chat template, asked for what it writes turn by turn."""

    def __init__(self, tokenizer: ChatTokenizer, all_counts: bool) -> None:
        """With ``all_counts`` every token counts but those of turns that are not to be trained on."""
        self._tokenizer = tokenizer
        self._all_counts = all_counts
        self._end = getattr(tokenizer, "eos_token", None) or ""

    def examples(self, dialogue: Dialogue, notes: set[str]) -> Iterator[Example]:
        """One example of the whole dialogue, or one for each answer where the template writes earlier turns anew.

        Args:
            notes: gets a line on all that is not trained on as the record has it.

        Raises:
            ValueError: the template refuses the dialogue, or writes nothing of an answer.
        """
        tools = list(dialogue.tools) or None
        messages = self._messages(dialogue, tools)
        whole = self._render(messages, tools)
        self._check_shown(dialogue, messages, tools, whole, notes)
        answers = list(self._answers(dialogue.turns, messages, tools, whole, notes))
        if all(whole.startswith(answer.text) for answer in answers):
            yield self._example(whole, answers, notes)
            return
        notes.add("the chat template writes earlier turns anew: one example for each answer, with what comes before it")
        counting = [answer for answer in answers if answer.turn.counts]
        for answer in counting:
            alone = self._example(answer.text, [answer], notes)
            yield Example(alone.parts, complete=True, last=answer is counting[-1])

    def _example(self, text: str, answers: Sequence[Answer], notes: set[str]) -> Example:
        parts: list[Part] = []
        done = 0
        for answer in answers:
            parts.append(Part(text[done : answer.start], self._all_counts))
            parts.append(Part(text[answer.start : answer.end], answer.turn.counts))
            done = answer.end
        content = answers[-1].turn.content.strip()
        if not text[done:].strip() and content and parts[-1].text.endswith(content):
            if not self._end:
                notes.add("the chat template writes no mark behind an answer, so the model does not learn to stop")
                return Example([*parts, Part(text[done:], self._all_counts)], complete=True)
            notes.add(
                f"the chat template writes no mark behind an answer: {self._end} is put behind a dialogue's last "
                "one, so that the model learns to stop"
            )
            said = parts.pop()
            return Example([*parts, Part(said.text + self._end, said.counts)], complete=True)
        return Example([*parts, Part(text[done:], self._all_counts)], complete=True)

    def _answers(
        self, turns: Sequence[Turn], messages: Messages, tools: list[Any] | None, whole: str, notes: set[str]
    ) -> Iterator[Answer]:
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            text = whole if i + 1 == len(turns) else self._render(messages[: i + 1], tools)
            prompt = self._render(messages[:i], tools, add_generation_prompt=True) if i else self._opening(whole)
            if not text.startswith(prompt):
                if not i or not text.startswith(self._render(messages[:i], tools)):
                    raise ValueError(
                        "the chat template of model.path writes an answer so that it cannot be told apart from what "
                        "stands before it: use task.template=none"
                    )
                notes.add("the chat template ends a prompt with what it does not write before an answer")
                prompt = commonprefix([prompt, text])  # noqa: RUF071 (texts, no paths)
            end = max(len(prompt), len(text.rstrip()))  # the white space behind the turn's end is the template's
            if turn.counts and not text[len(prompt) : end].strip():
                raise ValueError("the chat template of model.path writes nothing of an answer: use task.template=none")
            yield Answer(turn, text, len(prompt), end)

    def _messages(self, dialogue: Dialogue, tools: list[Any] | None) -> Messages:
        """As the template takes them: most want the arguments of a call as an object, some as the text that they are in
        OpenAI's format. The first form is taken of which it writes the calls."""
        messages = [turn.message for turn in dialogue.turns]
        if self._wants_parts:
            for message in messages:
                message["content"] = [{"type": "text", "text": message["content"]}]
        if not any("tool_calls" in message for message in messages):
            return messages
        refusal: ValueError | None = None
        for form in ([_with_calls(message) for message in messages], messages):
            try:
                if self._render(form, tools) != self._render(_without(form, "tool_calls"), tools):
                    return form
            except ValueError as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal
        return messages

    def _check_shown(
        self, dialogue: Dialogue, messages: Messages, tools: list[Any] | None, whole: str, notes: set[str]
    ) -> None:
        """Notes what the template leaves out. Raises ValueError: then nothing is left of an answer."""
        if tools and self._render(messages, None) == whole:
            notes.add("the chat template leaves out 'tools'")
        names = dict.fromkeys(name for turn in dialogue.turns for name in turn.extra if name not in CARRIED)
        dropped = {name for name in names if self._render(_without(messages, name), tools) == whole}
        notes.update(f"the chat template leaves out {name!r}" for name in dropped)
        for turn in dialogue.turns:
            said = [name for name in turn.extra if name not in CARRIED]
            if turn.role == "assistant" and turn.counts and not turn.content.strip() and dropped.issuperset(said):
                raise ValueError(
                    f"an answer of nothing but {', '.join(map(repr, said)) or 'its name'}, which the chat template of "
                    "model.path leaves out: use a model whose template writes it"
                )
            if turn.role in ("system", "tool") and turn.content.strip() not in whole:
                notes.add(f"the chat template leaves out, or rewrites, what a {turn.role!r} turn says")

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template reads lists of parts alone, as some of vision models do, and nothing of a plain text."""
        probe = "a plain question"
        try:
            return probe not in self._render([{"role": "user", "content": probe}], None) and probe in self._render(
                [{"role": "user", "content": [{"type": "text", "text": probe}]}], None
            )
        except ValueError:
            return False

    def _opening(self, whole: str) -> str:
        """What stands before the first turn of a dialogue that the assistant opens: nothing comes before it, and
        templates do not render nothing, so the mark of its turn is that which they write behind a question."""
        question = [{"role": "user", "content": "?"}]
        asked = self._render(question, None)
        prompt = self._render(question, None, add_generation_prompt=True)
        mark = prompt.removeprefix(asked)
        if mark in ("", prompt) or mark not in whole:
            raise ValueError(
                "the assistant opens a dialogue, and in the chat template of model.path its turn cannot be told apart: "
                "begin dialogues with a turn of the user, or use task.template=none"
            )
        return whole[: whole.index(mark) + len(mark)]

    def _render(self, messages: Messages, tools: list[Any] | None, add_generation_prompt: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except RecursionError:
            raise
        except Exception as error:  # a template is a program of someone else's
            remedy = ""
            if any(message["role"] == "system" for message in messages):
                remedy = "; if it takes no system turn: task.system=merge puts its text before the first question"
            reason = str(error).split("\n")[0]
            raise ValueError(f"the chat template of model.path refuses a dialogue: {reason}{remedy}") from None


def _without(messages: Messages, name: str) -> Messages:
    return [{key: value for key, value in message.items() if key != name} for message in messages]


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its calls' arguments as objects."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call(call) for call in calls]} if isinstance(calls, list) else message


def _call(call: Any) -> Any:
    """With the arguments as an object: in OpenAI's format they are JSON in a string, templates want what is in it."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, Mapping) else call
