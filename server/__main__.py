"""The server's host: make keys, start the SuperLink, let nodes in.

python -m server keys     --folder deploy --hosts server.example.org,10.0.0.5 --nodes 4
python -m server start    --folder deploy [--fleet-address 0.0.0.0:9092] [--control-port 8000]
python -m server register --folder deploy deploy/node-0.pub ...
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from server.keys import CA_CERTIFICATE, make_keys
from server.launch import CONNECTION, ServerPlace, register_node, start_superlink, stop


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    keys = commands.add_parser("keys", help="make a CA, the server's certificate and one key a node")
    start = commands.add_parser("start", help="start the SuperLink, until Ctrl-C or SIGTERM")
    register = commands.add_parser("register", help="let nodes in by their public keys, at a running SuperLink")
    for command in (keys, start, register):
        command.add_argument("--folder", type=Path, default=Path("deploy"), help="keys, database, log (default deploy)")
    keys.add_argument("--hosts", default="localhost,127.0.0.1", help="names and addresses of this host, with commas")
    keys.add_argument("--nodes", type=int, default=2, help="how many node keys (default 2)")
    start.add_argument("--fleet-address", default="0.0.0.0:9092", help="gRPC for the nodes (default 0.0.0.0:9092)")
    start.add_argument("--control-port", type=int, default=8000, help="on loopback only (default 8000)")
    register.add_argument("public_keys", nargs="+", type=Path, metavar="NODE.pub")
    args = parser.parse_args()
    try:
        {"keys": _keys, "start": _start, "register": _register}[args.command](args)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _keys(args: argparse.Namespace) -> None:
    nodes = make_keys(args.folder, args.hosts.split(","), args.nodes)
    print(f"server: {args.folder} stays on this host")
    for node in nodes:
        print(f"node:   copy {args.folder / CA_CERTIFICATE} and {node} to the node's host")


def _start(args: argparse.Namespace) -> None:
    place = ServerPlace(args.folder.absolute(), args.fleet_address, args.control_port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    process = start_superlink(place)
    try:
        for public_key in sorted(args.folder.glob("node-*.pub")):
            register_node(place, public_key)
            print(f"registered {public_key}")
        print(
            f"SuperLink up: nodes at {args.fleet_address} (gRPC, TLS, node keys), control on 127.0.0.1:"
            f"{args.control_port}\nrun:  FLWR_HOME={place.flwr_home} python -m server.federate backend=superlink "
            f"backend.connection={CONNECTION}",
            flush=True,
        )
        process.wait()
        raise ValueError(f"the SuperLink ended with status {process.returncode}; see {place.folder / 'superlink.log'}")
    except KeyboardInterrupt:
        print("stopping")
    finally:
        stop(process)


def _register(args: argparse.Namespace) -> None:
    place = ServerPlace(args.folder.absolute())
    for public_key in args.public_keys:
        if not public_key.is_file():
            raise ValueError(f"{public_key} is no file")
        register_node(place, public_key)
        print(f"registered {public_key}")


if __name__ == "__main__":
    main()
