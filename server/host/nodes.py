"""Lets nodes into a running SuperLink by their public keys, shuts them out, and lists them."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from server.host.bindings import KnownNode, bind, key_of, load_table, save_table
from server.host.keys import REVOKED
from server.host.launch import CONNECTION, DATABASE, ServerConfig

UNREGISTERED = "unregistered"
"""Flower's status of a node that was shut out."""


def register_nodes(config: ServerConfig, public_keys: Sequence[Path], partition: int | None = None) -> list[str]:
    """Lets the nodes with these public keys in, and binds each to its partition (see ``bind``).

    Returns:
        What became of each, as a line for its operator: registered, registered before, or revoked and still out.

    Raises:
        ValueError: the SuperLink refuses a key, or its partition is another's.
    """
    table = load_table(config.folder)
    nodes = [(path, bind(table, path, partition)) for path in public_keys]
    status = _status_by_id(config)
    lines = []
    for path, node in nodes:
        what = "registered before"
        if node.node_id not in status and not node.revoked:
            what = _admit(config, path, node)
            save_table(table, config.folder)  # one by one, as each is a fact at the SuperLink
        if node.revoked or status.get(node.node_id or "") == UNREGISTERED:
            node.revoked = True
            lines.append(f"revoked {path}: stays out; a node that was shut out needs a new key")
        else:
            lines.append(f"{what} {path}: node {node.node_id} holds partition {node.partition}")
    save_table(table, config.folder)
    return lines


def _admit(config: ServerConfig, path: Path, node: KnownNode) -> str:
    """Gives the node its id; says whether its key is new to the SuperLink."""
    try:
        node.node_id = str(_supernode(config, "register", str(path))["node-id"])
    except ValueError as error:
        if "already" not in str(error):
            raise
        node.node_id = _node_id_in_database(config, path)
        return "registered before"
    return "registered"


def _node_id_in_database(config: ServerConfig, path: Path) -> str:
    """Of a key that the SuperLink knows and our table does not, as after a crash between the two. No command of
    Flower's says it, so its database is read."""
    key = serialization.load_ssh_public_key(path.read_bytes())
    content = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        with contextlib.closing(sqlite3.connect(f"file:{config.folder / DATABASE}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT node_id FROM node WHERE public_key = ?", (content,)).fetchone()
    except sqlite3.Error as error:
        raise ValueError(f"{config.folder / DATABASE} cannot be read: {error}") from None
    if found is None:
        raise ValueError(f"{path} is registered at this SuperLink, but {config.folder / DATABASE} does not have it")
    return str(found[0] & 0xFFFFFFFFFFFFFFFF)  # stored as a signed number


def revoke_node(config: ServerConfig, public_key: Path) -> str:
    """Shuts the node with this public key out, now and from now on; gives its node id.

    The file becomes ``NODE.pub.revoked``, so that ``python -m server start`` does not let it in again.

    Raises:
        ValueError: no node of that key is registered.
    """
    table = load_table(config.folder)
    node = table.get(key_of(public_key))
    if node is None or node.node_id is None:
        raise ValueError(f"no node with the key {public_key} is registered at this SuperLink")
    if _status_by_id(config).get(node.node_id) != UNREGISTERED:
        _supernode(config, "unregister", node.node_id)
    node.revoked = True
    save_table(table, config.folder)
    if not public_key.name.endswith(REVOKED):
        public_key.rename(public_key.with_name(public_key.name + REVOKED))
    return node.node_id


def list_nodes(config: ServerConfig) -> list[str]:
    """A line a node: Flower's id, its status, and the partition that its key is bound to."""
    partitions = {node.node_id: node.partition for node in load_table(config.folder).values()}
    return [
        f"{node_id}  {status:12}  partition {partitions.get(node_id, 'unknown')}"
        for node_id, status in _status_by_id(config).items()
    ]


def _status_by_id(config: ServerConfig) -> dict[str, str]:
    nodes = _supernode(config, "list").get("nodes", [])
    return {str(node["node-id"]): str(node["status"]) for node in nodes}


def _supernode(config: ServerConfig, verb: str, *arguments: str) -> dict[str, Any]:
    if not (config.flwr_home / "config.toml").is_file():
        raise ValueError(
            f"{config.folder} is no folder of a SuperLink: `python -m server start --folder ...` makes one"
        )
    command = ["flwr", "supernode", verb, *arguments, CONNECTION, "--format", "json"]
    done = subprocess.run(command, env=config.environment(), capture_output=True, text=True, timeout=60)
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {}
    if done.returncode != 0 or not isinstance(answer, dict) or not answer.get("success", False):
        reason = answer.get("error-message") if isinstance(answer, dict) else None
        raise ValueError(f"`flwr supernode {verb}` failed: {reason or (done.stdout + done.stderr).strip()}")
    return answer
