"""One federated run, from the roll call to the last round: settings in, results out. Runs inside a ServerApp."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from adapters.finetune import num_examples
from conf.output import open_output, write_json
from conf.schema import Settings, check_settings
from gradcodec.artifact import load_artifact
from gradcodec.build import TRAINED, build_codec
from gradcodec.layout import Layout
from server.evaluate import Evaluator
from server.progress import bytes_text, progress_bar
from server.results import RunResults
from strategies.build import build_inner
from strategies.coded import CodedStrategy
from strategies.dense import DenseStrategy
from strategies.ledger import LedgerStrategy, Uplink
from strategies.recording import RecordingStrategy
from strategies.records import SETTINGS, from_record, to_record
from strategies.sampling import SeededStrategy, call_roll


def run_federation(grid: Grid, settings: Settings) -> RunResults:
    """Runs all rounds and writes ``results.json`` and the final adapter into ``settings.output``.

    Raises:
        ValueError: a setting, a file or a node is not as the run needs it; the message says which.
    """
    check_settings(settings)
    output = open_output(Path(settings.output))
    if settings.arm == "coded" and settings.codec.name in TRAINED:
        assert settings.codec.artifact is not None
        settings.codec.digest = load_artifact(Path(settings.codec.artifact), settings.codec.name).digest
    evaluator = Evaluator(settings)
    layout = Layout.of({name: tuple(tensor.shape) for name, tensor in evaluator.initial.items()})
    results = RunResults(settings, layout.num_parameters)
    if settings.record is not None:
        open_output(Path(settings.record).parent)
    uplinks = output / "uplinks.jsonl"
    for old in (uplinks, output / "results.json"):  # of an earlier run in the same folder
        old.unlink(missing_ok=True)
    start = time.monotonic()
    federation = settings.federation
    config = ConfigRecord({SETTINGS: settings.to_json()})
    with progress_bar() as progress:
        bar = progress.add_task("waiting for clients", total=federation.rounds * federation.clients_per_round, note="")

        def waiting(num_nodes: int) -> None:
            progress.update(bar, description=f"waiting for clients: {num_nodes} of {federation.num_clients}")

        def on_uplink(uplink: Uplink) -> None:
            results.uplinks.append(uplink)
            with uplinks.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(uplink)) + "\n")
            progress.update(bar, advance=1)

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            loss = evaluator.loss(from_record(arrays))
            results.heldout_loss.append(loss)
            sent = f"{bytes_text(results.payload_bytes_per_client_round)} a client and round, " if server_round else ""
            progress.update(bar, description=f"{settings.arm}, round {server_round}", note=f"{sent}loss {loss:.3f}")
            return MetricRecord({"heldout-loss": loss})

        roster = call_roll(grid, federation.num_clients, config, federation.wait_seconds, waiting)
        inner = build_inner(settings.strategy)
        recording = RecordingStrategy(inner) if settings.record is not None else None
        if settings.arm == "coded":
            receiving: Strategy = CodedStrategy(inner, build_codec(settings.codec, layout))
        else:
            receiving = DenseStrategy(recording or inner)
        ledger = LedgerStrategy(receiving, on_uplink)
        strategy = SeededStrategy(
            ledger, roster, federation.clients_per_round, settings.seed, num_examples(settings.train)
        )
        final = strategy.start(
            grid,
            to_record(evaluator.initial),
            num_rounds=federation.rounds,
            timeout=federation.round_seconds,
            train_config=config,
            evaluate_fn=evaluate,
        )
    if recording is not None and settings.record is not None:
        recording.save(Path(settings.record))
    results.seconds = time.monotonic() - start
    evaluator.save(from_record(final.arrays), output / "adapter")
    write_json(results.to_json(), output / "results.json")
    return results
