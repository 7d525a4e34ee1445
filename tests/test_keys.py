"""Keys of a deployment, and what the programs say when they cannot start."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import RunProgram
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from test_settings import composed

import client.__main__
import server.__main__
from bench.deployment import free_ports
from server.backends.superlink import run_on_superlink
from server.host.keys import make_keys
from server.host.launch import ServerConfig, start_server


def test_the_server_certificate_is_signed_by_the_ca_and_holds_for_its_hosts(tmp_path: Path) -> None:
    make_keys(tmp_path, ["server.example.org", "127.0.0.1"], 1)
    authority, server = (
        x509.load_pem_x509_certificate((tmp_path / name).read_bytes()) for name in ("ca.crt", "server.pem")
    )
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["server.example.org", "127.0.0.1", "localhost"]


def test_the_certificates_are_trusted_by_who_is_strict(tmp_path: Path) -> None:
    """As Python 3.13 is by default: a handshake in memory."""
    make_keys(tmp_path, ["server.example.org"], 1)
    trusts = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    trusts.verify_flags |= ssl.VERIFY_X509_STRICT
    serves = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serves.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        trusts.wrap_bio(down, up, server_hostname="server.example.org"),
        serves.wrap_bio(up, down, server_side=True),
    ]
    for end in itertools.chain.from_iterable(itertools.repeat(ends, 3)):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    assert ends[0].getpeercert()


def test_node_keys_are_openssh_p384_and_private(tmp_path: Path) -> None:
    first, second = make_keys(tmp_path, ["localhost"], 2)
    for node in (first, second):
        assert node.stat().st_mode & 0o077 == 0
        key = serialization.load_ssh_private_key(node.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp384r1"
        assert (tmp_path / f"{node.name}.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    assert first.read_bytes() != second.read_bytes()
    assert (tmp_path / "ca.key").stat().st_mode & 0o077 == 0


def test_keys_are_never_overwritten_and_more_nodes_can_be_added(tmp_path: Path) -> None:
    make_keys(tmp_path, ["localhost"], 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_keys(tmp_path, ["localhost"], 2)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert (tmp_path / "node-1").is_file()
    with pytest.raises(ValueError, match=r"does not hold for host 'example\.org'"):
        make_keys(tmp_path, ["example.org"], 1)


FILES = ("ca.crt", "ca.key", "server.pem", "server.key", "node-0", "node-0.pub")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_keys(folder, ["server.example.org"], 1)
    return folder


def assert_whole(folder: Path) -> None:
    """All belongs together: who trusts the CA trusts the server, and a node's private key is that of its public one."""
    authority, server = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in FILES[::2][:2])
    server.verify_directly_issued_by(authority)
    server_key = serialization.load_pem_private_key((folder / "server.key").read_bytes(), None)
    assert server_key.public_key() == server.public_key()
    if (folder / "node-0").exists():
        node = serialization.load_ssh_private_key((folder / "node-0").read_bytes(), None)
        assert node.public_key() == serialization.load_ssh_public_key((folder / "node-0.pub").read_bytes())


@pytest.mark.parametrize("missing", [c for n in range(1, 7) for c in itertools.combinations(FILES, n)], ids=" ".join)
def test_whatever_is_missing_is_completed_and_what_is_there_stays(
    missing: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name in missing:
        (tmp_path / name).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # the CA's key may lie elsewhere, but without it nothing can be signed
    if "ca.key" in missing and "ca.crt" not in missing and {"server.pem", "server.key"} & set(missing):
        with pytest.raises(ValueError, match=r"ca\.key is missing, and a certificate for the server must be signed"):
            make_keys(tmp_path, ["server.example.org"], 1)
        return
    nodes = make_keys(tmp_path, ["server.example.org"], 1)
    assert_whole(tmp_path)
    on_its_host = "node-0" in missing and "node-0.pub" not in missing  # was moved there: no other key is made
    assert nodes == ([] if on_its_host else [tmp_path / "node-0"])
    after = {name: (tmp_path / name).read_bytes() for name in before}
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"server.pem"}  # a certificate whose key or CA is gone serves nobody
    if not {"server.key", "ca.key", "ca.crt"} & set(missing):
        assert not changed


def test_a_crash_at_any_write_is_made_good_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    for moment in range(6):
        folder, writes = tmp_path / str(moment), itertools.count()

        def crash(source: Path, target: Path, moment: int = moment, writes: Iterator[int] = writes) -> None:
            if next(writes) == moment:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("conf.output.os.replace", crash)
            with pytest.raises(KeyboardInterrupt):
                make_keys(folder, [], 1)
        make_keys(folder, [], 1)
        assert_whole(folder)
        assert {path.name for path in folder.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"-----BEGIN", b"\xff\x00"])
def test_a_damaged_file_is_named(name: str, content: bytes, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    if name == "ca.key":  # is needed for the next signature only
        (tmp_path / "server.pem").unlink()
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        make_keys(tmp_path, ["server.example.org"], 1)
    assert "\n" not in str(error.value)
    assert (tmp_path / name).read_bytes() == content


def test_the_key_of_a_node_that_was_shut_out_does_not_come_back(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "node-0.pub").rename(tmp_path / "node-0.pub.revoked")
    assert make_keys(tmp_path, ["server.example.org"], 1) == []
    assert not (tmp_path / "node-0.pub").exists()


def test_folder_and_files_are_their_owners_alone(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir(mode=0o755)
    make_keys(tmp_path / "deploy", [], 1)
    for path in (tmp_path / "deploy", *(tmp_path / "deploy").iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_an_expired_server_certificate_is_made_anew_for_its_old_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.host.keys.DAYS", -0.001)
    make_keys(tmp_path, ["server.example.org"], 0)
    before = (tmp_path / "ca.crt").read_bytes()
    monkeypatch.undo()
    make_keys(tmp_path, [], 0)
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    assert server.not_valid_after_utc > datetime.datetime.now(datetime.UTC)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "server.example.org" in [str(name.value) for name in names]
    assert (tmp_path / "ca.crt").read_bytes() == before
    monkeypatch.setattr("server.host.keys.AUTHORITY_DAYS", -0.001)
    (tmp_path / "other").mkdir()
    make_keys(tmp_path / "other", [], 0)
    with pytest.raises(ValueError, match=r"ca\.crt has expired"):
        make_keys(tmp_path / "other", [], 0)


def test_a_superlink_without_keys_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="python -m server keys"):
        start_server(ServerConfig(tmp_path))


@pytest.mark.parametrize("option", ["--fleet-address", "--control-port"])
def test_a_taken_port_is_named_with_its_option(option: str, whole: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken, (free,) = listener.getsockname()[1], free_ports(1)
        fleet, control = (taken, free) if option == "--fleet-address" else (free, taken)
        with pytest.raises(ValueError, match=f"port {taken} .*taken by another program: choose one with {option}"):
            start_server(ServerConfig(whole, f"127.0.0.1:{fleet}", control))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["server", "start", "--folder", "/nowhere"], "error: /nowhere/ca.crt is missing"),
        (["server", "start", "--folder", "KEYS", "--fleet-address", "9092"], "HOST:PORT is expected"),
        (["server", "register", "/nowhere/node.pub"], "error: /nowhere/node.pub is no file"),
        (["server", "nodes", "--folder", "KEYS"], "is no folder of a SuperLink"),
        (["server", "register", "a.pub", "b.pub", "--partition", "0"], "--partition is for one key"),
        (
            ["client", "--server", "x:1", "--ca", "/nowhere", "--key", "k", "--partition", "0", "--partitions", "1"],
            "--ca",
        ),
        (
            ["client", "--server", "here", "--insecure", "--partition", "0", "--partitions", "1"],
            "HOST:PORT is expected",
        ),
    ],
)
def test_the_programs_fail_in_one_line(whole: Path, arguments: list[str], said: str, run_program: RunProgram) -> None:
    main = {"server": server.__main__.main, "client": client.__main__.main}[arguments[0]]
    options = ["--gpus", "none"] if arguments[0] == "client" else []
    command = [str(whole) if part == "KEYS" else part for part in arguments[1:]]
    status, _, stderr = run_program(main, [*command, *options])
    assert status != 0
    assert said in stderr
    assert "Traceback" not in stderr


def test_refusals_load_no_engine() -> None:
    """They come within a second, though torch and Flower take many."""
    code = (
        "import sys, client.__main__, client.health, server.__main__\n"
        "print({'torch', 'flwr', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_superlink_that_is_not_known_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    settings = composed("backend=superlink", "backend.connection=nobody")
    with pytest.raises(ValueError, match="'nobody' is not known") as error:
        run_on_superlink(settings)
    assert "\n" not in str(error.value)


def test_free_ports_are_different() -> None:
    assert len(set(free_ports(5))) == 5
