"""The apps in ``examples``: two rounds of each on a grid in this process, as they are and coded."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench import flowertune, vision
from bench.flowertune import copy_app, functions
from bench.local_app import run_app_here

EXAMPLES = Path(__file__).parents[1] / "examples"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the fine-tuning: a random model of one layer, whose tokens are words, and a few records."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<end>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    records = [{"instruction": f"say {word}", "response": f"{word} {word} a"} for word in words[1:]]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "num-server-rounds": 2,
        "model.name": str(folder),
        "dataset.name": str(folder / "records.jsonl"),
        "dataset.heldout-every": 5,
        "lora.r": 4,
        "train.max-steps": 2,
        "train.batch-size": 4,
        "train.learning-rate-max": 0.02,
    }


def test_the_diff_applies_and_is_at_most_five_lines(tmp_path: Path) -> None:
    changed = re.findall(r"^[+-](?![+-]).*", (EXAMPLES / "flowertune" / "coded.diff").read_text(), re.MULTILINE)
    assert len(changed) <= 5, "what is taken away counted, too"
    copy_app(tmp_path / "app", 0.5)
    for one in changed:
        files = [path.read_text() for path in (tmp_path / "app" / "flowertune").glob("*.py")]
        assert any(one[1:] in text.splitlines() for text in files) == one.startswith("+")


def test_the_app_that_is_patched_needs_nothing_of_ours_before() -> None:
    for file in (EXAMPLES / "flowertune").rglob("*.py"):
        assert not re.search(r"gradcodec|cg_fedllm|trl|tasks", file.read_text()), file


def test_the_apps_own_meter_shows_what_is_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for name, bits in (("plain", None), ("patched", 0.5), ("finer", 2.0)):
        copy_app(tmp_path / name, bits)
        found[name] = run_app_here(tmp_path / name, settings, 3)
    plain, patched, finer = found["plain"], found["patched"], found["finer"]
    assert plain["heldout_loss"][0] == patched["heldout_loss"][0]
    assert plain["heldout_loss"][-1] < plain["heldout_loss"][0]
    assert patched["heldout_loss"][-1] < patched["heldout_loss"][0]
    dense = 2 * 2 * 3 * 4 * plain["parameters"]  # rounds, ways, clients, bytes
    assert dense <= plain["megabytes"] * MEBIBYTE < 1.2 * dense
    assert patched["megabytes"] < finer["megabytes"] < plain["megabytes"] / 2, "one way of one round is still dense"


@pytest.mark.parametrize("codec", ["dense", "learned", "rotated"])
def test_the_vision_app_runs_dense_and_coded(codec: str) -> None:
    given: dict[str, Any] = {"num-server-rounds": 2, "coded": codec != "dense", "codec": codec, "bits": 2.0}
    found = run_app_here(EXAMPLES / "vision", given, 3)
    assert len(found["accuracy"]) == 3 and found["accuracy"][-1] > found["accuracy"][0]
    whole = 3 * 4 * found["parameters"]
    if codec == "dense":
        assert min(found["bytes_up"] + found["bytes_down"]) > whole
    else:
        assert max(found["bytes_up"] + found["bytes_down"][1:]) < whole / 5


def test_the_functions_are_instructions_and_responses() -> None:
    records = list(islice(functions(), 100))
    assert len(records) == 100
    assert all(record["instruction"].startswith("def ") and record["response"].strip() for record in records)


def test_benches_say_what_is_kept_and_what_is_behind() -> None:
    tuned: list[dict[str, Any]] = [
        {"seed": 0, "bits": None, "heldout_loss": [4.0, 3.0], "megabytes": 8.0, "seconds": 1.0},
        {"seed": 0, "bits": 0.5, "heldout_loss": [4.0, 3.1], "megabytes": 0.5, "seconds": 1.0},
    ]
    plain, coded = flowertune.summary(tuned)
    assert (plain["kept"], plain["fraction_of_bytes"]) == (1.0, 1.0)
    assert (coded["kept"], coded["fraction_of_bytes"]) == (pytest.approx(0.9), 1 / 16)
    common = {"seed": 0, "loss": [1.0, 0.5], "seconds": 1.0}
    seen: list[dict[str, Any]] = [
        {**common, "codec": "dense", "bits": 32.0, "accuracy": [0.1, 0.9], "bytes_up": [50], "bytes_down": [50]},
        {**common, "codec": "learned", "bits": 1.0, "accuracy": [0.1, 0.8], "bytes_up": [5], "bytes_down": [20]},
    ]
    dense, learned = vision.summary(seen)
    assert dense["behind_dense"] == 0.0
    assert (learned["behind_dense"], learned["fraction_of_bytes"]) == (pytest.approx(0.1), 0.25)
