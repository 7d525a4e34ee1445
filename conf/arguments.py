"""The command line of the programs that Hydra composes: plain options for paths, and errors in one line.

Hydra's grammar gives ``=``, parentheses, quotes, ``~`` and letters outside ASCII a meaning or none, so a path that
holds them needs quotes within quotes. ``--data PATH`` takes any path as it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from conf.console import printable
from conf.schema import OPEN, TgapRun

FULL_ERROR = "HYDRA_FULL_ERROR"
OPTIONS = {"--data": "task.path", "--model": "model.path", "--codec-artifact": "codec.artifact"}
"""Of every program: option -> the setting that it gives."""
SWEEP_EXTRA = {"hydra/launcher": ("joblib", "submitit_local", "submitit_slurm"), "hydra/sweeper": ("optuna",)}
"""Hydra's groups -> what the extra ``sweep`` brings."""
_BARE = re.compile(r"(\.{0,2}/|[A-Za-z_])[A-Za-z0-9_/.:@%+-]*")
"""What begins otherwise may be a number, which Hydra writes in its own way: ``0.`` as ``0.0``, ``1_0`` as ``10``."""
_FOLDERS = {"--output": ("hydra.run.dir", "hydra.sweep.dir")}
CONF = Path(__file__).parent


def hydra_value(text: str) -> str:
    """The text as Hydra's grammar reads it back: bare where it can be, else in single quotes."""
    if _BARE.fullmatch(text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def shell_word(text: str) -> str:
    """The text as one word of a shell, in double quotes where they do, as it holds single ones."""
    return shlex.quote(text) if re.search(r"""["$`\\!]""", text) or "'" not in text else f'"{text}"'


def overrides_of(arguments: Sequence[str], options: Mapping[str, str], output: bool = True) -> list[str]:
    """The arguments with plain options turned into Hydra's ``key=value``. ``~`` is the user's home.

    Raises:
        ValueError: an option without its value.
    """
    sweep = "-m" in arguments or "--multirun" in arguments
    known: dict[str, str] = dict(options)
    if output:
        known |= {option: keys[sweep] for option, keys in _FOLDERS.items()}
    left, overrides = list(arguments), []
    while left:
        option, given, value = left.pop(0).partition("=")
        if option not in known:
            overrides.append(option + given + value)
            continue
        if not given:
            if not left:
                raise ValueError(f"{option} needs a value: {option} PATH")
            value = left.pop(0)
        overrides.append(f"{known[option]}={hydra_value(os.path.expanduser(value))}")  # noqa: PTH111 - "" stays ""
    return overrides


def run_program(main: Callable[[], Any], options: Mapping[str, str] | None = None, output: bool = True) -> None:
    """Runs a ``hydra.main`` function on ``sys.argv``; what Hydra refuses is said in one line, with status 1.

    Args:
        options: further plain options of this program, beside ``OPTIONS``.
        output: whether it writes into a folder, which ``--output`` names.
    """
    known = {**OPTIONS, **(options or {})}
    wants_help = any(argument in ("--help", "-h") for argument in sys.argv[1:])
    if wants_help:
        print(_help(known, output))
    traced = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"  # Hydra hands its errors on instead of printing them
    try:
        sys.argv[1:] = overrides_of(sys.argv[1:], known, output)
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if traced:
            raise
        sys.exit(f"error: {refusal(error, known)}")
    except ValueError as error:
        if traced:
            raise
        sys.exit(f"error: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def _help(options: Mapping[str, str], output: bool) -> str:
    lines = [f"  {f'{option} PATH':<24} {key}=PATH, whatever characters are in it" for option, key in options.items()]
    if output:
        lines.append(f"  {'--output PATH':<24} the folder that the results go to")
    return "plain options, beside key=value:\n" + "\n".join(lines) + "\n"


def refusal(error: Exception, options: Mapping[str, str] = OPTIONS) -> str:
    """What Hydra or OmegaConf refuse, in one line: which setting, why, and what is near."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    text = str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, options)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        near = _near(name, error.options) or ", ".join(error.options)
        if name in SWEEP_EXTRA.get(group, ()):
            return f"{group}={name} is not installed: pip install 'cg-fedllm[sweep]'"
        return f"{group}={name}: there is no such {group}: {near}"
    if unknown := re.match(r"Could not override '([^']*)'", text):
        key = unknown[1]
        near = _near(key, [*setting_names(), *groups()])
        group, _, name = key.partition(".")
        own = f"; what a plug-in takes is {group}.options.{name}" if group in OPEN and name else ""
        return f"{key} is no setting{f': {near}' if near else '; --cfg job lists them'}{own}"
    if ambiguous := re.match(r"Ambiguous value for argument '(.*?)'\n", text):
        return f"{ambiguous[1]} holds a comma: -m runs a job for each value; key=[a,b] is a list, and text needs quotes"
    said = text.rstrip().split("\nConfig search path")[0].split("\n    full_key")[0]
    if cause is not None:
        said = f"{text.splitlines()[0]}: {str(cause).splitlines()[0]}"
    return printable(said)


def _unreadable(override: str, options: Mapping[str, str]) -> str:
    key, given, value = override.partition("=")
    if not given:
        return f"{printable(override)} is no key=value; --help and --cfg job list options and settings"
    option = next((option for option, of in options.items() if of == key), None)
    quoted = shell_word(f"{key}={hydra_value(value)}")
    plain = f", or give it as {option} {shlex.quote(value)}" if option is not None else ""
    return f"{printable(override)}: the value holds characters that need quotes: {printable(quoted)}{printable(plain)}"


def _near(name: str, known: Sequence[str]) -> str:
    """The names that are alike, or that have the same last part; empty: none."""
    last = name.rpartition(".")[2]
    alike = difflib.get_close_matches(name, known, 3, 0.6)
    alike += [one for one in known if one.rpartition(".")[2] == last and one not in alike]
    return f"did you mean {' or '.join(alike[:4])}?" if alike else ""


def setting_names(schema: Any = TgapRun, head: str = "") -> list[str]:
    """Every setting, as ``group.key``."""
    names: list[str] = []
    types = get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        kind = types[entry.name]
        nested = dataclasses.is_dataclass(kind)
        names += setting_names(kind, f"{head}{entry.name}.") if nested else [f"{head}{entry.name}"]
    return names


def groups() -> list[str]:
    """Hydra's config groups."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
