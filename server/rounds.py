"""One federated run, from the roll call to the last round: settings in, results out. Runs inside a ServerApp."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from logging import WARNING
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from adapters.model import adapter_parts, adapter_shapes
from adapters.settings import num_examples
from conf.output import OutputError, open_output, write_json
from conf.remedies import TRAIN_ONE, codec_remedies
from conf.schema import Settings, check_settings
from gradcodec.artifact import load_artifact
from gradcodec.build import build_codec, byte_budget
from gradcodec.layout import Layout
from gradcodec.registry import entry_of
from server.alive import alive
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.evaluate import Evaluator
from server.events import EventLog
from server.metrics import serve_metrics
from server.progress import shown
from server.results import RunResults
from strategies.build import build_inner
from strategies.coded import CodedStrategy
from strategies.dense import DenseStrategy
from strategies.errors import RoundError
from strategies.ledger import LedgerStrategy, Uplink
from strategies.messages import replies_to
from strategies.optimizer import optimizer_state, restore_optimizer
from strategies.recording import RecordingStrategy
from strategies.records import SETTINGS
from strategies.sampling import Fault, Roster, SeededStrategy, call_roll
from strategies.tensors import from_record, to_record


def run_federation(grid: Grid, settings: Settings) -> RunResults:
    """Runs all rounds, or those that are left of ``settings.resume``, and writes ``results.json`` and the final
    adapter into ``settings.output``; after every round a checkpoint.

    Raises:
        ValueError: a setting, a file or a node is not as the run needs it; the message says which.
    """
    check_settings(settings)
    output = open_output(Path(settings.output))
    with alive(output, settings.run_id):
        return _run(grid, settings, output)


def _run(grid: Grid, settings: Settings, output: Path) -> RunResults:
    before = load_checkpoint(Path(settings.resume)) if settings.resume is not None else None
    if settings.record is not None:
        open_output(Path(settings.record).parent)
    (output / "results.json").unlink(missing_ok=True)  # of an earlier run in the same folder, or of fewer rounds
    events = EventLog(output, keep=before is not None)
    try:
        with shown(events), serve_metrics(settings.federation.metrics_port, events):
            return _Run(grid, settings, output, events, before).go()
    except Exception as error:
        with contextlib.suppress(OutputError):  # a full disk, which is what the error says
            events.write("run_failed", reason=str(error) if isinstance(error, ValueError) else repr(error))
        raise


class _Run:
    """What a run holds between its rounds."""

    def __init__(
        self, grid: Grid, settings: Settings, output: Path, events: EventLog, before: Checkpoint | None
    ) -> None:
        if settings.arm == "coded" and entry_of(settings.codec.name).needs_artifact:
            assert settings.codec.artifact is not None
            with codec_remedies(TRAIN_ONE):
                settings.codec.digest = load_artifact(Path(settings.codec.artifact), settings.codec.name).digest
        self.grid = grid
        self.settings = settings
        self.output = output
        self.events = events
        self.before = before
        self.evaluator = Evaluator(settings)
        self.layout = Layout.of(adapter_shapes(self.evaluator.model), adapter_parts(self.evaluator.model))
        self.results = before.results if before is not None else RunResults(settings, self.layout.num_parameters)
        self.results.settings = settings
        self.adapter: Mapping[str, Tensor] = self.evaluator.initial
        if before is not None:
            if before.adapter.keys() != self.adapter.keys():
                raise ValueError(
                    f"resume={settings.resume}: its adapter is not that of model.path={settings.model.path}"
                )
            self.adapter = {name: before.adapter[name] for name in self.adapter}  # strategies zip them by position
        self.done = 0 if before is None else before.server_round
        self.evaluates_apart = settings.backend.name == "superlink"  # a simulation's clients share its machine
        self.started = time.monotonic() - self.results.seconds
        self.here = -1  # nodes, as long as some are waited for

    def go(self) -> RunResults:
        federation = self.settings.federation
        config = ConfigRecord({SETTINGS: self.settings.to_json()})
        started = "run_started" if self.before is None else "run_resumed"
        codec = self.settings.codec.name if self.settings.arm == "coded" else ""
        self.events.write(
            started, arm=self.settings.arm, codec=codec, rounds=federation.rounds, run_id=self.settings.run_id
        )
        roster = call_roll(self.grid, federation.num_clients, config, federation.wait_seconds, self._waiting)
        self.events.write("nodes", count=len(roster))
        self._build(roster)
        for server_round in range(self.done + 1, federation.rounds + 1):
            if not self.evaluates_apart:
                self._evaluate()
            self.adapter = from_record(self._round(server_round, config))
            self.done = server_round
            self.events.write("round_finished", server_round=server_round)
            self._save(roster)
        self._evaluate()
        if self.recording is not None and self.settings.record is not None:
            self.recording.save(Path(self.settings.record))
        self.evaluator.save(self.adapter, self.results.facts(), self.output / "adapter")
        write_json(self.results.to_json(), self.output / "results.json")
        self.events.write("run_finished", seconds=self.results.seconds)
        return self.results

    def _build(self, roster: Roster) -> None:
        """The strategies, one around the other, with the state of the checkpoint if there is one."""
        settings, federation, before = self.settings, self.settings.federation, self.before
        self.inner = build_inner(settings.strategy)
        self.recording = RecordingStrategy(self.inner, self.layout) if settings.record is not None else None
        self.coded: CodedStrategy | None = None
        if settings.arm == "coded":
            with codec_remedies(TRAIN_ONE):
                codec = build_codec(settings.codec, self.layout, self.evaluator.model.device)
            budget = byte_budget(settings.codec, self.layout)
            self.coded = CodedStrategy(self.inner, codec, federation.min_replies, budget)
        receiving = self.coded or DenseStrategy(self.recording or self.inner, federation.min_replies)
        receiving.on_refused = lambda node, reason: self.strategy.refuse(self.done + 1, node, reason)
        self.strategy = SeededStrategy(
            LedgerStrategy(receiving, self._uplink, lambda partition: partition in self.strategy.refused),
            roster,
            federation.clients_per_round,
            settings.seed,
            num_examples(settings.train, settings.task.max_windows),
            federation.max_failures,
            federation.rest_rounds,
            federation.wait_seconds,
            self._fault,
        )
        if before is not None:
            restore_optimizer(self.inner, before.optimizer)
            self.strategy.failures, self.strategy.resting = before.failures, before.resting
            if self.coded is not None:
                self.coded.side = before.side
                self.coded.accepted = {roster[p]: digest for p, digest in before.accepted.items() if p in roster}

    def _round(self, server_round: int, config: ConfigRecord) -> ArrayRecord:
        """The next adapter. A round that comes to nothing is tried again.

        Nodes need seconds to see a message and longer to train: meanwhile, what they start from is evaluated.

        Raises:
            RoundError: it came to nothing every time.
        """
        federation = self.settings.federation
        for attempt in range(federation.retries + 1):
            arrays = to_record(dict(self.adapter))
            try:
                messages = list(
                    self.strategy.configure_train(server_round, arrays, ConfigRecord({**config}), self.grid)
                )
                size = sum(len(a.data) for m in messages for r in m.content.array_records.values() for a in r.values())
                self.events.write("round_started", server_round=server_round, clients=len(messages), bytes_down=size)
                self.results.downlink_bytes += size
                replies = replies_to(self.grid, messages, federation.round_seconds)
                if self.evaluates_apart:
                    self._evaluate()
                new, _ = self.strategy.aggregate_train(server_round, replies)
            except RoundError as error:
                if attempt == federation.retries:
                    raise RoundError(f"{error}; tried {attempt + 1} times (federation.retries={attempt})") from None
                log(WARNING, "%s; the round is tried again", error)
                continue
            assert new is not None
            return new
        raise AssertionError

    def _evaluate(self) -> None:
        """Held-out loss after the last round that is done, unless it is known."""
        if len(self.results.heldout_loss) > self.done:
            return
        loss = self.evaluator.loss(self.adapter)
        self.results.heldout_loss.append(loss)
        self.results.seconds = time.monotonic() - self.started
        self.events.write("evaluated", server_round=self.done, heldout_loss=loss)

    def _save(self, roster: Roster) -> None:
        self.results.seconds = time.monotonic() - self.started
        partition_of = {node: partition for partition, node in roster.items()}
        accepted = self.coded.accepted if self.coded is not None else {}
        checkpoint = Checkpoint(
            self.settings,
            self.done,
            dict(self.adapter),
            self.results,
            optimizer_state(self.inner),
            self.coded.side if self.coded is not None else None,
            {partition_of[node]: digest for node, digest in accepted.items()},
            self.strategy.failures,
            self.strategy.resting,
        )
        save_checkpoint(checkpoint, self.output)

    def _waiting(self, num_nodes: int) -> None:
        if num_nodes != self.here:
            self.here = num_nodes
            self.events.write("waiting", count=num_nodes, of=self.settings.federation.num_clients)

    def _uplink(self, uplink: Uplink) -> None:
        self.results.uplinks.append(uplink)
        self.events.write("uplink", **dataclasses.asdict(uplink))

    def _fault(self, fault: Fault) -> None:
        self.results.faults.append(fault)
        self.events.write("fault", **dataclasses.asdict(fault))
