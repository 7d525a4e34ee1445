"""Compose file, manifests and images: what can be checked without a container engine."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from conftest import RunProgram
from flwr.cli.build import build_fab_from_disk
from omegaconf import OmegaConf

import client.__main__
import client.health
import server.__main__
from client.own_app import app_digests

DOCKER = Path("docker")
KUBERNETES = DOCKER / "kubernetes"
MAIN = {"client": client.__main__.main, "server": server.__main__.main, "client.health": client.health.main}


def services() -> dict[str, dict[str, object]]:
    """The services of the compose file, variables replaced by their defaults."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DOCKER / "compose.yaml").read_text())
    content = OmegaConf.to_container(OmegaConf.create(yaml.safe_load(text)))
    assert isinstance(content, dict)
    found: dict[str, dict[str, object]] = content["services"]
    return found


def unit_command(path: Path) -> list[str]:
    """What a unit of systemd starts, without the program; variables as its own remarks have them."""
    text = path.read_text().replace("\\\n", " ")
    given = dict(re.findall(r"^#   (\w+)=(.*)$", text, re.MULTILINE))
    (command,) = re.findall(r"^ExecStart=\S+/cg-fedllm (.*)$", text, re.MULTILINE)
    filled = re.sub(r"\$\{?(\w+)\}?", lambda found: given[found[1]], command.replace("%i", "0"))
    return shlex.split(filled)


def command_of(service: str) -> list[str]:
    command = services()[service]["command"]
    return shlex.split(command) if isinstance(command, str) else list(command)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("service", "module", "said"),
    [
        ("node", "client", "--ca /node/ca.crt is no file"),
        ("node-cpu", "client", "--ca /node/ca.crt is no file"),
        ("server", "server", "ca.crt is missing: make keys with"),
    ],
)
def test_the_services_commands_are_ours(
    service: str, module: str, said: str, tmp_path: Path, run_program: RunProgram
) -> None:
    command = [part.replace("/deploy", str(tmp_path)) for part in command_of(service)]
    status, _, stderr = run_program(MAIN[module], command)
    assert status != 0
    assert said in stderr


def test_the_commands_of_the_manifests_are_ours(tmp_path: Path, run_program: RunProgram) -> None:
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
        status, _, stderr = run_program(MAIN[module], command)
        assert (status == 0) == (said == ""), stderr
        assert said in stderr
    assert server["securityContext"]["runAsUser"] == node["securityContext"]["runAsUser"] == 10001
    asked = client["livenessProbe"]["exec"]["command"]
    assert asked[:3] == ["python", "-m", "client.health"]
    assert f"--logs={asked[3]}" in client["args"]


def test_the_keys_service_makes_keys(tmp_path: Path, run_program: RunProgram) -> None:
    command = [part.replace("/deploy", str(tmp_path)) for part in command_of("keys")]
    assert run_program(MAIN["server"], command)[0] == 0
    assert {"ca.crt", "server.pem", "node-0", "node-1"} <= {path.name for path in tmp_path.iterdir()}


def test_the_nodes_health_check_asks_where_its_logs_lie(run_program: RunProgram) -> None:
    check = services()["node"]["healthcheck"]["test"]  # type: ignore[index]
    command = command_of("node")
    assert check[:4] == ["CMD", "python", "-m", "client.health"]
    assert check[4:] == [command[command.index("--logs") + 1]]
    status, _, stderr = run_program(MAIN["client.health"], check[4:])  # no node runs here
    assert status == 1
    assert "no node runs with its logs in /node/logs" in stderr


def test_a_node_without_gpus_reserves_none_and_is_a_node_otherwise() -> None:
    node, other = services()["node"], services()["node-cpu"]
    assert "devices" in node["deploy"]["resources"]["reservations"]  # type: ignore[index]
    assert "devices" not in other["deploy"]["resources"]["reservations"]  # type: ignore[index]
    assert command_of("node-cpu") == [word if word != "all" else "none" for word in command_of("node")]
    assert {key: node[key] for key in node if key not in ("profiles", "deploy", "command")} == {
        key: other[key] for key in other if key not in ("profiles", "deploy", "command")
    }


def test_models_data_and_codec_have_one_name_on_every_host() -> None:
    folders = {"/models", "/data", "/codec"}
    for name in ("server", "node", "node-cpu"):
        mounts = {mount["target"]: mount for mount in services()[name]["volumes"]}  # type: ignore[attr-defined]
        assert folders <= mounts.keys() and all(mounts[folder]["read_only"] for folder in folders)


@pytest.mark.parametrize("name", ["server", "node"])
def test_a_linter_finds_nothing_in_the_manifests(name: str) -> None:
    """Against the schemas of Kubernetes itself; unknown keys are errors."""
    for document in yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text()):
        kubernetes_validate.validate(document, "1.33", strict=True)


def test_the_linter_of_manifests_finds_what_is_wrong() -> None:
    (document,) = yaml.safe_load_all((KUBERNETES / "node.yaml").read_text())
    document["spec"]["template"]["spec"]["containers"][0]["arguments"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.33", strict=True)


@pytest.mark.parametrize(
    ("unit", "said"),
    [("cg-fedllm-server", "ca.crt is missing: make keys with"), ("cg-fedllm-node@", "--ca ca.crt is no file")],
)
def test_the_units_of_systemd_start_ours(unit: str, said: str, tmp_path: Path, run_program: RunProgram) -> None:
    path = DOCKER / "systemd" / f"{unit}.service"
    program, *arguments = (word.replace("/var/lib/cg-fedllm", str(tmp_path)) for word in unit_command(path))
    status, _, stderr = run_program(MAIN[program], arguments)
    assert status != 0
    assert said in stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
@pytest.mark.parametrize("unit", ["cg-fedllm-server", "cg-fedllm-node@"])
def test_systemd_finds_nothing_wrong_in_the_units(unit: str, tmp_path: Path) -> None:
    text = (DOCKER / "systemd" / f"{unit}.service").read_text()
    (copy := tmp_path / f"{unit}.service").write_text(text.replace("/opt/cg-fedllm/bin/cg-fedllm", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["server", "client"])
def test_a_linter_finds_nothing_in_the_dockerfiles(name: str) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DOCKER / f"{name}.Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["server", "client"])
def test_images_are_pinned_and_non_root(name: str) -> None:
    text = (DOCKER / f"{name}.Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.11", text, re.MULTILINE)
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert "--constraint constraints.txt" in text
    assert text.index("USER 10001") < text.index("ENTRYPOINT")


def copied(root: Path, patterns: list[str]) -> Iterator[str]:
    """The files that an image's ``COPY . .`` takes, by the rules of Docker's ignore file
    (https://docs.docker.com/build/concepts/context/#dockerignore-files): patterns are rooted, of one path the last that
    matches it or a folder above it counts, ``!`` takes it back in, and ``**`` is any number of folders."""
    rules = [(line.startswith("!"), _regex(line.lstrip("!").strip("/"))) for line in patterns]
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        above = [name, *(parent.as_posix() for parent in path.relative_to(root).parents if parent.name)]
        kept = True
        for takes_in, rule in rules:
            if any(rule.fullmatch(one) for one in above):
                kept = takes_in
        if kept and path.is_file():
            yield name


def _regex(pattern: str) -> re.Pattern[str]:
    kinds = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern)
    return re.compile("".join(kinds.get(part, part if part.startswith("[") else re.escape(part)) for part in parts))


def ignore_patterns() -> list[str]:
    lines = Path(".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_ignore_rules_are_dockers() -> None:
    """Examples of its documentation."""
    for pattern, name, matches in (
        ("*/temp*", "somedir/temporary.txt", True),
        ("*/temp*", "a/b/temp", False),
        ("*/*/temp*", "somedir/subdir/temporary.txt", True),
        ("temp?", "tempa", True),
        ("**/*.go", "main.go", True),
        ("**/*.go", "a/b/main.go", True),
        ("*.md", "README.md", True),
        ("*.md", "docs/README.md", False),
        ("*", ".git", True),
    ):
        assert bool(_regex(pattern).fullmatch(name)) is matches, (pattern, name)


SECRET = [
    "node/node-0",
    "node/ca.crt",
    "node/memory/run/partition-0.safetensors",
    "deploy/ca.key",
    "deploy/node-3",
    "deploy/state.db-wal",
    "deploy/control.secret",
    "deploy/flwr/credentials.yaml",
    "node-0",
    "node-1.pub",
    "ca.key",
    "server.pem",
    "another-name/id",
    ".git/config",
    ".venv/bin/python",
    ".env",
    "outputs/federate/run/adapter.safetensors",
    "multirun/0/results.json",
    "data/train.jsonl",
    "client/node-0",
    "server/server.key",
    "conf/.secrets/token",
    "assets/ca.pem",
    "client/__pycache__/app.cpython-311.pyc",
]
"""Files that may lie in a checkout, and never in an image."""


def test_no_key_and_no_data_is_copied_into_an_image(tmp_path: Path) -> None:
    needed = ["pyproject.toml", "constraints.txt", "client/node.py", "conf/codec/int8.yaml", "gradcodec/general/a.json"]
    for name in [*SECRET, *needed]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list(copied(tmp_path, ignore_patterns())) == sorted(needed)


def test_an_image_holds_the_whole_app_and_its_assets(tmp_path: Path) -> None:
    """So that a node in a container has the app of the server that it joins."""
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    context, image = tmp_path / "context", tmp_path / "image"
    for name in tracked:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, context / name)
    for name in copied(context, ignore_patterns()):
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(context / name, image / name)
    assert app_digests(build_fab_from_disk(image)) == app_digests(build_fab_from_disk(context))
    assert {name for name in tracked if name.startswith("assets/")} <= set(copied(context, ignore_patterns()))
    for line in re.findall(r"^COPY (.+) \S+$", (DOCKER / "client.Dockerfile").read_text(), re.MULTILINE):
        assert all((image / source).exists() for source in line.split())
