"""What a run would do, from its settings alone: clients, steps, bytes, memory, time. ``dry_run=true`` prints it.

Reads the model's config.json and, where they are here, the task's records; no weights, no tokens, no clients. Of a
data set on the hub nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.base import empty_base, load_config, max_positions
from adapters.export import what_to_know
from adapters.footprint import MemoryEstimate
from adapters.model import adapter_parts, adapter_shapes, empty_model
from adapters.settings import LoraSettings, TrainSettings, for_round, num_steps, start_is_known
from conf.checks import check_settings
from conf.console import bytes_text, printable
from conf.footprint import client_memory, server_memory
from conf.schema import NONE, Settings
from conf.sums import terms_of
from gradcodec.build import payload_bytes
from gradcodec.layout import Layout
from gradcodec.registry import entry_of
from privacy.secagg import Traffic, traffic
from server.records.account import NOTHING, Account, CodecCost, transfer_seconds
from server.run.private import planned, promise
from strategies.evaluation import panel
from strategies.sampling import Sampling
from tasks.settings import check_window
from tasks.shards import client_records

ROUND_SECONDS = 5.0
"""What Flower takes of a round over gRPC besides training: `python -m bench.rounds`, column `rest`."""
_KEY_BITS = 2.0
"""A parameter, of a key (``gradcodec.broadcast``): about what they took in runs at half a bit; the run decides."""
SUSTAINED = 0.35
SHOWN_LINKS = ("10 Mbit/s", "100 Mbit/s", "10 Mbit/s down, 1 up")
DEVICES = {"RTX 4090": 165e12, "A100": 312e12, "H100": 989e12}
"""Dense bfloat16 FLOP/s by the data sheets; an adapter's training reaches about ``SUSTAINED`` of it."""


@dataclass(frozen=True)
class Plan:
    """Figures of one client and round are those of a client of mean size."""

    settings: Settings
    num_base_parameters: int
    layout: Layout
    num_records: int | None  # of all clients; None: neither the data nor their number are known
    records_here: bool  # counted, not said by ``task.expected_records``
    mean_windows: int | None
    steps: int | None
    payload_bytes: int | None  # at most; None: the codec takes what an update needs
    step_bytes: int | None  # of a coded broadcast, at most; None: the adapter goes down as it is
    codec_cost: CodecCost
    dense_bytes: int
    client_memory: MemoryEstimate
    server_memory: MemoryEstimate
    warnings: tuple[str, ...] = ()  # of the adapter: what a user would expect of it and does not get

    @property
    def uplinks(self) -> int:
        return self.settings.federation.rounds * self.settings.federation.clients_per_round

    def account(self) -> Account | None:
        """Of the whole run, if every client answers: at most, but for keys, whose sizes the run decides; None: payloads
        take what updates need."""
        account, protocol = self._account(), self.protocol
        if account is None or protocol is None:
            return account
        return replace(
            account, up=account.up + self.uplinks * protocol.up, down=account.down + self.uplinks * protocol.down
        )

    @property
    def protocol(self) -> Traffic | None:
        """What masked sums add for one client and round, if all stay; None: the server sees every update."""
        if not self.settings.privacy.secure_aggregation:
            return None
        return traffic(self.settings.federation.clients_per_round)

    def _account(self) -> Account | None:
        if self.payload_bytes is None:
            return None
        if self.step_bytes is None:
            return self._uncoded_broadcast(self.payload_bytes, 4 * self._axes)
        federation, held = self.settings.federation, dict[int, int]()
        sampling = Sampling(federation.num_clients, federation.clients_per_round, self.settings.seed)
        everybody = range(federation.num_clients)
        key_bytes = max(self.step_bytes, self._key_bytes)
        down = catch_up = snapshots = evaluation = keyed = 0  # keyed: after how many rounds the last key was made

        def missed(partition: int, steps: int) -> tuple[int, int]:
            """Bytes of steps, the server's log being no longer than the adapter itself, and of a key before them."""
            assert self.step_bytes is not None
            key = key_bytes if held.get(partition, 0) <= keyed and keyed > 0 else 0
            return min((steps - max(held.get(partition, 0), keyed)) * self.step_bytes, self.dense_bytes), key

        def once(partition: int) -> int:
            """A start adapter that the seed does not give; and axes, which keys do without."""
            return 0 if partition in held else self._start_bytes + (0 if keyed else self._axes)

        def bring(partition: int, steps: int) -> int:
            """All that it is sent so that it holds the adapter after so many rounds."""
            nonlocal down, catch_up, snapshots
            assert self.step_bytes is not None
            size, first = missed(partition, steps)
            first += once(partition)
            down += size + first
            catch_up, snapshots = catch_up + max(0, size - self.step_bytes), snapshots + first
            held[partition] = steps
            return size + first

        for server_round in range(1, federation.rounds + 1):
            evaluation += sum(bring(partition, server_round - 1) for partition in self.asked_after(server_round - 1))
            for partition in sampling.sample(server_round):
                bring(partition, server_round - 1)
            if sum(sum(missed(p, server_round - 1)) for p in everybody) > federation.num_clients * key_bytes:
                keyed = server_round - 1
        evaluation += sum(bring(partition, federation.rounds) for partition in self.asked_after(federation.rounds))
        delivery = sum(sum(missed(p, federation.rounds)) + once(p) for p in everybody)
        artifact, recording = self.codec_cost.artifact * federation.num_clients, self.codec_cost.recording
        up = self.uplinks * self.payload_bytes
        return Account(up, down, catch_up, snapshots, delivery, artifact, recording, evaluation)

    def asked_after(self, server_round: int) -> frozenset[int]:
        """Whom evaluation on the nodes asks of the adapter that came out of this round; 0: of the first one."""
        federation = self.settings.federation
        every, is_last = federation.evaluate_every, server_round == federation.rounds
        if not every or (server_round % every and not is_last):
            return frozenset()
        return panel(federation.num_clients, federation.evaluate_clients, self.settings.seed)

    @property
    def num_evaluations(self) -> int:
        """Answers that evaluation on the nodes asks for, in all."""
        return sum(len(self.asked_after(number)) for number in range(self.settings.federation.rounds + 1))

    def dense_account(self) -> Account:
        """Of the dense run with the same rounds and clients."""
        return replace(self._uncoded_broadcast(self.dense_bytes, 0), artifact=0, recording=0)

    def _uncoded_broadcast(self, payload_bytes: int, side_bytes: int) -> Account:
        clients = self.settings.federation.num_clients
        evaluation = self.num_evaluations * self.dense_bytes
        return Account(
            evaluation=evaluation,
            up=self.uplinks * payload_bytes,
            down=self.uplinks * (self.dense_bytes + side_bytes) + evaluation,
            delivery=clients * self.dense_bytes,
            artifact=clients * self.codec_cost.artifact,
            recording=self.codec_cost.recording,
        )

    @property
    def _key_bytes(self) -> int:
        has_rate = entry_of(self.settings.codec.name).has_rate
        return ceil(_KEY_BITS * self.layout.num_parameters / 8) if has_rate else 0

    @property
    def _start_bytes(self) -> int:
        return 0 if start_is_known(self.settings.lora) else self.dense_bytes

    @property
    def _axes(self) -> int:
        """Values of the codec's side information, which the first message brings in a byte each."""
        coded = self.settings.arm == "coded" and entry_of(self.settings.codec.name).uses_last_update
        rehearses = self.settings.federation.rehearsal_steps > 0 and self.settings.server.base != NONE
        known = coded and rehearses
        return len(self.layout.blocks) * self.layout.rank**2 if known else 0

    @property
    def tokens(self) -> int | None:
        """That one client trains on in one round, padding included."""
        training = self.settings.train
        return None if self.steps is None else self.steps * training.batch_size * self.settings.task.window

    @property
    def flops(self) -> float | None:
        """Of one client in one round: forward, and backward through frozen weights, 2 each a weight and token; once
        more forward with gradient checkpointing."""
        passes = 3 if self.settings.model.gradient_checkpointing else 2
        return None if self.tokens is None else 2.0 * passes * self.num_base_parameters * self.tokens


def plan_of(settings: Settings) -> Plan:
    """Raises ValueError: the settings cannot be served."""
    check_settings(replace(settings, dry_run=True))
    check_window(settings.task, max_positions(settings.model))
    model = empty_model(settings.model, settings.lora)
    layout = Layout.of(adapter_shapes(model), adapter_parts(model))
    dense = 4 * layout.num_parameters
    num_records, here = _count_records(settings)
    windows = _mean_windows(settings, num_records)
    if settings.privacy.secure_aggregation:
        terms_of(planned(settings), layout, settings.federation.clients_per_round)  # or says why not
    return Plan(
        settings=settings,
        num_base_parameters=sum(prod(p.shape) for p in empty_base(settings.model).parameters()),
        layout=layout,
        num_records=num_records,
        records_here=here,
        mean_windows=windows,
        steps=_mean_steps(settings.train, windows),
        payload_bytes=payload_bytes(settings.codec, layout) if settings.arm == "coded" else dense,
        step_bytes=_step_bytes(settings, layout),
        codec_cost=_codec_cost(settings),
        dense_bytes=dense,
        client_memory=client_memory(settings),
        server_memory=server_memory(settings),
        warnings=tuple(what_to_know(model, load_config(settings.model), settings.lora)),
    )


def _step_bytes(settings: Settings, layout: Layout) -> int | None:
    if settings.arm != "coded" or settings.codec.down_bits is None:
        return None
    return payload_bytes(replace(settings.codec, bits=settings.codec.down_bits), layout)


def _codec_cost(settings: Settings) -> CodecCost:
    needed = settings.arm == "coded" and entry_of(settings.codec.name).needs_artifact
    return CodecCost.of(settings.codec.artifact) if needed else NOTHING


def _count_records(settings: Settings) -> tuple[int | None, bool]:
    task, num_clients = settings.task, settings.federation.num_clients
    if task.path is not None and not Path(task.path).exists():
        return task.expected_records, False
    records_of = client_records(task, num_clients)
    return sum(len(records_of(client)) for client in range(num_clients)), True


def _mean_windows(settings: Settings, num_records: int | None) -> int | None:
    """Of a client, if a record is a window; None: not known."""
    task = settings.task
    if num_records is None or task.packing:
        return None
    share = {"tgap": task.tgap_fraction, "faf": 1 - task.tgap_fraction, "all": 1.0}[task.split]
    windows = num_records / settings.federation.num_clients * (1 - task.heldout_fraction) * share
    return max(1, round(min(windows, task.max_windows)))


def _mean_steps(training: TrainSettings, windows: int | None) -> int | None:
    if training.epochs is None:
        return training.steps
    return None if windows is None else num_steps(training, windows)


def print_plan(plan: Plan) -> None:
    """One line a figure."""
    table = Table(title="what this run would do", show_header=False, box=None, pad_edge=False, title_justify="left")
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, text in _lines(plan).items():
        table.add_row(name, Text(printable(text)))
    Console().print(table)


def _lines(plan: Plan) -> dict[str, str]:
    settings, federation, training = plan.settings, plan.settings.federation, plan.settings.train
    model, lora = settings.model, settings.lora
    held = model.dtype if model.quantization == "none" else f"{model.quantization}, the rest float32"
    batch = f"{training.batch_size} windows ({training.micro_batch_size} a pass)"
    steps = "an unknown number of" if plan.steps is None else f"{plan.steps:,}"
    lines = {
        "model": f"{model.path}: {plan.num_base_parameters / 1e9:.2f} B parameters, {held}",
        "adapter": f"{_kind_of(lora)}: {plan.layout.num_parameters:,} parameters in {len(plan.layout.shapes)} tensors",
        **({"note": "; ".join(plan.warnings)} if plan.warnings else {}),
        "data": _data_line(plan),
        **_memory_lines(plan),
    }
    if settings.arm == "base":
        return {**lines, "training": "none: arm=base is the model as it is"}
    lines["training"] = f"{steps} steps of {batch}, {rates(settings)}, a client and round"
    lines["clients"] = (
        f"{federation.num_clients}, {federation.clients_per_round} of them in each of {federation.rounds} rounds"
    )
    if settings.arm == "centralised":
        return {**lines, "network": "none: arm=centralised takes the steps of all of them in one place"}
    return {
        **lines,
        "codec": _codec_line(settings),
        "privacy": promise(settings, plan.mean_windows),
        **_evaluation_lines(plan),
        "bytes up": f"{_up(plan)}; dense: {_traffic(plan, plan.dense_bytes)}",
        "bytes down": _down(plan),
        **_exchange_lines(plan),
        **_time_lines(plan),
    }


def _evaluation_lines(plan: Plan) -> dict[str, str]:
    settings, every = plan.settings, plan.settings.federation.evaluate_every
    here = "by the server" if settings.server.base != NONE else "not by the server, which holds no base model"
    if not every and settings.server.base != NONE:
        return {}
    rounds = (
        "before the first round and after the last"
        if every >= settings.federation.rounds
        else (f"before the first round, after every {every} and after the last")
    )
    nodes = f"{plan.num_evaluations} answers of nodes, {rounds}" if every else "on no node"
    return {"evaluation": f"{here}; {nodes}"}


def rates(settings: Settings) -> str:
    """The learning rate, and where it changes over the rounds those of the first and the last."""
    rounds = settings.federation.rounds
    first, last = (for_round(settings.train, server_round, rounds).lr for server_round in (1, rounds))
    text = f"lr {settings.train.lr:g}"
    same = first == last == settings.train.lr
    return text if same else f"{text} at most ({first:.3g} in round 1, {last:.3g} in the last)"


def _kind_of(lora: LoraSettings) -> str:
    kind = f"rank {lora.rank}, alpha {lora.alpha:g}"
    for name, patterns in (("rank", lora.rank_pattern), ("alpha", lora.alpha_pattern)):
        kind += "".join(f", {name} {value:g} of {pattern}" for pattern, value in patterns.items())
    kind += (", rank-stabilised" if lora.rslora else "") + (", DoRA" if lora.dora else "")
    return kind + (f"; trained whole: {', '.join(lora.modules_to_save)}" if lora.modules_to_save else "")


def _memory_lines(plan: Plan) -> dict[str, str]:
    if plan.settings.arm in ("base", "centralised"):
        return {"memory": f"of the device: {plan.server_memory}"}
    if plan.settings.server.base == NONE:
        return {"memory": f"of a client's device: {plan.client_memory}", "on the server": "no base model"}
    return {"memory": f"of a client's device: {plan.client_memory}", "on the server": f"{plan.server_memory}"}


def _up(plan: Plan) -> str:
    if plan.payload_bytes is None:
        return "as many as an update needs, since codec.bits=null"
    if plan.protocol is None:
        return _traffic(plan, plan.payload_bytes)
    masked, added = bytes_text(plan.payload_bytes), bytes_text(plan.protocol.up)
    return f"{_traffic(plan, plan.payload_bytes + plan.protocol.up)} ({masked} masked, {added} of the protocol)"


def _down(plan: Plan) -> str:
    if plan.step_bytes is None:
        return f"{_traffic(plan, plan.dense_bytes)}: the adapter in float32"
    return (
        f"{bytes_text(plan.step_bytes)} a step at most, and of steps or keys what a client missed; "
        f"dense: {_traffic(plan, plan.dense_bytes)}"
    )


def _exchange_lines(plan: Plan) -> dict[str, str]:
    """Of the whole run, if everybody answers."""
    if (account := plan.account()) is None:
        return {}
    dense, num_clients = plan.dense_account(), plan.settings.federation.num_clients
    parts = [f"{bytes_text(account.up)} up", f"{bytes_text(account.down)} down"]
    if account.catch_up + account.snapshots:
        missed = bytes_text(account.catch_up + account.snapshots)
        parts.append(f"{missed} of it for what clients had missed, or a key in its place")
    parts += [f"{bytes_text(account.evaluation)} of it to be evaluated"] if account.evaluation else []
    parts.append(f"{bytes_text(account.delivery)} for the last adapter to all")
    parts += [f"{bytes_text(account.artifact)} of codec artifacts"] if account.artifact else []
    parts += [f"{bytes_text(account.recording)} of TGAP's recording"] if account.recording else []
    in_all = f"{bytes_text(account.total)} ({', '.join(parts)})"
    if plan.settings.arm == "coded":
        in_all += f", 1/{dense.total / account.total:.1f} of dense's {bytes_text(dense.total)}"
    own, of_dense = (
        transfer_seconds(one.up / num_clients, (one.down + one.delivery) / num_clients) for one in (account, dense)
    )
    times = (f"{_seconds(own[link])} at {link} (dense {_seconds(of_dense[link])})" for link in SHOWN_LINKS)
    return {"in all": in_all, "transfer": f"a client, the whole run: {', '.join(times)}"}


def _time_lines(plan: Plan) -> dict[str, str]:
    if plan.flops is None:
        return {}
    seconds = {name: plan.flops / (SUSTAINED * speed) for name, speed in DEVICES.items()}
    rounds = plan.settings.federation.rounds
    computing = ", ".join(f"{name} {_seconds(value)}" for name, value in seconds.items())
    whole = ", ".join(f"{name} {_seconds(rounds * (value + ROUND_SECONDS))}" for name, value in seconds.items())
    return {
        "computing": f"{plan.flops / 1e15:.3g} PFLOP a client and round: {computing}",
        "whole run": f"clients side by side, without the network: {whole}",
    }


def _traffic(plan: Plan, num_bytes: int) -> str:
    return f"{bytes_text(num_bytes)} a client and round, {bytes_text(num_bytes * plan.uplinks)} in all"


def _codec_line(settings: Settings) -> str:
    codec = settings.codec
    if settings.arm != "coded":
        return f"none (arm={settings.arm}): float32"
    if not entry_of(codec.name).has_rate or codec.bits is None:
        return codec.name
    return f"{codec.name}, at most {codec.bits:g} bits a parameter"


def _data_line(plan: Plan) -> str:
    task = plan.settings.task
    if plan.num_records is None:
        return f"{task.name}: not here, and task.expected_records is not said"
    per_client = ceil(plan.num_records / plan.settings.federation.num_clients)
    source = "" if plan.records_here else " by task.expected_records, as the data are not here"
    return f"{task.name}, {plan.num_records:,} records{source}; about {per_client:,} a client, windows of {task.window}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
