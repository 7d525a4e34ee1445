"""Trains the embedded base model: a tiny LLaMA on the prose of Python's standard library.

    python -m assets.pretrain [--out assets/tiny-llama] [--steps 1600] [--seed 0]
    python -m assets.pretrain --out outputs/second --steps 500 --width 128 --layers 3   # another model, for benches

Writes a Hugging Face model directory: config.json, model.safetensors (bf16), tokenizer.json, README.md (model card
with the data, the losses and the digest). A few minutes on a GPU, about half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.windows import Windows, next_token_loss
from tasks.stdlib import prose
from tasks.windows import heldout_loss, windows_of

WINDOW = 128
BATCH = 24
PEAK_LR = 3e-3
HEAD_WIDTH = 32


def train_tokenizer(texts: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>"]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def build_model(vocab_size: int, end_token: int, width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=end_token,
        eos_token_id=end_token,
        pad_token_id=end_token,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    warmup = min(100, steps // 10)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    return PEAK_LR * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/tiny-llama"))
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--width", type=int, default=192, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.width < HEAD_WIDTH or args.width % HEAD_WIDTH:
        parser.error(f"--width {args.width}: choose a multiple of {HEAD_WIDTH}")
    torch.manual_seed(args.seed)

    texts = prose()
    heldout_texts, train_texts = texts[::50], [text for i, text in enumerate(texts) if i % 50]
    tokenizer = train_tokenizer(train_texts)
    train, heldout = (windows_of(part, tokenizer, WINDOW) for part in (train_texts, heldout_texts))
    model = build_model(len(tokenizer), tokenizer.eos_token_id, args.width, args.layers)
    stream = train.ids.flatten()
    print(f"{stream.numel():,} tokens of prose, {sum(p.numel() for p in model.parameters()):,} parameters")

    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("pre-training", total=args.steps)
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps)
            starts = torch.randint(len(stream) - WINDOW, (BATCH,))
            batch = torch.stack([stream[s : s + WINDOW] for s in starts])
            model.train()
            loss = next_token_loss(model, Windows.whole(batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(bar, advance=1, description=f"pre-training, loss {loss.item():.3f}")
            if (step + 1) % 400 == 0:
                progress.print(f"step {step + 1}: held-out loss {heldout_loss(model, heldout):.3f}")

    model.to(torch.bfloat16)
    loss_bf16 = heldout_loss(model, heldout)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    digest = hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest()
    (args.out / "README.md").write_text(
        MODEL_CARD.format(
            loss=loss_bf16,
            tokens=stream.numel(),
            steps=args.steps,
            name=args.out.name,
            width=args.width,
            layers=args.layers,
            heads=args.width // HEAD_WIDTH,
            seed=args.seed,
            digest=digest,
            python=platform.python_version(),
            torch=torch.__version__,
            window=WINDOW,
            batch=BATCH,
        )
    )


MODEL_CARD = """---
license: apache-2.0
language: en
---
# {name}: a base model for demo, tests and benches

A LLaMA of {layers} layers, width {width}, {heads} heads and a byte-level BPE of 1,024 tokens, so small that a
federation of it trains on two CPU cores. It is a stand-in for a real model in the demo and the tests, and good for
nothing else.

- Data: the prose of Python {python}'s standard library (docstrings and `pydoc_data.topics`), {tokens:,} tokens.
- Training: `python -m assets.pretrain --steps {steps} --width {width} --layers {layers} --seed {seed}`, AdamW,
  {batch} windows of {window} tokens a step, torch {torch}.
- Held-out loss on prose: {loss:.3f} nats per token (every fiftieth text, bf16 weights).
- SHA-256 of `model.safetensors`: `{digest}`
"""

if __name__ == "__main__":
    main()
