"""Records of an instruction and its response: from a file or the hub, held out or dealt to clients, and as tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flowertune.models import Batch

Record = tuple[str, str]
TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"
IGNORED = -100  # a label that no loss is computed of


def partition(config: dict, number: int, of: int) -> list[Record]:
    """What one client trains on."""
    every = config["dataset.heldout-every"]
    return [one for place, one in enumerate(_records(config["dataset.name"])) if place % every][number::of]


def heldout(config: dict) -> list[Record]:
    """What nobody trains on."""
    return list(_records(config["dataset.name"])[:: config["dataset.heldout-every"]][: config["dataset.heldout-most"]])


def shuffled(records: list[Record], config: dict, seed: str) -> Iterator[Batch]:
    """Batches of a client's round, as many as it makes steps."""
    size, order = config["train.batch-size"], random.Random(seed)
    for _ in range(config["train.max-steps"]):
        yield to_batch(order.sample(records, min(size, len(records))), config)


def in_order(records: list[Record], config: dict) -> Iterator[Batch]:
    """Batches of all records."""
    size = config["train.batch-size"]
    for start in range(0, len(records), size):
        yield to_batch(records[start : start + size], config)


def to_batch(records: list[Record], config: dict) -> Batch:
    """Tokens [B, T], padded on the right; labels are those of the responses."""
    tokenizer, most = _tokenizer(config["model.name"]), config["train.seq-length"]
    rows = []
    for instruction, response in records:
        asked = tokenizer(TEMPLATE.format(instruction), add_special_tokens=False)["input_ids"][: most // 2]
        answered = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((len(asked), (asked + answered)[:most]))
    width = max(len(ids) for _, ids in rows)
    ids_BT = torch.full((len(rows), width), tokenizer.eos_token_id)
    labels_BT, mask_BT = torch.full_like(ids_BT, IGNORED), torch.zeros_like(ids_BT)
    for row, (start, ids) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, start : len(ids)] = ids_BT[row, start : len(ids)]
        mask_BT[row, : len(ids)] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


@cache
def _records(name: str) -> tuple[Record, ...]:
    if Path(name).is_file():
        rows = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        from datasets import load_dataset  # a file does not need it

        rows = load_dataset(name, split="train")
    return tuple(_as_record(row) for row in rows)


def _as_record(row: dict) -> Record:
    instruction = "\n".join(row[key] for key in ("instruction", "input") if row.get(key))
    return instruction, row["response"] if "response" in row else row["output"]


@cache
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(name)
