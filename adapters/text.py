"""Text of foreign files, made fit to be shown. Knows strings alone."""

from __future__ import annotations

import unicodedata

LONGEST = 500


def one_line(text: object, longest: int = LONGEST) -> str:
    """The text without line ends, terminal escapes and other control or direction characters, cut to a length."""
    plain = "".join(" " if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") else letter for letter in str(text))
    plain = " ".join(plain.split())
    return plain if len(plain) <= longest else f"{plain[:longest]}..."
