"""The arm ``centralised``: LoRA on the pooled data, as many steps as all clients of the federation take together.

Where ``train.epochs`` gives the clients different numbers of steps, their mean counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path

import torch

from adapters.finetune import DivergedError, descend, mean_gradients, trained_parts
from adapters.model import get_adapter, on_host, set_adapter
from adapters.settings import num_steps, round_factor
from adapters.windows import Windows
from conf.checks import check_settings
from conf.output import open_output, write_json
from conf.schema import Settings
from server.live.page import serve_page
from server.live.progress import shown
from server.live.tracking import tracked
from server.records.alive import alive
from server.records.events import EventLog
from server.records.results import RunResults
from server.run.best import best_round, enough
from server.run.evaluate import Evaluator
from server.run.finish import report_on


def run_alone(settings: Settings) -> RunResults:
    """Runs the arms without clients: ``base`` (evaluation only) and ``centralised`` (AdamW on the pooled D2).

    Raises:
        ValueError: a setting or file is not as the run needs it.
        DivergedError: training diverged; the results and the adapter of the last round with a finite held-out loss are
            written before.
    """
    check_settings(settings)
    output = open_output(Path(settings.output))
    with alive(output, settings.run_id):
        events = EventLog(output)
        with contextlib.ExitStack() as page, events.telling_failure():
            page.enter_context(serve_page(settings.federation.page_port, output))  # shut after a failure is told
            with shown(events), tracked(settings, events) as tracking:
                results = _run(settings, output, events)
                tracking.finish(results)
                return results


def _run(settings: Settings, output: Path, events: EventLog) -> RunResults:
    federation = settings.federation
    rounds = federation.rounds if settings.arm == "centralised" else 0
    events.write("run_started", arm=settings.arm, rounds=rounds, run_id=settings.run_id)
    evaluator = Evaluator(settings)
    results = RunResults(settings, sum(tensor.numel() for tensor in evaluator.initial.values()))
    start = time.monotonic()
    results.heldout_loss.append(evaluator.loss(evaluator.initial))
    events.write("evaluated", server_round=0, heldout_loss=results.heldout_loss[0])
    pooled = _Pooled(evaluator, results, events)
    diverged: DivergedError | None = None
    if settings.arm == "centralised":
        try:
            pooled.train(settings)
        except DivergedError as error:
            diverged = error
    results.seconds = time.monotonic() - start
    if settings.arm == "centralised" and federation.keep_best:
        results.adapter_round = best_round(results.deciding_losses)
    last = len(results.heldout_loss) - 1 if results.adapter_round is None else results.adapter_round
    kept = f"after round {last} of {federation.rounds}"
    facts = results.facts() | ({"diverged": f"this adapter is that {kept}"} if diverged is not None else {})
    evaluator.save(pooled.adapter, facts, output / "adapter", results.notes())
    write_json(results.to_json(), output / "results.json")
    report_on(results, evaluator, pooled.adapter)
    if diverged is not None:
        raise DivergedError(f"{diverged}; the adapter {kept} and the results until then are in {output}")
    events.write("run_finished", seconds=results.seconds)
    return results


class _Enough(Exception):
    """Patience is at its end."""


class _Pooled:
    """Training on the data of all clients at once; ``adapter`` is that of the last round with a finite loss, or of the
    best one."""

    def __init__(self, evaluator: Evaluator, results: RunResults, events: EventLog) -> None:
        self.adapter = evaluator.initial
        self._evaluator = evaluator
        self._results = results
        self._events = events

    def train(self, settings: Settings) -> None:
        """All rounds. Raises DivergedError: a loss is not finite."""
        federation, shards = settings.federation, self._evaluator.shards
        steps = [num_steps(settings.train, len(shard.train)) for shard in shards]
        steps_a_round = round(federation.clients_per_round * sum(steps) / len(steps))
        lr = settings.train.lr if settings.train.update == "delta" else settings.strategy.lr
        training = dataclasses.replace(
            settings.train,
            update="delta",
            lr=lr,
            steps=steps_a_round * federation.rounds,
            epochs=None,
            proximal_mu=0.0,  # there is nobody to hold together
        )
        torch.set_num_threads(os.cpu_count() or 1)  # alone on the machine
        self._events.write("round_started", server_round=1, clients=0)

        def on_step(step: int) -> None:
            if step % steps_a_round == 0:
                self._round_done(step // steps_a_round)

        def factor(step: int) -> float:
            return round_factor(training, step // steps_a_round + 1, federation.rounds)

        model, pooled = self._evaluator.model, Windows.cat([shard.train for shard in shards])
        set_adapter(model, self.adapter)
        gradients = mean_gradients(model, pooled, training, settings.seed)
        try:
            descend(trained_parts(model), gradients, training, training.steps, settings.seed, on_step, factor)
        except _Enough as end:
            done = len(self._results.heldout_loss) - 1
            self._results.ended_early = f"after round {done} of {federation.rounds}: {end}"
            self._events.write("ended_early", server_round=done, reason=self._results.ended_early)

    def _round_done(self, server_round: int) -> None:
        loss = self._evaluator.loss_as_it_is()
        if not math.isfinite(loss):
            raise DivergedError(f"training diverged: the held-out loss is {loss} after round {server_round}")
        federation = self._results.settings.federation
        self._results.heldout_loss.append(loss)
        if not federation.keep_best or best_round(self._results.deciding_losses) == server_round:
            self.adapter = on_host(get_adapter(self._evaluator.model))
        self._events.write("round_finished", server_round=server_round)
        self._events.write("evaluated", server_round=server_round, heldout_loss=loss)
        why = enough(self._results.deciding_losses, federation.patience, federation.min_improvement)
        if why is not None and server_round < federation.rounds:
            raise _Enough(why)
