"""Starts a SuperLink with TLS, node keys and a database, and its executor.

The executor (``flower-superexec``), which runs the ServerApp, is a process of its own: so a SuperLink that is killed
comes back, and the run goes on without losing a round. Two secrets in the folder, which its owner alone can read, close
the SuperLink's port on loopback to the other users of the host: one for its operator (``server.host.control``), one for
the executor.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import socket
import ssl
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from conf import CHECKOUT
from conf.processes import Child, end_all, last_line, path_with_binaries
from server.host.bindings import DEPLOY_VARIABLE
from server.host.keys import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, private_folder, write_private
from server.quiet import ENVIRONMENT

CONNECTION = "cg-fedllm"
CONTROL_SECRET, EXECUTOR_SECRET = "control.secret", "superexec.secret"
SECRET_VARIABLE = "CG_FEDLLM_CONTROL_SECRET"
"""Names the file of the control secret to the SuperLink's process."""
DATABASE = "state.db"
START_SECONDS = 60.0


@dataclass(frozen=True)
class ServerConfig:
    """Where a SuperLink listens and keeps its files: keys, secrets, database, logs, and Flower's own home."""

    folder: Path
    fleet_address: str = "0.0.0.0:9092"  # gRPC, for the nodes
    control_port: int = 8000  # HTTPS on loopback only
    insecure: bool = False  # no TLS and no node keys: for closed networks and experiments

    @property
    def flwr_home(self) -> Path:
        """Flower's home for every command that speaks to this SuperLink."""
        return self.folder / "flwr"

    def environment(self) -> dict[str, str]:
        """For every Flower command on this host."""
        return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(self.flwr_home), "PATH": path_with_binaries()}


def start_server(config: ServerConfig) -> list[Child]:
    """Starts SuperLink and executor and waits until the SuperLink's ports answer.

    Raises:
        ValueError: keys are missing, a port is taken, or it ended at once (its log's last line is in the message).
    """
    needed = () if config.insecure else (CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY)
    for name in needed:
        if not (config.folder / name).is_file():
            raise ValueError(f"{config.folder / name} is missing: make keys with `python -m server keys`")
    fleet = _host_and_port(config.fleet_address)
    control = ("127.0.0.1", config.control_port)
    for option, (host, port) in (("--fleet-address", fleet), ("--control-port", control)):
        if _answers(host, port):
            raise ValueError(f"port {port} on {host} is taken by another program: choose one with {option}")
    _write_connection(config)
    superlink, executor = children = [_superlink(config), _executor(config)]
    try:
        superlink.start()
        deadline = time.monotonic() + START_SECONDS
        while not (_answers(*fleet) and _answers(*control)):
            assert superlink.process is not None
            if superlink.process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"the SuperLink did not start; {superlink.log} ends with: {last_line(superlink.log)}")
            time.sleep(0.2)
        if not refuses_strangers(config):
            raise ValueError(f"the control port {config.control_port} lets in who has no secret: it is not started")
        executor.start()
    except BaseException:  # also Ctrl-C and SIGTERM: nothing is left running
        end_all(children)
        raise
    return children


def refuses_strangers(config: ServerConfig) -> bool:
    """Whether the control port turns away a request without the secret."""
    if config.insecure:
        connection = http.client.HTTPConnection("127.0.0.1", config.control_port, timeout=10)
    else:
        trust = ssl.create_default_context(cafile=str(config.folder / CA_CERTIFICATE))
        connection = http.client.HTTPSConnection("127.0.0.1", config.control_port, timeout=10, context=trust)
    try:
        connection.request("POST", "/v1/control/list-nodes", headers={"Content-Type": "application/x-protobuf"})
        return connection.getresponse().status == http.client.UNAUTHORIZED
    except OSError as error:
        older = "; the keys are of an older version: make new ones" if "Key Identifier" in str(error) else ""
        raise ValueError(f"the control port {config.control_port} does not answer: {error}{older}") from None
    finally:
        connection.close()


def _write_connection(config: ServerConfig) -> None:
    """All that ``flwr`` commands and the executor need to speak to the SuperLink: address, CA, secrets."""
    private_folder(config.folder)
    private_folder(config.flwr_home)
    address = f"127.0.0.1:{config.control_port}"
    trust = "insecure = true" if config.insecure else f'root-certificates = "{config.folder / CA_CERTIFICATE}"'
    text = f'[superlink.{CONNECTION}]\naddress = "{address}"\n{trust}\n'
    write_private(config.flwr_home / "config.toml", text.encode())
    for name in (CONTROL_SECRET, EXECUTOR_SECRET):
        if not (config.folder / name).is_file():
            write_private(config.folder / name, secrets.token_urlsafe(48).encode())
    token = (config.folder / CONTROL_SECRET).read_text()
    # as `flwr login` would write it: YAML, of which JSON is a part, and every value in base64
    account = f"flower.account-auth.{address}."
    values = {"authn-type": "oidc", "oidc-access-token": token, "oidc-refresh-token": token}
    store = {account + key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    write_private(config.flwr_home / "credentials.yaml", json.dumps(store).encode())


def _superlink(config: ServerConfig) -> Child:
    tls = [
        *("--ssl-ca-certfile", str(config.folder / CA_CERTIFICATE)),
        *("--ssl-certfile", str(config.folder / SERVER_CERTIFICATE)),
        *("--ssl-keyfile", str(config.folder / SERVER_KEY)),
    ]
    command = [
        *(sys.executable, "-m", "server.host.control"),
        *("--host", "127.0.0.1", "--port", str(config.control_port)),
        *("--fleet-api-address", config.fleet_address),
        *(["--insecure"] if config.insecure else [*tls, "--enable-supernode-auth"]),
        *("--isolation", "process", "--superexec-auth-secret-file", str(config.folder / EXECUTOR_SECRET)),
        *("--database", str(config.folder / DATABASE), "--disable-runtime-dependency-installation"),
    ]
    environment = {**config.environment(), SECRET_VARIABLE: str(config.folder / CONTROL_SECRET)}
    return Child("the SuperLink", command, config.folder / "superlink.log", environment, CHECKOUT, umask=0o077)


def _executor(config: ServerConfig) -> Child:
    command = [
        *("flower-superexec", "--runtime-api-address", f"127.0.0.1:{config.control_port}"),
        *(["--insecure"] if config.insecure else ["--root-certificates", CA_CERTIFICATE]),
        *("--superexec-auth-secret-file", EXECUTOR_SECRET),
    ]
    environment = config.environment()
    if not config.insecure:  # the ServerApp's process inherits it
        environment[DEPLOY_VARIABLE] = str(config.folder)
    return Child("the executor", command, config.folder / "superexec.log", environment, config.folder)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--fleet-address {address!r}: HOST:PORT is expected, as 0.0.0.0:9092")
    return host, int(port)


def _answers(host: str, port: int) -> bool:
    with socket.socket() as trial:
        trial.settimeout(0.5)
        return trial.connect_ex(("127.0.0.1" if host == "0.0.0.0" else host, port)) == 0
