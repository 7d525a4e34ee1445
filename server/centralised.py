"""The arm ``centralised``: LoRA on the pooled data, as many steps as all clients of the federation take together.

Where ``train.epochs`` gives the clients different numbers of steps, their mean counts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from pathlib import Path

import torch

from adapters.finetune import DivergedError, Windows, finetune
from adapters.model import get_adapter, on_host
from adapters.settings import num_steps
from conf.output import open_output, write_json
from conf.schema import Settings, check_settings
from server.evaluate import Evaluator
from server.progress import progress_bar
from server.results import RunResults


def run_alone(settings: Settings) -> RunResults:
    """Runs the arms without clients: ``base`` (evaluation only) and ``centralised`` (AdamW on the pooled D2).

    Raises:
        ValueError: a setting or file is not as the run needs it.
        DivergedError: training diverged; the results and the adapter of the last round with a finite held-out loss are
            written before.
    """
    check_settings(settings)
    output = open_output(Path(settings.output))
    evaluator = Evaluator(settings)
    num_parameters = sum(tensor.numel() for tensor in evaluator.initial.values())
    results = RunResults(settings, num_parameters)
    start = time.monotonic()
    results.heldout_loss.append(evaluator.loss(evaluator.initial))
    adapter, diverged = evaluator.initial, None
    if settings.arm == "centralised":
        federation = settings.federation
        pooled = Windows.cat([shard.train for shard in evaluator.shards])
        steps = [num_steps(settings.train, len(shard.train)) for shard in evaluator.shards]
        steps_a_round = round(federation.clients_per_round * sum(steps) / len(steps))
        lr = settings.train.lr if settings.train.update == "delta" else settings.strategy.lr
        training = dataclasses.replace(
            settings.train, update="delta", lr=lr, steps=steps_a_round * federation.rounds, epochs=None
        )
        torch.set_num_threads(os.cpu_count() or 1)  # alone on the machine
        with progress_bar() as progress:
            bar = progress.add_task("centralised", total=training.steps, note="")

            def on_step(step: int) -> None:
                progress.update(bar, advance=1)
                nonlocal adapter
                if step % steps_a_round == 0:
                    loss = evaluator.loss_as_it_is()
                    if not math.isfinite(loss):
                        raise DivergedError(f"training diverged: the held-out loss is {loss} after step {step}")
                    results.heldout_loss.append(loss)
                    adapter = on_host(get_adapter(evaluator.model))
                    progress.update(bar, note=f"loss {results.heldout_loss[-1]:.3f}")

            try:
                finetune(evaluator.model, evaluator.initial, pooled, training, settings.seed, on_step)
            except DivergedError as error:
                diverged = error
    results.seconds = time.monotonic() - start
    kept = f"after round {len(results.heldout_loss) - 1} of {settings.federation.rounds}"
    facts = results.facts() | ({"diverged": f"this adapter is that {kept}"} if diverged is not None else {})
    evaluator.save(adapter, facts, output / "adapter")
    write_json(results.to_json(), output / "results.json")
    if diverged is not None:
        raise DivergedError(f"{diverged}; the adapter {kept} and the results until then are in {output}")
    return results
