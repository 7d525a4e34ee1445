"""A node: joins a federation with one Flower SuperNode a partition, each with a trainer that stays loaded.

    python -m client --server HOST:9092 --ca ca.crt --key node-0 --partition 0 --partitions 2
    python -m client --server HOST:9092 --ca ca.crt --key node-0,node-1 --partition 0,1 --partitions 8 --gpus all

With GPUs every SuperNode and its trainer get one of their own, or several that train together (--gpus-per-client).
Trainers and SuperNodes that die are started again; the SuperNodes reconnect by themselves when the server comes back.
End it with Ctrl-C or SIGTERM: it frees the GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from client.preflight import check_server
from client.work import TRUST
from conf.processes import Child, exit_on_sigterm, path_with_binaries, stay_up

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",  # how soon a message is seen; Flower's default is a second
}
ON_THE_NODE = ("model_path", "task_path", "codec_artifact", "memory")
INSECURE = "INSECURE: no TLS, no node key. Whoever is on the way reads and changes everything. For experiments only."


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    partitions = _checked(parser, args)
    if args.insecure:
        print(INSECURE, file=sys.stderr, flush=True)
    exit_on_sigterm()
    try:
        gpus = deal_gpus(args.gpus, len(partitions), args.gpus_per_client)
        if not check_server(args.server, None if args.insecure else args.ca):
            print(f"{args.server} does not answer yet: waiting for it", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="cg-fedllm-") as sockets:  # its owner's alone
            logs = (args.logs or Path(tempfile.mkdtemp(prefix="cg-fedllm-logs-"))).absolute()
            logs.mkdir(parents=True, exist_ok=True)
            children: list[Child] = []
            for place, (partition, own) in enumerate(zip(partitions, gpus, strict=True)):
                children += node(args, place, partition, own, Path(sockets), logs)
            names = f"partition{'s' if len(partitions) > 1 else ''} {args.partition} of {args.partitions}"
            on = "; ".join(gpus) if any(gpus) else "none"
            print(f"joining {args.server} with {names}, GPUs: {on}; logs in {logs}", flush=True)
            stay_up(children)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


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
    parser.add_argument("--port", type=int, default=9094, help="the first of free local ports, one a partition")
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
    if not args.insecure:
        _check_keys(parser, args, len(partitions))
    for key in ("model_path", "task_path", "codec_artifact"):
        if (place := getattr(args, key)) is not None and not place.exists():
            parser.error(f"--{key.replace('_', '-')} {place} does not exist on this host")
    return partitions


def _check_keys(parser: argparse.ArgumentParser, args: argparse.Namespace, num_partitions: int) -> None:
    args.key = [Path(key) for key in args.key.split(",") if key]
    if args.ca is None or not args.key:
        parser.error("--ca and --key are needed: `python -m server keys` makes them (or say --insecure)")
    for name, path in (("ca", args.ca), *(("key", key) for key in args.key)):
        if not path.is_file():
            parser.error(f"--{name} {path} is no file: `python -m server keys` makes it")
    if len(args.key) != num_partitions or len({key.absolute() for key in args.key}) != num_partitions:
        parser.error(f"{num_partitions} partitions need as many different keys; --key names {len(args.key)}")


def deal_gpus(wanted: str, num_clients: int, per_client: int = 1) -> list[str]:
    """For every client what ``CUDA_VISIBLE_DEVICES`` holds: its GPUs with commas, or nothing.

    Where this process has the variable already (Slurm sets it), only its GPUs are dealt, by the names they have in it.

    Raises:
        ValueError: fewer GPUs than the clients need.
    """
    if wanted == "none":
        return [""] * num_clients
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else _names_in(visible)
    if wanted == "all":
        import torch

        numbers = [str(i) for i in range(torch.cuda.device_count())]
        if not numbers:
            return [""] * num_clients
    else:
        numbers = wanted.split(",")
        if not all(number.isdigit() for number in numbers) or len(set(numbers)) != len(numbers):
            raise ValueError(f"--gpus {wanted}: all, none or different numbers as in 0,1 are expected")
        if names is not None and any(int(number) >= len(names) for number in numbers):
            raise ValueError(
                f"--gpus {wanted}: CUDA_VISIBLE_DEVICES={visible} holds {len(names)} GPUs, which count from 0 here"
            )
    if len(numbers) < num_clients * per_client:
        raise ValueError(
            f"{num_clients} clients need {num_clients * per_client} GPUs, and --gpus {wanted} gives {len(numbers)}: "
            "hold fewer partitions here, or say --gpus none"
        )
    gpus = numbers if names is None else [names[int(number)] for number in numbers]
    return [",".join(gpus[i * per_client : (i + 1) * per_client]) for i in range(num_clients)]


def _names_in(visible: str) -> list[str]:
    """Numbers or UUIDs; for CUDA the list ends at the first that is none, as -1."""
    names = (name.strip() for name in visible.split(","))
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))


def node(args: argparse.Namespace, place: int, partition: int, gpus: str, sockets: Path, logs: Path) -> Sequence[Child]:
    """Trainer and SuperNode of one partition."""
    binaries = Path(sys.executable).parent
    environment = {**ENVIRONMENT, **os.environ, "PATH": path_with_binaries(), "CUDA_VISIBLE_DEVICES": gpus}
    socket_path = sockets / f"trainer-{partition}.sock"
    config = [f"partition-id={partition}", f"num-partitions={args.partitions}"]
    for key in ON_THE_NODE:
        if (value := getattr(args, key)) is not None:
            config.append(f'{key.replace("_", "-")}="{value.absolute()}"')
    if args.trust_remote_code:
        config.append(f'{TRUST}="true"')
    trust = ["--insecure"]
    if not args.insecure:
        trust = ["--root-certificates", str(args.ca), "--auth-supernode-private-key", str(args.key[place])]
    children = []
    if not args.no_trainer:
        config.append(f'trainer-socket="{socket_path}"')
        command = [
            sys.executable,
            "-m",
            *_team_of(args.gpus_per_client),
            "client.resident",
            "--socket",
            str(socket_path),
        ]
        root = Path(__file__).resolve().parents[1]
        children.append(Child(f"trainer {partition}", command, logs / f"trainer-{partition}.log", environment, root))
    command = [str(binaries / "flower-supernode"), "--superlink", args.server, *trust]
    command += ["--host", "127.0.0.1", "--port", str(args.port + place), "--node-config", " ".join(config)]
    log = logs / f"supernode-{partition}.log"
    children.append(Child(f"SuperNode {partition}", command, log, environment, may_refuse=True, explain=refusal))
    return children


def _team_of(size: int) -> list[str]:
    """What starts so many processes of the module that follows."""
    return ["torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m"] if size > 1 else []


def refusal(log: Path) -> str:
    """Why a SuperNode was turned away, where Flower's log has a number in place of a cause."""
    text = log.read_text(errors="replace")[-2000:] if log.is_file() else ""
    if NOT_ACTIVATED not in text:
        return ""
    return (
        "the server refuses this key. Either it is not registered or was revoked (on the server: `python -m server "
        "register NODE.pub`), or another SuperNode uses it now (one that was killed is forgotten after a minute)"
    )


NOT_ACTIVATED = "[code: 2004]"

if __name__ == "__main__":
    main()
