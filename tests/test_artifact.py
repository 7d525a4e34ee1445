from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gradcodec.artifact import Artifact, load_artifact, save_artifact
from gradcodec.build import build_codec
from gradcodec.errors import ArtifactError, CodecError
from gradcodec.layout import Layout
from gradcodec.learned.tables import LearnedTables
from gradcodec.settings import CodecSettings


@pytest.fixture
def folder(tmp_path: Path, learned_tables: LearnedTables) -> Path:
    save_artifact(Artifact("learned", learned_tables.to_tensors(), {"codec": {}, "trained": {}}), tmp_path / "codec")
    return tmp_path / "codec"


def test_what_is_saved_is_loaded(folder: Path, learned_tables: LearnedTables) -> None:
    loaded = LearnedTables.from_tensors(load_artifact(folder, "learned").tensors)
    assert loaded.to_tensors().keys() == learned_tables.to_tensors().keys()
    for name, tensor in learned_tables.to_tensors().items():
        assert torch.equal(loaded.to_tensors()[name], tensor)


def test_an_artifact_of_one_file_is_the_same(folder: Path, tmp_path: Path) -> None:
    artifact, whole = load_artifact(folder, "learned"), tmp_path / "whole"
    save_artifact(artifact, whole, in_one_file=True)
    assert [file.name for file in whole.iterdir()] == ["codec.json"]
    assert load_artifact(whole, "learned").digest == artifact.digest
    for weights, said in (("{}", "is damaged"), ("", "does not match its digest")):
        _edit(whole, weights=weights)
        with pytest.raises(ArtifactError, match=said):
            load_artifact(whole, "learned")


def test_two_nodes_with_one_artifact_have_one_codec_id(folder: Path, layout: Layout) -> None:
    settings = CodecSettings(artifact=str(folder), digest=load_artifact(folder, "learned").digest)
    assert build_codec(settings, layout).id == build_codec(settings, layout).id


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "codec.json").unlink(), "holds no codec artifact"),
        (lambda f: (f / "codec.json").write_text("{"), "is damaged"),
        (lambda f: (f / "codec.safetensors").write_bytes(b"x" * 100), "does not match its digest"),
        (lambda f: (f / "codec.json").write_text("[" * 100_000), "is damaged"),
        (lambda f: (f / "codec.json").write_text('{"a":' * 100_000), "is damaged"),
        (lambda f: (f / "codec.json").write_text(" " * (1 << 20) + "{}"), "larger than"),
        (lambda f: _edit(f, format=2), "format 2"),
        (lambda f: _edit(f, kind="resnet"), "not 'learned'"),
        (lambda f: _edit(f, settings={"codec": {"x": 1}}), "changed by hand"),
    ],
)
def test_a_damaged_artifact_is_refused_and_named(folder: Path, damage: object, said: str) -> None:
    damage(folder)  # type: ignore[operator]
    with pytest.raises(CodecError) as error:
        load_artifact(folder, "learned")
    assert said in str(error.value)
    assert str(folder) in str(error.value)


def _edit(folder: Path, **changes: object) -> None:
    head = json.loads((folder / "codec.json").read_text())
    (folder / "codec.json").write_text(json.dumps(head | changes))


def test_another_artifact_than_the_servers_is_refused(folder: Path, layout: Layout) -> None:
    with pytest.raises(CodecError, match="both need a copy of the same artifact"):
        build_codec(CodecSettings(artifact=str(folder), digest="0" * 64), layout)


def test_a_resnet_of_another_geometry_is_refused(tmp_path: Path, layout: Layout) -> None:
    settings = {"codec": {"layout": "00000000", "literal": False}, "trained": {}}
    save_artifact(Artifact("resnet", {"x": torch.zeros(1)}, settings), tmp_path / "r")
    with pytest.raises(CodecError, match="trained for layout 00000000"):
        build_codec(CodecSettings(name="resnet", artifact=str(tmp_path / "r")), layout)


def test_an_interrupted_save_leaves_the_old_artifact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_artifact(folder, "learned").digest

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(Artifact("learned", {"x": torch.zeros(3)}, {}), folder)
    monkeypatch.undo()
    assert load_artifact(folder, "learned").digest == before
    assert [path.name for path in folder.parent.iterdir()] == ["codec"]


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CodecError, match="choose another folder"):
        save_artifact(Artifact("learned", {"x": torch.zeros(1)}, {}), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CodecError, match="cannot write"):
        save_artifact(Artifact("learned", {"x": torch.zeros(1)}, {}), tmp_path / "file" / "codec")
