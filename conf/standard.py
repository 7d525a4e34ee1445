"""A run's settings as they are if nobody sets any, and those of a run that are others.

``conf/federate.yaml`` makes them out of the schema's defaults and the groups that it names; this is the same without
Hydra, for a place where there are no YAML files. A test holds the two in step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from conf import CHECKOUT
from conf.arguments import hydra_value, shell_word
from conf.schema import Settings

OF_THE_GROUPS = {"train.update": "delta", "train.lr": 0.005, "strategy.lr": 1.3}
"""What ``train=delta`` and ``strategy=fedavg`` set."""
OF_THIS_RUN = ("output", "run_id", "resume", "from_round", "dry_run")
"""Settings by which no two runs are told apart."""
SETTLED = ("codec.digest",)
"""What a run finds out for itself."""


def flat(settings: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """``group.key`` -> value, of settings as JSON has them."""
    return dict(_entries(settings, head))


def _entries(settings: Mapping[str, Any], head: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value


def standard() -> dict[str, Any]:
    """``group.key`` -> the value if nobody sets any."""
    return flat(dataclasses.asdict(Settings())) | OF_THE_GROUPS


def set_by_hand(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's ``flat`` settings that are not the standard ones, without ``OF_THIS_RUN`` and ``SETTLED``."""
    usual = standard()
    usual["model.path"] = str(CHECKOUT / usual["model.path"])
    return {
        key: value
        for key, value in settings.items()
        if key not in (*OF_THIS_RUN, *SETTLED) and (key not in usual or usual[key] != value)
    }


def command(by_hand: Mapping[str, Any]) -> str:
    """The command line of a run with these settings, for a shell."""
    words = [shell_word(f"{key}={_text(value)}") for key, value in by_hand.items()]
    return " ".join(["python -m server.federate", *words])


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_text, value))}]"
    return hydra_value(value) if isinstance(value, str) else repr(value)
