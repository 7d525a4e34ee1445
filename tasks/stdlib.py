"""The text that every Python installation carries: prose for the base model, source code for the clients.

Knows the standard library's files; must not know models, partitions or federations. Nothing is executed: sources
are parsed, never imported (except ``pydoc_data.topics``, which holds nothing but text).
"""

from __future__ import annotations

import ast
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Not library code, or not there on every installation.
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils"}
    | {"encodings", "pydoc_data", "ensurepip", "__pycache__", "__phello__"}
)


def stdlib_folder() -> Path:
    """Where this Python's standard library lies."""
    return Path(sysconfig.get_path("stdlib"))


def prose() -> list[str]:
    """The standard library's own documentation: the language reference's topics and every docstring.

    Returns:
        One string per topic or docstring, in a fixed order, without repetitions.
    """
    from pydoc_data.topics import topics  # 750 KB: loaded by those who pre-train only

    texts = [topics[name] for name in sorted(topics)]
    for path in _sources(stdlib_folder()):
        texts.extend(_docstrings(path))
    return list(dict.fromkeys(text for text in texts if len(text) > 80))


@functools.cache
def packages(min_bytes: int = 40_000) -> dict[str, list[Path]]:
    """The packages and single modules of the standard library with at least ``min_bytes`` of source code.

    The folder is searched once a process: do not change what is returned.

    Returns:
        Name -> its source files, the largest package first (ties by name).
    """
    root = stdlib_folder()
    files: dict[str, list[Path]] = {}
    for path in _sources(root):
        files.setdefault(path.relative_to(root).parts[0].removesuffix(".py"), []).append(path)
    sizes = {name: sum(path.stat().st_size for path in paths) for name, paths in files.items()}
    names = sorted((name for name in files if sizes[name] >= min_bytes), key=lambda name: (-sizes[name], name))
    return {name: files[name] for name in names}


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _LEFT_OUT.intersection(parts) and not parts[0].startswith(("_sysconfigdata", "config-")):
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a few files show broken syntax on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text
