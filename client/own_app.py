"""A node runs its own code: the app that a server sends must be, file by file, the app of this node's checkout.

Flower sends the app (a FAB, a zip of Python files) to the nodes and runs it there. Who submits runs at the server could
so run anything on every node. Here the ClientApp's process compares it first, and unpacks nothing that differs. The
app's digests are in the file that ``CG_FEDLLM_APP`` names.

Two hosts may compress the same files differently, so files are compared and not the zip.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.console import note, write_notes
from conf import CHECKOUT

APP_VARIABLE = "CG_FEDLLM_APP"
"""Names the file with the digests of the only app that may run."""
MANIFEST = ".info/CONTENT"
"""The bundle's own list of its files; differs with any of them."""
MAX_BYTES = 64 << 20
"""Of an app's files together, unpacked."""


def app_digests(fab: bytes) -> dict[str, str]:
    """SHA-256 (hex) by name of every file in an app bundle.

    Raises:
        ValueError: it is no bundle, names a file twice, or holds more than ``MAX_BYTES``.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as bundle:
            entries = bundle.infolist()
            names = [entry.filename for entry in entries]
            if len(set(names)) < len(names):
                raise ValueError("an app that names a file twice is none")
            if sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise ValueError(f"an app of more than {MAX_BYTES >> 20} MiB is none")
            return {name: hashlib.sha256(bundle.read(name)).hexdigest() for name in names}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"what the server sent is no app: {error}") from None


def own_digests() -> dict[str, str]:
    """Of the app that this checkout would send itself."""
    from flwr.cli.build import build_fab_from_disk

    return app_digests(build_fab_from_disk(CHECKOUT))


def check_app(fab: bytes, own: Mapping[str, str]) -> None:
    """Raises ValueError: the app differs from this node's own; the message names files."""
    theirs = app_digests(fab)
    differing = sorted(name for name in {*theirs, *own} if theirs.get(name) != own.get(name))
    if not differing:
        return
    named = [name for name in differing if name != MANIFEST] or differing
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    raise ValueError(
        f"the server's app is not this node's own: {', '.join(named[:3])}{more} differ. Bring both to one release, or "
        "start the node with --trust-server-code to run whatever the server sends"
    )


def take_token(path: Path) -> str:
    """The task's token; the file that it was handed over in goes."""
    token = path.read_text()
    path.unlink()
    return token


def main() -> None:
    """The process of one message."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runtime-api-address", required=True, metavar="HOST:PORT", help="of the SuperNode")
    parser.add_argument("--token-file", type=Path, required=True, help="read once, then deleted")
    parser.add_argument("--parent-pid", type=int, help="the process ends with it")
    args = parser.parse_args()
    from client.supernode import log_with_times  # loads Flower, as the digests alone do not

    write_notes()
    log_with_times()
    own = json.loads(Path(os.environ[APP_VARIABLE]).read_text())
    runtime = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    install = runtime.install_from_fab

    def install_own(fab: bytes, *arguments: Any, **options: Any) -> Path:
        try:
            check_app(fab, own)
        except ValueError as error:
            note(f"refused to run: {error}")
            raise
        installed: Path = install(fab, *arguments, **options)
        return installed

    setattr(runtime, "install_from_fab", install_own)  # noqa: B010
    # not by Flower's command, which loads the whole SuperNode, for over a second, before every message
    runtime.run_clientapp(
        runtime_api_address=args.runtime_api_address,
        token=take_token(args.token_file),
        insecure=True,  # its SuperNode is on this host
        parent_pid=args.parent_pid,
    )


if __name__ == "__main__":
    main()
