"""What would cross from a GPU to the host, seen without one: see ``pretended_gpu.py``."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, InProcessGrid, heavy_tailed_update
from pretended_gpu import pretended_gpu

from adapters.settings import DEVICES
from bench.speed import codec_for, layout_of, update_of
from client.app import app as client_app
from client.residuals import load_residual, save_residual
from conf.schema import Settings
from gradcodec.build import byte_budget
from gradcodec.exchange import decode_blocks, encode_update, max_payload_bytes
from gradcodec.layout import Layout
from gradcodec.paper.networks import ARCHITECTURES
from gradcodec.paper.resnet import ResnetCodec
from gradcodec.registry import names_for_any_layout
from gradcodec.settings import CodecSettings
from server.run.federation import run_federation

ARTIFACT = str(Path("gradcodec/general").absolute())


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., None]]:
    """Calls a function in a process of its own, the same for all tests: it takes seconds to start."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda work, *args: pool.submit(work, *args).result()


def test_a_payload_takes_a_copy_to_the_host_for_each_try_and_all_else_stays(apart: Callable[..., None]) -> None:
    apart(code_on_the_device)


def code_on_the_device() -> None:
    layout, settings = layout_of("tiny", rank=8), CodecSettings(artifact=ARTIFACT)
    update_bytes = 4 * layout.num_parameters
    here, update = codec_for(settings, layout), update_of(layout)
    side = here.side_information(layout.to_blocks(update_of(layout, seed=1)))
    with pretended_gpu() as gpu:
        there, far_update = codec_for(settings, layout, gpu.device), gpu.moved(update)
        for bits in (0.1, 8.0):
            how: dict[str, Any] = {"max_bytes": max_payload_bytes(bits, layout.num_parameters), "side": side}
            expected, residual = encode_update(update, None, codec=here, **how)
            (payload, far_residual), copies = gpu.copies_of(
                partial(encode_update, far_update, None, codec=there, **how)
            )
            assert payload == expected
            assert residual.error_RC.device.type == "cpu"
            assert far_residual.error_RC.device == far_residual.target_RC.device == gpu.device
            codes = [size for size in copies if size >= update_bytes // 50]
            # what is smaller: energies of segments, numbers of coefficients by class
            assert 1 <= len(codes) <= 4, "a copy each try"
            assert update_bytes // 5 < min(codes) == max(codes) <= update_bytes
            decoded_RC, copies = gpu.copies_of(partial(decode_blocks, payload, codec=there, side=side))
            assert decoded_RC.device == gpu.device
            assert sum(copies) < update_bytes // 100
            assert torch.equal(decoded_RC.cpu(), decode_blocks(payload, codec=here, side=side))


def test_every_codec_serves_updates_that_lie_on_a_device(apart: Callable[..., None], tmp_path: Path) -> None:
    apart(serve_a_device, tmp_path)


def serve_a_device(folder: Path) -> None:
    layout = Layout.of(SHAPES)
    update, other = heavy_tailed_update(0), heavy_tailed_update(1)
    with pretended_gpu() as gpu:
        for name, network in ARCHITECTURES.items():
            for literal in (False, True):
                codec = ResnetCodec(layout, network(literal), literal, b"untrained", name)
                payload, _ = encode_update(gpu.moved(update), None, codec=codec)
                assert payload == encode_update(update, None, codec=codec)[0], name
        for name in names_for_any_layout():
            for snr_db in (None, 3.0) if name == "powersgd" else (None,):
                settings = CodecSettings(name, bits=4.0, snr_db=snr_db, artifact=ARTIFACT)
                how: dict[str, Any] = {"max_bytes": byte_budget(settings, layout), "snr_db": snr_db}
                here, there = codec_for(settings, layout), codec_for(settings, layout, gpu.device)
                _, carried = encode_update(other, None, codec=here, **how)
                expected, residual = encode_update(update, carried.error_RC, codec=here, **how)
                payload, far_residual = encode_update(gpu.moved(update), carried.error_RC, codec=there, **how)
                assert payload == expected, name
                assert far_residual.error_RC.device == gpu.device, name
                save_residual(folder / name, 0, layout, 1, far_residual)
                kept = load_residual(folder / name, 0, layout, 2)
                assert kept is not None and torch.equal(kept.error_RC, residual.error_RC), name
                assert torch.equal(kept.target_RC, residual.target_RC), name


def test_a_federation_whose_models_lie_on_a_device_does_what_one_on_the_host_does(
    apart: Callable[..., None], tmp_path: Path
) -> None:
    apart(federate_on_the_device, tmp_path)


def federate_on_the_device(folder: Path) -> None:
    with pretended_gpu() as gpu:
        DEVICES.append(gpu.device.type)
        for arm in ("coded", "dense"):
            expected, copies = gpu.copies_of(partial(federate, folder / f"{arm}-cpu", arm, "cpu"))
            assert not copies
            losses, copies = gpu.copies_of(partial(federate, folder / arm, arm, str(gpu.device)))
            assert losses == pytest.approx(expected, abs=1e-3)
            assert len(set(losses)) == len(losses) > 1
            # the first adapter; in each round, dense: an update; coded: at most four tries, the residual's two, and the
            # decoded update twice, for its norm and for the mean; and once the server's trial, at most four tries
            assert 0 < sum(copies) < (22 if arm == "coded" else 4) * 4 * 49_152


def federate(folder: Path, arm: str, device: str) -> list[float]:
    settings = Settings(output=str(folder / "out"), run_id="device", arm=arm)
    settings.model.path, settings.model.device = str(Path("assets/tiny-llama").absolute()), device
    settings.codec.artifact = ARTIFACT
    settings.train.steps, settings.train.batch_size, settings.train.micro_batch_size = 1, 1, 1
    settings.task.window, settings.task.heldout_windows = 32, 2
    federation = settings.federation
    federation.num_clients = 2
    federation.rounds = 2 if arm == "coded" else 1  # residuals come in with the second
    federation.clients_per_round = 1
    results = run_federation(InProcessGrid(client_app, 2, {"memory": str(folder / "memory")}), settings)
    assert not results.faults
    return results.heldout_loss
