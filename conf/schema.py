"""The schema of every setting. One process composes and resolves them once; all others get the result as JSON.

Each library brings the dataclass of its own group; this module puts them together. What is refused, and why,
stands in ``checks.py``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from adapters.settings import LoraSettings, ModelSettings, TrainSettings, is_package_file
from adapters.settings import is_hub_name as is_hub_model
from conf import CHECKOUT
from gradcodec.registry import PLUGINS as CODECS
from gradcodec.settings import CodecSettings, FitSettings
from privacy.settings import PrivacySettings
from strategies.settings import PLUGINS as STRATEGIES
from strategies.settings import StrategySettings
from tasks.settings import PLUGINS as TASKS
from tasks.settings import TaskSettings
from tasks.settings import is_hub_name as is_hub_dataset

Run = TypeVar("Run", bound="Settings")
ARMS = ("base", "centralised", "dense", "coded")
BACKENDS = ("simulation", "inprocess", "superlink")
MOST_ANSWERS = 64
"""That a report shows; they are generated at once."""
WHOLE, NONE = "whole", "none"
BASES = (WHOLE, NONE)
TRACKERS = ("tensorboard", "mlflow", "wandb")
OBJECTIVES = ("loss", "bytes", "loss_and_bytes")


@dataclass
class FederationSettings:
    """How many, how often, how long."""

    rounds: int = 12
    num_clients: int = 10
    clients_per_round: int = 5
    wait_seconds: float = 180.0  # for the nodes to come and to answer the roll call
    round_seconds: float = 3600.0  # for the clients of one round to answer; later replies do not count
    min_clients: int | None = None  # so many are enough to start; null: num_clients. The others may come later
    min_replies: int = 1  # a round with fewer usable replies is tried again
    retries: int = 2  # how often, before the run ends with an error
    # bits a parameter that clients send at most, in place of `codec.bits`, and ranks of what they train, in place of
    # the adapter's, dealt in turn: partition p has entry p modulo their number; empty: all alike
    client_bits: list[float] = field(default_factory=list)
    client_ranks: list[int] = field(default_factory=list)
    max_failures: int = 3  # a client that fails so often in a row is left out for `rest_rounds` rounds
    rest_rounds: int = 5
    rehearsal_steps: int = (
        6  # coded: of the server on its held-out text before round 1, which follows no update; 0: none
    )
    keep_best: bool = False  # the adapter of the round with the lowest held-out loss is the final one, not the last
    patience: int | None = None  # so many rounds without an improvement end the run; null: all rounds are run
    min_improvement: float = 0.0  # with patience: of the held-out loss, nats per token, that counts as one
    metrics_port: int | None = None  # Prometheus text on 127.0.0.1, while the run lasts
    page_port: int | None = None  # a live page of the run on 127.0.0.1, while it lasts
    sample_answers: int = 3  # held-out prompts that the report shows answers to, before and after; 0: none
    # nodes evaluate the global adapter on their own held-out windows before the first round, after every Nth and after
    # the last; 0: never
    evaluate_every: int = 0
    evaluate_clients: int | None = None  # how many of them, the same ones throughout; null: all that are connected
    trackers: list[str] = field(default_factory=list)  # tensorboard, mlflow, wandb: told of every round


@dataclass
class ServerSettings:
    """What the server itself holds."""

    base: str = "whole"  # whole: base model and text, by which it evaluates | none: neither; config.json is enough


@dataclass
class BackendSettings:
    """Which engine runs the clients."""

    # simulation: Flower's, on this machine; inprocess: clients take turns in one process; superlink: a running one
    name: str = "simulation"
    connection: str = "cg-fedllm"  # superlink: its name in Flower's config.toml
    client_cpus: int = 1  # simulation: CPU cores a client occupies
    client_gpus: float = 0.0  # simulation: GPUs, or share of one, a client occupies; with 0 it sees none


@dataclass
class SearchSettings:
    """What a sweeper that searches makes as small as it can (``-m +search=fewest_bytes``)."""

    # loss: the final held-out loss | bytes: of the whole run, at no more than target_loss | loss_and_bytes: both
    objective: str = "loss"
    target_loss: float | None = None  # nats per token


@dataclass
class Settings:
    """One federated run."""

    seed: int = 0
    arm: str = "coded"  # base | centralised | dense | coded
    dry_run: bool = False  # print what the run would do, and end
    output: str = "outputs/federate"
    run_id: str = ""  # set at the start; names the run in the clients' memory
    resume: str | None = None  # folder of a run that did not end: go on from its last finished round
    from_round: int | None = None  # with resume: from this round, of the two whose checkpoints are kept
    record: str | None = None  # dense only: writes every client's updates to this file
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    codec: CodecSettings = field(default_factory=CodecSettings)
    strategy: StrategySettings = field(default_factory=StrategySettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    backend: BackendSettings = field(default_factory=BackendSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    search: SearchSettings = field(default_factory=SearchSettings)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Inverse of ``to_json``. Raises ValueError: no JSON, JSON too deep, an unknown or ill-typed key, or an
        interpolation, by which a peer could read this machine's environment."""
        if "${" in text:
            raise ValueError("settings from a peer hold an interpolation (${...}): they must be resolved")
        try:
            return _typed(cls, OmegaConf.create(json.loads(text)))
        except RecursionError:
            raise ValueError("settings from a peer are nested too deeply: they are no settings of ours") from None


@dataclass
class TgapSettings(FitSettings):
    """What TGAP trains, and on which part of the recording."""

    artifact: str = "outputs/codec"  # where the artifact of `learned` goes; others beside it, as <artifact>-<name>
    record: str | None = None  # an existing recording to train on; null: record one
    codecs: list[str] = field(default_factory=lambda: ["learned", "resnet", "resnet-literal"])
    heldout_rounds: int = 2  # the last ones
    heldout_clients: int = 2  # those with the highest numbers
    bits: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5, 1.0])


@dataclass
class TgapRun(Settings):
    """A federated recording and the training of codecs on it."""

    tgap: TgapSettings = field(default_factory=TgapSettings)


OPEN = ("codec", "strategy", "task")
"""Groups whose ``options`` hold what no schema knows."""


def register_schemas() -> None:
    """Tells Hydra the types of all keys, so that a misspelt or ill-typed one is refused at once, and the names that
    plug-ins bring, so that ``codec=NAME`` chooses one as it does one of ours."""
    store = ConfigStore.instance()
    for name, schema in (("federate_schema", Settings), ("tgap_schema", TgapRun)):
        config = OmegaConf.structured(schema)
        for group in OPEN:
            OmegaConf.set_struct(config[group].options, False)
        for patterns in (config.lora.rank_pattern, config.lora.alpha_pattern):
            OmegaConf.set_struct(patterns, False)
        store.store(name=name, node=config)
    for group, plugins in (("codec", CODECS), ("strategy", STRATEGIES), ("task", TASKS)):
        for name in plugins.names:
            store.store(group=group, name=name, node={"name": name})


def settings_of(config: DictConfig) -> Settings:
    """Hydra's config -> settings, all paths absolute. Raises ValueError naming the key."""
    return _absolute(_typed(Settings, config))


def changed(settings: Settings, overrides: Sequence[str]) -> Settings:
    """The settings with ``key=value`` changes. Raises ValueError naming the key."""
    config: Any = OmegaConf.create(dataclasses.asdict(settings))
    for text in overrides:
        try:
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([text]))
        except Exception as error:  # YAML's and OmegaConf's, many of several lines
            raise ValueError(f"setting {text!r} is no key=value: {' '.join(str(error).split())}") from None
    return _typed(Settings, config)


def tgap_run_of(config: DictConfig) -> TgapRun:
    """Hydra's config of TGAP -> settings, all paths absolute. Raises ValueError naming the key."""
    run = _absolute(_typed(TgapRun, config))
    if run.tgap.record is not None:
        run.tgap.record = _located(run.tgap.record)
    run.tgap.artifact = str(Path(run.tgap.artifact).expanduser().absolute())
    return run


def _typed(schema: type[Run], config: Any) -> Run:
    try:
        if isinstance(config, DictConfig):
            _check_keys(OmegaConf.to_container(config), schema)
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))
    except Exception as error:  # OmegaConf has a dozen kinds, all of them about one key
        key = getattr(error, "full_key", None)
        raise ValueError(f"settings: {f'{key}: ' if key else ''}{error}".split("\n")[0]) from None
    assert isinstance(typed, schema)
    return typed


def _check_keys(config: Any, schema: Any, head: str = "") -> None:
    """Raises ValueError: a key that no schema has, which ``+key=value`` adds and OmegaConf drops without a word."""
    types = get_type_hints(schema)
    for key, value in config.items():
        if key not in types:
            raise ValueError(f"{head}{key} is no setting of ours: --cfg job lists them")
        if dataclasses.is_dataclass(types[key]) and isinstance(value, dict):
            _check_keys(value, types[key], f"{head}{key}.")


def _absolute(settings: Run) -> Run:
    """All paths absolute. What a run reads may lie in the checkout: its defaults do, wherever it is started."""
    settings.output = str(Path(settings.output).expanduser().absolute())
    if not is_package_file(settings.model.path):
        settings.model.path = _located(settings.model.path, is_hub_model)
    if settings.task.path is not None:
        settings.task.path = _located(settings.task.path, is_hub_dataset)
    if settings.record is not None:
        settings.record = str(Path(settings.record).expanduser().absolute())
    for holder, key in ((settings.lora, "start"), (settings.codec, "artifact")):
        if getattr(holder, key) is not None:
            setattr(holder, key, _located(getattr(holder, key)))
    return settings


def _located(path: str, is_hub_name: Callable[[str], bool] = lambda path: False) -> str:
    here = Path(path).expanduser()
    if not here.exists() and (CHECKOUT / here).exists():
        return str(CHECKOUT / here)
    return path if is_hub_name(path) else str(here.absolute())
