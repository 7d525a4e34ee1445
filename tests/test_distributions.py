"""What is installed: two distributions, whose lists of packages are whole, and the commands."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import gradcodec
from cg_fedllm.__main__ import PROGRAMS, app_folder, main

ROOT = Path(__file__).parents[1]


def described(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text())


def folders_of(top: str) -> set[str]:
    """Packages under a folder of the repository, dotted."""
    here = [path.parent for path in (ROOT / top).rglob("*.py") if "outputs" not in path.parts]
    return {".".join(folder.relative_to(ROOT).parts) for folder in here}


def test_no_package_is_forgotten() -> None:
    setuptools = described("pyproject.toml")["tool"]["setuptools"]
    mapped = setuptools["package-dir"]
    for name, folder in mapped.items():
        assert name == f"cg_fedllm.{folder}"
    listed = {name.removeprefix("cg_fedllm.") for name in setuptools["packages"]} - {"cg_fedllm"}
    assert listed == set.union(*(folders_of(folder) for folder in mapped.values()))
    app = described("pyproject.toml")["tool"]["flwr"]["app"]
    assert {pattern.split("/")[0] for pattern in app["fab-include"]} <= set(mapped.values())
    library = described("gradcodec/pyproject.toml")["tool"]["setuptools"]
    assert set(library["packages"]) == folders_of("gradcodec")


def test_what_is_no_code_is_in_the_distributions() -> None:
    """Every file of theirs that is tracked matches a pattern."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no checkout")
    data = described("pyproject.toml")["tool"]["setuptools"]["package-data"]
    for package, patterns in data.items():
        folder = package.removeprefix("cg_fedllm").lstrip(".") or "cg_fedllm"
        covered = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / folder).glob(pattern)}
        own = {name for name in tracked.stdout.split() if name.startswith(f"{folder}/") and not name.endswith(".py")}
        if folder == "gradcodec":  # the other distribution's own
            own -= {f"gradcodec/{name}" for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE")}
        assert own <= covered


def test_both_distributions_are_of_one_version_and_agree_on_what_they_need() -> None:
    product, library = described("pyproject.toml")["project"], described("gradcodec/pyproject.toml")["project"]
    assert product["version"] == library["version"]
    assert product["requires-python"] == library["requires-python"]
    needed = {one.name: one.specifier for one in map(Requirement, product["dependencies"])}
    for one in map(Requirement, library["dependencies"]):
        assert needed[one.name] == one.specifier
    (flower,) = map(Requirement, library["optional-dependencies"]["flower"])
    assert flower.specifier.contains(str(needed["flwr"]).removeprefix("=="))


def test_the_library_loads_nothing_but_what_it_says() -> None:
    blocked = "flwr", "transformers", "peft", "hydra", "omegaconf", "datasets", "bitsandbytes", "accelerate", "rich"
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "gradcodec/README.md").read_text(), re.DOTALL)
    program = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n{blocks[0]}\nassert len(payload) <= 1024"
    for one in (program, blocks[1]):
        subprocess.run([sys.executable, "-c", one], cwd=ROOT, check=True)
    assert len(blocks[0].strip().splitlines()) <= 12


def test_the_public_names_are_there_and_are_loaded_when_asked_for() -> None:
    for module in ("gradcodec", "gradcodec.flower"):
        namespace = importlib.import_module(module)
        for name in namespace.__all__:
            assert getattr(namespace, name).__doc__
        with pytest.raises(AttributeError):
            getattr(namespace, "anything")  # noqa: B009
    assert set(gradcodec.__all__) <= set(dir(gradcodec))
    lazy = "import sys, gradcodec, gradcodec.settings, gradcodec.flower.wire; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", lazy], cwd=ROOT).returncode == 0


def test_every_command_is_a_program(tmp_path: Path) -> None:
    """From any folder, in a process of its own."""
    assert app_folder() == ROOT
    alone = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    for command, program in PROGRAMS.items():
        here = said([*program, "--help"], ROOT, None)
        assert here
        assert said(["cg_fedllm", command, "--help"], tmp_path, alone) == here


def said(arguments: list[str], folder: Path, environment: dict[str, str] | None) -> str:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_command_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="'train' is none of federate, preview"):
        main(["train"])
    main([])
    assert "cg-fedllm federate" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out.startswith("cg-fedllm 0.")
