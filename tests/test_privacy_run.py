"""Federations with differential privacy, on an in-process Grid over the real ClientApp: what is counted, noised and
withheld, and what a run says of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import InProcessGrid
from flwr.app import Message
from scipy import stats
from test_federation import run, settings_for

import client.private as private
import client.trainer as trainer
from client.app import app as client_app
from conf.checks import check_settings
from conf.schema import Settings
from gradcodec.client import ClientEnd
from gradcodec.exchange import decode_blocks
from gradcodec.transfers import context_of
from privacy.accounting import Release, epsilon_of
from privacy.errors import BudgetSpentError, PrivacyError
from privacy.ledger import Ledger
from privacy.mechanism import clipped
from server.federate import resumed
from server.run.federation import run_federation
from server.run.private import LEDGER, REPORT, promise
from strategies.sampling import Sampling
from strategies.wire import METRICS, NUM_EXAMPLES, SERVER_ROUND, TRAIN_LOSS


def private_settings(folder: Path, run: str, kind: str = "client_dp", **changes: object) -> Settings:
    settings = settings_for(folder, run, arm="dense")
    settings.privacy.name = kind
    for key, value in changes.items():
        setattr(settings.privacy, key, value)
    return settings


class Watched(InProcessGrid):
    """Keeps what the clients sent."""

    replies: ClassVar[list[Message]] = []

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Watched.replies = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        Watched.replies += [reply for reply in replies if reply.has_content()]
        return replies


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Every update before the noise and behind it."""
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    true = private.Guard.hidden

    def watched(guard: private.Guard, update: Any, secret: bytes) -> dict[str, torch.Tensor]:
        hidden = true(guard, update, secret)
        seen.append((clipped(update, guard.settings.clip), hidden))
        return hidden

    monkeypatch.setattr(private.Guard, "hidden", watched)
    return seen


def values(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).double()


def test_the_noise_is_as_stated_on_every_message(
    tmp_path: Path, noises: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]
) -> None:
    """Variance and independence at 99.9 % confidence each, on all messages of a run and of its resume."""
    settings = private_settings(tmp_path, "run", clip=0.5, epsilon=4.0)
    settings.federation.rounds = 2
    run(settings, tmp_path)
    settings = resumed(tmp_path / "run", ["federation.rounds=3"])
    run(settings, tmp_path)
    drawn = [values(behind) - values(before) for before, behind in noises]
    assert len(drawn) == 6
    assert settings.privacy.noise_multiplier is not None
    deviation = settings.privacy.clip * settings.privacy.noise_multiplier
    for noise in drawn:
        low, high = stats.chi2.interval(0.999, len(noise))
        assert low < float((noise / deviation).square().sum()) < high
        assert stats.kstest((noise / deviation).numpy()[:20_000], "norm").pvalue > 0.001
    correlations = np.corrcoef(torch.stack(drawn).numpy())
    bound = stats.norm.ppf(1 - 0.0005 / 15) / len(drawn[0]) ** 0.5
    assert np.abs(correlations - np.eye(6)).max() < bound


def test_a_run_counts_and_says_what_it_releases(tmp_path: Path) -> None:
    settings = private_settings(tmp_path, "run", epsilon=8.0)
    results = run(settings, tmp_path, Watched)
    report = json.loads((tmp_path / "run" / REPORT).read_text())
    assert report == json.loads((tmp_path / "run" / "results.json").read_text())["privacy"] == results.privacy
    times = report["releases"]
    assert sum(times.values()) == 6 and report["releases_most"] == max(times.values())
    assert report["epsilon"] <= 8.0
    assert report["epsilon"] == pytest.approx(
        epsilon_of(Release(report["noise_multiplier"]), report["releases_most"], 1e-5)
    )
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "## Privacy" in card and "Differential privacy" in card and f"epsilon = {report['epsilon']:.4g}" in card
    for partition, count in times.items():  # the nodes' own counts are the same
        (own,) = (tmp_path / "memory").rglob(f"privacy-{partition}.json")
        assert json.loads(own.read_text())["releases"] == {partition: count}
    metrics = [reply.content.metric_records[METRICS] for reply in Watched.replies if METRICS in reply.content]
    trained = [metric for metric in metrics if NUM_EXAMPLES in metric]
    assert len(trained) == 6 and all(TRAIN_LOSS not in one and one[NUM_EXAMPLES] == 1 for one in trained)


def test_without_privacy_the_card_says_so(tmp_path: Path) -> None:
    run(settings_for(tmp_path, "run", arm="dense"), tmp_path)
    assert "No differential privacy" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_the_run_ends_when_the_budget_is_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the dry run has said."""
    settings = private_settings(tmp_path, "run", noise_multiplier=3.0, epsilon=2.0, clip=0.1)
    settings.federation.rounds = 9
    said = promise(settings, None)
    results = run(settings, tmp_path)
    done = len(results.heldout_loss) - 1
    assert f"THE BUDGET IS SPENT AFTER ROUND {done} of 9" in said and 0 < done < 9
    assert results.ended_early.startswith(f"after round {done} of 9")
    assert max(results.privacy["releases"].values()) == results.privacy["releases_allowed"]
    assert results.privacy["epsilon"] <= 2.0
    assert "ended early" in results.facts()
    again = resumed(tmp_path / "run", ["federation.rounds=20"])
    assert len(run(again, tmp_path).heldout_loss) == done + 1  # nothing is left for a resume either


def test_what_was_lost_counts(tmp_path: Path) -> None:
    """A server that dies within a round has spent it, whatever its checkpoint says."""

    class Dies(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            for reply in replies:
                if reply.has_content() and reply.content.metric_records[METRICS].get(SERVER_ROUND) == 2:
                    raise KeyboardInterrupt
            return replies

    settings = private_settings(tmp_path, "run", noise_multiplier=20.0, clip=1e-3)
    settings.federation.clients_per_round = settings.federation.num_clients
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path, Dies)
    results = run(resumed(tmp_path / "run", []), tmp_path)
    assert results.privacy["releases"] == {"0": 4, "1": 4, "2": 4}  # three rounds and the one that was lost
    assert results.privacy["rounds"] == 4


def test_a_resume_without_its_count_is_refused(tmp_path: Path) -> None:
    settings = private_settings(tmp_path, "run")
    run(settings, tmp_path)
    (tmp_path / "run" / LEDGER).write_text("{}")
    with pytest.raises(PrivacyError, match="nobody knows what this run has released"):
        run(resumed(tmp_path / "run", ["federation.rounds=4"]), tmp_path)


def test_a_node_keeps_its_own_count(tmp_path: Path) -> None:
    """A server that forgets what it asked for gets no more than the budget."""
    settings = private_settings(tmp_path, "run", releases=2)
    guard = private.Guard(settings_with_noise(settings), 10, tmp_path, 0)
    guard.spend(1, b"first")
    guard.spend(1, b"first")  # the same answer once more
    guard.spend(2, b"second")
    with pytest.raises(BudgetSpentError, match="it has answered 2 times"):
        private.Guard(settings_with_noise(settings), 10, tmp_path, 0).spend(1, b"third")
    (tmp_path / "privacy-0.json").write_text("?")
    with pytest.raises(PrivacyError, match="nobody knows"):
        private.Guard(settings_with_noise(settings), 10, tmp_path, 0)


def settings_with_noise(settings: Settings) -> Settings:
    settings.privacy.noise_multiplier = 5.0
    return settings


def test_residuals_hold_nothing_without_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What error feedback carries over is a function of noised updates alone: payload and residual add up to the noised
    update and the residual before, to rounding."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    true = ClientEnd.encode

    def watched(end: Any, update: Any, memory: Any, place: Any, codec: Any) -> bytes:
        payload = true(end, update, memory, place, codec)
        residual = memory.load_residual(end.layout, place.server_round + 1)
        context = context_of(end.run_id, place.server_round, place.client)
        decoded = decode_blocks(payload, codec=codec, side=place.side, context=context)
        seen.append((end.layout.to_blocks(update), decoded + residual.error_RC))
        return payload

    monkeypatch.setattr(ClientEnd, "encode", watched)
    settings = private_settings(tmp_path, "run", epsilon=8.0)
    settings.arm, settings.codec.name, settings.federation.rounds = "coded", "rotated", 1
    run(settings, tmp_path)
    for noised, kept in seen:
        torch.testing.assert_close(noised, kept, rtol=1e-4, atol=1e-5)


def test_record_level_runs_and_settles_its_own_noise(tmp_path: Path) -> None:
    settings = private_settings(tmp_path, "run", kind="record_dp", epsilon=8.0, clip=0.5, accountant="rdp")
    results = run(settings, tmp_path)
    assert len(results.heldout_loss) == 4
    own = [json.loads(path.read_text())["account"] for path in (tmp_path / "memory").rglob("privacy-*.json")]
    assert own and all(0 < account["epsilon"] <= 8.0 and account["sampling"] < 1 for account in own)
    assert results.privacy["unit"].startswith("one training window")


def test_noise_of_an_experiment_can_be_repeated_and_protects_nothing(tmp_path: Path) -> None:
    losses = []
    for name in ("one", "other"):
        settings = private_settings(tmp_path, name, noise_seed=7, clip=0.01)
        settings.run_id = "same"
        results = run(settings, tmp_path / name)
        losses.append(results.heldout_loss)
        assert results.privacy["epsilon"] is None and "NOTHING is protected" in results.notes()["Privacy"][0]
    assert losses[0] == losses[1]


def test_sums_and_secret_draws(tmp_path: Path) -> None:
    settings = private_settings(tmp_path, "run", noise="sum", secret_sampling=True, epsilon=8.0)
    settings.federation.min_replies = 2
    results = run(settings, tmp_path)
    report = results.privacy
    assert report["epsilon"] <= 8.0
    assert report["epsilon_towards_the_server"] > report["epsilon"]
    assert report["deviation_of_a_client"] == pytest.approx(report["noise_multiplier"] / 2**0.5)
    assert "releases" not in report and "took part" not in results.facts()
    secret = json.loads((tmp_path / "run" / LEDGER).read_text())["secret"]
    assert len(secret) == 64 and secret not in settings.to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dp"}, "privacy.name='dp' is none of none, client_dp, record_dp"),
        ({"epsilon": None}, "privacy.epsilon=null needs privacy.noise_multiplier"),
        ({"epsilon": -1.0}, "privacy.epsilon=-1.0 must be greater than 0"),
        ({"delta": 1.0}, "privacy.delta=1.0 must lie between 0 and 1"),
        ({"name": "record_dp", "noise": "sum"}, "privacy.noise=sum needs privacy=client_dp"),
        ({"secret_sampling": True}, "privacy.secret_sampling=true needs privacy.noise=sum"),
        ({"releases": 0}, "privacy.releases=0 must be at least 1"),
        ({"levels": 4}, "privacy.levels=4 must be odd"),
        ({"secure_aggregation": True}, "privacy.secure_aggregation=true needs arm=coded"),
    ],
)
def test_settings_that_cannot_be_served(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check_settings(private_settings(tmp_path, "run", "client_dp", **changes))


def test_noise_in_the_sum_needs_a_code_that_adds_up(tmp_path: Path) -> None:
    settings = private_settings(tmp_path, "run", noise="sum")
    with pytest.raises(ValueError, match=r"needs federation\.min_replies=N"):
        check_settings(settings)
    settings.arm = "coded"
    with pytest.raises(ValueError, match="needs codes that add up"):
        check_settings(settings)
    settings.arm = "centralised"
    with pytest.raises(ValueError, match="asks no clients"):
        check_settings(settings)


def test_an_owner_bounds_all_runs_together(tmp_path: Path) -> None:
    grid_config = {"memory": str(tmp_path / "memory"), "max-epsilon": "10"}

    def attempt(settings: Settings) -> None:
        run_federation(InProcessGrid(client_app, settings.federation.num_clients, grid_config), settings)

    attempt(private_settings(tmp_path, "one", epsilon=8.0, clip=1e-3))
    again = resumed(tmp_path / "one", ["federation.rounds=4"])
    attempt(again)  # the same run: its budget was counted
    with pytest.raises(ValueError, match=r"of the 10 that this node's owner allows for all runs .* 8 are spent"):
        attempt(private_settings(tmp_path, "other", epsilon=4.0))
    with pytest.raises(ValueError, match="takes part in runs with a privacy budget alone"):
        attempt(settings_for(tmp_path, "open", arm="dense"))
    attempt(private_settings(tmp_path, "small", epsilon=2.0, clip=1e-3))
    spent = json.loads((tmp_path / "memory" / "spent.json").read_text())
    assert sorted(spent.values()) == [2.0, 8.0]


def test_a_node_believes_no_budget_that_the_noise_does_not_keep(tmp_path: Path) -> None:
    """A server may say epsilon = 1 and ask for noise and answers that spend far more."""
    settings = private_settings(tmp_path, "run", epsilon=1.0, noise_multiplier=8.0, releases=1000)
    allowed = private.Guard(settings, 10, tmp_path, 0).ledger.allowed
    assert allowed is not None and 1 <= allowed < 20
    assert epsilon_of(Release(8.0), allowed, 1e-5) <= 1.0
    with pytest.raises(PrivacyError, match=r"spends more than privacy\.epsilon=1 in one message"):
        private.Guard(private_settings(tmp_path, "run", epsilon=1.0, noise_multiplier=0.1), 10, tmp_path, 1)
    loose = private_settings(tmp_path, "run", epsilon=1.0, delta=0.5)
    with pytest.raises(PrivacyError, match=r"takes a delta of 1e-05 at most, not 0\.5"):
        private.Owner(tmp_path, 10.0).check(loose)


def test_a_run_ends_whose_clients_alone_know_their_budgets(tmp_path: Path) -> None:
    """How often a client may answer follows from its number of windows, if the noise is given: it says when no more."""
    settings = private_settings(tmp_path, "run", "record_dp", epsilon=6.0, noise_multiplier=0.9)
    settings.task.max_windows = 20
    settings.federation.rounds, settings.federation.retries = 9, 0
    settings.federation.clients_per_round = settings.federation.num_clients
    results = run(settings, tmp_path)
    done = len(results.heldout_loss) - 1
    assert 0 < done < 9 and results.ended_early.startswith(f"after round {done} of 9: round {done + 1}: the privacy")
    assert {fault.server_round for fault in results.faults} == {done + 1}
    assert all("its own count says" in fault.reason for fault in results.faults)
    for own in (tmp_path / "memory").rglob("privacy-?.json"):
        state = json.loads(own.read_text())
        assert list(state["releases"].values()) == [done] and state["account"]["epsilon"] <= 6.0
    state = json.loads((tmp_path / "run" / LEDGER).read_text())["ledger"]
    assert state["closed"] == [0, 1, 2]
    copy = Ledger(None, lambda state: None)
    copy.load_state(state)
    assert copy.is_spent(0) and not copy.is_spent(3)


@pytest.mark.parametrize("kind", ["client_dp", "none"])
def test_what_is_wrong_with_protected_data_stays_on_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def unreadable(*_: object) -> Any:
        raise ValueError("line 3: 'Mary Smith of Leeds' is no JSON object")

    monkeypatch.setattr(trainer, "load_shard", unreadable)
    with pytest.raises(ValueError, match="cannot take part") as error:
        run(private_settings(tmp_path, "run", kind), tmp_path)
    assert ("Mary Smith" in str(error.value)) == (kind == "none")
    assert ("its own log says alone" in str(error.value)) == (kind != "none")


@pytest.mark.parametrize("kind", ["client_dp", "none"])
def test_why_training_failed_stays_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def fails(*_: object, **__: object) -> Any:
        raise RuntimeError("no token for 'Mary Smith of Leeds'")

    monkeypatch.setattr(trainer, "finetune", fails)
    settings = private_settings(tmp_path, "run", kind)
    settings.federation.retries = 0
    with pytest.raises(ValueError, match="0 usable replies"):
        run(settings, tmp_path)
    faults = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    reasons = [event["reason"] for event in faults if event["event"] == "fault"]
    assert len(reasons) == 2
    assert all(("Mary Smith" in reason) == (kind == "none") for reason in reasons)


def test_a_run_keeps_its_terms(tmp_path: Path) -> None:
    """Settings come with every message: a server that changes those of privacy or training gets nothing."""
    first = private_settings(tmp_path, "run", epsilon=0.1, noise_multiplier=50.0)
    private.keep_terms(first, tmp_path, 0)
    private.keep_terms(first, tmp_path, 0)
    for change in ("epsilon", "none", "steps"):
        other = private_settings(tmp_path, "run", epsilon=0.1, noise_multiplier=50.0)
        if change == "epsilon":
            other.privacy.epsilon = 9.9
        elif change == "none":
            other.privacy.name = "none"
        else:
            other.train.steps += 1
        with pytest.raises(PrivacyError, match="on other terms of privacy or training than before"):
            private.keep_terms(other, tmp_path, 0)
    longer = private_settings(tmp_path, "run", epsilon=0.1, noise_multiplier=50.0)
    longer.federation.rounds = 100
    private.keep_terms(longer, tmp_path, 0)  # the budget stays what it was


def test_two_processes_of_a_node_share_its_count(tmp_path: Path) -> None:
    settings = settings_with_noise(private_settings(tmp_path, "run", releases=2))
    one, other = (private.Guard(settings, 10, tmp_path, 0) for _ in range(2))
    one.spend(1, b"first")
    other.spend(1, b"second")
    for guard in (one, other):
        with pytest.raises(BudgetSpentError):
            guard.spend(2, b"third")


def test_a_secret_draw_is_another_one_when_a_round_is_done_again() -> None:
    ledger = Ledger(None, lambda state: None)
    sampling = Sampling(100, 10, "a secret", ledger=ledger)
    first = sampling.sample(1)
    sampling.asked(1, first)
    assert sampling.sample(1) != first


@pytest.mark.parametrize("strategy", ["krum", "fedmedian", "rfa"])
def test_noise_in_the_sum_is_for_the_mean(tmp_path: Path, strategy: str) -> None:
    settings = private_settings(tmp_path, "run", noise="sum")
    settings.federation.min_replies, settings.strategy.name = 2, strategy
    with pytest.raises(ValueError, match=r"privacy\.noise=sum and strategy=.* do not go together"):
        check_settings(settings)
