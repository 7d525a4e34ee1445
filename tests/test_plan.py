"""Dry runs: the paper's three settings with its own figures, and what a run would do from its settings alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_settings import composed

from conf.schema import Settings
from server.plan import plan_of

SHAPES = {"llama7b_dolly": "llama-7b", "llama7b_ceval": "llama-7b", "qwen7b_mmlu": "qwen2.5-7b"}


def experiment(name: str, *overrides: str) -> Settings:
    settings = composed(f"+experiment={name}", f"model.path=assets/geometries/{SHAPES[name]}", *overrides)
    assert isinstance(settings, Settings)
    return settings


@pytest.mark.parametrize(
    ("name", "rounds", "clients", "sampled", "batch", "micro", "lr", "epochs", "rank"),
    [
        ("llama7b_dolly", 20, 100, 5, 32, 16, 1.5e-4, 1, 8),
        ("llama7b_ceval", 5, 3, 3, 24, 8, 2.0e-4, 3, 16),
        ("qwen7b_mmlu", 8, 3, 3, 8, 4, 3.5e-4, 2, 8),
    ],
)
def test_experiments_have_the_papers_figures(
    name: str, rounds: int, clients: int, sampled: int, batch: int, micro: int, lr: float, epochs: int, rank: int
) -> None:
    """Section 4.1 and its table."""
    settings = experiment(name)
    federation, training = settings.federation, settings.train
    assert (federation.rounds, federation.num_clients, federation.clients_per_round) == (rounds, clients, sampled)
    assert (training.batch_size, training.micro_batch_size, training.lr) == (batch, micro, lr)
    assert (training.epochs, training.update, settings.lora.rank) == (epochs, "delta", rank)
    assert plan_of(settings).memory.total < 24 * 2**30


def test_llama_7b_takes_the_papers_bytes() -> None:
    """[1, 4096, 2048] values, and at half a bit each its 524,288 bytes a client and round."""
    plan = plan_of(experiment("llama7b_dolly"))
    assert plan.layout.num_parameters == 4096 * 2048
    assert plan.payload_bytes == 524_288
    assert plan.uplinks == 100
    assert (plan.num_records, plan.records_here) == (15_011, False)
    assert plan.steps == 3  # 150 records, a tenth held out, 70 % of the rest: 95 windows in batches of 32


def test_records_that_are_here_are_counted() -> None:
    plan = plan_of(composed("task=stdlib"))
    assert plan.records_here
    assert plan.steps == plan.settings.train.steps


def test_a_dry_run_prints_and_ends() -> None:
    command = [sys.executable, "-m", "server.federate", "+experiment=llama7b_dolly", "dry_run=true"]
    command += ["model.path=assets/geometries/llama-7b", "arm=dense", "hydra.run.dir=.", "hydra.output_subdir=null"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8,388,608 parameters in 256 tensors" in done.stdout
    assert "none (arm=dense): float32" in done.stdout
