"""Lets nodes into a running SuperLink by their public keys, shuts them out, and lists them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.bindings import KnownNode, Table, bind, key_of, load_table, save_table
from server.keys import REVOKED
from server.launch import CONNECTION, ServerConfig

UNREGISTERED = "unregistered"
"""Flower's status of a node that was shut out."""


def register_nodes(config: ServerConfig, public_keys: Sequence[Path], partition: int | None = None) -> list[str]:
    """Lets the nodes with these public keys in, and binds each to its partition (see ``bind``).

    Returns:
        What became of each, as a line for its operator: new, registered already, or revoked and still out.

    Raises:
        ValueError: the SuperLink refuses a key, or its partition is another's.
    """
    table = load_table(config.folder)
    nodes = [(path, bind(table, path, partition)) for path in public_keys]
    status = _status_by_id(config)
    lines = []
    for path, node in nodes:
        if node.node_id is not None and status.get(node.node_id) == UNREGISTERED:
            node.revoked = True
        if node.revoked:
            lines.append(f"revoked {path}: stays out; a node that was shut out needs a new key")
            continue
        if node.node_id in status:
            what = "registered before"
        else:
            what = "registered" if _admit(config, path, node, table, status) else "registered before"
        save_table(table, config.folder)  # one by one, as each of them is a fact at the SuperLink
        lines.append(f"{what} {path}: node {node.node_id} holds partition {node.partition}")
    save_table(table, config.folder)
    return lines


def _admit(config: ServerConfig, path: Path, node: KnownNode, table: Table, status: dict[str, str]) -> bool:
    """Whether the key is new to the SuperLink; its node id either way."""
    try:
        node.node_id = str(_supernode(config, "register", str(path))["node-id"])
    except ValueError as error:
        if "already" not in str(error):
            raise
        # registered, but a crash came before the table was written: then it is the one node that no key has
        known = {other.node_id for other in table.values()}
        strange = [node_id for node_id in status if node_id not in known]
        if len(strange) != 1:
            raise ValueError(
                f"{path} is registered at the SuperLink, but {config.folder} does not say which node it is: make a new "
                "key for it"
            ) from None
        node.node_id = strange[0]
        node.revoked = status[strange[0]] == UNREGISTERED
        if node.revoked:
            raise ValueError(f"{path} was revoked: a node that was shut out needs a new key") from None
        return False
    return True


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
