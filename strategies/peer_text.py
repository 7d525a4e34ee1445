"""Text that a peer sent, made fit for logs, terminals and files: the one place where it enters.

A node's words end in event logs, checkpoints, model cards and on the operator's terminal. So what is kept of them is
short and holds no character that a terminal obeys or that hides another one. Escaping for a format (rich, Markdown) is
the business of who writes that format.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARACTERS = 500
_READ = 8 * MAX_CHARACTERS
"""No more of a text is looked at: a reason of 100 MB costs no more than one of a page."""
_TERMINAL_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor, modes
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-~]?"  # every other escape
)
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn"}
"""Categories of Unicode: control, format (bidirectional marks, zero width), surrogate, private, not assigned."""


def clean(text: object) -> str:
    """One line of at most ``MAX_CHARACTERS`` characters (and an ellipsis) without control characters, terminal
    sequences, or characters that are not seen or change the direction of others. White space becomes single spaces."""
    whole = str(text)
    seen = _TERMINAL_SEQUENCE.sub("", whole[:_READ])
    shown = "".join(" " if c.isspace() else c for c in seen if c.isspace() or unicodedata.category(c) not in _HIDDEN)
    line = " ".join(shown.split())
    if len(line) <= MAX_CHARACTERS and len(whole) <= _READ:
        return line
    return f"{line[:MAX_CHARACTERS]}… ({len(whole)} characters)"
