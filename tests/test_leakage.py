"""The attacks of bench.leakage, on inputs whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.model import set_adapter
from bench.leakage import __main__ as program
from bench.leakage import channels, membership, sections
from bench.leakage.channels import CHANNELS, Ends, noise_multiplier, noised, transmit
from bench.leakage.inverter import Inverter, Projection, prior_guess
from bench.leakage.matching import Effort, Matcher
from bench.leakage.page import means_of, page_of
from bench.leakage.scores import auc, f1_of, precision_of, recall_of, roc, rouge, true_positives_at
from bench.leakage.sequences import exact_sentences, likely_sentence
from bench.leakage.span import (
    ATTACKS,
    RIDGES,
    Coordinates,
    Known,
    best_threshold,
    calibrated,
    dictionary_of,
    rows_of,
    span_scores,
    sparse_scores,
)
from bench.leakage.victim import TOY, Victim
from privacy.mechanism import norm_of

VOCABULARY, WIDTH, ROWS = 600, 96, 24


@pytest.fixture(scope="module")
def victim() -> Victim:
    """Of a rank at which the span holds all of a short batch."""
    return Victim(TOY, rank=64)


def dictionary() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)))


def planted(count: int, seed: int, noise: float = 0.0, uneven: float = 0.0) -> tuple[Tensor, frozenset[int]]:
    """Rows that are sums of so many tokens, and which; ``uneven``: how much the tokens' weights differ."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(VOCABULARY, generator=generator)[:count]
    weights = torch.randn(ROWS, count, generator=generator) * (uneven * torch.randn(count, generator=generator)).exp()
    rows = weights.double() @ dictionary()[tokens].double()
    rows += noise * rows.std() * torch.randn(ROWS, WIDTH, generator=generator)
    return rows, frozenset(tokens.tolist())


def strongest(scores: Tensor, count: int) -> list[int]:
    return [int(token) for token in scores.topk(count).indices]


@pytest.mark.parametrize("attack", ATTACKS)
def test_tokens_no_more_than_rows_are_found_by_either_attack(attack: str) -> None:
    rows, truth = planted(20, seed=1)
    assert {*strongest(ATTACKS[attack](rows, dictionary(), RIDGES[0]), len(truth))} == truth


def test_the_span_holds_planted_tokens_wholly_and_others_not() -> None:
    rows, truth = planted(20, seed=2)
    scores = span_scores(rows, dictionary(), RIDGES[0])
    others = [token for token in range(VOCABULARY) if token not in truth]
    assert float(scores[[*truth]].min()) > 0.9999 and float(scores[others].max()) < 0.7


def test_sparse_recovery_goes_on_where_the_span_check_ends() -> None:
    rows, truth = planted(50, seed=3, uneven=1.5)  # of 24 rows
    by_span = recall_of(strongest(span_scores(rows, dictionary(), RIDGES[0]), 50), truth)
    by_sparse = recall_of(strongest(sparse_scores(rows, dictionary(), RIDGES[0]), 50), truth)
    assert by_sparse > by_span + 0.1 and by_sparse > 0.9


@pytest.mark.parametrize("attack", ATTACKS)
def test_pure_noise_gives_no_tokens_away(attack: str) -> None:
    """Of 20 guesses among 600 tokens as many are right as chance has it: in 40 trials 26.7, standard deviation 5.0, and
    fewer than 47 at 99.99 % confidence."""
    hits = 0
    for seed in range(40):
        rows, truth = planted(20, seed, noise=1e4)
        hits += len({*strongest(ATTACKS[attack](rows, dictionary(), RIDGES[1]), 20)} & truth)
    assert hits < 47


def test_no_gradient_says_nothing() -> None:
    nothing = torch.zeros(ROWS, WIDTH).double()
    assert not any(bool(scorer(nothing, dictionary(), RIDGES[0]).any()) for scorer in ATTACKS.values())


def test_thresholds_come_from_the_attackers_own_updates_and_hold_for_others() -> None:
    own = [Known(rows, rows, truth) for rows, truth in (planted(15, seed) for seed in range(10, 18))]
    for scorer in ATTACKS.values():
        rows, truth = planted(15, seed=99)
        guess = calibrated(scorer, dictionary(), own).guess(rows)
        assert recall_of(guess, truth) > 0.9 and precision_of(guess, truth) > 0.9


def test_coordinates_keep_a_span_and_tell_tokens_apart_that_have_much_in_common(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, truth = planted(15, seed=4)
    plain = Coordinates(dictionary(), [(rows, rows)])
    assert float(span_scores(plain.rows(rows), plain.inputs_VD, RIDGES[0])[[*truth]].min()) > 0.999
    common = torch.nn.functional.normalize(dictionary() * torch.linspace(2, 0.1, WIDTH) + 0.2)
    monkeypatch.setattr(sys.modules[__name__], "dictionary", lambda: common)
    fitted = Coordinates(common, [(planted(15, seed)[0], planted(15, seed, noise=0.5)[0]) for seed in range(8)])
    found, unfitted = [], []
    for seed in range(50, 55):
        seen, truth = planted(15, seed, noise=0.5)
        scores = span_scores(fitted.rows(seen), fitted.inputs_VD, RIDGES[1])
        found.append(recall_of(strongest(scores, 15), truth))
        unfitted.append(recall_of(strongest(span_scores(seen, common, RIDGES[1]), 15), truth))
    assert sum(found) > 4.5 and sum(found) > sum(unfitted) + 0.5


def test_the_best_threshold_parts_what_can_be_parted() -> None:
    scores = torch.tensor([0.9, 0.8, 0.2, 0.1, 0.0])
    threshold, f1 = best_threshold([(scores, frozenset({0, 1}))])
    assert f1 == 1.0 and 0.2 < threshold <= 0.8


def test_the_first_layers_rows_are_sums_of_its_tokens_inputs(victim: Victim) -> None:
    sentence = victim.texts.private[0]
    update, truth = victim.update([sentence], "gradient"), {*victim.ids(sentence)}
    scores = span_scores(rows_of(update, 0), dictionary_of(victim.model), RIDGES[0])
    assert {*strongest(scores, len(truth))} == truth and float(scores[[*truth]].min()) > 0.999


def test_in_the_first_round_a_has_no_gradient(victim: Victim) -> None:
    update = victim.update([victim.texts.private[0]], "gradient", start=victim.seeded)
    assert not bool(rows_of(update, 0).any()) and norm_of(update) > 0


def test_where_the_rank_is_enough_sentences_come_back_to_the_letter(victim: Victim) -> None:
    """DAGER; another client's second layer does not confirm them."""
    text = victim.texts.private[:2]
    update, other = victim.update(text, "gradient"), victim.update(victim.texts.private[4:5], "gradient")
    set_adapter(victim.model, victim.adapter)
    victim.model.eval()
    tokens = sorted({token for sentence in text for token in victim.ids(sentence)})
    found = [victim.tokenizer.decode(path) for path in exact_sentences(victim.model, rows_of(update, 1), tokens, 26)]
    assert {*text} <= {*found}
    assert not exact_sentences(victim.model, rows_of(other, 1), tokens, 26)
    ids = victim.ids(text[0])
    assert likely_sentence(victim.model, rows_of(update, 1), sorted({*ids}), len(ids)) == ids


def test_matching_prefers_the_truth_and_never_ends_above_its_start(victim: Victim) -> None:
    sentence = victim.texts.private[0]
    ids = victim.ids(sentence)
    matcher = Matcher(
        victim.model, victim.adapter, victim.update([sentence], "gradient"), victim.tokenizer.eos_token_id
    )
    swapped = [ids[1], ids[0], *ids[2:]]
    assert matcher.objective(ids) < 0.2 < matcher.objective(swapped[::-1])
    better = matcher.improved(swapped, sorted({*ids}), 12)
    assert matcher.objective(better) <= matcher.objective(swapped)
    evidence = torch.zeros(len(dictionary_of(victim.model)))
    assert len(matcher.invert(evidence, sorted({*ids}), len(ids), Effort(2, 0))) == len(ids)


def test_channels(victim: Victim) -> None:
    updates = [victim.update([text], "gradient") for text in victim.texts.public[:5]]
    ends = Ends(victim.codec, victim.side, norm_of(updates[0]))
    dense, half, tenth, noisy, _, of_five, _ = CHANNELS
    name = next(iter(updates[0]))
    assert torch.equal(transmit(dense, updates, ends, 0)[name], updates[0][name])
    assert torch.allclose(
        transmit(of_five, updates, ends, 0)[name], torch.stack([one[name] for one in updates]).mean(0), atol=1e-7
    )

    def error(channel: channels.Channel) -> float:
        seen = transmit(channel, updates, ends, 0)
        return norm_of({name: seen[name] - updates[0][name] for name in seen}) ** 2 / norm_of(updates[0]) ** 2

    assert 0 < error(half) < error(tenth) < 1 < error(noisy)


def test_noise_is_of_its_multiplier_times_the_clip() -> None:
    """200,000 values: the standard deviation within 1 %, beyond six of its own standard deviations."""
    update = {"a": torch.zeros(400, 500)}
    assert float(noised(update, clip=2.0, multiplier=0.5, seed=0)["a"].std()) == pytest.approx(1.0, rel=0.01)
    long = noised({"a": torch.full((4,), 10.0)}, clip=1.0, multiplier=0.0, seed=0)
    assert norm_of(long) == pytest.approx(1.0)


def test_the_noise_of_an_epsilon_is_the_analytic_gaussian_mechanisms() -> None:
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    for epsilon, releases in ((8.0, 1), (2.0, 1), (2.0, 4)):
        per_release = noise_multiplier(epsilon, releases)
        spent = GaussianPrivacyLoss(per_release / releases**0.5).get_delta_for_epsilon(epsilon)
        assert spent == pytest.approx(channels.DELTA, rel=1e-3)


def test_shares_of_tokens() -> None:
    assert recall_of([1, 2, 2, 3], [2, 3, 4, 4]) == pytest.approx(2 / 3)
    assert precision_of([1, 2, 3, 4], [2]) == 0.25 and precision_of([], [2]) == 0.0
    assert f1_of([1, 2], [2, 3]) == 0.5 and f1_of([], [1]) == 0.0


def test_rouge_by_hand() -> None:
    """Words: 3 of 4 found and 3 of 5 true, F1 6/9. Pairs: "the cat" alone, 1 of 3 and 1 of 4, F1 2/7."""
    assert rouge("the cat on sat", "the cat sat down on") == pytest.approx((8 / 9, 2 / 7))
    assert rouge("The cat.", "the cat") == (1.0, 1.0) and rouge("", "the cat") == (0.0, 0.0)


def test_auc_and_true_positives_by_hand() -> None:
    """Members 3, 2, 1 against others 2, 0: pairs won 1 + 1/2 + 0 against 2, and 3 against 0: 4.5 of 6."""
    members, others = [3.0, 2.0, 1.0], [2.0, 0.0]
    assert auc(members, others) == pytest.approx(4.5 / 6)
    assert true_positives_at(0.01, members, others) == pytest.approx(1 / 3)
    assert true_positives_at(0.5, members, others) == pytest.approx(1.0)
    assert roc(members, others)[-1] == (1.0, 1.0) and auc([1.0], [1.0]) == 0.5


def test_a_guess_without_an_update_takes_the_frequent_tokens() -> None:
    assert {*prior_guess([frozenset({1, 2}), frozenset({1, 2, 3}), frozenset({1, 2})], 5)} == {1, 2}


def test_the_inverter_learns_what_speaks_for_a_token() -> None:
    """The tokens stand in the update itself, beside noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = [frozenset(torch.randperm(40, generator=generator)[:4].tolist()) for _ in range(80)]
    updates = [{"a": 0.1 * torch.randn(40, generator=generator)} for _ in tokens]
    for update, own in zip(updates, tokens, strict=True):
        update["a"][[*own]] += 1.0
    inverter = Inverter(lambda update: update["a"][None], Projection(40), vocabulary=40)
    assert inverter.fit(updates[:-10], tokens[:-10]) > 0.9
    found = [recall_of(inverter.guess(update), own) for update, own in zip(updates[-10:], tokens[-10:], strict=True)]
    assert sum(found) > 8


def test_members_and_others_are_of_the_same_texts_and_no_window_is_both(victim: Victim) -> None:
    held, others = membership.deal(victim, membership.Federation(clients=2, windows=4))
    assert [len(one) for one in held] == [4, 4] and len(others) == 8
    rows = {tuple(row) for one in held for row in one.ids.tolist()}
    assert not rows & {tuple(row) for row in others.ids.tolist()}


def test_the_bench_writes_rows_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = (CHANNELS[0], CHANNELS[1])
    for name in ("CHANNELS", "LEARNED"):
        monkeypatch.setattr(sections, name, few)
    monkeypatch.setattr(sections, "_MOST_CLIENTS", 2)
    tiny = dataclasses.replace(
        sections.QUICK,
        kinds={TOY: (("gradient", 1),)},
        trials={TOY: 1},
        own={TOY: 2},
        effort={TOY: Effort(1, 1)},
        learned_from=6,
        learned_trials=1,
        federation=membership.Federation(rounds=1, clients=1, windows=4, epochs=1),
    )
    monkeypatch.setattr(sections, "QUICK", tiny)
    places = ["--json", str(tmp_path / "rows.json"), "--page", str(tmp_path / "page.md")]
    parts = ["tokens", "sentences", "learned", "members"]  # whole sentences from a large rank: above
    monkeypatch.setattr(sys, "argv", ["bench.leakage", "--quick", "--sections", ",".join(parts), *places])
    program.main()
    results = json.loads((tmp_path / "rows.json").read_text())
    assert [*results["sections"]] == parts and str(tmp_path) not in json.dumps(results)
    by_attack = {row["attack"]: row for row in results["sections"]["tokens"]["rows"] if row["channel"] == "dense"}
    assert by_attack["span check"]["recall"] > 0.6  # of one trial: a token more or less, by the CPU's rounding
    assert all(0 <= row["attacks"]["loss"]["auc"] <= 1 for row in results["sections"]["members"]["rows"])
    page = (tmp_path / "page.md").read_text()
    assert "they mean nothing" in page and page.count("\n## ") == 5
    monkeypatch.setattr(sys, "argv", ["bench.leakage", "--sections", "token", *places])
    with pytest.raises(SystemExit):
        program.main()
    assert "'token'" in capsys.readouterr().err


def test_the_page_of_the_docs_is_what_the_bench_makes_of_its_file() -> None:
    results = json.loads(program.RESULTS.read_text())
    assert page_of(results) == program.PAGE.read_text()
    assert results["means"] == means_of(results["sections"])
