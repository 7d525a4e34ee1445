"""The keys of a deployment: a CA, the server's TLS certificate, and one EC P-384 key pair a node.

The folder and its private keys can be read by their owner alone. What is there is kept: a second call makes what is
missing, also after a crash, and a server certificate that has expired is made anew, for the nodes trust the CA.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from conf.output import replace_file

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.pem", "server.key"
REVOKED = ".revoked"
"""Follows the name of a public key that was shut out."""
DAYS = 365
AUTHORITY_DAYS = 3650
LOOPBACK = ("localhost", "127.0.0.1")
"""Always in the certificate: the control port, on loopback only, uses the same one."""


def make_keys(folder: Path, hosts: Sequence[str], num_nodes: int) -> list[Path]:
    """Makes what is missing in the folder: CA, server certificate for ``hosts``, ``node-0`` to ``node-<n-1>``. A server
    certificate that has expired is made anew, for its old hosts too. A node's private key that is not here any more
    (its public key is) was brought to its host, and stays the node's.

    Returns:
        The private keys of the nodes that are here, each with its public key beside it (``.pub``).

    Raises:
        ValueError: there is a server certificate already, for other hosts; the CA has expired, or its key is needed and
            not here; a file is damaged; or the folder cannot be written.
    """
    hosts = [*dict.fromkeys([*filter(None, map(str.strip, hosts)), *LOOPBACK])]
    try:
        private_folder(folder)
        _complete_authority(folder)
        _complete_server(folder, hosts)
        return [node for i in range(num_nodes) if _complete_node(node := folder / f"node-{i}")]
    except OSError as error:
        raise ValueError(f"keys cannot be written into {folder}: {error}") from None


def _complete_authority(folder: Path) -> None:
    """A key without a certificate is what a crash leaves: the certificate is made for it. A certificate without a key
    may be meant so, for the key of a CA is best kept elsewhere."""
    path, key_path = folder / CA_CERTIFICATE, folder / CA_KEY
    if not path.exists():
        write_private(path, _authority(_key_at(key_path)))
    elif _certificate_at(path).not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise ValueError(
            f"{path} has expired: remove ca.crt, ca.key, server.pem and server.key, run this again "
            "and copy the new ca.crt to every node"
        )


def _complete_server(folder: Path, hosts: list[str]) -> None:
    path, key_path = folder / SERVER_CERTIFICATE, folder / SERVER_KEY
    if path.exists():
        certificate = _certificate_at(path)
        named = _hosts_of(certificate)
        expired = certificate.not_valid_after_utc <= datetime.datetime.now(datetime.UTC)
        its_own = key_path.exists() and certificate.public_key() == _key_at(key_path).public_key()
        if its_own and not expired and _is_issued_by(_certificate_at(folder / CA_CERTIFICATE), certificate):
            if missing := sorted(set(hosts) - named):
                raise ValueError(
                    f"{path} does not hold for host {missing[0]!r}: remove server.pem and server.key to make them anew"
                )
            return
        hosts = [*dict.fromkeys([*hosts, *sorted(named)])]
    if not (folder / CA_KEY).exists():
        raise ValueError(
            f"{folder / CA_KEY} is missing, and a certificate for the server must be signed with it: put it back, or "
            "remove ca.crt too, run this again and copy the new ca.crt to every node"
        )
    write_private(path, _server_certificate(folder, _key_at(key_path), hosts))


def _complete_node(path: Path) -> bool:
    """Whether the node's private key is here afterwards."""
    public_path = path.with_name(path.name + ".pub")
    revoked = public_path.with_name(public_path.name + REVOKED).exists()
    if not path.exists() and (revoked or public_path.exists()):
        return False
    public = _public_text(_key_at(path, openssh=True))
    if not revoked and not public_path.exists():
        write_private(public_path, public)
    elif not revoked and public_path.read_bytes().split()[:2] != public.split()[:2]:
        raise ValueError(f"{public_path} is not the public key of {path}: remove the one that is not the node's")
    return not revoked


def _key_at(path: Path, openssh: bool = False) -> ec.EllipticCurvePrivateKey:
    """The private key in the file, which is made if there is none. Raises ValueError: it is damaged."""
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        private = serialization.PrivateFormat.OpenSSH if openssh else serialization.PrivateFormat.PKCS8
        encoding, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
        write_private(path, key.private_bytes(encoding, private, no_password))
        return key
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        found = load(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} is damaged, or no EC key without a password: put the right one there, or remove it")
    return found


def _certificate_at(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is damaged: put the right one there, or remove it") from None


def _is_issued_by(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _authority(key: ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CG-FedLLM federation CA")])
    certificate = (
        _certificate(name, name, key.public_key(), key.public_key(), AUTHORITY_DAYS)
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
    return certificate.public_bytes(serialization.Encoding.PEM)


def _server_certificate(folder: Path, key: ec.EllipticCurvePrivateKey, hosts: Sequence[str]) -> bytes:
    authority, authority_key = _certificate_at(folder / CA_CERTIFICATE), _key_at(folder / CA_KEY)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    certificate = (
        _certificate(name, authority.subject, key.public_key(), authority_key.public_key(), DAYS)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    """With what names both keys: since Python 3.13 no certificate is trusted without."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hosts_of(certificate: x509.Certificate) -> set[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def _public_text(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, public = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(encoding, public) + b"\n"


def private_folder(folder: Path) -> None:
    """Makes the folder, or closes one that is there to all but its owner. Raises ValueError: it cannot be made."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be made: {error.strerror}") from None
    with contextlib.suppress(PermissionError):  # a volume's folder may be another's: the files in it are closed, too
        folder.chmod(0o700)


def write_private(path: Path, content: bytes) -> None:
    """A file that its owner alone can read, written whole or not at all. Raises OutputError: it cannot be written."""
    replace_file(path, lambda part: _write(part, content))


def _write(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)  # a killed process may have left one of another mode
        file.write(content)
