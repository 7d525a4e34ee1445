"""Text from peers: what of it reaches a log, a checkpoint or a terminal."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.peer_text import MAX_CHARACTERS, clean


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("CUDA out of memory", "CUDA out of memory"),
        ("two\nlines\tand\r\nmore", "two lines and more"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;a new title\x07after", "after"),
        ("\x1b]8;;http://example.org\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Jcleared", "cleared"),
        ("a\x00b\x08c\x7fd\x85e", "abcd e"),
        ("evil\u202etxt.exe\u2069", "eviltxt.exe"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("a lone \ud800 surrogate", "a lone surrogate"),
        ("[/usr/lib/foo] stays: who prints it escapes it", "[/usr/lib/foo] stays: who prints it escapes it"),
        ("Übung 機械 ok", "Übung 機械 ok"),
    ],
)
def test_what_is_kept(text: str, kept: str) -> None:
    assert clean(text) == kept


def test_a_reason_of_101_megabytes_is_cut_and_costs_nothing() -> None:
    text, start = "x" * 101_000_000, time.perf_counter()
    assert clean(text) == "x" * MAX_CHARACTERS + "… (101000000 characters)"
    assert time.perf_counter() - start < 1


@given(st.text(st.characters(codec=None), max_size=3000))
def test_any_text_is_one_short_line_of_what_can_be_seen(text: str) -> None:
    line = clean(text)
    assert len(line) <= MAX_CHARACTERS + 40
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in line)
    line.encode()
