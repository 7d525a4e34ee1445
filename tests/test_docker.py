"""Compose file and images: what can be checked without a Docker engine."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

DOCKER = Path("docker")
KUBERNETES = DOCKER / "kubernetes"


def commands() -> dict[str, list[str]]:
    """The commands of the services, variables replaced by their defaults."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DOCKER / "compose.yaml").read_text())
    content = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(content, dict)
    return {
        name: shlex.split(service["command"]) if isinstance(service["command"], str) else list(service["command"])
        for name, service in content["services"].items()
    }


@pytest.mark.parametrize(
    ("service", "module", "said"),
    [
        ("node", "client", "--ca /node/ca.crt is no file"),
        ("server", "server", "ca.crt is missing: make keys with"),
    ],
)
def test_the_services_commands_are_ours(service: str, module: str, said: str, tmp_path: Path) -> None:
    command = [part.replace("/deploy", str(tmp_path)) for part in commands()[service]]
    done = subprocess.run([sys.executable, "-m", module, *command], capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stderr


def test_the_commands_of_the_manifests_are_ours(tmp_path: Path) -> None:
    documents = [
        d for name in ("server", "node") for d in yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text())
    ]
    assert [document["kind"] for document in documents] == ["Service", "StatefulSet", "StatefulSet"]
    server, node = (document["spec"]["template"]["spec"] for document in documents[1:])
    (keys,), (start,), (client,) = server["initContainers"], server["containers"], node["containers"]
    for module, container, said in (
        ("server", start, "ca.crt is missing: make keys with"),
        ("server", keys, ""),
        ("client", client, "--ca /keys/ca.crt is no file"),
    ):
        command = [part.replace("/deploy", str(tmp_path)) for part in container["args"]]
        done = subprocess.run([sys.executable, "-m", module, *command], capture_output=True, text=True)
        assert (done.returncode == 0) == (said == ""), done.stderr
        assert said in done.stderr
    assert server["securityContext"]["runAsUser"] == node["securityContext"]["runAsUser"] == 10001


def test_the_keys_service_makes_keys(tmp_path: Path) -> None:
    command = [part.replace("/deploy", str(tmp_path)) for part in commands()["keys"]]
    subprocess.run([sys.executable, "-m", "server", *command], check=True, capture_output=True)
    assert {"ca.crt", "server.pem", "node-0", "node-1"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["server", "client"])
def test_a_linter_finds_nothing_in_the_dockerfiles(name: str) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DOCKER / f"{name}.Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["server", "client"])
def test_images_are_pinned_non_root_and_hold_no_keys(name: str) -> None:
    text = (DOCKER / f"{name}.Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.11", text, re.MULTILINE)
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert "--constraint constraints.txt" in text
    assert text.index("USER 10001") < text.index("ENTRYPOINT")
    ignored = Path(".dockerignore").read_text().split()
    assert {"deploy", "outputs", ".venv", "*.key"} <= set(ignored)
