"""What ``bench.attackers`` sends, what ``bench.attacks`` makes of its runs, and that its page says what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import heavy_tailed_update
from flwr.supercore.task_identity import TaskIdentity

from adapters.settings import TrainSettings
from adapters.windows import Windows
from bench.attackers import ALIE_Z, ATTACKS, GAIN, STEP_OCTAVES, mean_of, norm_of
from bench.attacks import DEFENCES, markdown_of, measure, print_tables, summary, tables_of
from gradcodec.exchange import decode_update, encode_update
from gradcodec.frame import pack, unpack
from gradcodec.learned.codec import LearnedCodec
from strategies.settings import STRATEGIES

RESULTS = Path("bench/results/attacks.json")
HONEST = [heavy_tailed_update(seed) for seed in range(8)]


def cosine(one: dict[str, torch.Tensor], other: Any) -> float:
    inner = sum(float((one[name].double() * other[name].double()).sum()) for name in one)
    return inner / (norm_of(one) * norm_of(other))


@pytest.mark.parametrize(("name", "usual_norms"), [("sign", 1.0), ("scaled", 10.0), ("under", 2.99), ("step", 1.0)])
def test_reversed_updates_have_the_length_that_they_say(name: str, usual_norms: float) -> None:
    make = ATTACKS[name].update
    assert make is not None
    sent = make(HONEST)
    usual = sorted(map(norm_of, HONEST))
    assert usual[3] * usual_norms <= norm_of(sent) <= usual[4] * usual_norms
    assert cosine(mean_of(HONEST), sent) == pytest.approx(-1, abs=1e-6)


def test_a_little_lies_among_the_honest_and_ipm_is_short() -> None:
    alie, ipm = (ATTACKS[name].update for name in ("alie", "ipm"))
    assert alie is not None and ipm is not None
    stack = torch.stack([update["layers.0.q.lora_A.weight"] for update in HONEST])
    sent = alie(HONEST)["layers.0.q.lora_A.weight"]
    torch.testing.assert_close(sent, stack.mean(0) - ALIE_Z * stack.std(0))
    assert 0.3 < float((sent > stack.min(0).values).float().mean()) < 1
    assert norm_of(ipm(HONEST)) == pytest.approx(0.5 * norm_of(mean_of(HONEST)))


def test_labels_are_wrong_where_they_count_and_text_stays_where_they_do_not() -> None:
    windows = Windows.whole(torch.arange(12).view(2, 6))
    poisoned = ATTACKS["labels"].poison(windows, 12)
    assert poisoned.ids.tolist()[0] == [0, 7, 2, 9, 4, 11]
    assert poisoned.counted.tolist()[0] == [False, True] * 3


def test_forged_payloads_are_whole_and_decode_to_what_their_authors_want(learned: LearnedCodec) -> None:
    """The checksum is right, so nothing but the bounds on norms stands between them and the mean."""
    payload, _ = encode_update(HONEST[0], None, codec=learned, max_bytes=400)
    honest, frame = decode_update(payload, codec=learned, context=b""), unpack(payload, 1)
    for name, factor in (("gain", GAIN), ("step", 2.0**STEP_OCTAVES)):
        found = decode_update(pack(ATTACKS[name].forge(frame)), codec=learned)
        assert cosine(honest, found) == pytest.approx(1.0 if factor > 0 else -1.0, abs=1e-3)
        assert norm_of(found) == pytest.approx(abs(factor) * norm_of(honest), rel=1e-2)


def test_every_robust_strategy_is_in_the_bench() -> None:
    shown = {defence.strategy.name for defence in DEFENCES.values()}
    assert shown == {*STRATEGIES} - {"fedavgm", "fedadam"}


def a_run(seed: int, rfa: float | None) -> dict[str, Any]:
    def cell(loss: float | None) -> dict[str, Any]:
        return {"loss": loss, "lost_rounds": 0, "by_client": None if loss is None else [loss, loss]}

    cells = {"mean": {"none": cell(3.0), "sign": cell(3.5)}, "rfa": {"none": cell(3.1), "sign": cell(rfa)}}
    minority = {"base": {"minority": 8.0, "majority": 4.0}}
    after = {"mean": {"minority": 6.0, "majority": 3.0}, "rfa": {"minority": 7.5, "majority": 2.9}}
    common = {"seed": seed, "base": 4.0, "base_by_client": [4.0, 5.0], "without_them": 3.05, "cells": cells}
    return common | {"minority": minority | {"after": after}}


def test_what_was_kept_is_a_share_of_what_the_mean_of_ten_honest_ones_gains() -> None:
    found = summary([a_run(0, 3.2), a_run(1, 3.4)], ["none", "sign"])
    assert found["kept"]["mean"] == {"none": 1.0, "sign": 0.5}
    assert found["kept"]["rfa"] == {"none": pytest.approx(0.9), "sign": pytest.approx(0.7)}
    assert found["best"]["sign"] == {"defence": "rfa", "kept": pytest.approx(0.7), "reached": False}
    assert found["best"]["none"]["reached"] and found["kept_without_them"] == pytest.approx(0.95)
    assert found["worst_kept"]["rfa"] == pytest.approx(0.7)
    assert found["worst_client"]["rfa"] == pytest.approx(0.9)
    assert found["minority_kept"]["rfa"] == {"minority": 0.25, "majority": pytest.approx(1.1)}
    diverged = summary([a_run(0, None)], ["none", "sign"])
    assert (
        diverged["kept"]["rfa"]["sign"] is diverged["worst_kept"]["rfa"] is None
        and diverged["best"]["sign"]["defence"] == "mean"
    )
    print_tables(diverged)


def test_a_small_run_of_the_bench() -> None:
    """What is a million times too long is refused, and then the run is that of the others alone, to the bit."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    torch.set_num_threads(1)
    train = TrainSettings(update="delta", lr=0.005, steps=1, batch_size=2, micro_batch_size=2)
    (found,) = measure(0, 1, train, ["mean"], ["none", "step"])
    cells = found["cells"]["mean"]
    assert cells["none"]["loss"] < found["base"]
    assert cells["step"]["loss"] == found["without_them"] != cells["none"]["loss"]
    assert found["minority"]["base"]["minority"] > found["minority"]["base"]["majority"] + 1
    print_tables(summary([found], ["none", "step"]))


@pytest.mark.skipif(not RESULTS.is_file(), reason="the bench has not been run")
def test_the_page_says_what_was_measured() -> None:
    page, results = Path("docs/robustness.md").read_text(), json.loads(RESULTS.read_text())
    for title, rows in tables_of(results).items():
        assert markdown_of(rows) in page, title
