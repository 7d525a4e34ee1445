"""The rounds of a federated run, from the roll call to the last one, and what the run holds between them.

``federation.py`` puts its parts together; docs/rounds.md draws how those of a round hang together.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import partial
from logging import WARNING
from pathlib import Path
from statistics import median

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.supercore import log
from safetensors import SafetensorError
from torch import Tensor

from conf.output import OutputError, write_json
from conf.schema import Settings
from gradcodec.errors import DivergedError
from gradcodec.registry import entry_of
from privacy.errors import BudgetSpentError
from server.records.events import WHO, WORDS
from server.records.results import RunResults
from server.run.best import best_round, enough
from server.run.checkpoint import Checkpoint, go_back, save_checkpoint
from server.run.evaluate import Evaluator
from server.run.finish import report_on
from server.run.journal import Journal
from server.run.outline import Outline
from server.run.private import Books
from strategies.errors import RoundError
from strategies.evaluation import Bounds, Evaluation, panel
from strategies.federated import FederatedStrategy
from strategies.messages import replies_to
from strategies.recording import RecordingStrategy
from strategies.roll import call_roll
from strategies.tensors import from_record, to_record
from strategies.wire import SETTINGS


def _evaluation(settings: Settings, strategy: FederatedStrategy) -> Evaluation:
    federation, task = settings.federation, settings.task
    clients = panel(federation.num_clients, federation.evaluate_clients, settings.seed)
    bounds = Bounds(task.heldout_windows, task.window)
    return Evaluation(strategy.roll.grid, strategy.roll, strategy.broadcaster, clients, bounds)


class Diverged(ValueError):
    """An adapter that no round may start from."""


class Federation:
    """What a run holds between its rounds."""

    def __init__(
        self,
        grid: Grid,
        settings: Settings,
        evaluator: Outline,
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
        self.evaluation = _evaluation(settings, strategy)
        self._asked_after = -1  # the round whose adapter the nodes were last asked about
        self.best: Mapping[str, Tensor] | None = None  # adapter of the round with the lowest loss, where it is wanted
        self._good: tuple[int, Mapping[str, Tensor]] | None = None  # the last round that was evaluated, and its adapter

    def restore(self, before: Checkpoint) -> None:
        """Goes on from a checkpoint. Raises ValueError: it is of another model, or its state is none."""
        where = f"resume={self.settings.resume}"
        if any(one.keys() != self.adapter.keys() for one in (before.adapter, before.best) if one is not None):
            raise ValueError(f"{where}: its adapter is not that of model.path={self.settings.model.path}")
        self.best = before.best
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
            base=self.settings.server.base,
            **({"withheld": withheld} if withheld else {}),
        )
        places = call_roll(self.strategy.roll, self.journal.waiting, federation.min_clients)
        self.journal.event("nodes", count=len(places))
        self._rehearse()
        try:
            self._run_rounds()
        except Diverged as error:
            raise ValueError(self._reported(self._kept(error))) from None
        except ValueError as error:
            self._reported(str(error))
            raise
        self._write_results()
        report_on(self.results, self.evaluator, self.adapter)
        self.journal.event("run_finished", seconds=self.results.seconds)
        return self.results

    def _rehearse(self) -> None:
        """Round 1 follows no global update: a few steps of the server's own stand in for it."""
        settings, steps, evaluator = self.settings, self.settings.federation.rehearsal_steps, self.evaluator
        if not isinstance(evaluator, Evaluator):
            return
        if self.done or not steps or settings.arm != "coded" or not entry_of(settings.codec.name).uses_last_update:
            return
        self.journal.event("rehearsing", steps=steps)
        started = time.monotonic()
        update = evaluator.rehearse(settings, steps)
        if update is not None:
            self.strategy.foresee(update)
            self.journal.event("rehearsed", steps=steps, seconds=time.monotonic() - started)

    def _write_results(self) -> None:
        """Raises ValueError: the disk is full or cannot be written; the last checkpoint holds all that is needed."""
        try:
            self.books.report(self.results)
            if self.recording is not None and self.settings.record is not None:
                self.recording.save(Path(self.settings.record))
            self._write_final(self.adapter)
            write_json(self.results.to_json(), self.output / "results.json")
        except (OSError, OutputError, SafetensorError) as error:
            raise ValueError(
                f"the results cannot be written to output={self.output}: {error}. Make room there, then "
                f"resume={self.output} writes them"
            ) from None

    def _write_final(self, last: Mapping[str, Tensor]) -> None:
        """The best adapter, if it is to be kept, or the last one."""
        adapter = last
        if self.best is not None and self.results.deciding_losses:
            self.results.adapter_round, adapter = best_round(self.results.deciding_losses), self.best
        self.evaluator.save(adapter, self.results.facts(), self.output / "adapter", self.results.notes())

    def _run_rounds(self) -> None:
        """What a round gave is evaluated while the clients of the next one train: that is why the checkpoint before
        the last is kept. Nodes are asked in between, when they have nothing else to do."""
        self._ask_nodes()
        for server_round in range(self.done + 1, self.settings.federation.rounds + 1):
            if self._has_enough():
                break
            try:
                new = from_record(self._round(server_round))
            except BudgetSpentError as error:
                if not self.done:
                    raise
                self._end_early("budget_spent", str(error))
                break
            if not all(bool(tensor.isfinite().all()) for tensor in new.values()):
                raise Diverged(f"the adapter after round {server_round} holds NaN or infinity")
            self._check_training(server_round)
            self.adapter, self.done = new, server_round
            self.results.delivery_bytes.append(self._missing_bytes())
            self.journal.round_finished(server_round, self.strategy.uplinks)
            self._save()
            self._ask_nodes()
        self._evaluate()
        self._ask_nodes(is_last=True)

    def _has_enough(self) -> bool:
        """Whether patience is at its end: to know it, the last round is evaluated before the next one begins."""
        federation = self.settings.federation
        if federation.patience is None:
            return False
        self._evaluate()
        why = enough(self.results.deciding_losses, federation.patience, federation.min_improvement)
        if why is not None:
            self._end_early("ended_early", why)
        return why is not None

    def _end_early(self, event: str, why: str) -> None:
        self.results.ended_early = f"after round {self.done} of {self.settings.federation.rounds}: {why}"
        self.journal.event(event, server_round=self.done, reason=self.results.ended_early)

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
        """Held-out loss after the last round that is done, unless it is known, or the server holds no base model.

        Raises:
            Diverged: it is not finite, or worse by far than that of a model which knows nothing.
        """
        if not isinstance(self.evaluator, Evaluator):
            return
        if len(self.results.heldout_loss) <= self.done:
            loss = self.evaluator.loss(self.adapter)
            if not loss <= self._limit():
                raise Diverged(f"the held-out loss after round {self.done} is {loss:.4g}")
            self.journal.evaluated(self.done, loss)
            self._keep_best()
        self._good = self.done, self.adapter

    def _ask_nodes(self, is_last: bool = False) -> None:
        """What the nodes lose with the last round's adapter, where that is due; meanwhile the server evaluates itself.

        Too few answers are said, and cost nothing else.

        Raises:
            Diverged: as ``_evaluate``; of a server without base model, by the median node, which one that lies is not.
        """
        every, done = self.settings.federation.evaluate_every, self.done
        is_last = is_last or done >= self.settings.federation.rounds
        if not every or self._asked_after == done or (done % every and not is_last):
            return
        self._asked_after, seconds = done, self.settings.federation.round_seconds
        poll = self.evaluation.ask(done, self.adapter, self.settings.to_json(), seconds, self.journal)
        if isinstance(self.evaluator, Evaluator):
            self._evaluate()
        losses = poll.losses()
        needed = max(1, min(self.settings.federation.min_replies, len(self.evaluation.clients)))
        if len(losses) < needed:
            said = "the adapter after round %s has no loss on the nodes: %s of %s answered, and it takes %s"
            log(WARNING, said, done, len(losses), len(poll.nodes), needed)
            losses = []
        if not isinstance(self.evaluator, Evaluator):
            self._check_median([one.loss for one in losses], f"loss on the nodes after round {done}")
            self._good = (done, self.adapter) if losses else self._good
        if done:  # those that answered hold it
            self.results.delivery_bytes[-1] = self._missing_bytes()
        self.journal.evaluated_on_nodes(done, len(poll.nodes), losses)
        self._keep_best()

    def _keep_best(self) -> None:
        """The adapter whose loss became known, if there was no better one."""
        losses = self.results.deciding_losses
        if self.settings.federation.keep_best and losses and best_round(losses) == self.done:
            self.best = self.adapter

    def _missing_bytes(self) -> int:
        """What would bring every client to the last round's adapter."""
        return sum(map(self.strategy.broadcaster.missing_bytes, range(self.settings.federation.num_clients)))

    def _check_training(self, server_round: int) -> None:
        """A server without base model sees by its clients' training losses whether what they started from was sane.

        Raises:
            Diverged: it was not. Nothing of the round is kept yet, nor was the checkpoint before that adapter's lost.
        """
        if isinstance(self.evaluator, Evaluator):
            return
        losses = [one.train_loss for one in self.strategy.uplinks if one.train_loss is not None]
        self._check_median(losses, f"training loss in round {server_round}")
        self._good = self.done, self.adapter

    def _check_median(self, losses: list[float], what: str) -> None:
        """Clients' word, of which a few may lie: their median counts. Raises Diverged: it is too large."""
        if losses and not median(losses) <= self._limit():
            raise Diverged(f"the median client's {what} is {median(losses):.4g}")

    def _limit(self) -> float:
        """Twice the loss that guessing blindly has (ln of the vocabulary), or that the run began with."""
        first = self.results.deciding_losses.get(0)
        if first is None:  # of a server without base model: what its clients' first training had
            trained = [u.train_loss for u in self.results.uplinks if u.server_round == 1 and u.train_loss is not None]
            first = median(trained) if trained else None
        return sys.float_info.max if first is None else 2 * max(self.evaluator.blind_loss, first)

    def _save(self) -> None:
        """A checkpoint; where it cannot be written the run goes on, and the next round tries again."""
        best = None if self.best is None else dict(self.best)
        checkpoint = Checkpoint(self.settings, self.done, dict(self.adapter), self.results, self.strategy.state(), best)
        try:
            self.books.report(self.results)
            save_checkpoint(checkpoint, self.output)
        except OutputError as error:
            reason = f"no checkpoint of round {self.done} in output={self.output}: {error}"
            log(WARNING, "%s. The run goes on, and tries again after the next round: make room on that disk", reason)
            self.journal.event("checkpoint_failed", server_round=self.done, reason=reason)

    def _reported(self, reason: str) -> str:
        """What a run that fails leaves to read, if it has done any rounds; gives the reason."""
        self.results.failed = reason
        if self.results.rounds_done:
            report_on(self.results)
        return reason

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
        self.results.node_losses = [one for one in self.results.node_losses if one.server_round <= good]
        self.results.uplinks = [uplink for uplink in self.results.uplinks if uplink.server_round <= good]
        self.results.downlinks = [downlink for downlink in self.results.downlinks if downlink.server_round <= good]
        del self.results.delivery_bytes[good:]
        if good > 0:
            go_back(self.output, good)
            what += f". resume={self.output} goes on from round {good}"
        self._write_final(adapter)
        kept = good if self.results.adapter_round is None else self.results.adapter_round
        return f"{what}. The adapter of round {kept} is in {self.output / 'adapter'}"
