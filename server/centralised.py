"""The arm ``centralised``: LoRA on the pooled data, as many steps as all clients of the federation take together.

Where ``train.epochs`` gives the clients different numbers of steps, their mean counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path

import torch

from adapters.finetune import Windows, finetune
from adapters.model import add, on_host
from adapters.settings import num_steps
from conf.output import OutputError, open_output, write_json
from conf.schema import Settings, check_settings
from server.alive import alive
from server.evaluate import Evaluator
from server.events import EventLog
from server.progress import shown
from server.results import RunResults


def run_alone(settings: Settings) -> RunResults:
    """Runs the arms without clients: ``base`` (evaluation only) and ``centralised`` (AdamW on the pooled D2).

    Raises:
        ValueError: a setting or file is not as the run needs it.
    """
    check_settings(settings)
    output = open_output(Path(settings.output))
    with alive(output, settings.run_id):
        events = EventLog(output)
        try:
            with shown(events):
                return _run(settings, output, events)
        except Exception as error:
            with contextlib.suppress(OutputError):  # a full disk, which is what the error says
                events.write("run_failed", reason=str(error) if isinstance(error, ValueError) else repr(error))
            raise


def _run(settings: Settings, output: Path, events: EventLog) -> RunResults:
    federation = settings.federation
    rounds = federation.rounds if settings.arm == "centralised" else 0
    events.write("run_started", arm=settings.arm, rounds=rounds, run_id=settings.run_id)
    evaluator = Evaluator(settings)
    num_parameters = sum(tensor.numel() for tensor in evaluator.initial.values())
    results = RunResults(settings, num_parameters)
    start = time.monotonic()
    results.heldout_loss.append(evaluator.loss(evaluator.initial))
    events.write("evaluated", server_round=0, heldout_loss=results.heldout_loss[0])
    adapter = evaluator.initial
    if settings.arm == "centralised":
        pooled = Windows.cat([shard.train for shard in evaluator.shards])
        steps = [num_steps(settings.train, len(shard.train)) for shard in evaluator.shards]
        steps_a_round = round(federation.clients_per_round * sum(steps) / len(steps))
        lr = settings.train.lr if settings.train.update == "delta" else settings.strategy.lr
        training = dataclasses.replace(
            settings.train, update="delta", lr=lr, steps=steps_a_round * federation.rounds, epochs=None
        )
        torch.set_num_threads(os.cpu_count() or 1)  # alone on the machine
        events.write("round_started", server_round=1, clients=0, bytes_down=0)

        def on_step(step: int) -> None:
            if step % steps_a_round == 0:
                done = step // steps_a_round
                results.heldout_loss.append(evaluator.loss_as_it_is())
                events.write("round_finished", server_round=done)
                events.write("evaluated", server_round=done, heldout_loss=results.heldout_loss[-1])

        update, _ = finetune(evaluator.model, adapter, pooled, training, settings.seed, on_step)
        adapter = add(adapter, on_host(update))
    results.seconds = time.monotonic() - start
    evaluator.save(adapter, results.facts(), output / "adapter")
    write_json(results.to_json(), output / "results.json")
    events.write("run_finished", seconds=results.seconds)
    return results
