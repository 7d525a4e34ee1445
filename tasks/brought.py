"""Records of a plug-in's task. Knows the function that the plug-in brings; must not know what its fields mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from tasks.records import Corpus, Fields, Record
from tasks.settings import PLUGINS, TaskSettings

Reader = Callable[..., Iterable[Fields]]
"""Settings, and by name the options that it knows -> the fields of every record, the same on every machine and in the
same order. Of the settings it reads ``path``, which may be one client's own; a ValueError refuses them."""


def read_brought(settings: TaskSettings, path: str | None) -> Corpus:
    """The records that the task's reader gives.

    Raises:
        ValueError: the reader refuses the settings, fails, or gives something else than fields.
    """
    said = f"task.name={settings.name}"
    try:
        rows = list(PLUGINS.load(settings.name)(replace(settings, path=path), **settings.options))
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from None
    except Exception as error:  # it is another's code, which may raise anything
        raise ValueError(f"{said}: {PLUGINS.origin(settings.name)} failed: {error!r}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{said}, record {number}: fields by name are expected, not {type(row).__name__}")
    return Corpus([Record(row, path or settings.name, f"record {number}") for number, row in enumerate(rows, 1)])
