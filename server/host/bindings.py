"""Which node holds which partition: a table beside the keys, so that no node can claim another's data.

``nodes.json`` has for every public key its partition, Flower's id of its node, and whether it was revoked: Flower's own
list names no keys. ``partitions.json`` is what a run needs of it, the partition of every node that was let in; the
ServerApp finds it through ``CG_FEDLLM_DEPLOY``. Loads no Flower.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.host.keys import write_private

DEPLOY_VARIABLE = "CG_FEDLLM_DEPLOY"
"""Names the deployment's folder to the process of the ServerApp."""
TABLE, PARTITIONS = "nodes.json", "partitions.json"


@dataclass
class KnownNode:
    """What is known of one public key."""

    partition: int
    node_id: str | None = None  # Flower's, once it was let in
    revoked: bool = False


Table = dict[str, KnownNode]
"""By public key, as the first two words of its file."""


def read_bindings() -> dict[int, int]:
    """The partition of every registered node by Flower's node id; empty where this process serves no deployment with
    node keys.

    Raises:
        ValueError: the file is damaged.
    """
    folder = os.environ.get(DEPLOY_VARIABLE)
    path = Path(folder, PARTITIONS) if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        return {int(node_id): _number(partition) for node_id, partition in _object_in(path).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): `python -m server start` writes it anew") from None


def load_table(folder: Path) -> Table:
    """All nodes of a deployment. Raises ValueError: the file is damaged."""
    path = folder / TABLE
    if not path.is_file():
        return {}
    try:
        table = {key: KnownNode(**content) for key, content in _object_in(path).items()}
        for node in table.values():
            _number(node.partition)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and register the nodes again") from None
    return table


def save_table(table: Table, folder: Path) -> None:
    """Inverse of ``load_table``; writes what ``read_bindings`` reads, too."""
    admitted = {n.node_id: n.partition for n in table.values() if n.node_id is not None and not n.revoked}
    for name, content in ((PARTITIONS, admitted), (TABLE, {key: asdict(node) for key, node in table.items()})):
        write_private(folder / name, (json.dumps(content, indent=1) + "\n").encode())


def bind(table: Table, public_key: Path, partition: int | None = None) -> KnownNode:
    """The key's entry in the table, made if there is none. Its partition is the one asked for, or the one it has, or
    the number in the name ``node-N.pub``. A revoked key's entry stays, and its partition is free for another.

    Raises:
        ValueError: no partition is known, or it is another key's, or this key has another one.
    """
    key, number = key_of(public_key), re.fullmatch(r"node-(\d+)\.pub", public_key.name)
    known = table.get(key)
    if known is not None and known.revoked:
        return known
    wanted = partition if partition is not None else known.partition if known else int(number[1]) if number else None
    if wanted is None or wanted < 0:
        raise ValueError(f"which partition does the node of {public_key} hold? Say it with --partition N, from 0")
    holders = [other for text, other in table.items() if text != key and other.partition == wanted]
    if any(not other.revoked for other in holders):
        raise ValueError(
            f"{public_key}: partition {wanted} is bound to another key; revoke that one, or take another N"
        )
    if known is None:
        known = table[key] = KnownNode(wanted)
    known.partition = wanted
    return known


def key_of(public_key: Path) -> str:
    """The two words that say which key a file holds: kind and number, without the comment. Raises ValueError: none."""
    try:
        words = public_key.read_text().split()[:2]
    except (OSError, UnicodeDecodeError):
        words = []
    if len(words) < 2:
        raise ValueError(f"{public_key} is no public key: one line, as `python -m server keys` writes it, is expected")
    return " ".join(words)


def _object_in(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise TypeError("no JSON object")
    return content


def _number(partition: object) -> int:
    if not isinstance(partition, int) or isinstance(partition, bool) or partition < 0:
        raise ValueError(f"{partition!r} is no partition")
    return partition
