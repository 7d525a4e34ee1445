"""The analyses on inputs whose answer is known, and the program on a run that was recorded."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import RunProgram, heavy_tailed_update
from test_federation import run, settings_for
from torch import Tensor

import bench.analyses
from adapters.settings import LoraSettings, ModelSettings, TrainSettings
from adapters.work import step_work
from gradcodec.analysis.control import control, noise_before
from gradcodec.analysis.damage import damaged
from gradcodec.analysis.places import factor_of, layer_of
from gradcodec.analysis.snr import snr_by_place
from gradcodec.analysis.spectra import entropy_of, excess_kurtosis, shares_of, spectra
from gradcodec.analysis.work import work_of
from gradcodec.build import build_codec
from gradcodec.codec import IdentityCodec
from gradcodec.frame import Codes
from gradcodec.layout import Layout
from gradcodec.settings import CodecSettings
from gradcodec.training.coding import Coding
from gradcodec.training.measure import measure
from gradcodec.training.recording import Recording, Update, save_recording
from server.analyse import ANALYSES, main
from server.analysis.analyses import SECTIONS, rounded, spread
from server.analysis.links import Link, course
from server.analysis.subjects import read_subjects
from server.records.account import account_of
from server.records.results import RunResults
from strategies.outcomes import Downlink, Uplink


def recording_of(layout: Layout, rounds: Sequence[int] = (1, 2, 3), clients: int = 2) -> Recording:
    return Recording(
        layout,
        tuple(Update(r, c, layout.to_blocks(heavy_tailed_update(10 * r + c))) for r in rounds for c in range(clients)),
    )


@dataclass(frozen=True)
class Halving(IdentityCodec):
    """Decodes to half of what it was given: the error is a quarter of the energy."""

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        return super().decode(codes, side) / 2


@dataclass(frozen=True)
class Deaf(IdentityCodec):
    """Decodes to one and the same update, whatever it was given."""

    said: Tensor | None = None

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        assert self.said is not None
        return self.said.clone()


def test_a_known_ratio_by_both_definitions_in_every_place(layout: Layout) -> None:
    recording = recording_of(layout)
    rows = snr_by_place(Coding.of("half", Halving(layout), recording), recording.updates)
    assert {(row.layer, row.factor) for row in rows} == {*((i, f) for i in (0, 1) for f in "AB"), ("all", "all")}
    assert len(rows) == 3 * 5
    for row in rows:
        assert row.snr_db == pytest.approx(10 * math.log10(4))
        assert row.paper_snr_db == pytest.approx(10 * math.log10(4 * row.num_values))
    whole = next(row for row in rows if row.factor == "all")
    assert whole.num_values == layout.num_parameters == sum(r.num_values for r in rows[:5]) - whole.num_values
    exact = snr_by_place(Coding.of("identity", IdentityCodec(layout), recording), recording.updates)
    assert all(row.snr_db is None and row.error_energy == 0 for row in exact)


def test_an_output_of_zeros_has_no_signal_by_one_definition_and_much_by_the_other(layout: Layout) -> None:
    recording = recording_of(layout)
    nothing = Deaf(layout, said=torch.zeros(layout.rank, layout.num_columns))
    *_, row = snr_by_place(Coding.of("nothing", nothing, recording), recording.updates)
    assert row.snr_db == pytest.approx(0, abs=1e-6)
    assert row.paper_snr_db == pytest.approx(10 * math.log10(row.num_values)) and row.num_values > 100


@pytest.mark.parametrize("bits", [0.5, 1.0])
def test_a_gaussian_source_stays_above_its_bound_and_near_it(bits: float) -> None:
    layout = Layout.of({"0.lora_A.weight": (8, 4096), "0.lora_B.weight": (4096, 8)})
    generator = torch.Generator().manual_seed(0)
    updates = tuple(Update(r, 0, torch.randn(8, 8192, generator=generator)) for r in (1, 2))
    codec = build_codec(CodecSettings(name="rotated"), layout)
    (row,) = measure("rotated", codec, Recording(layout, updates), {"x": list(updates)}, [bits])
    assert row.bits <= bits
    assert 4**-row.bits < row.error_energy < 1.45 * 4**-row.bits  # 1.53 dB of a scalar quantiser, and its tables


def test_a_codec_that_ignores_its_input_is_exposed_though_no_noise_harms_it(layout: Layout) -> None:
    recording = recording_of(layout)
    mean = torch.stack([update.blocks_RC for update in recording.updates]).mean(0)
    coding = Coding.of("deaf", Deaf(layout, said=mean), recording)
    found = control(coding, recording.updates)
    assert found.own_error < 0.95  # it is right about what all have in common
    assert (found.innovation_cosine, found.reads_input) == (0.0, False)
    assert found.shifted_error == pytest.approx(found.own_error)
    rows = noise_before(coding, recording.updates, (1e-3, 10.0))
    assert [row.error for row in rows] == pytest.approx([found.own_error] * 3)
    assert rows[2].noise_energy > 1e6


def test_what_loses_nothing_reads_its_input_and_carries_the_noise(layout: Layout) -> None:
    recording = recording_of(layout)
    coding = Coding.of("identity", IdentityCodec(layout), recording)
    found = control(coding, recording.updates)
    assert (found.own_error, found.reads_input) == (0.0, True)
    assert found.innovation_cosine == pytest.approx(1)
    assert found.shifted_error > 0.5 and found.other_error is not None and found.other_error > 0.5
    clean, noisy = noise_before(coding, recording.updates, (1e-3,))
    assert clean.noise_energy == clean.error == 0
    energy = sum(float(u.blocks_RC.square().sum()) for u in recording.updates)
    assert noisy.noise_energy == pytest.approx(len(recording.updates) * layout.num_parameters * 1e-6 / energy, rel=0.05)
    assert noisy.error == pytest.approx(noisy.noise_energy, rel=1e-3)


def test_a_round_of_one_client_has_no_other_to_compare_with(layout: Layout) -> None:
    recording = recording_of(layout, clients=1)
    found = control(Coding.of("identity", IdentityCodec(layout), recording), recording.updates)
    assert found.other_error is None and found.reads_input


def test_damaged_payloads_are_refused_and_without_the_checksum_would_not_be(layout: Layout) -> None:
    recording = recording_of(layout)
    rows = damaged(Coding.of("identity", IdentityCodec(layout), recording), recording.updates, trials=6)
    assert [(row.kind, row.amount) for row in rows] == [
        *(("bits", n) for n in (1, 8, 64)),
        *(("packets", share) for share in (0.01, 0.1, 0.5)),
    ]
    assert all(row.refused == 1.0 and row.error is None for row in rows)
    lost = rows[-1]
    assert lost.unchecked_refused == 0 and lost.unchecked_error is not None
    assert 0.1 < lost.unchecked_error < 1  # zeros stand for what is lost: about half of the energy
    assert rows[0].unchecked_refused < 1


def test_spectra_of_planted_factors() -> None:
    orthogonal = torch.eye(4, 16)
    assert shares_of(orthogonal).tolist() == pytest.approx([0.25] * 4)
    assert math.exp(entropy_of(shares_of(orthogonal))) == pytest.approx(4)
    assert entropy_of(shares_of(torch.outer(torch.ones(4), torch.arange(16.0)))) == pytest.approx(0, abs=1e-9)
    assert excess_kurtosis(torch.tensor([1.0, -1.0, 1.0, -1.0])) == pytest.approx(-2)
    assert excess_kurtosis(torch.randn(200_000, generator=torch.Generator().manual_seed(0))) == pytest.approx(
        0, abs=0.1
    )

    layout = Layout.of({"0.lora_A.weight": (4, 16), "0.lora_B.weight": (16, 4), "0.norm.weight": (16,)})
    factors = {"0.lora_A.weight": orthogonal, "0.lora_B.weight": torch.ones(16, 4)}
    one = layout.to_blocks({**factors, "0.norm.weight": torch.ones(16)})  # a vector has no spectrum
    rows = spectra(Recording(layout, (Update(1, 0, one), Update(1, 1, -0.5 * one))))
    by = {(row.of, row.factor): row for row in rows}
    assert by["clients", "A"].effective_rank == pytest.approx(4)
    assert by["global", "B"].effective_rank == pytest.approx(1)
    assert by["global", "B"].rms == pytest.approx(0.25)
    assert all(sum(row.histogram) == pytest.approx(1) and sum(row.shares) == pytest.approx(1) for row in rows)


def test_places_in_the_model(layout: Layout) -> None:
    assert [(layer_of(block), factor_of(block)) for block in layout.blocks] == [(0, "A"), (0, "B"), (1, "A"), (1, "B")]
    unnamed = Layout.of({"head": (4, 16), "tail": (16, 4)})
    assert [(layer_of(block), factor_of(block)) for block in unnamed.blocks] == [(None, "A"), (None, "B")]
    vectors = Layout.of({"0.lora_magnitude_vector": (16,), "norm.weight": (16,)})
    assert [(layer_of(block), factor_of(block)) for block in vectors.blocks] == [(0, "vector"), (None, "vector")]


def test_work_counts_products_of_codec_and_model(layout: Layout) -> None:
    recording = recording_of(layout)
    work = work_of(Coding.of("identity", IdentityCodec(layout), recording), recording.updates[0], 7, repeats=1)
    assert (work.num_learned, work.encode_operations) == (7, 0)
    assert work.payload_bytes == 16 + 4 * layout.num_parameters and work.encode_seconds > 0
    train = TrainSettings(batch_size=2)
    one, two = (step_work(ModelSettings(), LoraSettings(), train, window) for window in (16, 32))
    assert (one.tokens, two.tokens, one.num_adapter) == (32, 64, 49_152)
    weights = one.forward_operations / (2 * one.tokens)  # those that are multiplied with each token, or nearly
    assert 0.5 * one.num_parameters < weights < 1.5 * one.num_parameters
    assert 2 * one.forward_operations < two.forward_operations < 2.2 * one.forward_operations


def test_the_updates_that_are_tried_are_the_last_whole_rounds(layout: Layout) -> None:
    chosen = spread(recording_of(layout).updates, 3)
    assert [(update.round, update.client) for update in chosen] == [(2, 0), (3, 0), (3, 1)]


def test_rows_keep_six_digits_and_no_infinity() -> None:
    assert rounded({"x": 1}) == {"x": 1}
    assert rounded([1.23456789, math.inf, 3, "a", None]) == [1.23457, None, 3, "a", None]


@pytest.mark.parametrize(
    ("text", "down", "up", "delay"),
    [("10mbit", 1e7, 1e7, 0), ("10mbit/50ms", 1e7, 1e7, 0.05), ("1.5gbit:100kbit/2s", 1.5e9, 1e5, 2)],
)
def test_a_link_says_what_it_is(text: str, down: float, up: float, delay: float) -> None:
    link = Link.of(text)
    assert (link.down, link.up, link.delay) == (down, up, delay)


@pytest.mark.parametrize("text", ["", "10", "10mb", "0mbit", "10mbit/50", "10mbit:/5ms", "1.2.3mbit", "-1mbit"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="link"):
        Link.of(text)


def test_the_course_of_a_run_counts_all_bytes_and_waits_for_the_slowest(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "x")
    ups = [Uplink(r, p, 1000 * (p + 1), "", None, 2.0, 1.0) for r in (1, 2) for p in (0, 1)]
    downs = [Downlink(r, p, step_bytes=500) for r in (1, 2) for p in (0, 1)]
    results = RunResults(settings, 10, [4.0, 3.0, 2.5], ups, downlinks=downs, delivery_bytes=[70, 80])
    link = Link.of("8kbit/1s")  # a kilobyte a second
    start, first, second = course(results, link)
    assert (start.bytes, start.seconds, start.heldout_loss) == (0, 0.0, 4.0)
    assert first.bytes == 3000 + 1000 + 70
    assert second.bytes == results.account().total == account_of(ups, downs, 80).total
    assert first.link_seconds == pytest.approx(2 * 1 + 2.0 + 0.5)
    assert second.link_seconds == pytest.approx(9.0)
    assert second.seconds == pytest.approx(15.0)
    with pytest.raises(ValueError, match="sent nothing"):
        course(replace(results, uplinks=[]), link)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    settings = settings_for(folder, "dense", arm="dense", record=str(folder / "updates.safetensors"))
    settings.federation.rounds = 2
    results = run(settings, folder)
    (folder / "dense" / "results.json").write_text(json.dumps(results.to_json()))
    return folder


def test_the_program_analyses_a_recorded_run(recorded: Path, tmp_path: Path, run_program: RunProgram) -> None:
    asked = ["--output", str(tmp_path), "--codecs", "int8,resnet", "--network-steps", "1", "--updates", "2"]
    only = ["--only", "snr,rate,noise,damage,spectra,work,loss"]
    status, out, err = run_program(main, [str(recorded / "dense"), *only, *asked])
    assert status == 0, err
    content = json.loads((tmp_path / "analyses.json").read_text())
    assert [row["run"] for row in content["runs"]] == ["dense"]
    assert content["loss"][-1]["heldout_loss"] < content["loss"][0]["heldout_loss"]
    assert {row["codec"]: row["reads_input"] for row in content["control"]} == {"int8": True, "resnet": False}
    assert all(row["refused"] == 1.0 for row in content["damage"])
    assert len(content["snr"]) == 2 * (4 * 2 + 1)  # codecs, layers, factors, and whole
    assert content["model"][0]["num_adapter"] == content["runs"][0]["parameters"] == 49_152
    assert 500_000 < (tmp_path / "analyses.html").stat().st_size < 2_000_000
    with (tmp_path / "rate.csv").open() as file:
        assert [row["codec"] for row in csv.DictReader(file)] == [row["codec"] for row in content["rate"]]
    assert str(recorded) not in (tmp_path / "analyses.json").read_text()
    assert str(tmp_path / "analyses.json") in out and str(tmp_path / "rate.csv") in out


def test_one_artifact_over_recordings_of_several_ranks(tmp_path: Path, run_program: RunProgram) -> None:
    for rank in (8, 4):
        shapes = {"0.q.lora_A.weight": (rank, 64), "0.q.lora_B.weight": (64, rank)}
        updates = {(r, c): heavy_tailed_update(10 * r + c, shapes) for r in range(1, 4) for c in range(2)}
        save_recording(updates, {}, tmp_path / f"rank{rank}.safetensors")
    runs = [str(tmp_path / f"rank{rank}.safetensors") for rank in (8, 4)]
    status, _, err = run_program(main, [*runs, "--only", "transfer", "--rate", "2", "--output", str(tmp_path)])
    assert status == 0 and "rank4: a recording alone" in err
    rows = json.loads((tmp_path / "analyses.json").read_text())["transfer"]
    assert [(row["artifact"], row["run"]) for row in rows] == [
        (artifact, run)
        for artifact in ("ships with the project", "trained on rank8", "trained on rank4")
        for run in ("rank8", "rank4")
    ]
    assert all(0 < row["error"] < 1 and not row["refused"] for row in rows)


def test_a_run_without_its_recording_says_what_is_lacking(
    recorded: Path, tmp_path: Path, run_program: RunProgram
) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    content = json.loads((recorded / "dense" / "results.json").read_text())
    content["settings"]["record"] = str(tmp_path / "nowhere" / "gone.safetensors")
    (folder / "results.json").write_text(json.dumps(content))
    status, _, err = run_program(main, [str(folder), "--output", str(tmp_path / "out")])
    assert status == 0 and "its recording gone.safetensors is gone" in err
    assert {*json.loads((tmp_path / "out" / "analyses.json").read_text())} == {
        "asked",
        "notes",
        "runs",
        "loss",
        "made_with",
    }


def test_whose_folder_it_is_may_not_ask_for_code_of_the_models(recorded: Path, tmp_path: Path) -> None:
    content = json.loads((recorded / "dense" / "results.json").read_text())
    content["settings"]["model"]["trust_remote_code"] = True
    (tmp_path / "results.json").write_text(json.dumps(content))
    (subject,) = read_subjects([str(tmp_path)])
    assert subject.results is not None and not subject.results.settings.model.trust_remote_code


def test_the_program_knows_every_analysis() -> None:
    assert ANALYSES.split(",") == [*SECTIONS]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["NOWHERE"], "is neither a run's output folder nor a recording"),
        (["EMPTY"], "holds no results.json"),
        (["BROKEN"], "is not what a run writes"),
        (["TEXT.safetensors"], "is no safetensors file"),
        (["RUN", "--codecs", "learned,none"], "--codecs holds 'none'"),
        (["RUN", "--only", "snr,colour"], "--only holds 'colour'"),
        (["RUN", "--bits", "0.1,x"], "numbers with commas"),
        (["RUN", "--rate", "0"], "more than 0"),
        (["RUN", "--updates", "0"], "--updates 0 must be at least 1"),
        (["RUN", "--network-steps", "-1"], "--network-steps -1 must be at least 0"),
        (["RUN", "--link", "fast"], "'fast': a link is"),
        (["RUN", "--codec", "NOWHERE"], "is no folder"),
    ],
)
def test_what_cannot_be_analysed_is_refused_in_one_line(
    arguments: list[str], said: str, recorded: Path, tmp_path: Path, run_program: RunProgram
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "results.json").write_text('{"settings": 3}')
    (tmp_path / "TEXT.safetensors").write_text("text")
    places = {"RUN": str(recorded / "dense")}
    given = [places.get(one, str(tmp_path / one) if one.isupper() or "TEXT" in one else one) for one in arguments]
    status, out, err = run_program(main, [*given, "--output", str(tmp_path / "out")])
    assert (status, out) == (1, "")
    assert said in err and len(err.splitlines()) == 1 and err.startswith("error: ")


def test_an_artifact_for_another_geometry_is_left_out_and_said(
    recorded: Path, tmp_path: Path, run_program: RunProgram
) -> None:
    (tmp_path / "empty").mkdir()
    asked = ["--only", "rate", "--codecs", "identity", "--codec", str(tmp_path / "empty"), "--output", str(tmp_path)]
    status, _, err = run_program(main, [str(recorded / "dense"), *asked])
    assert status == 0 and "--codec empty is left out" in err


def test_the_bench_makes_every_run_and_hands_them_on(
    tmp_path: Path, run_program: RunProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, list[str]] = {}
    analysed: list[str] = []

    def analyse(module: str, arguments: list[str]) -> None:
        analysed.extend(arguments)
        folder = Path(arguments[arguments.index("--output") + 1])
        folder.mkdir()
        for name in bench.analyses.FILES:
            (folder / name).write_text(module)

    monkeypatch.setattr(bench.analyses, "write_real_text", lambda folder: None)
    monkeypatch.setattr(bench.analyses, "run_arm", lambda name, output, settings: made.setdefault(name, settings))
    monkeypatch.setattr(bench.analyses, "run_program", analyse)
    asked = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "train.lr=0.1"]
    status, out, err = run_program(bench.analyses.main, asked)
    assert status == 0 and "minutes" in out, err
    assert made.keys() == bench.analyses.RUNS.keys()
    assert all("train.lr=0.1" in settings for settings in made.values())
    for settings in made.values():
        assert any(one.startswith("record=") for one in settings) == ("arm=dense" in settings)
    assert [Path(one).name for one in analysed[:4]] == ["smollm2", "embedded", "embedded-rank-4", "embedded-coded"]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["analyses.html", "analyses.json"]
