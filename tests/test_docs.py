"""Every command in README and docs is understood by its program, and those that can run here do."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hydra import compose, initialize_config_dir

import server.federate
import tgap.__main__
from conf.arguments import OPTIONS, overrides_of
from conf.schema import Settings, check_settings, register_schemas, settings_of, tgap_run_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
COMPOSED = {"server.federate": "federate", "server.preview": "preview", "tgap": "tgap"}
"""Program -> its configuration, for those that Hydra composes."""
ALL_OPTIONS = {**OPTIONS, **server.federate.OPTIONS, **tgap.__main__.OPTIONS}


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line of a code block that starts one of our programs."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"^(\$ |kubectl .* -- env )", "", line)
                if re.match(r"(\w+=\S+ )*python -m ", text):
                    found.append((page.name, " ".join(re.sub(r"\s#.*|\s\.\.\.(\s|$)|\[--\S+\]", " ", text).split())))
    return found


COMMANDS = commands()


def words_of(command: str) -> tuple[str, list[str]]:
    """Module and arguments."""
    words = shlex.split(command)
    start = words.index("-m")
    return words[start + 1], words[start + 2 :]


class Parsed(Exception):
    pass


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p}-{i}" for i, (p, _) in enumerate(COMMANDS)])
def test_a_documented_command_is_understood(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, arguments = words_of(command)
    if module in COMPOSED:
        understood_by_hydra(module, arguments)
        return
    for way in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, way)

        def parse_and_end(parser: argparse.ArgumentParser, parse: Any = parse) -> NoReturn:
            parse(parser)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, way, parse_and_end)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    name = module if (ROOT / f"{module.replace('.', '/')}.py").is_file() else f"{module}.__main__"
    with pytest.raises(Parsed):
        importlib.import_module(name).main()


def understood_by_hydra(module: str, arguments: list[str]) -> None:
    register_schemas()
    swept = "-m" in arguments
    overrides = [a for a in overrides_of(arguments, ALL_OPTIONS) if a not in ("-m", "--cfg", "job")]
    if swept:  # a job of the sweep
        overrides = [re.sub(r",[^\]]*$", "", override) for override in overrides]
    overrides = [o for o in overrides if not o.startswith(("resume=", "from_round=", "hydra."))]  # need a run
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(COMPOSED[module], [*overrides, "output=here", "hydra.run.dir=here"], return_hydra_config=False)
    settings: Settings = tgap_run_of(config) if module == "tgap" else settings_of(config)
    settings.model.path, settings.model.sha256 = str(ROOT / "assets/tiny-llama"), None  # theirs are not here
    settings.dry_run = True
    settings.codec.artifact = settings.codec.artifact or str(ROOT / "gradcodec/general")
    if module == "server.preview":  # it holds no rounds
        settings.federation.clients_per_round = 1
    check_settings(settings)


def dolly(path: Path) -> None:
    rows = [
        {"instruction": f"Say {i}.", "response": str(i), "category": "open_qa" if i % 3 else "brainstorming"}
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def can_run_here(command: str) -> bool:
    """Those that need no data, model or server but what a newcomer has; one of each kind."""
    return any(text in command for text in ("server keys", "server.preview task=dolly", "+experiment=llama7b_dolly"))


@pytest.mark.parametrize("command", sorted({c for _, c in COMMANDS if can_run_here(c)}))
def test_a_documented_command_runs(command: str, tmp_path: Path) -> None:
    dolly(tmp_path / "dolly.jsonl")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    module, arguments = words_of(command)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_readme_says_what_make_offers() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE)):
        assert f"\n{target}:" in makefile, target
