"""One client's coded round on a model of real size with random weights: seconds a stage, tokens a second, peak memory.

    python -m bench.coded_round --geometry assets/geometries/llama-7b --quantization nf4 [--steps 8] [--json OUT]

Writes random weights of the geometry (its config.json) in the format that users have, loads them as a client does,
trains an adapter on random tokens, encodes the update and decodes it again. The codec's share of the round is what
matters: it should be lost in the training. Works where the model works: on a GPU if there is one. A step and a payload
go before what is timed: kernels are chosen, and with ``--compile`` made, at the first call.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.base import resolve_device
from adapters.finetune import finetune
from adapters.footprint import estimate_memory
from adapters.model import adapter_parts, adapter_shapes, get_adapter, load_model
from adapters.settings import QUANTIZATIONS, LoraSettings, ModelSettings, TrainSettings
from adapters.windows import Windows
from bench.programs import ends_in_a_line
from bench.speed import codec_for, device_name, peak_bytes, wait_for
from conf.output import provenance, write_json
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes
from gradcodec.layout import Layout
from gradcodec.registry import entry_of
from gradcodec.settings import CodecSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", type=Path, default=Path("assets/geometries/llama-7b"), help="has config.json")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="nf4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--bits", type=float, default=0.5)
    parser.add_argument("--artifact")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="model.compile: see what it saves a step")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    with ends_in_a_line(), tempfile.TemporaryDirectory(prefix="coded-round-") as folder:
        spawn = multiprocessing.get_context("spawn")  # a process of its own: its memory is not the round's
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            pool.submit(write_random_weights, args.geometry, Path(folder), getattr(torch, args.dtype)).result()
        figures = measure(args, folder)
    table = Table(title=f"{args.geometry.name}, {args.quantization}, on {figures['device']}", show_header=False)
    for key, value in figures.items():
        text = f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(key.replace("_", " "), text)
    Console().print(table)
    if args.json is not None:
        write_json(
            {**figures, "options": {k: str(v) for k, v in vars(args).items()}, "made_with": provenance()}, args.json
        )


def write_random_weights(geometry: Path, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint of the geometry in safetensors, a normal draw of the usual size in every matrix."""
    if not (geometry / "config.json").is_file():
        raise ValueError(f"--geometry {geometry} holds no config.json")
    config = AutoConfig.from_pretrained(geometry)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, 0.02)
    model.tie_weights()
    model.save_pretrained(folder)


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    settings = ModelSettings(
        path=folder,
        dtype=args.dtype,
        device=args.device,
        quantization=args.quantization,
        gradient_checkpointing=True,
        compile=args.compile,
    )
    lora = LoraSettings(rank=args.rank)
    training = TrainSettings(
        update="delta",
        lr=1.5e-4,
        steps=args.steps,
        batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size,
    )
    device = resolve_device(settings)
    clock = _Clock(device)
    model = load_model(settings, lora, seed=0)
    load = clock.lap()
    layout = Layout.of(adapter_shapes(model), adapter_parts(model))
    codec = codec_for(CodecSettings(artifact=args.artifact), layout, device)
    adapter = get_adapter(model)
    vocabulary = int(model.get_base_model().config.vocab_size)
    drawn = torch.randint(vocabulary, (64, args.window), generator=torch.Generator().manual_seed(0))
    peak_loading = peak_bytes(device)
    held = peak_bytes(device, reset=True)
    clock.lap()
    finetune(model, adapter, Windows.whole(drawn), dataclasses.replace(training, steps=1), seed=0)
    first_step = clock.lap()
    update, loss = finetune(model, adapter, Windows.whole(drawn), training, seed=0)
    train = clock.lap()
    peak_training = peak_bytes(device)
    before_encoding = peak_bytes(device, reset=True)
    budget = max_payload_bytes(args.bits, layout.num_parameters)
    encode_update(update, None, codec=codec, max_bytes=budget)
    clock.lap()
    payload, _ = encode_update(update, None, codec=codec, max_bytes=budget)
    encode = clock.lap()
    decode_update(payload, codec=codec)
    decode = clock.lap()
    estimated = estimate_memory(settings, lora, training, args.window)
    update_bytes = 4 * layout.num_parameters
    tokens = args.steps * args.batch_size * args.window
    return {
        "device": device_name(str(device)),
        "adapter_parameters": layout.num_parameters,
        "payload_bytes": len(payload),
        "train_loss": loss,
        "load_seconds": load,
        "first_step_seconds": first_step,
        "train_seconds": train,
        "encode_seconds": encode,
        "decode_seconds": decode,
        "tokens_per_second": tokens / train,
        "codec_share_of_round": (encode + decode) / (train + encode + decode),
        "peak_bytes_loading": peak_loading,
        "held_bytes": held,
        "peak_bytes_training": peak_training,
        "peak_bytes_encoding": update_bytes + peak_bytes(device) - before_encoding,
        "estimated_bytes_weights": estimated.weights,
        "estimated_bytes_training": estimated.total,
        "estimated_bytes_encoding": entry_of("learned").encoding_updates * update_bytes,
    }


class _Clock:
    """Seconds between laps, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self) -> float:
        wait_for(self._device)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


if __name__ == "__main__":
    main()
