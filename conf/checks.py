"""Settings that cannot be served are refused before any work, by the key that is to be changed.

Each library checks its own group; this module checks what only goes together with other groups, and what must be on
this host. Knows names and numbers alone; must load no engine, so that a refusal comes at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.files import CONFIG as ADAPTER_CONFIG
from adapters.settings import (
    check_kind,
    check_lora,
    check_model,
    check_seed,
    check_training,
    start_needs_weights,
    trains_vectors,
)
from conf.limits import check_limits
from conf.remedies import TRAIN_ONE
from conf.schema import (
    ARMS,
    BACKENDS,
    BASES,
    MOST_ANSWERS,
    NONE,
    OBJECTIVES,
    OPEN,
    TRACKERS,
    BackendSettings,
    FederationSettings,
    SearchSettings,
    Settings,
)
from gradcodec.errors import ArtifactError, CodecError
from gradcodec.registry import entry_of
from gradcodec.settings import CodecSettings, check_codec
from privacy.settings import MIN_CLIENTS, check_privacy
from strategies.settings import OF_THE_MEAN, check_attackers, check_strategy
from tasks.settings import TaskSettings, check_task
from tasks.settings import is_hub_name as is_hub_dataset


def check_settings(settings: Settings) -> None:
    """Raises ValueError naming the first key that cannot be served, before any work; a dry run needs no GPU."""
    _check_numbers(settings)
    _check_options(settings)
    if settings.arm not in ARMS:
        raise ValueError(f"arm={settings.arm!r} is none of {', '.join(ARMS)}")
    if settings.server.base not in BASES:
        raise ValueError(f"server.base={settings.server.base!r} is none of {', '.join(BASES)}")
    if settings.backend.name not in BACKENDS:
        raise ValueError(f"backend.name={settings.backend.name!r} is none of {', '.join(BACKENDS)}")
    _check_federation(settings.federation)
    _check_trackers(settings.federation.trackers)
    _check_search(settings.search)
    check_privacy(settings.privacy)
    _check_together(settings)
    check_seed(settings.seed)
    check_model(settings.model)
    check_lora(settings.lora)
    check_kind(settings.model, settings.lora)
    check_training(settings.train)
    check_task(settings.task)
    check_strategy(settings.strategy)
    if settings.arm in ("dense", "coded"):
        check_attackers(settings.strategy, settings.federation.clients_per_round)
    if settings.arm == "coded":
        _check_codec_group(settings.codec)
    check_limits(settings)
    if settings.backend.name == "simulation" and settings.arm in ("dense", "coded"):
        _check_simulation(settings.backend, settings.dry_run)


def _check_federation(federation: FederationSettings) -> None:
    least = {"rounds": 1, "num_clients": 1, "clients_per_round": 1, "retries": 0, "rest_rounds": 0, "max_failures": 1}
    least |= {"rehearsal_steps": 0, "sample_answers": 0, "evaluate_every": 0}
    for key, lowest in least.items():
        if getattr(federation, key) < lowest:
            raise ValueError(f"federation.{key}={getattr(federation, key)} must be at least {lowest}")
    if federation.sample_answers > MOST_ANSWERS:
        raise ValueError(f"federation.sample_answers={federation.sample_answers} must be at most {MOST_ANSWERS}")
    for key in ("wait_seconds", "round_seconds"):
        if not getattr(federation, key) > 0:
            raise ValueError(f"federation.{key}={getattr(federation, key)} must be greater than 0")
    _check_counts(federation)


def _check_counts(federation: FederationSettings) -> None:
    """Numbers of clients, which bound each other, and ports."""
    if federation.clients_per_round > federation.num_clients:
        raise ValueError(
            f"federation.clients_per_round={federation.clients_per_round} is more than "
            f"federation.num_clients={federation.num_clients}"
        )
    if not 1 <= federation.min_replies <= federation.clients_per_round:
        raise ValueError(
            f"federation.min_replies={federation.min_replies} must lie between 1 and "
            f"federation.clients_per_round={federation.clients_per_round}"
        )
    for key in ("min_clients", "evaluate_clients"):
        number = getattr(federation, key)
        if number is not None and not 1 <= number <= federation.num_clients:
            raise ValueError(
                f"federation.{key}={number} must lie between 1 and federation.num_clients={federation.num_clients}, or "
                "be null"
            )
    _check_ports(federation)
    _check_patience(federation)


def _check_patience(federation: FederationSettings) -> None:
    if federation.patience is not None and federation.patience < 1:
        raise ValueError(f"federation.patience={federation.patience} must be at least 1, or null")
    if not federation.min_improvement >= 0:
        raise ValueError(f"federation.min_improvement={federation.min_improvement} must be at least 0")
    if federation.min_improvement and federation.patience is None:
        raise ValueError(
            f"federation.min_improvement={federation.min_improvement} needs federation.patience=N, the rounds that may "
            "pass without one"
        )


def _check_trackers(names: Sequence[str]) -> None:
    """By name alone: whether a library is installed is the affair of the host that the rounds run on."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"federation.trackers holds {name!r}, which is none of {', '.join(TRACKERS)}")


def _check_search(search: SearchSettings) -> None:
    if search.objective not in OBJECTIVES:
        raise ValueError(f"search.objective={search.objective!r} is none of {', '.join(OBJECTIVES)}")
    if search.objective == "bytes" and search.target_loss is None:
        raise ValueError(
            "search.objective=bytes needs search.target_loss=NATS, the held-out loss that the fewest bytes must keep"
        )


def _check_ports(federation: FederationSettings) -> None:
    for key in ("metrics_port", "page_port"):
        port = getattr(federation, key)
        if port is not None and not 1 <= port <= 65535:
            raise ValueError(f"federation.{key}={port} must lie between 1 and 65535, or be null")
    if federation.page_port is not None and federation.page_port == federation.metrics_port:
        raise ValueError(
            f"federation.page_port={federation.page_port} is federation.metrics_port as well: choose another port"
        )


def _check_together(settings: Settings) -> None:
    """Settings that only go together with others."""
    if settings.record is not None and settings.resume is not None:
        raise ValueError("record=... and resume=... do not go together: the rounds before were not kept")
    if settings.from_round is not None and settings.resume is None:
        raise ValueError(f"from_round={settings.from_round} needs resume=RUN")
    if settings.resume is not None and settings.arm not in ("dense", "coded"):
        raise ValueError(f"resume=... needs arm=dense or arm=coded, not arm={settings.arm}")
    if settings.record is not None and settings.arm != "dense":
        raise ValueError(f"record=... needs arm=dense, not arm={settings.arm}: payloads are no updates")
    _check_vectors(settings)
    if settings.lora.local:
        _check_local(settings)
    _check_rounds(settings)
    if settings.privacy.is_private or settings.privacy.secure_aggregation:
        _check_private_run(settings)
    if settings.federation.evaluate_every:
        _check_evaluation(settings)
    if settings.server.base == NONE:
        _check_without_base(settings)


def _check_vectors(settings: Settings) -> None:
    """What vectors beside the factors need of the rest."""
    lora = settings.lora
    if not trains_vectors(lora):
        return
    what = "lora.dora=true" if lora.dora else f"lora.modules_to_save={lora.modules_to_save}"
    if settings.arm == "coded" and settings.codec.name == "b-only":
        raise ValueError(
            f"{what} does not go with codec=b-only, which sends B factors alone: vectors would never arrive"
        )
    if settings.server.base == NONE and start_needs_weights(lora):
        raise ValueError(
            f"server.base=none does not go with {what}: a run starts from the base model's own values there, which "
            "this server does not hold; give lora.start, or server.base=whole"
        )


def _check_local(settings: Settings) -> None:
    """What layers that stay on the nodes need of the rest."""
    what = f"lora.local={settings.lora.local}"
    if settings.arm not in ("dense", "coded"):
        raise ValueError(f"{what} needs arm=dense or arm=coded: arm={settings.arm} has no nodes to keep them")
    if settings.lora.start is not None:
        raise ValueError(f"{what} and lora.start do not go together: the start adapter would hold those layers, too")
    if settings.privacy.protects:
        raise ValueError(
            f"{what} and privacy do not go together: what is sent depends on those layers, which no noise protects"
        )


def _check_evaluation(settings: Settings) -> None:
    """What evaluation on the nodes needs of the rest."""
    what, privacy = f"federation.evaluate_every={settings.federation.evaluate_every}", settings.privacy
    if settings.arm not in ("dense", "coded"):
        raise ValueError(f"{what} needs arm=dense or arm=coded: arm={settings.arm} asks no clients")
    if privacy.protects:
        asked = f"privacy={privacy.name}" if privacy.is_private else "privacy.secure_aggregation=true"
        raise ValueError(
            f"{what} and {asked} do not go together: nodes withhold their losses in a run that protects their data, as "
            "these are neither accounted for nor masked; give federation.evaluate_every=0"
        )


def _check_without_base(settings: Settings) -> None:
    """What a server without base model and text cannot do."""
    if settings.arm not in ("dense", "coded"):
        raise ValueError(f"server.base=none needs arm=dense or arm=coded: arm={settings.arm} runs on the server itself")
    federation = settings.federation
    if (federation.keep_best or federation.patience is not None) and not federation.evaluate_every:
        raise ValueError(
            "federation.keep_best and federation.patience go by losses, and with server.base=none nodes alone measure "
            "them: give federation.evaluate_every=1"
        )
    if settings.strategy.name == "fltrust":
        raise ValueError("server.base=none and strategy=fltrust do not go together: it trains on the server's own text")
    if settings.privacy.secure_aggregation:
        raise ValueError(
            "server.base=none and privacy.secure_aggregation=true do not go together: the first sum's steps come from "
            "a rehearsal on the server's base model and text"
        )
    if settings.arm == "coded" and settings.codec.basis == "model":
        raise ValueError(
            "server.base=none and codec.basis=model do not go together, as the server decodes by directions of the "
            "base model: give codec.basis=auto, moves or artifact, or a codec without directions, such as codec=rotated"
        )


def _check_rounds(settings: Settings) -> None:
    """What training changes from round to round."""
    train, rounds = settings.train, settings.federation.rounds
    if train.round_warmup >= rounds:
        raise ValueError(
            f"train.round_warmup={train.round_warmup} must be less than federation.rounds={rounds}: the whole learning "
            "rate would never be reached"
        )
    follows = train.round_schedule != "constant" or train.round_warmup > 0
    if follows and settings.strategy.name == "fedadam" and settings.arm in ("dense", "coded"):
        raise ValueError(
            "train.round_schedule and train.round_warmup do not go with strategy=fedadam, which divides what clients "
            "send by its own size and so takes the factor out again: choose strategy=fedavg or fedavgm"
        )


def _check_private_run(settings: Settings) -> None:
    """What privacy needs of the rest."""
    privacy, secure = settings.privacy, settings.privacy.secure_aggregation
    if settings.arm not in ("dense", "coded"):
        raise ValueError(
            f"privacy.name={privacy.name} needs arm=dense or arm=coded: arm={settings.arm} asks no clients"
        )
    if privacy.noise == "sum" and not secure and settings.arm == "coded":
        raise ValueError(
            "privacy.noise=sum needs codes that add up, as the noise of one client alone hides little: give "
            "privacy.secure_aggregation=true, or arm=dense, or privacy.noise=local"
        )
    if privacy.noise == "sum" and settings.federation.min_replies < 2:
        raise ValueError(
            f"privacy.noise=sum needs federation.min_replies=N, the least number of clients that share the noise of a "
            f"round: with {settings.federation.min_replies} each would add all of it"
        )
    if secure and settings.arm != "coded":
        raise ValueError(f"privacy.secure_aggregation=true needs arm=coded, not arm={settings.arm}")
    if secure and settings.codec.name != "learned":
        raise ValueError(
            f"privacy.secure_aggregation=true needs codec=learned, whose tables say which values to send, not "
            f"codec.name={settings.codec.name}"
        )
    if secure and (settings.codec.bits is None or not settings.federation.rehearsal_steps):
        raise ValueError(
            "privacy.secure_aggregation=true needs codec.bits=NUMBER, as masked integers have no rate of their own, "
            "and federation.rehearsal_steps above 0, from which the first round's steps come"
        )
    if secure and settings.federation.clients_per_round < MIN_CLIENTS:
        raise ValueError(
            f"privacy.secure_aggregation=true needs federation.clients_per_round of at least {MIN_CLIENTS}: of a sum "
            "of two, each of the two knows the other's part"
        )
    if (secure or privacy.noise == "sum") and settings.strategy.name not in OF_THE_MEAN:
        what = "privacy.secure_aggregation=true" if secure else "privacy.noise=sum"
        raise ValueError(
            f"{what} and strategy={settings.strategy.name} do not go together: the sum alone is what may be made use "
            f"of, and no client's own update; choose one of {', '.join(OF_THE_MEAN)}"
        )


def _check_numbers(settings: Any, head: str = "") -> None:
    """Raises ValueError: a setting is NaN or infinite, which no comparison finds."""
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            _check_numbers(value, f"{head}{entry.name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{head}{entry.name}={number} must be a finite number")


def _check_options(settings: Settings) -> None:
    """Raises ValueError: an option is no plain value. Which there are is the plug-in's affair."""
    for group in OPEN:
        for key, value in getattr(settings, group).options.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            if not isinstance(key, str) or type(value) not in (bool, int, float, str) or not finite:
                raise ValueError(f"{group}.options.{key}={value!r}: a finite number, a text, true or false is expected")


def check_files(settings: Settings) -> None:
    """What a run reads is on this host, as far as its names tell. Not for a node, which has its own.

    Raises:
        ValueError: a file or folder is missing; the message names its key.
    """
    if settings.server.base != NONE:  # else the nodes alone have data
        check_data(settings.task)
    start = settings.lora.start
    if start is not None and not (Path(start) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"lora.start={start!r} holds no {ADAPTER_CONFIG}: give a PEFT adapter directory")
    if settings.arm == "coded" and entry_of(settings.codec.name).needs_artifact and settings.codec.artifact is not None:
        _check_artifact(Path(settings.codec.artifact), settings.codec.name)


def check_data(task: TaskSettings) -> None:
    """Raises ValueError: what ``task.path`` names is not on this host, and no name on the hub."""
    if task.path is not None and not Path(task.path).exists() and not is_hub_dataset(task.path):
        raise ValueError(f"task.path={task.path!r} is not here: give a file, a folder, or owner/name of a data set")


def _check_artifact(folder: Path, name: str) -> None:
    """By its head alone: ``gradcodec.artifact`` reads the rest."""
    head, damaged = {}, False
    if (folder / "codec.json").is_file():
        try:
            head = dict(json.loads((folder / "codec.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            damaged = True
    files = ("codec.json",) if "weights" in head else ("codec.json", "codec.safetensors")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"codec.artifact: {folder} holds no codec artifact ({' and '.join(missing)} missing): train one with "
            f"`python -m tgap`, or choose a codec that needs none, such as codec=rotated"
        )
    if damaged or "kind" not in head:
        raise ValueError(f"codec.artifact: {folder / 'codec.json'} is damaged: train the codec again")
    if head["kind"] != name:
        kind = head["kind"]
        raise ValueError(f"codec.artifact: {folder} holds a codec of kind {kind!r}; codec.name asks for {name!r}")


def _check_codec_group(settings: CodecSettings) -> None:
    """The library's check, with the names of this project's keys and commands."""
    try:
        check_codec(settings)
    except CodecError as error:
        remedy = f": {TRAIN_ONE}" if isinstance(error, ArtifactError) else ""
        raise CodecError(f"codec.{error}{remedy}") from None


def _check_simulation(backend: BackendSettings, dry_run: bool) -> None:
    if backend.client_cpus < 1:
        raise ValueError(f"backend.client_cpus={backend.client_cpus} must be at least 1")
    if not backend.client_gpus >= 0:
        raise ValueError(f"backend.client_gpus={backend.client_gpus} must be at least 0")
    if backend.client_gpus > 0 and not dry_run:
        import torch  # here, as it takes seconds

        if backend.client_gpus > (found := torch.cuda.device_count()):
            raise ValueError(
                f"backend.client_gpus={backend.client_gpus:g} is more than the {found} GPUs of this machine: "
                "give backend.client_gpus=0 to simulate on its CPUs"
            )
