"""Whether a node can speak to its server, tried before anything is started: each refusal with its cause."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

SECONDS = 5.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and an empty SETTINGS frame
_SETTINGS = 4
_EXPIRED, _NOT_YET, _OTHER_HOST = 10, 9, 62  # OpenSSL's X509_V_ERR_...


def check_server(address: str, ca: Path | None) -> bool:
    """Tries a handshake; without ``ca`` a plain one.

    Returns:
        False if nobody answers at the address (yet).

    Raises:
        ValueError: the other end is no server for this node; the message says why.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--server {address}: HOST:PORT is expected, as example.org:9092")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), SECONDS)
    except socket.gaierror as error:
        raise ValueError(f"--server {address}: no such host: {error.strerror}") from None
    except OSError:
        return False
    with connection:
        if ca is None:
            _check_plain(connection, address)
        else:
            _check_tls(connection, address, host.strip("[]"), ca)
    return True


def _check_tls(connection: socket.socket, address: str, host: str, ca: Path) -> None:
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"--ca {ca} is no certificate: {error}") from None
    context.set_alpn_protocols(["h2"])
    try:
        context.wrap_socket(connection, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        causes = {
            _EXPIRED: "its certificate has expired: run `python -m server keys` on its host and start it again",
            _NOT_YET: "its certificate does not hold yet: compare both clocks",
            _OTHER_HOST: f"its certificate does not hold for {host}: `python -m server keys --hosts {host}`",
        }
        wrong_ca = f"its certificate is not from the CA of --ca {ca}: copy the server's ca.crt to this node"
        raise ValueError(f"{address} is refused: {causes.get(error.verify_code, wrong_ca)}") from None
    except (ssl.SSLError, OSError) as error:
        raise ValueError(
            f"{address} speaks no TLS ({error}): is it the Fleet port, and was the server started with --insecure?"
        ) from None


def _check_plain(connection: socket.socket, address: str) -> None:
    """A gRPC server without TLS answers HTTP/2's preface with a SETTINGS frame."""
    try:
        connection.settimeout(SECONDS)
        connection.sendall(_PREFACE)
        head = connection.recv(9)
    except OSError:
        head = b""
    if len(head) < 4 or head[3] != _SETTINGS:
        raise ValueError(f"{address} wants TLS: give --ca and --key, and leave --insecure away")
