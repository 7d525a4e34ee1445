"""What the benches compute, on inputs whose answer is known; their runs are commands of their own."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import heavy_tailed_update
from safetensors.torch import save_file

from adapters.model import adapter_shapes, empty_model
from adapters.settings import LoraSettings, ModelSettings
from bench import arms, audit, demo_real, drop_outs, private, secure
from bench.both_ways import budget_of, judge, means_of, print_means
from bench.fidelity import Given, first_third, measure_all
from bench.fuzz import honest_payloads, hostile
from bench.loss_over_bytes import Run, summary
from bench.programs import run_once
from bench.real_text import NUM_CLIENTS, write_real_text
from bench.speed import layout_of
from gradcodec.build import build_codec
from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.exchange import decode_update
from gradcodec.layout import Layout
from gradcodec.registry import codec_names, entry_of
from gradcodec.settings import CodecSettings
from gradcodec.training.recording import Recording, load_recording
from strategies.outcomes import DOWNLINK_BYTES


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("recording") / "updates.safetensors"
    updates = {(r, c): heavy_tailed_update(10 * r + c) for r in range(1, 7) for c in range(2)}
    save_file({f"r{r}/c{c}/{name}": t for (r, c), u in updates.items() for name, t in u.items()}, path)
    return load_recording(path)


def test_fidelity_trains_on_the_first_third_and_measures_on_the_rest(recording: Recording) -> None:
    train, heldout = first_third(recording)
    assert {update.round for update in train} == {1, 2}
    assert {update.round for update in heldout} == {3, 4, 5, 6}
    rows = measure_all(["learned", "topk", "bf16"], recording, train, heldout, [0.5, 1.0], Given(Path("none"), 1))
    assert [(row.codec, row.bits_requested) for row in rows] == [
        ("learned", 0.5),
        ("learned", 1.0),
        ("topk", 0.5),
        ("topk", 1.0),
        ("bf16", None),
    ]
    assert all(row.bits <= row.bits_requested for row in rows if row.bits_requested is not None)
    assert all(0 < row.cosine <= row.aggregate_cosine + 0.2 for row in rows)
    assert rows[-1].cosine > 0.9999


def test_fidelity_needs_three_rounds(recording: Recording) -> None:
    with pytest.raises(ValueError, match="at least 3"):
        first_third(Recording(recording.layout, recording.updates[:4]))


def test_the_real_text_differs_names_its_licences_and_keeps_the_questions_that_are_asked(tmp_path: Path) -> None:
    holdings, aside = write_real_text(tmp_path)
    files = [tmp_path / f"client-{client}.jsonl" for client in range(NUM_CLIENTS)]
    records = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [len(of_client) for of_client in records] == [holding.records for holding in holdings]
    assert {holding.licence for holding in holdings} <= {"MIT", "Apache-2.0", "BSD-3-Clause"}
    said = [json.dumps(record) for of_client in records for record in of_client]
    assert len(set(said)) == len(said) > 400
    assert len(aside) == 4 and not any(json.dumps(one.question) in text for one in aside for text in said)


def test_a_run_says_what_it_overrides() -> None:
    assert Run.of("learned@0.5").overrides == ("codec=learned", "codec.bits=0.5")
    assert Run.of("b-only@0.1:codec.feedback=1").overrides[-2:] == ("lora.train=b", "codec.feedback=1")
    assert Run.of("sign").overrides == ("codec=sign",)
    for wrong in ("", "learned@", "learned@x", "learned:feedback"):
        with pytest.raises(ValueError, match="CODEC"):
            Run.of(wrong)


def test_what_was_run_is_not_run_again_at_the_same_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run(module: str, overrides: list[str]) -> None:
        runs.append(overrides)
        (tmp_path / "results.json").write_text(json.dumps(len(runs)))

    monkeypatch.setattr("bench.programs.run_program", run)
    again = partial(run_once, "server.federate", result=tmp_path / "results.json")
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert [again(["a=1"]), again(["a=1"]), again(["a=2"]), again(["a=2"], anew=True)] == [1, 1, 2, 3]
    monkeypatch.setenv("GIT_COMMIT", "abcd")
    assert [again(["a=2"]), again(["a=2"])] == [4, 4]
    (tmp_path / "results.json").unlink()
    assert again(["a=2"]) == 5
    monkeypatch.setenv("GIT_COMMIT", "abcd-dirty")
    assert [again(["a=2"]), again(["a=2"])] == [6, 7]


def test_loss_over_bytes_counts_what_is_kept_and_when() -> None:
    def run(*losses: float) -> dict[str, object]:
        return {"heldout_loss": list(losses), "bits_per_parameter": 1.0, "uplink_payload_bytes_per_client_round": 100.0}

    found = [
        {"dense": run(4.0, 3.5, 3.0), "x": run(4.0, 3.19, 3.1)},
        {"dense": run(4.0, 3.4, 3.0), "x": run(4.0, 3.15, 3.1)},
    ]
    row = summary("x", found)
    assert row["kept_fraction"] == pytest.approx(0.9)
    assert row["behind_dense"] == pytest.approx(0.1)
    assert row["behind_dense_spread"] == pytest.approx(0.0)
    assert row["bytes_until"]["0.8"] == 100.0
    assert row["bytes_until"]["0.95"] is None


@pytest.mark.parametrize(("name", "geometry"), [("7b", "llama-7b"), ("70b", "llama-70b")])
def test_geometries_are_those_of_real_adapters(name: str, geometry: str) -> None:
    """What `bench.speed` times has the factors of the model that transformers and PEFT make of the config."""
    model = empty_model(ModelSettings(path=f"assets/geometries/{geometry}", dtype="bfloat16"), LoraSettings(rank=8))
    shapes = sorted(adapter_shapes(model).values())
    assert sorted(layout_of(name, 8).shapes.values()) == shapes
    assert name != "7b" or layout_of(name, 8).num_parameters == 8_388_608


@pytest.mark.parametrize("name", [name for name in codec_names() if not entry_of(name).needs_artifact])
def test_hostile_payloads_are_decoded_or_refused(layout: Layout, name: str) -> None:
    """A few of what ``python -m bench.fuzz`` tries by the hundred thousand."""
    _try(build_codec(CodecSettings(name=name), layout))


def test_hostile_payloads_of_learned_are_decoded_or_refused(learned: Codec) -> None:
    _try(learned)


def _try(codec: Codec) -> None:
    chance, honest = random.Random(1), honest_payloads(codec)
    for _ in range(150):
        payload = hostile(chance, codec, honest)
        try:
            update = decode_update(payload, codec=codec)
        except CodecError:
            continue
        assert all(bool(torch.isfinite(tensor).all()) for tensor in update.values()), payload.hex()


def a_run(loss: float) -> dict[str, object]:
    figures: dict[str, object] = dict.fromkeys(arms.FIGURES, 1.0) | {"heldout_loss": [3.0, loss], "uplinks": []}
    return figures | {"num_parameters": 8, "uplink_payload_bytes": 16, "bytes": {"total": 100}}


def test_seeds_of_several_machines_are_put_together(tmp_path: Path) -> None:
    losses = dict(zip(demo_real.ARMS, (3.0, 2.0, 2.1, 2.5), strict=True))
    runs = [{"seed": seed} | {arm: a_run(loss - seed / 100) for arm, loss in losses.items()} for seed in (0, 1, 2)]
    whole = arms.summary(runs, [*demo_real.ARMS])
    file = tmp_path / "results.json"
    file.write_text(json.dumps(arms.summary(runs[:2], [*demo_real.ARMS])))
    assert arms.summary(runs[2:], [*demo_real.ARMS], demo_real.earlier_runs(file, [2])) == whole
    assert whole["seeds"] == [0, 1, 2]
    with pytest.raises(ValueError, match="has seed 1, too"):
        demo_real.earlier_runs(file, [1, 2])
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"is no results\.json of this command"):
        demo_real.earlier_runs(file, [2])


def test_a_whole_run_is_judged_at_equal_rounds_and_at_denses_loss() -> None:
    def sent(server_round: int, **sizes: int) -> dict[str, int]:
        return {"server_round": server_round, **dict.fromkeys(DOWNLINK_BYTES, 0), **sizes}

    run = {
        "heldout_loss": [4.0, 3.5, 3.25, 3.0, 2.5],
        "uplinks": [{"server_round": number, "payload_bytes": 10} for number in (1, 2, 3, 4)],
        "downlinks": [sent(1, snapshot_bytes=5), sent(2, step_bytes=10), sent(3, step_bytes=10, catch_up_bytes=10)],
        "delivery_bytes": [1, 2, 3, 4],
        "bytes": {"artifact": 7, "recording": 1, "total": 86},
        "seconds": 1.0,
    }
    dense = {"heldout_loss": [4.0, 3.5, 3.0], "bytes": {"total": 860}}
    found = judge(run, dense)
    assert found["kept"] == 0.75
    assert found["bytes"] == {
        "up": 20,
        "down": 15,
        "delivery": 2,
        "artifact": 7,
        "recording": 1,
        "catch_up": 0,
        "snapshots": 5,
        "total": 45,
    }
    assert (found["rounds_to_dense"], found["bytes_to_dense"]["total"]) == (3, 30 + 35 + 3 + 7 + 1)
    assert found["of_dense_at_the_end"] == 10
    assert found["kept_within"] == {"1/25": 0.5, "1/40": 0.0, "1/100": 0.0, "1/200": 0.0}
    never = judge(run | {"heldout_loss": [4.0, 3.9, 3.8, 3.7, 3.6]}, dense)
    assert never["rounds_to_dense"] is None
    means = means_of([{"coded": {"a": found}}, {"coded": {"a": never}}])["a"]
    assert (means["reached"], means["seeds"], means["rounds_to_dense"]) == (1, 2, None)
    print_means({"a": means}, 2)


def test_a_budget_says_its_settings() -> None:
    assert budget_of("0.5/0.25") == ["codec=learned", "codec.bits=0.5", "codec.down_bits=0.25"]
    assert budget_of("1/1/nf4")[0] == "codec=nf4"
    with pytest.raises(ValueError, match="UP/DOWN"):
        budget_of("0.5")


def test_an_audit_finds_what_a_gaussian_mechanism_has() -> None:
    """With the very rates of a mechanism of multiplier 2, many trials come near its epsilon from below."""
    from scipy import stats

    from privacy.accounting import Release, epsilon_of

    many = 10_000_000
    right, wrong = (round(many * float(stats.norm.sf(0.25 - apart))) for apart in (0.5, 0.0))
    found, true = audit.lower_bound(right, many, wrong, many), epsilon_of(Release(2.0), 1, audit.DELTA)
    assert 0.98 * true < found < true
    assert audit.lower_bound(5, 10, 5, 10) == 0
    assert audit.lower_bound(10, 10, 10, 10) == 0


def test_bytes_for_a_loss_lie_between_runs() -> None:
    points = [(3.0, 1000.0), (3.2, 100.0), (3.4, 50.0)]
    assert secure.bytes_for(3.0, points) == pytest.approx(1000)
    assert secure.bytes_for(3.1, points) == pytest.approx((1000 * 100) ** 0.5)
    assert secure.bytes_for(3.5, points) is None


def test_a_simulated_federation_has_the_noise_of_its_clients() -> None:
    """Of five clients a round the mean has the noise that a thousand have with the noise in their sum."""
    from privacy.accounting import noise_for

    runs = private.simulated_runs([8.0], [1000], 6)
    (settings,) = (own for name, own in runs.items() if name == "1000 clients dense 8")
    noise = next(float(one.partition("=")[2]) for one in settings if one.startswith("privacy.noise_multiplier="))
    assert noise / 5**0.5 == pytest.approx(noise_for(8.0, private.DELTA, 6) / 1000)


def test_a_drop_out_is_judged_by_the_sum() -> None:
    uplinks = [{"server_round": r, "partition": p} for r, count in ((1, 4), (2, 3)) for p in range(count)]
    results = {"heldout_loss": [4.0, 3.5, 3.2], "uplinks": uplinks, "seconds": 1.0}
    undisturbed = {"heldout_loss": [4.0, 3.5, 3.1], "in_sums": [4, 4]}
    assert drop_outs.judged("before the opening", results, undisturbed, 1)["survived"]
    off = {**results, "heldout_loss": [4.0, 3.5000001, 3.2]}
    assert not drop_outs.judged("before the opening", off, undisturbed, 1)["survived"]
    assert not drop_outs.judged("before the reply", results, undisturbed, 1)["survived"]
