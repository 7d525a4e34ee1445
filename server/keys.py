"""The keys of a deployment: a CA, the server's TLS certificate, and one EC P-384 key pair a node.

Private keys are written readable by their owner only. Existing files are never overwritten, but for a server
certificate that has expired: it is made anew, and the nodes, which trust the CA, need nothing.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.pem", "server.key"
DAYS = 365
AUTHORITY_DAYS = 3650
LOOPBACK = ("localhost", "127.0.0.1")
"""Always in the certificate: the control port, on loopback only, uses the same one."""


def make_keys(folder: Path, hosts: Sequence[str], num_nodes: int) -> list[Path]:
    """Makes what is missing in the folder: CA, server certificate for ``hosts``, ``node-0`` to ``node-<n-1>``. A server
    certificate that has expired is made anew, for its old hosts too.

    Returns:
        The private keys of the nodes, each with its public key beside it (``.pub``).

    Raises:
        ValueError: there is a server certificate already, for other hosts; the CA has expired; or the folder cannot be
            written.
    """
    hosts = [*dict.fromkeys([*filter(None, map(str.strip, hosts)), *LOOPBACK])]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _make_missing(folder, hosts, num_nodes)
    except OSError as error:
        raise ValueError(f"keys cannot be written into {folder}: {error}") from None


def _make_missing(folder: Path, hosts: list[str], num_nodes: int) -> list[Path]:
    if not (folder / CA_CERTIFICATE).exists():
        _make_authority(folder)
    elif _has_expired(folder / CA_CERTIFICATE):
        raise ValueError(
            f"{folder / CA_CERTIFICATE} has expired: remove ca.crt, ca.key, server.pem and server.key, run this again "
            "and copy the new ca.crt to every node"
        )
    if (folder / SERVER_CERTIFICATE).exists() and _has_expired(folder / SERVER_CERTIFICATE):
        hosts = [*dict.fromkeys([*hosts, *sorted(_hosts_of(folder))])]
        for name in (SERVER_CERTIFICATE, SERVER_KEY):
            (folder / name).unlink()
    if not (folder / SERVER_CERTIFICATE).exists():
        _make_server_certificate(folder, hosts)
    elif missing := sorted(set(hosts) - _hosts_of(folder)):
        raise ValueError(
            f"{folder / SERVER_CERTIFICATE} does not hold for host {missing[0]!r}: "
            "remove server.pem and server.key to make them anew"
        )
    nodes = [folder / f"node-{i}" for i in range(num_nodes)]
    for node in nodes:
        if not node.exists():
            _make_node_key(node)
    return nodes


def _make_authority(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CG-FedLLM federation CA")])
    certificate = (
        _certificate(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(key, hashes.SHA384())
    )
    write_private(folder / CA_KEY, _pem(key))
    (folder / CA_CERTIFICATE).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _make_server_certificate(folder: Path, hosts: Sequence[str]) -> None:
    authority = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
    authority_key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    certificate = (
        _certificate(name, authority.subject, key.public_key(), DAYS)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    write_private(folder / SERVER_KEY, _pem(key))
    (folder / SERVER_CERTIFICATE).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _make_node_key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    encoding, no_password = serialization.Encoding, serialization.NoEncryption()
    write_private(path, key.private_bytes(encoding.PEM, serialization.PrivateFormat.OpenSSH, no_password))
    public = key.public_key().public_bytes(encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(path.name + ".pub").write_bytes(public + b"\n")


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hosts_of(folder: Path) -> set[str]:
    certificate = x509.load_pem_x509_certificate((folder / SERVER_CERTIFICATE).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def _has_expired(path: Path) -> bool:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return certificate.not_valid_after_utc <= datetime.datetime.now(datetime.UTC)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    return key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, no_password)


def write_private(path: Path, content: bytes) -> None:
    """A new file that its owner alone can read. Raises FileExistsError: there is one."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
