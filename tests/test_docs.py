"""What README and docs show runs: every command is understood by its program, and every block of Python is executed."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from hydra import compose, initialize_config_dir
from markdown_it import MarkdownIt

import server.federate
import tgap.__main__
from cg_fedllm.__main__ import PROGRAMS
from conf.arguments import OPTIONS, overrides_of
from conf.checks import check_settings
from conf.schema import Settings, register_schemas, settings_of, tgap_run_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])
COMPOSED = {
    "server.federate": "federate",
    "server.preview": "preview",
    "server.resources": "preview",
    "tgap": "tgap",
}
"""Program -> its configuration, for those that Hydra composes."""
ALL_OPTIONS = {**OPTIONS, **server.federate.OPTIONS, **tgap.__main__.OPTIONS}
PROGRAM = re.compile(r"(kubectl .* -- env )?(\w+=\S+ )*(python -m|cg-fedllm) ")
OTHERS = ("make", "pip", "git", "hf", "kubectl", "docker", ".")
"""Programs of others, which these tests take at their word; of ``make`` the target is looked for."""
READ_BY = {"yaml": yaml.safe_load, "json": json.loads, "toml": tomllib.loads, "text": str, "sh": str, "python": str}
"""Language of a block -> what must take it. ``text`` is shown and not meant for a program."""


@dataclass(frozen=True)
class Block:
    """A block of code: its page, the line of the page that it begins after, and what it holds."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
            if token.type == "fence" and not token.info.startswith("{"):  # a directive of the site's
                assert token.map is not None
                found.append(Block(page, token.map[0] + 1, token.info, token.content))
    return found


BLOCKS = blocks()
WITH_PYTHON = sorted({block.page for block in BLOCKS if block.language == "python"})


def lines_of_shell() -> list[tuple[str, str]]:
    """(place, line) of every command that a page shows, without what is no part of it: remarks, ``...``, options in
    brackets."""
    found = []
    for block in BLOCKS:
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                bare = " ".join(re.sub(r"\s#.*|\s\.\.\.(\s|$)|\[--\S+\]", " ", line).split())
                found += [(block.name, bare)] if bare else []
    return found


LINES = lines_of_shell()
COMMANDS = [(place, re.sub(r"^kubectl .* -- env ", "", line)) for place, line in LINES if PROGRAM.match(line)]


def words_of(command: str) -> tuple[str, list[str]]:
    """Module and arguments."""
    words = shlex.split(re.sub(r"^(\w+=\S+ )*", "", command))
    if words[0] == "cg-fedllm":
        module, *arguments = PROGRAMS[words[1]]
        return module, [*arguments, *words[2:]]
    return words[2], words[3:]


class Parsed(Exception):
    pass


@pytest.mark.parametrize(("place", "command"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_a_documented_command_is_understood(place: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    if COMPOSED[module] == "preview":  # it holds no rounds
        settings.federation.clients_per_round = 1
    check_settings(settings)


def dolly(path: Path) -> None:
    rows = [
        {"instruction": f"Say {i}.", "response": str(i), "category": "open_qa" if i % 3 else "brainstorming"}
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


CAN_RUN_HERE = ("server keys", "server.preview task=dolly", "+experiment=llama7b_dolly")
"""Those that need no data, model or server but what a newcomer has; one of each kind."""
RUN_HERE = sorted({command for _, command in COMMANDS if any(text in command for text in CAN_RUN_HERE)})


@pytest.mark.parametrize("command", RUN_HERE)
def test_a_documented_command_runs(command: str, tmp_path: Path) -> None:
    dolly(tmp_path / "dolly.jsonl")
    module, arguments = words_of(command)
    done = run_python(["-m", module, *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def run_python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=[str(page.relative_to(ROOT)) for page in WITH_PYTHON])
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """All blocks of a page are one program, in their order, in an empty folder; its lines are those of the page."""
    own = [block for block in BLOCKS if block.page == page and block.language == "python"]
    lines: list[str] = []
    for block in own:
        lines += [""] * (block.line - len(lines)) + block.text.splitlines()
    program = tmp_path / "page.py"
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = run_python([str(program)], tmp_path)
    assert done.returncode == 0, f"{page}, whose lines are those of page.py:\n{done.stderr}"


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_a_block_says_what_it_is_and_is_it(block: Block) -> None:
    assert block.language in READ_BY, f"{block.language!r} is none of {', '.join(READ_BY)}"
    READ_BY[block.language](block.text)


def test_shown_commands_are_ours_which_are_checked_or_known_ones_of_others() -> None:
    for place, line in LINES:
        program = re.sub(r"^(\w+=\S+ )*", "", line).split()[0]
        assert PROGRAM.match(line) or program in OTHERS, f"{place}: {line}"


def test_commands_within_the_text_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
            assert f"\n{target}:" in makefile, f"{page.name}: make {target}"
        for module in re.findall(r"python\s+-m\s+([a-z_][\w.]*\w)", text):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), f"{page.name}: python -m {module}"


def test_every_shown_program_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    for place, command in COMMANDS:
        assert f"### `python -m {words_of(command)[0]}`" in reference, place
