"""Directions that both ends derive: from priors and from how the adapter moved; and what is noticed if they differ."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import InProcessGrid, heavy_tailed_update
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapters.model import adapter_parts, adapter_shapes, empty_model
from client.app import app as client_app
from conf.basis import codecs_of
from conf.schema import FederationSettings, Settings
from gradcodec.artifact import Artifact, save_artifact
from gradcodec.errors import ArtifactError, CodecError
from gradcodec.exchange import decode_blocks, encode_update, max_payload_bytes
from gradcodec.layout import Layout
from gradcodec.learned.basis import Prior, derive, sketch
from gradcodec.learned.codec import LearnedCodec
from gradcodec.learned.fit import DerivedSample, Sample, fit_general
from gradcodec.learned.tables import LearnedTables
from gradcodec.rounds import DerivedCodecs, SameCodec
from gradcodec.settings import CodecSettings, check_codec
from server.run.federation import run_federation

TINY = Path("assets/tiny-llama").absolute()


def prior_of(width: int, seed: int, count: int = 40) -> Prior:
    generator = torch.Generator().manual_seed(seed)
    directions_WK = torch.linalg.qr(torch.randn(width, min(count, width), generator=generator))[0]
    shares_K = torch.rand(directions_WK.shape[1], generator=generator).sort(descending=True)[0]
    return Prior(directions_WK, shares_K / shares_K.sum())


@pytest.fixture(scope="module")
def priors(layout: Layout) -> dict[str, Prior]:
    return {block.name: prior_of(block.width, i) for i, block in enumerate(layout.blocks)}


@pytest.fixture(scope="module")
def general(layout: Layout, priors: dict[str, Prior]) -> LearnedTables:
    """Trained on updates of which a good part lies where the priors say."""
    leading = derive(layout, priors, None)
    samples = [Sample(update_within(layout, priors, seed), None) for seed in range(6)]
    return fit_general([DerivedSample(layout, sample, leading) for sample in samples], passes=2)


def update_within(layout: Layout, priors: dict[str, Prior], seed: int) -> Tensor:
    blocks_RC = layout.to_blocks(heavy_tailed_update(seed)) * 0.3
    generator = torch.Generator().manual_seed(1000 + seed)
    for block in layout.blocks:
        strongest_WK = priors[block.name].directions_WK[:, :6]
        inside_RW = torch.randn(block.rank, 6, generator=generator) @ strongest_WK.T
        blocks_RC[: block.rank, block.start : block.stop] += 4e-3 * inside_RW
    return blocks_RC


def test_directions_are_orthonormal_and_hold_what_is_known(layout: Layout, priors: dict[str, Prior]) -> None:
    moved_RC = layout.to_blocks(heavy_tailed_update(5))
    for name, leading_WK in derive(layout, priors, moved_RC, most=24).items():
        block = next(block for block in layout.blocks if block.name == name)
        assert leading_WK.shape == (block.width, min(24, block.width // 2))
        assert torch.allclose(leading_WK.T @ leading_WK, torch.eye(leading_WK.shape[1]).double(), atol=1e-9)
        rows_RW = moved_RC[: block.rank, block.start : block.stop].double()
        assert (rows_RW @ leading_WK).norm() > 0.9 * rows_RW.norm()
        strongest_W = priors[name].directions_WK[:, 0].double()
        assert (strongest_W @ leading_WK).norm() > 0.9
    alone = derive(layout, {}, moved_RC)  # a server without a base model has the history
    assert {len(basis_WK.T) for basis_WK in alone.values()} <= {1, 2, 3, 4, 5, 6, 7, 8}
    assert derive(layout, {}, None) == derive(layout, {}, torch.zeros_like(moved_RC)) == {}
    with pytest.raises(CodecError, match="another model"):
        derive(layout, {layout.blocks[0].name: prior_of(50, 0)}, None)


def test_a_sketch_sees_every_difference_but_signs_and_rounding(layout: Layout, priors: dict[str, Prior]) -> None:
    leading = derive(layout, priors, None)
    name = layout.blocks[0].name
    other = leading[name] * torch.where(torch.arange(leading[name].shape[1]) % 2 == 0, -1.0, 1.0)
    noise = 1e-9 * torch.randn(other.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert sketch(leading | {name: other + noise}) == sketch(leading)
    swapped = leading[name].clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    assert sketch(leading | {name: swapped}) != sketch(leading)
    quantised = {
        name: Prior(prior.directions_WK + 2e-3 * torch.randn_like(prior.directions_WK), prior.shares_K)
        for name, prior in priors.items()
    }
    assert sketch(derive(layout, quantised, None)) != sketch(leading)


def test_both_ends_derive_one_codec_a_round_and_others_are_refused(
    layout: Layout, priors: dict[str, Prior], general: LearnedTables
) -> None:
    start = heavy_tailed_update(50)
    ends = [DerivedCodecs(LearnedCodec(layout, general, b"same"), priors, start) for _ in range(2)]
    later = {name: tensor + 0.1 * heavy_tailed_update(51)[name] for name, tensor in start.items()}
    update_RC = update_within(layout, priors, 7)
    update, budget = layout.to_update(update_RC), max_payload_bytes(0.5, layout.num_parameters)
    ids = set()
    for adapter in (start, later):
        client, server = (end.at(adapter) for end in ends)
        assert client.id == server.id
        ids.add(client.id)
        payload, residual = encode_update(update, None, codec=client, max_bytes=budget)
        assert len(payload) <= budget
        decoded_RC = decode_blocks(payload, codec=server)
        assert torch.allclose(decoded_RC + residual.error_RC, residual.target_RC, atol=1e-6)
        assert server is ends[1].at({name: tensor.clone() for name, tensor in adapter.items()})  # one for all payloads
    assert len(ids) == 2
    with pytest.raises(CodecError, match="the same base model"):
        decode_blocks(payload, codec=ends[1].at(start))  # a client that missed a round
    other = {**priors, layout.blocks[1].name: prior_of(layout.blocks[1].width, 99)}
    stranger = DerivedCodecs(LearnedCodec(layout, general, b"same"), other, start)
    with pytest.raises(CodecError, match="the same base model"):
        decode_blocks(payload, codec=stranger.at(later))
    assert SameCodec(client).at(start) is client


def test_derived_directions_pay(layout: Layout, priors: dict[str, Prior], general: LearnedTables) -> None:
    """Beside the same tables with every tensor's own columns."""
    codec = LearnedCodec(layout, general, b"same")
    update = layout.to_update(update_within(layout, priors, 8))
    budget = max_payload_bytes(0.5, layout.num_parameters)
    left = {}
    for name, one in (("own columns", codec), ("derived", codec.starting_from(priors, None))):
        _, residual = encode_update(update, None, codec=one, max_bytes=budget)
        left[name] = float(residual.error_RC.square().sum() / residual.target_RC.square().sum())
    assert left["derived"] < 0.7 * left["own columns"]


def test_general_tables_come_back_from_an_artifact(general: LearnedTables) -> None:
    back = LearnedTables.from_tensors(general.to_tensors())
    assert (back.any_rows, back.any_columns) == (general.any_rows, general.any_columns)
    assert len(back.any_columns[0]) > 10
    assert not back.leading
    assert not back.expected
    assert replace(back, any_columns=((0,), (0,))).to_tensors().keys() == back.to_tensors().keys() - {
        "any_columns.a",
        "any_columns.b",
    }


def settings_for(folder: Path, **changes: object) -> Settings:
    settings = Settings(output=str(folder / "run"), run_id="derived")
    settings.model.path = str(TINY)
    settings.task.window, settings.task.heldout_windows, settings.task.max_windows = 32, 4, 200
    settings.train.update, settings.train.lr, settings.train.steps = "delta", 0.005, 2
    settings.train.batch_size = settings.train.micro_batch_size = 4
    settings.federation = FederationSettings(rounds=3, num_clients=3, clients_per_round=2, wait_seconds=5.0)
    for key, value in changes.items():
        setattr(settings, key, value)
    return settings


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CG_FEDLLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("caches")
def test_a_federation_derives_its_directions_and_a_resumed_one_the_same(tmp_path: Path) -> None:
    grid = InProcessGrid(client_app, 3, {"memory": str(tmp_path / "memory")})
    results = run_federation(grid, settings_for(tmp_path))
    assert not results.faults
    assert results.heldout_loss[-1] < results.heldout_loss[0] - 0.02
    assert all(8 * uplink.payload_bytes <= 0.5 * results.num_parameters for uplink in results.uplinks)
    settings = settings_for(tmp_path, resume=str(tmp_path / "run"), from_round=2)
    again = run_federation(InProcessGrid(client_app, 3, {"memory": str(tmp_path / "memory")}), settings)
    assert again.heldout_loss == results.heldout_loss


@pytest.mark.usefixtures("caches")
def test_a_node_with_another_base_model_is_noticed_in_its_first_round(tmp_path: Path) -> None:
    """It trains on other weights than it says; its payloads would decode into noise."""
    shutil.copytree(TINY, tmp_path / "other")
    tensors = load_file(TINY / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("o_proj.weight"):  # as a checkpoint that was quantised and taken out again
            scale = tensor.float().abs().max() / 127
            tensors[name] = ((tensor.float() / scale).round() * scale).to(tensor.dtype)
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    grid = InProcessGrid(client_app, 3, {"memory": str(tmp_path / "memory")})
    grid.contexts[1000].node_config["model-path"] = str(tmp_path / "other")
    settings = settings_for(tmp_path)
    settings.federation.clients_per_round, settings.federation.rounds = 3, 1
    results = run_federation(grid, settings)
    assert [fault.partition for fault in results.faults] == [0]
    assert "the same base model" in results.faults[0].reason
    assert {uplink.partition for uplink in results.uplinks} == {1, 2}


def test_only_the_learned_codec_derives_directions() -> None:
    with pytest.raises(CodecError, match="basis=model: the codec rotated has no directions"):
        check_codec(CodecSettings(name="rotated", basis="model"))
    with pytest.raises(CodecError, match="basis='weights' is none of auto, artifact, model, moves"):
        check_codec(CodecSettings(artifact="x", basis="weights"))


@pytest.mark.usefixtures("caches")
def test_an_artifact_with_directions_of_its_own_is_refused_for_derived_ones(
    tmp_path: Path, general: LearnedTables
) -> None:
    settings = settings_for(tmp_path)
    layout, seeded = layout_of(settings)
    own = replace(general, any_columns=((0,), (0,)))
    save_artifact(Artifact("learned", own.to_tensors(), {}), tmp_path / "own")
    settings.codec.artifact, settings.codec.basis = str(tmp_path / "own"), "model"
    with pytest.raises(ArtifactError, match=r"codec\.basis=model take the general one"):
        codecs_of(settings, layout, seeded)
    settings.codec.basis = "auto"
    assert isinstance(codecs_of(settings, layout, seeded), SameCodec)
    assert settings.codec.basis == "artifact"


@pytest.mark.usefixtures("caches")
def test_directions_are_derived_unless_the_artifact_has_some_and_without_weights_from_the_moves_alone(
    tmp_path: Path,
) -> None:
    settings = settings_for(tmp_path)
    layout, seeded = layout_of(settings)
    moved = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in seeded.items()}
    for basis in ("model", "auto"):
        settings.codec.basis = basis
        codecs = codecs_of(settings, layout, seeded)
        assert isinstance(codecs, DerivedCodecs)
        assert settings.codec.basis == "model", "nodes are told"
    known = codecs.at(seeded).id
    shutil.copytree(TINY, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    settings.model.path = str(tmp_path / "pickled")  # a checkpoint as PyTorch wrote them once
    settings.codec.basis = "auto"
    codecs = codecs_of(settings, layout, seeded)
    assert codecs.at(seeded).id != known
    assert codecs.at(moved).id != codecs.at(seeded).id
    assert settings.codec.basis == "moves", "nodes are told"
    alone = codecs.at(moved).id
    settings.model.path = str(TINY)
    assert codecs_of(settings, layout, seeded).at(moved).id == alone, "whatever a node could read"
    quantised = AutoModelForCausalLM.from_pretrained(
        TINY, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    quantised.save_pretrained(tmp_path / "quantised")
    settings.model.path, settings.codec.basis = str(tmp_path / "quantised"), "auto"
    assert codecs_of(settings, layout, seeded).at(moved).id == alone
    settings.codec.basis = "model"
    with pytest.raises(ValueError, match="before quantisation"):
        codecs_of(settings, layout, seeded)
    settings.model.path = str(tmp_path / "pickled")
    with pytest.raises(ValueError, match=r"no model\*\.safetensors"):
        codecs_of(settings, layout, seeded)


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path)
    layout, seeded = layout_of(settings)
    monkeypatch.setenv("CG_FEDLLM_CACHE", str(tmp_path / "cache"))
    known = codecs_of(settings, layout, seeded).at(seeded).id
    (tmp_path / "file").touch()
    monkeypatch.setenv("CG_FEDLLM_CACHE", str(tmp_path / "file"))
    assert codecs_of(settings, layout, seeded).at(seeded).id == known


def layout_of(settings: Settings) -> tuple[Layout, dict[str, torch.Tensor]]:
    """Of the settings' adapter, and the one that the seed gives."""
    model = empty_model(settings.model, settings.lora)
    layout = Layout.of(adapter_shapes(model), adapter_parts(model))
    return layout, {name: torch.zeros(shape) for name, shape in layout.shapes.items()}
