"""One federated run: settings in, results out. Puts its parts together and starts it. Runs inside a ServerApp.

``rounds.py`` has the loop; docs/rounds.md draws how the parts of a round hang together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from adapters.settings import num_examples, start_is_known
from conf.basis import codecs_of
from conf.checks import check_settings
from conf.output import open_output
from conf.remedies import TRAIN_ONE, codec_remedies
from conf.schema import NONE, Settings
from conf.sums import terms_of
from gradcodec.artifact import load_artifact
from gradcodec.build import artifact_folder, broadcast_budget, byte_budget
from gradcodec.delivery import Delivery
from gradcodec.errors import BudgetError
from gradcodec.intake import Intake
from gradcodec.layout import Layout
from gradcodec.registry import entry_of
from gradcodec.rounds import codec_at
from gradcodec.sums import SumIntake
from gradcodec.trial import check_budgets
from privacy.secagg import least_stay
from server.live.metrics import serve_metrics
from server.live.page import serve_page
from server.live.progress import shown
from server.live.tracking import tracked
from server.records.account import NOTHING, CodecCost
from server.records.alive import alive
from server.records.events import EventLog
from server.records.results import RunResults
from server.run.checkpoint import Checkpoint, go_back, load_checkpoint
from server.run.evaluate import Evaluator
from server.run.journal import Journal
from server.run.outline import Outline
from server.run.private import Books
from server.run.rounds import Federation
from strategies.broadcast import CodedBroadcaster, DenseBroadcaster
from strategies.build import build_inner, proximal_mu_of
from strategies.coded import CodedReceiver
from strategies.dense import DenseReceiver
from strategies.federated import FederatedStrategy, Limits, Ways
from strategies.norms import NormBound
from strategies.recording import RecordingStrategy
from strategies.roll import Roll
from strategies.sampling import Sampling
from strategies.secure import SecureStrategy, SumReceiver
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
        with (
            shown(events),
            serve_metrics(settings.federation.metrics_port, events),
            tracked(settings, events, before.server_round if before is not None else 0) as tracking,
        ):
            results = prepare(grid, settings, events, before, bound).run()
            tracking.finish(results)
            return results


def prepare(
    grid: Grid,
    settings: Settings,
    events: EventLog,
    before: Checkpoint | None = None,
    bound: Mapping[int, int] | None = None,
) -> Federation:
    """Loads model and data, and puts the parts of a run together; nobody has been asked anything yet."""

    def root(server_round: int, adapter: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert isinstance(evaluator, Evaluator), "check_settings refuses this"
        return evaluator.root_update(settings, server_round, adapter)

    inner = build_inner(settings.strategy, root)  # first, as a plug-in may refuse its settings
    if (asked := proximal_mu_of(inner)) != 0.0 and asked != settings.train.proximal_mu:
        raise ValueError(
            f"strategy.name={settings.strategy.name} asks clients for a proximal term of {asked:g}, and they take it "
            f"from train.proximal_mu={settings.train.proximal_mu:g} alone: give train.proximal_mu={asked:g}"
        )
    codec_cost = NOTHING
    if settings.arm == "coded" and entry_of(settings.codec.name).needs_artifact:
        with codec_remedies(TRAIN_ONE):
            artifact = load_artifact(artifact_folder(settings.codec), settings.codec.name)
            settings.codec.digest = artifact.digest
        codec_cost = CodecCost.of(settings.codec.artifact)
    evaluator = Outline(settings) if settings.server.base == NONE else Evaluator(settings)
    layout = evaluator.layout
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


def _ways(settings: Settings, layout: Layout, evaluator: Outline, books: Books) -> Ways:
    if settings.arm != "coded":
        return Ways(DenseBroadcaster(), DenseReceiver())
    with codec_remedies(TRAIN_ONE):
        codecs = codecs_of(settings, layout, evaluator.seeded, evaluator.device)
    try:
        check_budgets(settings.codec, codecs.at(evaluator.seeded), evaluator.device)
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
    budget, known = broadcast_budget(settings.codec, layout), start_is_known(settings.lora)
    delivery = Delivery(
        codec_at(codecs, layout), layout, evaluator.initial, settings.run_id, budget, clients, start_is_known=known
    )
    return Ways(CodedBroadcaster(delivery), receiver)
