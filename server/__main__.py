"""The server's host: make keys, start the SuperLink, let nodes in and out, look at a run.

python -m server keys     --folder deploy --hosts server.example.org,10.0.0.5 --nodes 4
python -m server start    --folder deploy [--fleet-address 0.0.0.0:9092] [--control-port 8000]
python -m server register --folder deploy deploy/node-0.pub ... [--partition N]
python -m server revoke   --folder deploy deploy/node-0.pub ...
python -m server nodes    --folder deploy
python -m server status   [outputs/federate/2026-01-31/12-00-00] [--follow]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from conf.processes import end_all, exit_on_sigterm, stay_up
from server.host.bindings import bind, load_table, save_table
from server.host.keys import CA_CERTIFICATE, make_keys, private_folder
from server.host.launch import CONNECTION, ServerConfig, start_server
from server.host.nodes import list_nodes, register_nodes, revoke_node
from server.live.status import show_status
from server.records.places import LATEST, found

INSECURE = """\
************************************************************************
INSECURE: no TLS and no node keys. Whoever reaches {address} can join the
federation, read every adapter and send any update. For experiments only.
************************************************************************"""


def main() -> None:
    args = _parser().parse_args()
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "keys": _keys,
        "start": _start,
        "register": _register,
        "revoke": _revoke,
        "nodes": _nodes,
        "status": lambda args: show_status(found(args.run), args.follow),
    }
    try:
        actions[args.command](args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    keys = commands.add_parser("keys", help="make a CA, the server's certificate and one key a node")
    start = commands.add_parser("start", help="start the SuperLink, until Ctrl-C or SIGTERM")
    register = commands.add_parser("register", help="let nodes in by their public keys, at a running SuperLink")
    revoke = commands.add_parser("revoke", help="shut nodes out by their public keys, at a running SuperLink")
    nodes = commands.add_parser("nodes", help="list the nodes of a running SuperLink")
    status = commands.add_parser("status", help="where a run stands: nodes, round, loss, bytes, time left")
    for command in (keys, start, register, revoke, nodes):
        command.add_argument("--folder", type=Path, default=Path("deploy"), help="keys, database, log (default deploy)")
    keys.add_argument("--hosts", default="localhost,127.0.0.1", help="names and addresses of this host, with commas")
    keys.add_argument("--nodes", type=int, default=2, help="how many node keys (default 2)")
    start.add_argument("--fleet-address", default="0.0.0.0:9092", help="gRPC for the nodes (default 0.0.0.0:9092)")
    start.add_argument("--control-port", type=int, default=8000, help="on loopback only (default 8000)")
    start.add_argument("--insecure", action="store_true", help="without TLS and keys: for experiments only")
    for command in (register, revoke):
        command.add_argument("public_keys", nargs="+", type=Path, metavar="NODE.pub")
    register.add_argument("--partition", type=int, help="what the node holds (default: N of a file named node-N.pub)")
    status.add_argument("run", nargs="?", default=LATEST, help="its output folder (default: the run started last)")
    status.add_argument("--follow", action="store_true", help="until the run has ended")
    return parser


def _keys(args: argparse.Namespace) -> None:
    nodes = make_keys(args.folder, args.hosts.split(","), args.nodes)
    table = load_table(args.folder)
    for public_key in sorted(args.folder.glob("node-*.pub")):
        bind(table, public_key)
    save_table(table, args.folder)
    print(f"server: {args.folder} stays on this host, where its owner alone can read it")
    for node in nodes:
        print(f"node:   copy {args.folder / CA_CERTIFICATE} and {node} to the node's host")


def _start(args: argparse.Namespace) -> None:
    config = ServerConfig(args.folder.absolute(), args.fleet_address, args.control_port, args.insecure)
    exit_on_sigterm()
    if args.insecure:
        private_folder(args.folder)
        print(INSECURE.format(address=args.fleet_address), file=sys.stderr, flush=True)
    children = start_server(config)
    try:
        public_keys = [] if args.insecure else sorted(args.folder.glob("node-*.pub"))
        for line in register_nodes(config, public_keys) if public_keys else []:
            print(line)
        how = "gRPC, INSECURE" if args.insecure else "gRPC, TLS, node keys"
        print(
            f"SuperLink up: nodes at {args.fleet_address} ({how}), control on 127.0.0.1:{args.control_port}, for who "
            f"can read {config.folder}\n"
            f"run:  FLWR_HOME={config.flwr_home} python -m server.federate backend=superlink "
            f"backend.connection={CONNECTION}",
            flush=True,
        )
    except BaseException:
        end_all(children)
        raise
    stay_up(children)


def _register(args: argparse.Namespace) -> None:
    if args.partition is not None and len(args.public_keys) > 1:
        raise ValueError("--partition is for one key: register the others on their own")
    for line in register_nodes(ServerConfig(args.folder.absolute()), _files(args.public_keys), args.partition):
        print(line)


def _revoke(args: argparse.Namespace) -> None:
    for public_key in _files(args.public_keys):
        node = revoke_node(ServerConfig(args.folder.absolute()), public_key)
        print(f"revoked {public_key}: node {node} is out")


def _nodes(args: argparse.Namespace) -> None:
    for line in list_nodes(ServerConfig(args.folder.absolute())):
        print(line)


def _files(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is no file")
    return paths


if __name__ == "__main__":
    main()
