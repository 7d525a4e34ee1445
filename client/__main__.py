"""A node: joins a federation with one Flower SuperNode a partition, each with a trainer that stays loaded.

    python -m client --server HOST:9092 --ca ca.crt --key node-0 --partition 0 --partitions 2
    python -m client --server HOST:9092 --ca ca.crt --key node-0,node-1 --partition 0,1 --partitions 8 --gpus all

With GPUs every SuperNode and its trainer get one of their own, or several that train together (--gpus-per-client).
Trainers and SuperNodes that die are started again; the SuperNodes reconnect by themselves when the server comes back.
End it with Ctrl-C or SIGTERM: it frees the GPUs.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from client.console import WAITING, print_event
from client.gpus import deal_gpus
from client.health import WRITE_SECONDS, write_health
from client.line import LEAST_SECONDS
from client.node import (
    ON_THE_NODE,
    NodeConfig,
    PartitionConfig,
    PartitionPrograms,
    free_ports,
    programs_of,
    write_private_files,
)
from client.preflight import check_server
from conf.processes import exit_on_sigterm, stay_up

INSECURE = "INSECURE: no TLS, no node key. Whoever is on the way reads and changes everything. For experiments only."
ANY_CODE = "this node runs whatever code the server sends (--trust-server-code)"


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    partitions = _checked(parser, args)
    for warning in ([INSECURE] if args.insecure else []) + ([ANY_CODE] if args.trust_server_code else []):
        print(warning, file=sys.stderr, flush=True)
    exit_on_sigterm()
    try:
        gpus = deal_gpus(args.gpus, len(partitions), args.gpus_per_client)
        answers = check_server(args.server, None if args.insecure else args.ca)
        ports = free_ports(args.port, len(partitions))
        with tempfile.TemporaryDirectory(prefix="cg-fedllm-") as private:  # its owner's alone
            node = _node_config(args, Path(private))
            write_private_files(node.private, {} if args.trust_server_code else _own_app())
            keys = [None] * len(partitions) if args.insecure else args.key
            each = zip(partitions, ports, gpus, keys, strict=True)
            programs = [programs_of(node, PartitionConfig(*one)) for one in each]
            _say_what_starts(args, node, ports, gpus)
            if not answers:
                print_event(f"{args.server} does not answer yet: {WAITING}")
            children = [child for one in programs for child in one.children]
            stay_up(children, print_event, _watch(programs, node.logs))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def _node_config(args: argparse.Namespace, private: Path) -> NodeConfig:
    logs = (args.logs or Path(tempfile.mkdtemp(prefix="cg-fedllm-logs-"))).absolute()
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = {key: getattr(args, key.replace("-", "_")) for key in ON_THE_NODE}
    return NodeConfig(
        server=args.server,
        num_partitions=args.partitions,
        paths={key: path for key, path in paths.items() if path is not None},
        private=private,
        logs=logs,
        ca=None if args.insecure else args.ca,
        gpus_per_client=args.gpus_per_client,
        resident_trainer=not args.no_trainer,
        trust_remote_code=args.trust_remote_code,
        trust_server_code=args.trust_server_code,
        peer_keys=args.peer_keys,
        max_epsilon=args.max_epsilon,
        max_bits=args.max_bits,
        upload_seconds=args.upload_seconds,
        max_rank=args.max_rank,
    )


def _own_app() -> dict[str, str]:
    from client.own_app import own_digests  # loads Flower: after all that can be refused

    return own_digests()


def _say_what_starts(args: argparse.Namespace, node: NodeConfig, ports: Sequence[int], gpus: Sequence[str]) -> None:
    plural = "s" if len(ports) > 1 else ""
    on = "; ".join(gpus) if any(gpus) else "none"
    print_event(
        f"joining {args.server} with partition{plural} {args.partition} of {args.partitions}, GPUs: {on}; "
        f"local port{plural} {', '.join(map(str, ports))}; logs in {node.logs}"
    )
    if args.port not in ports:
        print_event(f"port {args.port} is taken by another program, perhaps another node: {ports[0]} is used")


def _watch(programs: Sequence[PartitionPrograms], logs: Path) -> Callable[[], None]:
    """To be called again and again: passes on what happened, and says from time to time that the node is alive."""
    written = -WRITE_SECONDS

    def watch() -> None:
        nonlocal written
        for one in programs:
            one.console.poll()
        if time.monotonic() >= written + WRITE_SECONDS:
            write_health(logs, programs)
            written = time.monotonic()

    return watch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="the SuperLink's address for nodes")
    parser.add_argument("--ca", type=Path, help="certificate of the federation's CA")
    parser.add_argument("--key", default="", help="private keys, one a partition: node-0 or node-0,node-1")
    parser.add_argument("--partition", required=True, help="which partitions this host holds, from 0: 0 or 0,1,2")
    parser.add_argument("--partitions", required=True, type=int, help="how many there are in the federation")
    parser.add_argument(
        "--gpus",
        default="all",
        help="all, none, or numbers as in 0,1: places in CUDA_VISIBLE_DEVICES where it is set (default all)",
    )
    parser.add_argument(
        "--gpus-per-client", type=int, default=1, help="how many GPUs train one partition together (default 1)"
    )
    parser.add_argument(
        "--port", type=int, default=9094, help="local ports are taken from here on, one a partition (default 9094)"
    )
    parser.add_argument("--model-path", type=Path, help="this node's copy of the base model")
    parser.add_argument(
        "--task-path", type=Path, help="this node's own data, all of it its own; default: its share of the task"
    )
    parser.add_argument("--codec-artifact", type=Path, help="this node's copy of the codec artifact")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let a model's own Python code run here if the run asks",
    )
    parser.add_argument(
        "--trust-server-code",
        action="store_true",
        help="run whatever app the server sends; default: only one that is this checkout's own, file by file",
    )
    parser.add_argument(
        "--max-epsilon",
        type=float,
        metavar="E",
        help="take part in runs with differential privacy alone, and only until their epsilons add up to E",
    )
    parser.add_argument(
        "--max-bits",
        type=float,
        metavar="B",
        help="of a slow line: send at most B bits a parameter, whatever the run says",
    )
    parser.add_argument(
        "--upload-seconds",
        type=float,
        metavar="S",
        help="of a line whose speed is not known: send no more than it takes in S seconds, as the reply before took",
    )
    parser.add_argument(
        "--max-rank",
        type=int,
        metavar="R",
        help="of a small GPU or a slow line: train and send the first R rows of every factor alone, whatever the run's "
        "lora.rank",
    )
    parser.add_argument(
        "--peer-keys",
        type=Path,
        metavar="FOLDER",
        help="public keys of all nodes, node-0.pub and so on, by which those of masked sums are checked; default: the "
        "server's word is taken",
    )
    parser.add_argument("--memory", type=Path, help="where residuals are kept (default ~/.cache/cg-fedllm/memory)")
    parser.add_argument("--logs", type=Path, help="where logs go (default: a new folder below the temporary one)")
    parser.add_argument("--no-trainer", action="store_true", help="load model and data anew for every message")
    parser.add_argument("--insecure", action="store_true", help="without TLS and key: for experiments only")
    return parser


def _checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[int]:
    """The partitions of this host. Ends the program if an option cannot be served."""
    try:
        partitions = [int(part) for part in args.partition.split(",")]
    except ValueError:
        parser.error(f"--partition {args.partition}: numbers are expected, as in 0,1")
    for partition in partitions:
        if not 0 <= partition < args.partitions or partitions.count(partition) > 1:
            parser.error(
                f"--partition {args.partition}: different numbers from 0 to {args.partitions - 1} are expected"
            )
    if args.gpus_per_client < 1 or (args.gpus_per_client > 1 and args.no_trainer):
        parser.error(
            f"--gpus-per-client {args.gpus_per_client}: at least 1, and more than 1 needs the resident trainer"
        )
    _check_bounds(parser, args)
    if not args.insecure:
        _check_keys(parser, args, len(partitions))
    for key in ("model_path", "task_path", "codec_artifact", "peer_keys"):
        if (path := getattr(args, key)) is not None and not path.exists():
            parser.error(f"--{key.replace('_', '-')} {path} does not exist on this host")
    return partitions


def _check_bounds(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What the node's owner allows at most."""
    for option in ("max_epsilon", "max_bits", "max_rank", "upload_seconds"):
        value, least = getattr(args, option), LEAST_SECONDS if option == "upload_seconds" else 0.0
        if value is not None and not (0 < value < math.inf and value >= least):
            said = f"at least {least:g}" if least else "greater than 0"
            parser.error(f"--{option.replace('_', '-')} {value:g} must be a number {said}")


def _check_keys(parser: argparse.ArgumentParser, args: argparse.Namespace, num_partitions: int) -> None:
    args.key = [Path(key) for key in args.key.split(",") if key]
    if args.ca is None or not args.key:
        parser.error("--ca and --key are needed: `python -m server keys` makes them (or say --insecure)")
    for name, path in (("ca", args.ca), *(("key", key) for key in args.key)):
        if not path.is_file():
            parser.error(f"--{name} {path} is no file: `python -m server keys` makes it")
    if len(args.key) != num_partitions or len({key.absolute() for key in args.key}) != num_partitions:
        parser.error(f"{num_partitions} partitions need as many different keys; --key names {len(args.key)}")


if __name__ == "__main__":
    main()
