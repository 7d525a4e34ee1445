"""One federated run, from the roll call to the last round: settings in, results out. Runs inside a ServerApp.

docs/rounds.md draws how the parts of a round hang together.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from functools import partial
from logging import WARNING
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.supercore import log
from safetensors import SafetensorError
from torch import Tensor

from adapters.model import adapter_parts, adapter_shapes
from adapters.settings import num_examples
from conf.basis import codecs_of
from conf.output import OutputError, open_output, write_json
from conf.remedies import TRAIN_ONE, codec_remedies
from conf.schema import Settings, check_settings
from conf.sums import terms_of
from gradcodec.artifact import load_artifact
from gradcodec.build import artifact_folder, broadcast_budget, byte_budget
from gradcodec.delivery import Delivery
from gradcodec.errors import BudgetError, DivergedError
from gradcodec.intake import Intake
from gradcodec.layout import Layout
from gradcodec.registry import entry_of
from gradcodec.rounds import codec_at
from gradcodec.sums import SumIntake
from gradcodec.trial import check_budgets
from privacy.errors import BudgetSpentError
from privacy.secagg import least_stay
from server.account import NOTHING, CodecCost
from server.alive import alive
from server.checkpoint import Checkpoint, go_back, load_checkpoint, save_checkpoint
from server.evaluate import Evaluator
from server.events import WHO, WORDS, EventLog
from server.finish import report_on
from server.journal import Journal
from server.live_page import serve_page
from server.metrics import serve_metrics
from server.private import Books
from server.progress import shown
from server.results import RunResults
from strategies.broadcast import CodedBroadcaster, DenseBroadcaster
from strategies.build import build_inner
from strategies.coded import CodedReceiver
from strategies.dense import DenseReceiver
from strategies.errors import RoundError
from strategies.federated import FederatedStrategy, Limits, Ways
from strategies.messages import replies_to
from strategies.norms import NormBound
from strategies.recording import RecordingStrategy
from strategies.roll import Roll, call_roll
from strategies.sampling import Sampling
from strategies.secure import SecureStrategy, SumReceiver
from strategies.tensors import from_record, to_record
from strategies.wire import SETTINGS


def run_federation(grid: Grid, settings: Settings, bound: Mapping[int, int] | None = None) -> RunResults:
    """Runs all rounds, or those that remain of ``settings.resume``, and writes ``results.json`` and the final
    adapter into ``settings.output``; after every round a checkpoint.

    Args:
        bound: node id -> the partition that its key was made for; None or empty: nodes say themselves which they hold.

    Raises:
        ValueError: a setting, a file or a node is not as the run needs it, or training diverged; the message says
            which. Of a run that diverged the last finite adapter is kept.
    """
    check_settings(settings)
    output = open_output(Path(settings.output))
    with alive(output, settings.run_id):
        return _run(grid, settings, output, bound)


def _run(grid: Grid, settings: Settings, output: Path, bound: Mapping[int, int] | None) -> RunResults:
    before = load_checkpoint(Path(settings.resume), settings.from_round) if settings.resume is not None else None
    if before is not None:
        go_back(output, before.server_round)
    if settings.record is not None:
        open_output(Path(settings.record).parent)
    (output / "results.json").unlink(missing_ok=True)  # of an earlier run in the same folder, or of fewer rounds
    events = EventLog(output, keep=before is not None)
    with contextlib.ExitStack() as page, events.telling_failure():
        page.enter_context(serve_page(settings.federation.page_port, output))  # shut after a failure is told
        with shown(events), serve_metrics(settings.federation.metrics_port, events):
            return prepare(grid, settings, events, before, bound).run()


def prepare(
    grid: Grid,
    settings: Settings,
    events: EventLog,
    before: Checkpoint | None = None,
    bound: Mapping[int, int] | None = None,
) -> Federation:
    """Loads model and data, and puts the parts of a run together; nobody has been asked anything yet."""

    def root(server_round: int, adapter: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return evaluator.root_update(settings, server_round, adapter)

    inner = build_inner(settings.strategy, root)  # first, as a plug-in may refuse its settings
    codec_cost = NOTHING
    if settings.arm == "coded" and entry_of(settings.codec.name).needs_artifact:
        with codec_remedies(TRAIN_ONE):
            artifact = load_artifact(artifact_folder(settings.codec), settings.codec.name)
            settings.codec.digest = artifact.digest
        codec_cost = CodecCost.of(settings.codec.artifact)
    evaluator = Evaluator(settings)
    layout = Layout.of(adapter_shapes(evaluator.model), adapter_parts(evaluator.model))
    results = before.results if before is not None else RunResults(settings, layout.num_parameters)
    results.settings, results.codec_cost = settings, codec_cost
    journal = Journal(results, events)
    recording = RecordingStrategy(inner, layout) if settings.record is not None else None
    federation = settings.federation
    books = Books(settings, Path(settings.output), goes_on=before is not None)
    ways = _ways(settings, layout, evaluator, books)  # settles the codec's basis, too
    config = ConfigRecord({SETTINGS: settings.to_json()})
    strategy = (SecureStrategy if settings.privacy.secure_aggregation else FederatedStrategy)(
        recording or inner,
        ways,
        Roll(grid, federation.num_clients, config, journal, federation.wait_seconds, bound),
        Sampling(
            federation.num_clients,
            federation.clients_per_round,
            books.draws,
            federation.max_failures,
            federation.rest_rounds,
            books.ledger,
        ),
        _norm_bound(settings),
        journal,
        Limits(
            federation.min_replies,
            num_examples(settings.train, settings.task.max_windows),
            federation.wait_seconds,
            says_loss=not settings.privacy.protects,
        ),
    )
    run = Federation(grid, settings, evaluator, strategy, journal, books)
    run.recording = recording
    if before is not None:
        run.restore(before)
    return run


def _norm_bound(settings: Settings) -> NormBound:
    """None where noise is shared: a share that is scaled down is not the noise that was accounted for."""
    strategy = settings.strategy
    if settings.privacy.noise == "sum":
        return NormBound(None, None)
    return NormBound(strategy.clip_norm_ratio, strategy.max_norm_ratio, strategy.max_norm)


def _ways(settings: Settings, layout: Layout, evaluator: Evaluator, books: Books) -> Ways:
    if settings.arm != "coded":
        return Ways(DenseBroadcaster(), DenseReceiver())
    with codec_remedies(TRAIN_ONE):
        codecs = codecs_of(settings, layout, evaluator.seeded, evaluator.model.device)
    try:
        check_budgets(settings.codec, codecs.at(evaluator.seeded), evaluator.model.device)
    except BudgetError as error:
        raise BudgetError(f"codec.{error}") from None
    clients, budget = range(settings.federation.num_clients), byte_budget(settings.codec, layout)
    down = settings.codec.down_bits is not None
    receiver: CodedReceiver | SumReceiver
    if settings.privacy.secure_aggregation:
        terms_of(settings, layout, settings.federation.clients_per_round)  # refused before anybody trains
        sums = SumIntake(codecs.at(evaluator.seeded), settings.run_id)
        terms = partial(terms_of, settings, layout)
        stay = partial(least_stay, settings.privacy, min_replies=settings.federation.min_replies)
        receiver = SumReceiver(sums, codecs, terms, books.next_sum, stay, sends_side=not down)
    else:
        intake = Intake(codecs.at(evaluator.seeded), settings.run_id, clients, budget)
        receiver = CodedReceiver(intake, codecs, sends_side=not down)
    if not down:
        return Ways(DenseBroadcaster(), receiver)
    budget, known = broadcast_budget(settings.codec, layout), settings.lora.start is None
    delivery = Delivery(
        codec_at(codecs, layout), layout, evaluator.initial, settings.run_id, budget, clients, start_is_known=known
    )
    return Ways(CodedBroadcaster(delivery), receiver)


class Diverged(ValueError):
    """An adapter that no round may start from."""


class Federation:
    """What a run holds between its rounds."""

    def __init__(
        self,
        grid: Grid,
        settings: Settings,
        evaluator: Evaluator,
        strategy: FederatedStrategy,
        journal: Journal,
        books: Books,
    ) -> None:
        self.grid = grid
        self.settings = settings
        self.output = Path(settings.output)
        self.evaluator = evaluator
        self.strategy = strategy
        self.journal = journal
        self.results = journal.results
        self.books = books
        self.recording: RecordingStrategy | None = None
        self.adapter: Mapping[str, Tensor] = evaluator.initial
        self.done = 0  # rounds
        self._good: tuple[int, Mapping[str, Tensor]] | None = None  # the last round that was evaluated, and its adapter

    def restore(self, before: Checkpoint) -> None:
        """Goes on from a checkpoint. Raises ValueError: it is of another model, or its state is none."""
        where = f"resume={self.settings.resume}"
        if before.adapter.keys() != self.adapter.keys():
            raise ValueError(f"{where}: its adapter is not that of model.path={self.settings.model.path}")
        self.adapter = {name: before.adapter[name] for name in self.adapter}  # strategies zip them by position
        self.done = before.server_round
        try:
            self.strategy.load_state(before.strategy)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: the state in its checkpoint cannot be read: {error!r}") from None

    def run(self) -> RunResults:
        """The rounds that remain."""
        federation = self.settings.federation
        started = "run_resumed" if self.done else "run_started"
        codec = self.settings.codec.name if self.settings.arm == "coded" else ""
        privacy = self.settings.privacy
        withheld = [what for what, kept in ((WHO, privacy.secret_sampling), (WORDS, privacy.protects)) if kept]
        self.journal.event(
            started,
            arm=self.settings.arm,
            codec=codec,
            rounds=federation.rounds,
            run_id=self.settings.run_id,
            **({"withheld": withheld} if withheld else {}),
        )
        places = call_roll(self.strategy.roll, self.journal.waiting, federation.min_clients)
        self.journal.event("nodes", count=len(places))
        self._rehearse()
        try:
            self._run_rounds()
        except Diverged as error:
            raise ValueError(self._kept(error)) from None
        self._write_results()
        report_on(self.results, self.evaluator, self.adapter)
        self.journal.event("run_finished", seconds=self.results.seconds)
        return self.results

    def _rehearse(self) -> None:
        """Round 1 follows no global update: a few steps of the server's own stand in for it."""
        settings, steps = self.settings, self.settings.federation.rehearsal_steps
        if self.done or not steps or settings.arm != "coded" or not entry_of(settings.codec.name).uses_last_update:
            return
        self.journal.event("rehearsing", steps=steps)
        started = time.monotonic()
        update = self.evaluator.rehearse(settings, steps)
        if update is not None:
            self.strategy.foresee(update)
            self.journal.event("rehearsed", steps=steps, seconds=time.monotonic() - started)

    def _write_results(self) -> None:
        """Raises ValueError: the disk is full or cannot be written; the last checkpoint holds all that is needed."""
        try:
            self.books.report(self.results)
            if self.recording is not None and self.settings.record is not None:
                self.recording.save(Path(self.settings.record))
            self._write_adapter(self.adapter)
            write_json(self.results.to_json(), self.output / "results.json")
        except (OSError, OutputError, SafetensorError) as error:
            raise ValueError(
                f"the results cannot be written to output={self.output}: {error}. Make room there, then "
                f"resume={self.output} writes them"
            ) from None

    def _write_adapter(self, adapter: Mapping[str, Tensor]) -> None:
        self.evaluator.save(adapter, self.results.facts(), self.output / "adapter", self.results.notes())

    def _run_rounds(self) -> None:
        """What a round gave is evaluated while the clients of the next one train: that is why the checkpoint before
        the last is kept."""
        for server_round in range(self.done + 1, self.settings.federation.rounds + 1):
            try:
                new = from_record(self._round(server_round))
            except BudgetSpentError as error:
                if not self.done:
                    raise
                self.results.ended_early = f"after round {self.done} of {self.settings.federation.rounds}: {error}"
                self.journal.event("budget_spent", server_round=self.done, reason=self.results.ended_early)
                break
            if not all(bool(tensor.isfinite().all()) for tensor in new.values()):
                raise Diverged(f"the adapter after round {server_round} holds NaN or infinity")
            self.adapter, self.done = new, server_round
            clients = range(self.settings.federation.num_clients)
            self.results.delivery_bytes.append(sum(map(self.strategy.broadcaster.missing_bytes, clients)))
            self.journal.round_finished(server_round, self.strategy.uplinks)
            self._save()
        self._evaluate()

    def _round(self, server_round: int) -> ArrayRecord:
        """The next adapter. A round that comes to nothing is tried again.

        Nodes need seconds to see a message and longer to train, and a simulation's last wave of clients leaves cores
        idle: meanwhile, what they start from is evaluated.

        Raises:
            RoundError: it came to nothing every time.
            BudgetSpentError: the privacy budget allows no such round.
        """
        federation, attempt = self.settings.federation, 0
        while True:
            spent = self.books.num_closed
            arrays, config = to_record(dict(self.adapter)), ConfigRecord({SETTINGS: self.settings.to_json()})
            try:
                messages = list(self.strategy.configure_train(server_round, arrays, config, self.grid))
                self.journal.round_started(server_round, len(messages))
                again = partial(self.strategy.again, server_round)
                replies = replies_to(self.grid, messages, federation.round_seconds, again)
                self._evaluate()
                new, _ = self.strategy.aggregate_train(server_round, replies)
            except DivergedError as error:  # of the step, as it was to be coded
                raise Diverged(f"the step of round {server_round} cannot be coded: {error}") from None
            except RoundError as error:
                failed = self.books.num_closed == spent  # else there are fewer to ask, and that ends by itself
                if failed and attempt == federation.retries:
                    raise RoundError(f"{error}; tried {attempt + 1} times (federation.retries={attempt})") from None
                attempt += failed
                log(WARNING, "%s; the round is tried again", error)
                continue
            assert new is not None
            return new

    def _evaluate(self) -> None:
        """Held-out loss after the last round that is done, unless it is known.

        Raises:
            Diverged: it is not finite, or worse by far than that of a model which knows nothing.
        """
        if len(self.results.heldout_loss) <= self.done:
            loss = self.evaluator.loss(self.adapter)
            if not loss <= self._limit():
                raise Diverged(f"the held-out loss after round {self.done} is {loss:.4g}")
            self.journal.evaluated(self.done, loss)
        self._good = self.done, self.adapter

    def _limit(self) -> float:
        """Twice the loss that guessing blindly has (ln of the vocabulary), or that the run began with."""
        if not self.results.heldout_loss:
            return sys.float_info.max
        vocabulary = self.evaluator.model.config.get_text_config().vocab_size
        return 2 * max(math.log(vocabulary), self.results.heldout_loss[0])

    def _save(self) -> None:
        """A checkpoint; where it cannot be written the run goes on, and the next round tries again."""
        checkpoint = Checkpoint(self.settings, self.done, dict(self.adapter), self.results, self.strategy.state())
        try:
            self.books.report(self.results)
            save_checkpoint(checkpoint, self.output)
        except OutputError as error:
            reason = f"no checkpoint of round {self.done} in output={self.output}: {error}"
            log(WARNING, "%s. The run goes on, and tries again after the next round: make room on that disk", reason)
            self.journal.event("checkpoint_failed", server_round=self.done, reason=reason)

    def _kept(self, error: Diverged) -> str:
        """Goes back to the last good round, writes its adapter, and says all this."""
        what = f"training diverged: {error}. Lower train.lr or strategy.lr"
        longest = sorted(self.strategy.uplinks, key=lambda uplink: -uplink.update_norm)[:3]
        if longest:
            norms = ", ".join(f"{uplink.update_norm:.3g} of partition {uplink.partition}" for uplink in longest)
            what += f"; the longest updates of the last round had norms {norms}"
        if self._good is None:
            return what
        good, adapter = self._good
        del self.results.heldout_loss[good + 1 :]
        self.results.uplinks = [uplink for uplink in self.results.uplinks if uplink.server_round <= good]
        self.results.downlinks = [downlink for downlink in self.results.downlinks if downlink.server_round <= good]
        del self.results.delivery_bytes[good:]
        if good > 0:
            go_back(self.output, good)
            what += f". resume={self.output} goes on from round {good}"
        self._write_adapter(adapter)
        return f"{what}. The adapter of round {good} is in {self.output / 'adapter'}"
