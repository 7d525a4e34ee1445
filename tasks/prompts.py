"""The fields of a record -> a text, a question with its answer, or a dialogue.

Knows the field names and roles that data sets use; must not know templates, tokenizers or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tasks.records import Fields, as_text, is_missing, parsed

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "instruction": ("output", "response"),
    "prompt": ("completion", "response"),
    "question": ("answer", "response"),
}
"""The field of a question -> that of its answer. ``input`` or ``context`` is what is given with it."""
DIALOGUES = ("messages", "conversations")
ROLES: Mapping[str, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "ai"),
    "tool": ("tool", "function", "observation"),
}
"""A turn's role -> the names that data sets give it, in any case."""
SPOKEN = {"role", "from", "content", "value", "weight"}
TEXT_PARTS = ("text", "input_text", "output_text")


class Turn(NamedTuple):
    """One turn of a dialogue; ``extra`` is what else it holds for the template, as ``tool_calls``."""

    role: str  # one of ROLES
    content: str
    extra: Mapping[str, Any] = {}
    counts: bool = True  # an assistant's, to be trained on

    @property
    def message(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Question:
    """A question and its answer; ``given`` is what the question is about."""

    instruction: str
    answer: str
    given: str = ""
    system: str = ""
    joint: str = "\n\n"  # between question and answer where no template stands

    @property
    def question(self) -> str:
        return f"{self.instruction}\n\n{self.given}" if self.given else self.instruction

    @property
    def dialogue(self) -> Dialogue:
        turns = [Turn("user", self.question), Turn("assistant", self.answer)]
        return Dialogue([Turn("system", self.system), *turns] if self.system else turns)


@dataclass(frozen=True)
class Dialogue:
    """Turns of several roles, and the tools that the assistant may call."""

    turns: Sequence[Turn]
    tools: Sequence[Any] = field(default_factory=list)  # that the assistant may call, as JSON schemas


_FORMS = ("instruction", *DIALOGUES, "prompt", "question")


def prompt_of(fields: Fields) -> str | Question | Dialogue:
    """What a record says; of several forms the first of: ``instruction``, ``messages``, ``conversations``, ``prompt``,
    ``question``, ``text``.

    Raises:
        ValueError: none of these with its answer is there, or a dialogue that is none.
    """
    present = {name: value for name, value in fields.items() if not is_missing(value)}
    for name in (*_FORMS, "text"):
        if name in present and (found := _form(present, name)) is not None:
            return found
    has = ", ".join(map(str, present)) or "none"
    if asked := next((name for name in QUESTIONS if name in present), None):
        raise ValueError(f"a record with {asked!r} needs {' or '.join(map(repr, QUESTIONS[asked]))} too; it has {has}")
    needs = ", or ".join(f"{asked!r} and {answers[0]!r}" for asked, answers in QUESTIONS.items())
    raise ValueError(f"a record needs 'text', 'messages', 'conversations', or {needs}; it has {has}")


def _form(present: Fields, name: str) -> str | Question | Dialogue | None:
    """None: a question without its answer."""
    if name == "text":
        return as_text(present[name])
    if name in DIALOGUES:
        _no_history_beside(present, name)
        return Dialogue([*_system(present, turns := _turns(present[name], name)), *turns], _tools(present))
    answer = next((present[key] for key in QUESTIONS[name] if key in present), None)
    if answer is None:
        return None
    asked = present[name]
    if _is_turns(asked) or _is_turns(answer):  # TRL's conversational form: the prompt's answers are not trained on
        _no_history_beside(present, name)
        before = _turns(asked, name) if _is_turns(asked) else [Turn("user", as_text(asked))]
        behind = _turns(answer, "completion") if _is_turns(answer) else [Turn("assistant", as_text(answer))]
        turns = [*(turn._replace(counts=False) for turn in before), *behind]
        return Dialogue([*_system(present, turns), *turns], _tools(present))
    given = as_text(next((present[key] for key in ("input", "context") if key in present), ""))
    joint = "" if name == "prompt" else "\n\n"  # TRL writes a completion straight behind its prompt
    question = Question(as_text(asked), as_text(answer), given, _system_text(present), joint)
    before, tools = _history(present), _tools(present)
    *system, user, assistant = question.dialogue.turns
    return Dialogue([*system, *before, user, assistant], tools) if before or tools else question


def role_of(name: Any) -> str:
    """One of ``ROLES``. Raises ValueError: nobody's role."""
    asked = str(name).strip().lower()
    for role, names in ROLES.items():
        if asked in names:
            return role
    known = ", ".join(name for names in ROLES.values() for name in names)
    raise ValueError(f"nobody knows the role {str(name)!r}: roles are {known}")


def _is_turns(value: Any) -> bool:
    return _are_objects(value) and all("role" in turn or "from" in turn for turn in value)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _turns(turns: Any, name: str) -> list[Turn]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a cell of CSV
        turns = parsed(turns)
    if not isinstance(turns, list | tuple) or not turns:
        raise ValueError(f"{name!r} must be a list of at least one turn: leave records without a dialogue out")
    return [_turn(turn, name) for turn in turns]


def _turn(turn: Any, name: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"every entry of {name!r} needs a 'role' and a 'content'")
    said = {key: value for key, value in turn.items() if not is_missing(value)}
    role, content = said.get("role", said.get("from")), said.get("content", said.get("value"))
    extra = {key: value for key, value in said.items() if key not in SPOKEN and value not in ("", [], {})}
    if role is None or (content is None and not extra):
        raise ValueError(f"every entry of {name!r} needs a 'role' and a 'content'")
    weight = said.get("weight", 1)
    if weight not in (0, 1):
        raise ValueError(f"a turn's 'weight' is 0 or 1, not {as_text(weight)}")
    return Turn(role_of(role), _content("" if content is None else content), extra, bool(weight))


def _content(content: Any) -> str:
    """A text, or the texts of its parts, joined; any other value as JSON."""
    is_parts = _are_objects(content) and all("type" in part or "text" in part for part in content)
    if not is_parts:
        return as_text(content)
    for part in content:
        if (kind := part.get("type", "text")) not in TEXT_PARTS:
            raise ValueError(f"a turn holds a part of type {kind!r}: parts of type 'text' alone can be trained on")
    return "".join(as_text(part["text"]) for part in content if not is_missing(part.get("text")))


def _system_text(present: Fields) -> str:
    return as_text(next((present[key] for key in ("system", "system_prompt") if key in present), ""))


def _system(present: Fields, turns: Sequence[Turn]) -> list[Turn]:
    """The system text that stands beside a dialogue, unless there is one in it."""
    text = _system_text(present)
    return [Turn("system", text)] if text and all(turn.role != "system" for turn in turns) else []


def _history(present: Fields) -> list[Turn]:
    """The questions and answers before a record's own, pairs as LLaMA-Factory has them."""
    history = _listed(present, "history")
    if not isinstance(history, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
        raise ValueError("'history' must be a list of pairs, each a question and its answer")
    roles = ("user", "assistant")
    return [Turn(role, as_text(said)) for pair in history for role, said in zip(roles, pair, strict=True)]


def _no_history_beside(present: Fields, name: str) -> None:
    """Raises ValueError: earlier turns stand in two fields, and nothing says in which order."""
    if _history(present):
        raise ValueError(f"{name!r} holds turns and so does 'history': put them into one of the two, in their order")


def _tools(present: Fields) -> list[Any]:
    tools = _listed(present, "tools")
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("'tools' must be a list of JSON schemas")
    return list(tools)


def _listed(present: Fields, name: str) -> Any:
    """A field that should hold a list; in CSV a cell with its JSON."""
    value = present.get(name, [])
    if isinstance(value, str):
        return parsed(value) if value.strip() else []
    return value
