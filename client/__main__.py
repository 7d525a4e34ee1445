"""A node: joins a federation as one Flower SuperNode and serves one partition of the data.

    python -m client --server HOST:9092 --ca ca.crt --key node-0 --partition 0 --partitions 2

The process becomes the SuperNode; end it with Ctrl-C or SIGTERM. It reconnects by itself when the server comes back.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="the SuperLink's address for nodes")
    parser.add_argument("--ca", required=True, type=Path, help="certificate of the federation's CA")
    parser.add_argument("--key", required=True, type=Path, help="this node's private key")
    parser.add_argument("--partition", required=True, type=int, help="which partition this node holds, from 0")
    parser.add_argument("--partitions", required=True, type=int, help="how many there are")
    parser.add_argument("--port", type=int, default=9094, help="a free local port, another for each node of a host")
    parser.add_argument("--model-path", type=Path, help="this node's copy of the base model")
    parser.add_argument(
        "--task-path", type=Path, help="this node's own data, all of it its own; default: its share of the task"
    )
    parser.add_argument("--codec-artifact", type=Path, help="this node's copy of the codec artifact")
    parser.add_argument("--memory", type=Path, help="where residuals are kept (default ~/.cache/cg-fedllm/memory)")
    args = parser.parse_args()
    for key in ("ca", "key"):
        if not getattr(args, key).is_file():
            parser.error(f"--{key} {getattr(args, key)} is no file: `python -m server keys` makes it")
    if not 0 <= args.partition < args.partitions:
        parser.error(f"--partition {args.partition} is none of 0 to {args.partitions - 1}")
    config = [f"partition-id={args.partition}", f"num-partitions={args.partitions}"]
    for key in ("model_path", "task_path", "codec_artifact", "memory"):
        if (value := getattr(args, key)) is not None:
            config.append(f'{key.replace("_", "-")}="{value.absolute()}"')
    binaries = Path(sys.executable).parent
    os.environ["PATH"] = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
    for key, value in (("FLWR_TELEMETRY_ENABLED", "0"), ("FLWR_DISABLE_UPDATE_CHECK", "1"), ("HF_HUB_OFFLINE", "1")):
        os.environ.setdefault(key, value)
    command = [
        *("flower-supernode", "--superlink", args.server, "--root-certificates", str(args.ca)),
        *("--auth-supernode-private-key", str(args.key), "--host", "127.0.0.1", "--port", str(args.port)),
        *("--node-config", " ".join(config)),
    ]
    os.execv(binaries / command[0], command)


if __name__ == "__main__":
    main()
