"""The lock file: what ``make lock`` resolves, in step with the constraints and with what is asked for."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ON_A_GPU = "nvidia-", "cuda-", "triton"
"""Of PyTorch's CUDA builds, which the tests do not run with."""


def pins(path: str) -> dict[str, str]:
    lines = (line.split("#")[0].split(";")[0].strip() for line in (ROOT / path).read_text().splitlines())
    pairs = (line.partition("==") for line in lines if line)
    return {str(canonicalize_name(name)): version for name, _, version in pairs}


def test_the_lock_is_what_the_tests_ran_with() -> None:
    lock, constraints = pins("requirements.lock"), pins("constraints.txt")
    assert {name: version for name, version in lock.items() if constraints.get(name, version) != version} == {}
    unknown = lock.keys() - constraints.keys()
    assert [name for name in unknown if not name.startswith(ON_A_GPU)] == []
    assert constraints.keys() - lock.keys() == set(), "constraints of what nothing needs any more"


def test_the_lock_has_all_that_is_asked_for() -> None:
    lock = pins("requirements.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for extra in project["optional-dependencies"].values() for one in extra]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        if requirement.name == "cg-fedllm":
            continue
        version = lock[str(canonicalize_name(requirement.name))]
        assert requirement.specifier.contains(version), f"{requirement}: the lock has {version}; make lock"
