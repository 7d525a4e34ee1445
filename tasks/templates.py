"""A record -> examples: the text that a model reads, in parts, and which of them count in the loss.

``alpaca`` is the prompt of Stanford Alpaca (Taori et al. 2023), to the letter, further turns behind each other as in
FastChat; ``chat`` is the tokenizer's own chat template (``tasks.chat``); ``none`` joins the fields by blank lines.
Knows records and templates; must not know token ids, files or who holds a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tasks.chat import ChatTemplate
from tasks.examples import ChatTokenizer, Example, Part
from tasks.prompts import Dialogue, Question, Turn, prompt_of
from tasks.records import Fields

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_TURN = "### Instruction:\n{instruction}\n\n### Response:"
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n" + ALPACA_TURN
)


def check_template(template: str, tokenizer: object) -> None:
    """Raises ValueError: the tokenizer has no chat template, and one is asked for."""
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "task.template=chat needs a tokenizer with a chat template, and that of model.path has none: "
            "use task.template=alpaca or none, or the model's instruct version"
        )


class Renderer:
    """Renders the records of one client.

    Attributes:
        notes: what is not trained on as it stands -> in how many records.
    """

    def __init__(self, template: str, loss_on: str, system: str, tokenizer: ChatTokenizer) -> None:
        """``template``, ``loss_on`` and ``system`` are ``task.template``, ``task.loss_on`` and ``task.system``."""
        self.notes: Counter[str] = Counter()
        self._template = template
        self._all_counts = loss_on == "all"
        self._system = system
        self._end = getattr(tokenizer, "eos_token", None) or ""
        self._chat = ChatTemplate(tokenizer, self._all_counts) if template == "chat" else None

    def examples(self, fields: Fields) -> list[Example]:
        """One example, or one for each answer where the template writes earlier turns anew; none: the answer is empty.

        Raises:
            ValueError: the record has no fields that are known, or none that the template can render.
        """
        try:
            prompt = prompt_of(fields)
            notes: set[str] = set()
            found = list(self._examples(prompt, notes))
            for part in (part for example in found for part in example.parts):
                part.text.encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no text") from None
        except RecursionError:
            raise ValueError("a value that is nested too deeply") from None
        self.notes.update(notes)
        return found

    def _examples(self, prompt: str | Question | Dialogue, notes: set[str]) -> Iterator[Example]:
        if isinstance(prompt, str):
            if not self._all_counts:
                raise ValueError("a record with nothing but 'text' has no response: use task.loss_on=all")
            if prompt:
                yield Example([Part(prompt, True)])
            return
        if isinstance(prompt, Question) and self._chat is None and not (prompt.system and self._system != "drop"):
            if prompt.answer.strip():
                yield Example(self._question(prompt))
            return
        dialogue = prompt.dialogue if isinstance(prompt, Question) else prompt
        turns = [turn._replace(counts=turn.counts and _says(turn)) for turn in self._with_system(dialogue.turns)]
        if all(turn.role != "assistant" for turn in turns):
            raise ValueError("a dialogue without a turn of the assistant")
        if not any(turn.counts for turn in turns if turn.role == "assistant"):
            return
        dialogue = Dialogue(turns, dialogue.tools)
        if self._chat is not None:
            yield from self._chat.examples(dialogue, notes)
            return
        self._check_shown(dialogue, notes)
        yield Example(self._alpaca(turns) if self._template == "alpaca" else self._joined(turns))

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """As ``task.system`` says."""
        if self._system == "keep":
            return list(turns)
        text = "\n\n".join(turn.content for turn in turns if turn.role == "system")
        others = [turn for turn in turns if turn.role != "system"]
        if self._system == "drop" or not text:
            return others
        first = next((i for i, turn in enumerate(others) if turn.role == "user"), None)
        if first is None:
            raise ValueError("task.system=merge: there is no turn of the user to put the system text before")
        others[first] = others[first]._replace(content=f"{text}\n\n{others[first].content}")
        return others

    def _check_shown(self, dialogue: Dialogue, notes: set[str]) -> None:
        """Notes, or refuses, what these templates do not show: they write contents alone."""
        if dialogue.tools:
            notes.add(f"task.template={self._template} leaves out 'tools'")
        for turn in dialogue.turns:
            shown_not = [name for name in turn.extra if name not in ("name", "id", "tool_call_id")]
            if shown_not and turn.role == "assistant" and turn.counts and not turn.content.strip():
                raise ValueError(
                    f"an answer of nothing but {shown_not[0]!r}, which task.template={self._template} leaves out: use "
                    "task.template=chat with a model whose template writes it"
                )
            notes.update(f"task.template={self._template} leaves out {name!r}" for name in shown_not)

    def _question(self, prompt: Question) -> list[Part]:
        if self._template == "alpaca":
            form = ALPACA_WITH_INPUT if prompt.given else ALPACA_WITHOUT_INPUT
            asked = form.format(instruction=prompt.instruction, input=prompt.given)
        else:
            asked = prompt.question + prompt.joint
        return [Part(asked, self._all_counts), Part(prompt.answer, True)]

    def _alpaca(self, turns: Sequence[Turn]) -> list[Part]:
        """What is asked behind the last answer is left out."""
        if any(turn.role == "system" for turn in turns):
            raise ValueError(
                "task.template=alpaca has no system turn: task.system=merge puts its text before the first question"
            )
        parts: list[Part] = []
        last = 2 * (len(turns) // 2) - 1
        for i, (asked, answer) in enumerate(zip(turns[::2], turns[1::2], strict=False)):
            if (asked.role, answer.role) != ("user", "assistant"):
                raise ValueError(
                    f"task.template=alpaca takes questions and answers in turn, and a turn of {asked.role!r} is "
                    f"followed by one of {answer.role!r}: use task.template=chat"
                )
            form = f"\n\n{ALPACA_TURN}" if parts else ALPACA_WITHOUT_INPUT
            said = answer.content if 2 * i + 1 == last else answer.content + self._end
            parts += [Part(form.format(instruction=asked.content), self._all_counts), Part(said, answer.counts)]
        return parts

    def _joined(self, turns: Sequence[Turn]) -> list[Part]:
        parts: list[Part] = []
        for i, turn in enumerate(turns):
            if parts:
                parts.append(Part("\n\n", self._all_counts))
            if turn.role == "assistant":
                parts.append(Part(turn.content if i + 1 == len(turns) else turn.content + self._end, turn.counts))
            else:
                parts.append(Part(turn.content, self._all_counts))
        return parts


def _says(turn: Turn) -> bool:
    return bool(turn.content.strip() or turn.extra)
