"""One table of codecs: what it says of each is what its class does, and a stranger's codec needs one entry more."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import heavy_tailed_update
from test_settings import composed
from torch import Tensor

from conf.checks import check_settings
from gradcodec.artifact import Artifact, load_artifact
from gradcodec.build import build_codec, byte_budget, codec_of, payload_bytes
from gradcodec.codec import Codec, WithoutSideInformation, codec_id
from gradcodec.errors import ArtifactError, CodecError
from gradcodec.exchange import decode_update, encode_update
from gradcodec.frame import Codes
from gradcodec.layout import Layout
from gradcodec.paper.networks import ARCHITECTURES
from gradcodec.registry import (
    CodecEntry,
    codec_names,
    entry_of,
    loaded,
    names_with_a_rate,
    register,
    trainable_names,
    trained_by,
    unregister,
)
from gradcodec.settings import CodecSettings, check_codec
from server.plan import plan_of


@dataclass(frozen=True)
class HalfCodec(WithoutSideInformation):
    """A stranger's codec: float16, in two streams."""

    layout: Layout
    id: bytes = codec_id("half/1")
    num_streams: int = 2

    @classmethod
    def stream_bytes(cls, layout: Layout) -> tuple[int, ...]:
        return layout.num_parameters, layout.num_parameters

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        halves = self.layout.flatten(blocks_RC).half().numpy().tobytes()
        return halves[: len(halves) // 2], halves[len(halves) // 2 :]

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        if len(b"".join(codes)) != 2 * self.layout.num_parameters:
            raise CodecError("another number of values")
        return self.layout.unflatten(torch.frombuffer(bytearray(b"".join(codes)), dtype=torch.float16).float())


@pytest.fixture
def half() -> Iterator[CodecEntry]:
    entry = CodecEntry("half", f"{__name__}:HalfCodec")
    register(entry)
    yield entry
    unregister("half")


def test_a_codec_of_ones_own_needs_one_entry_and_one_class(half: CodecEntry, layout: Layout) -> None:
    settings = CodecSettings("half")
    check_codec(settings)
    codec = build_codec(settings, layout)
    update = heavy_tailed_update(0)
    payload, _ = encode_update(update, None, codec=codec, max_bytes=byte_budget(settings, layout))
    assert all(torch.equal(t, update[name].half().float()) for name, t in decode_update(payload, codec=codec).items())
    assert payload_bytes(settings, layout) == len(payload)
    with pytest.raises(CodecError, match="the codec half has one rate"):
        check_codec(CodecSettings("half", snr_db=3.0))


def test_a_dry_run_and_the_settings_know_a_codec_of_ones_own(half: CodecEntry) -> None:
    plan = plan_of(composed("task=alpaca", "codec.name=half"))
    assert plan.payload_bytes == payload_bytes(plan.settings.codec, plan.layout)
    assert 2 * plan.layout.num_parameters < (plan.payload_bytes or 0) < 2 * plan.layout.num_parameters + 32


def test_a_name_is_registered_once(half: CodecEntry) -> None:
    with pytest.raises(ValueError, match="'half' is registered already"):
        register(half)
    with pytest.raises(ValueError, match="cannot be trained as 'learned'"):
        register(CodecEntry("own", "own:Own", trained_as=("learned",)))
    assert "own" not in codec_names()


@pytest.mark.parametrize("name", [name for name in codec_names() if not entry_of(name).has_rate])
def test_a_codec_of_one_rate_says_its_bytes(name: str, layout: Layout) -> None:
    ranks = {"a.lora_A.weight": (3, 70), "a.lora_B.weight": (129, 3), "b.lora_A.weight": (5, 64), "c": (2, 4099)}
    for shapes in (layout.shapes, {"one.lora_A.weight": (1, 1)}, ranks):
        codec = _built(name, Layout.of(shapes))
        update = {key: torch.randn(shape) for key, shape in shapes.items()}
        assert payload_bytes(CodecSettings(name), codec.layout) == len(encode_update(update, None, codec=codec)[0])


@pytest.mark.parametrize("name", names_with_a_rate())
def test_a_codec_with_a_rate_keeps_to_what_is_planned(name: str, layout: Layout) -> None:
    settings = CodecSettings(name, bits=0.5)
    planned = payload_bytes(settings, layout)
    payload, _ = encode_update(heavy_tailed_update(0), None, codec=build_codec(settings, layout), max_bytes=planned)
    assert planned is not None and 0.8 * planned < len(payload) <= planned
    assert payload_bytes(dataclasses.replace(settings, bits=None), layout) is None


def _built(name: str, layout: Layout) -> Codec:
    if name not in ARCHITECTURES:
        return build_codec(CodecSettings(name), layout)
    settings = {"codec": {"layout": layout.id.hex(), "literal": False}}
    return codec_of(Artifact(name, ARCHITECTURES[name](False).state_dict(), settings), layout)


def test_every_entry_names_what_there_is() -> None:
    for entry in map(entry_of, codec_names()):
        assert hasattr(loaded(entry.codec), "stream_bytes") != entry.has_rate
        assert hasattr(loaded(entry.codec), "from_artifact") == entry.needs_artifact == (entry.trainer is not None)
        assert entry.trainer is None or callable(loaded(entry.trainer))
    assert {trained_by(name).name for name in trainable_names()} == {n for n in codec_names() if entry_of(n).trainer}


def test_an_artifact_of_no_trained_codec_is_refused(layout: Layout) -> None:
    for kind in ("zip", "eden"):
        with pytest.raises(ArtifactError, match=f"kind '{kind}'"):
            codec_of(Artifact(kind, {}, {}), layout)


def test_the_table_is_read_without_torch() -> None:
    program = (
        "import sys, gradcodec.settings, gradcodec.files; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_library_names_no_setting_or_command_of_this_project() -> None:
    folder = Path(importlib.import_module("gradcodec.errors").__file__ or "").parent
    for path in folder.rglob("*.py"):
        text = path.read_text()
        for word in (
            "codec.bits",
            "codec.name",
            "codec.snr_db",
            "codec.artifact=",
            "train.lr",
            "tgap.",
            "python -m",
            "lora.",
        ):
            assert word not in text.replace(".lora_B.", ""), f"{path.name}: {word}"


def test_the_programs_name_the_key_and_the_remedy() -> None:
    with pytest.raises(CodecError, match=r"^codec\.artifact=null: .*train one with `python -m tgap`"):
        check_settings(composed("codec=resnet", "codec.artifact=null"))
    with pytest.raises(CodecError, match=r"^codec\.snr_db=3.0 needs bits"):
        check_settings(composed("codec.snr_db=3", "codec.bits=null"))


def test_a_missing_artifact_says_which(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no codec artifact"):
        load_artifact(tmp_path, "learned")
