"""Whom server and nodes trust: the control port's secret, partitions bound to keys, and apps that a node refuses."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict, UserConfig
from flwr.cli.build import build_fab_from_disk, build_fab_from_files
from flwr.common.constant import ACCESS_TOKEN_KEY, NOOP_FLWR_AID
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.superexec.executor import ExecutionSpec
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager

import client.own_app
from bench.deployment import free_ports, node_command, running, wait_for
from client.executor import OwnAppExecutor
from client.health import problems_of
from client.own_app import app_digests, check_app, own_digests, take_token
from conf import CHECKOUT
from conf.processes import end_all
from gradcodec.artifact import load_artifact
from gradcodec.build import artifact_folder
from gradcodec.settings import CodecSettings
from server.backends.submit import write_deflated
from server.host.bindings import DEPLOY_VARIABLE, bind, key_of, load_table, read_bindings, save_table
from server.host.control import SecretPlugin
from server.host.keys import make_keys
from server.host.launch import ServerConfig, refuses_strangers, start_server
from server.host.nodes import _node_id_in_database, list_nodes, register_nodes, revoke_node

runtime: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "deploy", [], 3)
    return tmp_path / "deploy"


# whom the control port lets in


def test_only_who_holds_the_secret_is_let_in() -> None:
    plugin = SecretPlugin("the secret")
    allowed, account = plugin.validate_tokens_in_metadata([(ACCESS_TOKEN_KEY, "the secret")])
    assert allowed and account is not None and account.flwr_aid == NOOP_FLWR_AID
    metadata: list[list[tuple[str, str | bytes]]] = [
        [],
        [(ACCESS_TOKEN_KEY, "")],
        [(ACCESS_TOKEN_KEY, "the secre")],
        [(ACCESS_TOKEN_KEY, "the secret\u00e9")],
        [(ACCESS_TOKEN_KEY, b"\xff")],
        [("another", "the secret")],
    ]
    for one in metadata:
        assert plugin.validate_tokens_in_metadata(one) == (False, None)


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerConfig]:
    folder = tmp_path_factory.mktemp("superlink") / "deploy"
    make_keys(folder, [], 4)
    fleet, control = free_ports(2)
    config = ServerConfig(folder, f"127.0.0.1:{fleet}", control)
    children = start_server(config)
    yield config
    end_all(children)


def strangers_words(config: ServerConfig, home: Path) -> str:
    """What Flower's own command says to who knows where the SuperLink is, and has its CA, but not its secret."""
    shutil.copytree(config.flwr_home, home)
    (home / "credentials.yaml").unlink()
    environment = {**config.environment(), "FLWR_HOME": str(home)}
    done = subprocess.run(["flwr", "list", "cg-fedllm"], env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.grpc
def test_a_superlink_turns_strangers_away(superlink: ServerConfig, tmp_path: Path) -> None:
    assert refuses_strangers(superlink)
    assert "Authentication failed" in strangers_words(superlink, tmp_path / "stranger")
    assert [path for path in (superlink.folder, *superlink.folder.rglob("*")) if path.stat().st_mode & 0o077] == []


@pytest.mark.grpc
def test_so_does_one_without_tls(tmp_path: Path) -> None:
    fleet, control = free_ports(2)
    config = ServerConfig(tmp_path / "deploy", f"127.0.0.1:{fleet}", control, insecure=True)
    children = start_server(config)
    try:
        assert refuses_strangers(config)
        assert "Authentication failed" in strangers_words(config, tmp_path / "stranger")
        assert list_nodes(config) == []
    finally:
        end_all(children)


@pytest.mark.grpc
def test_nodes_are_let_in_bound_and_shut_out(superlink: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = superlink.folder
    first, second = (folder / f"node-{i}.pub" for i in range(2))
    (new,) = register_nodes(superlink, [first])
    assert new.startswith(f"registered {first}: node ")
    again, other = register_nodes(superlink, [first, second])
    assert again == new.replace("registered", "registered before")
    node_id = int(new.split("node ")[-1].split()[0])
    monkeypatch.setenv(DEPLOY_VARIABLE, str(folder))
    assert sorted(read_bindings().values()) == [0, 1]
    assert read_bindings()[node_id] == 0
    shutil.copy(first, folder / "copy.pub")
    assert revoke_node(superlink, first) == str(node_id)
    assert list(read_bindings().values()) == [1]
    assert "stays out" in register_nodes(superlink, [folder / "copy.pub"])[0]
    (folder / "nodes.json").unlink()  # Flower still knows
    assert register_nodes(superlink, [second]) == [other.replace("registered", "registered before")]


@pytest.mark.grpc
def test_nodes_of_one_host_say_how_they_are(superlink: ServerConfig, tmp_path: Path) -> None:
    """Two that want the same local port, one of which dies; and one whose key nobody let in."""
    folder, logs = superlink.folder, [tmp_path / f"node-{i}.log" for i in (2, 3)]
    register_nodes(superlink, [folder / "node-2.pub"])
    (port,) = free_ports(1)
    commands = [[*node_command(folder, i, 4, superlink.fleet_address, port), "--no-trainer"] for i in (2, 3)]
    with running(commands[0], logs[0]) as node:
        wait_for("partition 2: connected as node", logs[0], node)
        assert problems_of(folder / "logs-2") == []
        with running(commands[1], logs[1]) as stranger:
            assert stranger.wait(60) == 1
        assert f"port {port} is taken by another program" in logs[1].read_text()
        assert "the server refuses this key" in logs[1].read_text()
    assert "its SuperNode does not answer" in problems_of(folder / "logs-2")[0]


# which node holds which partition


def test_a_table_comes_back_and_a_run_reads_who_was_let_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_bindings() == {}
    monkeypatch.setenv(DEPLOY_VARIABLE, str(folder))
    assert read_bindings() == {}
    table = load_table(folder)
    for i in range(3):
        bind(table, folder / f"node-{i}.pub").node_id = str((1 << 64) - 1 - i) if i < 2 else None
    table[key_of(folder / "node-1.pub")].revoked = True
    save_table(table, folder)
    assert load_table(folder) == table
    assert read_bindings() == {(1 << 64) - 1: 0}


def test_a_partition_is_one_keys(folder: Path) -> None:
    table = load_table(folder)
    (folder / "alice.pub").write_text((folder / "node-2.pub").read_text())
    with pytest.raises(ValueError, match=r"alice\.pub.*--partition N"):
        bind(table, folder / "alice.pub")
    bind(table, folder / "node-0.pub")
    with pytest.raises(ValueError, match="partition 0 is bound to another key"):
        bind(table, folder / "alice.pub", 0)
    with pytest.raises(ValueError, match="--partition N, from 0"):
        bind(table, folder / "alice.pub", -1)
    assert bind(table, folder / "alice.pub", 7).partition == 7
    assert bind(table, folder / "node-2.pub").partition == 7  # the same key under another name
    bind(table, folder / "node-0.pub").revoked = True
    assert bind(table, folder / "alice.pub", 0).partition == 0  # free again


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"x": 1}', '{"1": -1}', '{"1": "0"}', '{"1": true}', '{"k": {"partition": null}}']
)
def test_damaged_tables_are_named(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEPLOY_VARIABLE, str(folder))
    for name in ("nodes.json", "partitions.json"):
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=r"partitions\.json is damaged"):
        read_bindings()
    with pytest.raises(ValueError, match=r"nodes\.json is damaged"):
        load_table(folder)


@pytest.mark.parametrize("content", [b"", b"one", b"\xff\xfe"])
def test_what_is_no_public_key_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "node-0.pub").write_bytes(content)
    with pytest.raises(ValueError, match=r"node-0\.pub is no public key"):
        key_of(tmp_path / "node-0.pub")


def test_flowers_database_says_which_node_has_a_key(folder: Path) -> None:
    objects = ObjectStoreFactory(str(folder / "state.db"))
    state = SqlLinkState(str(folder / "state.db"), NoOpFederationManager(), objects.store())
    state.initialize()
    key = serialization.load_ssh_public_key((folder / "node-1.pub").read_bytes())
    ids = [state.create_node("<id:none>", "none", public_key_to_bytes(cast(Any, key)), 30.0)]
    config = ServerConfig(folder)
    assert [int(_node_id_in_database(config, folder / "node-1.pub"))] == ids
    with pytest.raises(ValueError, match="does not have it"):
        _node_id_in_database(config, folder / "node-0.pub")


# which app a node runs


@pytest.fixture(scope="module")
def own_fab() -> bytes:
    return build_fab_from_disk(CHECKOUT)


@pytest.fixture(scope="module")
def other_fab(own_fab: bytes) -> bytes:
    """The same app with one line more on the client's side."""
    with zipfile.ZipFile(io.BytesIO(own_fab)) as bundle:
        files = {name: bundle.read(name) for name in bundle.namelist() if not name.startswith(".info")}
    files["client/app.py"] += b"\nprint('something else')\n"
    return build_fab_from_files(files)[0]


def test_the_app_brings_the_artifact_that_its_codec_comes_with(own_fab: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(own_fab)) as bundle:
        bundle.extractall(tmp_path)
    digest = load_artifact(artifact_folder(CodecSettings()), "learned").digest
    assert load_artifact(tmp_path / "gradcodec" / "general", "learned").digest == digest


def rezipped(fab: bytes, compression: int) -> bytes:
    with zipfile.ZipFile(io.BytesIO(fab)) as bundle:
        files = {name: bundle.read(name) for name in bundle.namelist()}
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", compression) as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return output.getvalue()


def test_the_own_app_runs_however_it_was_compressed(own_fab: bytes) -> None:
    own = own_digests()
    assert {"client/app.py", "gradcodec/exchange.py", "pyproject.toml"} <= set(own)
    check_app(own_fab, own)
    check_app(rezipped(own_fab, zipfile.ZIP_STORED), own)


def test_another_app_is_refused_with_the_files_that_differ(other_fab: bytes) -> None:
    with pytest.raises(ValueError, match=r"not this node's own: client/app\.py differ\. .*--trust-server-code"):
        check_app(other_fab, own_digests())


def test_one_file_more_or_less_is_another_app(own_fab: bytes) -> None:
    own = own_digests()
    for name in ("client/sitecustomize.py", ".info/another"):
        with zipfile.ZipFile(more := io.BytesIO(own_fab), "a") as bundle:
            bundle.writestr(name, "x = 1")
        with pytest.raises(ValueError, match="differ"):
            check_app(more.getvalue(), own)
    with pytest.raises(ValueError, match=r"client/app\.py"):
        check_app(own_fab, {name: digest for name, digest in own.items() if name != "client/app.py"})


def test_bundles_that_are_none_are_refused(own_fab: bytes) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice := io.BytesIO(own_fab), "a") as bundle:
        bundle.writestr("client/app.py", "print('another')")
    with zipfile.ZipFile(bomb := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as bundle:
        for i in range(5):
            bundle.writestr(f"zeros-{i}", bytes(20 << 20))
    assert len(bomb.getvalue()) < 1 << 20
    for content, said in (
        (twice.getvalue(), "names a file twice"),
        (bomb.getvalue(), "more than 64 MiB"),
        (own_fab[:-100], "no app"),
        (b"", "no app"),
        (own_fab[:2000] + bytes(64) + own_fab[2064:], "no app"),
    ):
        with pytest.raises(ValueError, match=said):
            app_digests(content)


class StandInSuperNode:
    """What a ClientApp's process asks its SuperNode, as far as Flower's own ``run_clientapp`` goes here."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: SimpleNamespace()


@pytest.fixture
def run_fab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs an app as the node's process of one message does: Flower's code, but for the wire to the SuperNode."""
    home, replies = tmp_path / "flwr", []
    monkeypatch.setenv("FLWR_HOME", str(home))
    (tmp_path / "app.json").write_text(json.dumps(own_digests()))
    monkeypatch.setenv(client.own_app.APP_VARIABLE, str(tmp_path / "app.json"))
    monkeypatch.setattr(runtime.RuntimeHttpClient, "from_server_address", lambda **_: StandInSuperNode())
    monkeypatch.setattr(runtime, "HeartbeatSender", lambda _: SimpleNamespace(start=lambda: None, is_running=False))
    monkeypatch.setattr(runtime, "register_signal_handlers", lambda **_: None)
    monkeypatch.setattr(runtime, "push_message", lambda _, reply, __: replies.append(reply))
    monkeypatch.setattr(runtime, "flwr_exit", lambda **_: None)
    monkeypatch.setattr(runtime, "install_from_fab", runtime.install_from_fab)  # put back afterwards

    def run(fab: bytes) -> tuple[Message, bool]:
        message = Message(RecordDict({"c": ConfigRecord({})}), dst_node_id=1, message_type=MessageType.QUERY)
        context = Context(1, 1, UserConfig({}), RecordDict(), UserConfig({}))
        about = SimpleNamespace(run_id=1, fab_id="cg-fedllm/cg-fedllm", fab_version="0.1.0")
        sent = (message, context, about, Fab("0" * 64, fab, {}))
        monkeypatch.setattr(runtime, "pull_task_input", lambda _: sent)
        token = tmp_path / "token"
        token.write_text("token")
        arguments = ["--runtime-api-address", "127.0.0.1:1", "--token-file", str(token)]
        monkeypatch.setattr(sys, "argv", ["client.own_app", *arguments])
        client.own_app.main()
        assert not token.exists()
        return replies[-1], (home / "apps").exists()

    return run


def test_a_node_unpacks_no_other_app_and_says_so_to_the_server(
    run_fab: Any, other_fab: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    reply, installed = run_fab(other_fab)
    assert reply.has_error()
    assert "the server's app is not this node's own: client/app.py differ" in reply.error.reason
    assert not installed
    assert "node: refused to run: the server's app" in capfd.readouterr().out


def test_a_node_unpacks_its_own_app(run_fab: Any, own_fab: bytes) -> None:
    reply, installed = run_fab(own_fab)
    assert installed
    assert reply.has_error()  # of a run that this message does not have
    assert "not this node's own" not in reply.error.reason


def test_tasks_of_a_client_app_alone_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    executor, started = OwnAppExecutor(), []
    monkeypatch.setattr("client.executor.subprocess.Popen", lambda command, **_: started.append(command))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert executor.get_eligible_capacity(set(TaskType)) == ({TaskType.CLIENT_APP}, set())
    for kind in TaskType:
        spec = ExecutionSpec(kind, "127.0.0.1:1", "a token", True, None, False, os.getpid(), False, 1)
        assert (executor.launch(spec).status.value == "accepted") == (kind == TaskType.CLIENT_APP)
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "client.own_app"]
    assert "a token" not in " ".join(command)  # which every user of the host can read
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert command[command.index("--token-file") + 1] == str(file)
    assert take_token(file) == "a token"
    assert not file.exists()


def test_the_app_is_sent_deflated_and_is_the_same_app(monkeypatch: pytest.MonkeyPatch) -> None:
    build = importlib.import_module("flwr.cli.build")
    stored = build.build_fab_from_disk(CHECKOUT)
    monkeypatch.setattr(build, "write_to_zip", write_deflated)
    deflated = build.build_fab_from_disk(CHECKOUT)
    assert len(deflated) < len(stored) / 2
    assert app_digests(deflated) == app_digests(stored)
    assert build.build_fab_from_disk(CHECKOUT) == deflated, "equal apps are equal bytes"
