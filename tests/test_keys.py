"""Keys of a deployment, and what the programs say when they cannot start."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bench.deployment import free_ports
from server.keys import make_keys
from server.launch import ServerConfig, start_server


def test_the_server_certificate_is_signed_by_the_ca_and_holds_for_its_hosts(tmp_path: Path) -> None:
    make_keys(tmp_path, ["server.example.org", "127.0.0.1"], 1)
    authority, server = (
        x509.load_pem_x509_certificate((tmp_path / name).read_bytes()) for name in ("ca.crt", "server.pem")
    )
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["server.example.org", "127.0.0.1", "localhost"]


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


def test_an_expired_server_certificate_is_made_anew_for_its_old_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys.DAYS", -0.001)
    make_keys(tmp_path, ["server.example.org"], 0)
    before = (tmp_path / "ca.crt").read_bytes()
    monkeypatch.undo()
    make_keys(tmp_path, [], 0)
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    assert server.not_valid_after_utc > datetime.datetime.now(datetime.UTC)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "server.example.org" in [str(name.value) for name in names]
    assert (tmp_path / "ca.crt").read_bytes() == before
    monkeypatch.setattr("server.keys.AUTHORITY_DAYS", -0.001)
    (tmp_path / "other").mkdir()
    make_keys(tmp_path / "other", [], 0)
    with pytest.raises(ValueError, match=r"ca\.crt has expired"):
        make_keys(tmp_path / "other", [], 0)


def test_a_superlink_without_keys_or_with_a_taken_port_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="python -m server keys"):
        start_server(ServerConfig(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["server", "start", "--folder", "/nowhere"], "error: /nowhere/ca.crt is missing"),
        (["server", "start", "--folder", "KEYS", "--fleet-address", "9092"], "HOST:PORT is expected"),
        (["server", "register", "/nowhere/node.pub"], "error: /nowhere/node.pub is no file"),
        (
            ["client", "--server", "x:1", "--ca", "/nowhere", "--key", "k", "--partition", "0", "--partitions", "1"],
            "--ca",
        ),
        (["server.federate", "backend=superlink", "backend.connection=nobody"], "nobody"),
    ],
)
def test_the_programs_fail_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    make_keys(tmp_path / "keys", ["server.example.org"], 0)
    command = [sys.executable, "-m", *(str(tmp_path / "keys") if a == "KEYS" else a for a in arguments)]
    if arguments[0] == "server.federate":
        command += [f"output={tmp_path / 'out'}", f"hydra.run.dir={tmp_path / 'hydra'}"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "FLWR_HOME": str(tmp_path / "flwr")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_free_ports_are_different() -> None:
    assert len(set(free_ports(5))) == 5
