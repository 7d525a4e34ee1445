"""docs/extending.md as a newcomer takes it: its modules and its pyproject.toml, installed, are found, tried and run."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import InProcessGrid
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedYogi,
    Krum,
    Strategy,
)
from hydra import compose, initialize_config_dir
from test_federation import settings_for
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from adapters import spaces
from adapters.settings import ModelSettings
from client.app import app as client_app
from client.trainer import trainer_for
from conf import CHECKOUT
from conf.basis import priors_of
from conf.checks import check_settings
from conf.schema import Settings, register_schemas, settings_of
from gradcodec import registry
from gradcodec.broadcast import Held
from gradcodec.build import build_codec, payload_bytes
from gradcodec.errors import CodecError
from gradcodec.flower.codecs import codec_of_rounds
from gradcodec.layout import Layout
from gradcodec.plugins import Plugins
from gradcodec.settings import CodecSettings, check_codec
from server.plan import plan_of
from server.records.results import RunResults
from server.run.federation import run_federation
from strategies import settings as strategies_settings
from strategies.build import build_inner
from strategies.errors import FederationError
from strategies.optimizer import optimizer_state, restore_optimizer
from strategies.settings import StrategySettings
from tasks import settings as tasks_settings
from tasks.settings import TaskSettings
from tasks.shards import client_records

PAGE = (CHECKOUT / "docs" / "extending.md").read_text(encoding="utf-8")
MODULES = {m[1]: m[0] for m in re.finditer(r"(?<=```python\n)# (\w+)\.py.*?(?=```)", PAGE, re.DOTALL)}
GROUPS = (registry.PLUGINS, strategies_settings.PLUGINS, tasks_settings.PLUGINS, spaces.PLUGINS)


def look_again() -> None:
    for plugins in GROUPS:
        plugins.look_again()


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Puts folders on the path, as if what lies there were installed, until the end of the test."""

    def add(folder: Path) -> None:
        monkeypatch.syspath_prepend(str(folder))
        look_again()

    yield add
    monkeypatch.undo()
    look_again()
    for name in (*MODULES, "broken", "halves"):
        sys.modules.pop(name, None)


@pytest.fixture
def installed(tmp_path: Path, path: Callable[[Path], None]) -> Path:
    """The page's package, as ``pip install`` would leave it."""
    (toml,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    project = tomllib.loads(toml)
    folder = tmp_path / "site-packages"
    folder.mkdir()
    for module in project["tool"]["setuptools"]["py-modules"]:
        (folder / f"{module}.py").write_text(MODULES[module], encoding="utf-8")
    install(folder, project["project"]["name"], project["project"]["entry-points"])
    path(folder)
    return folder


def install(folder: Path, name: str, groups: dict[str, dict[str, str]]) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{key} = {at}\n" for key, at in of.items()) for group, of in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


def composed(*overrides: str) -> Settings:
    register_schemas()
    with initialize_config_dir(str(CHECKOUT / "conf"), version_base="1.3"):
        return settings_of(compose("federate", ["output=out", *overrides]))


def test_every_example_fits_on_a_screen() -> None:
    assert set(MODULES) == {"grid", "slow", "sums", "neox"}
    assert all(sum(bool(line) for line in text.splitlines()) <= 30 for text in MODULES.values())


def test_the_installed_codec_keeps_the_contract(installed: Path) -> None:
    command = [sys.executable, "-m", "gradcodec.contract", "grid", "--option", "wide=true"]
    done = subprocess.run(
        command, env={"PYTHONPATH": f"{CHECKOUT}:{installed}"}, capture_output=True, text=True, cwd=installed
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") == 9


def federation(folder: Path, name: str, *overrides: str) -> Settings:
    """Four rounds of a small model with all that the page brings."""
    settings = composed(
        *("codec=grid", "codec.options.wide=true", "strategy=slow", "strategy.options.keep=0.25"),
        *("task=sums", "task.options.count=300", "task.window=32", "task.heldout_windows=4", "task.packing=true"),
        *("train.steps=2", "train.batch_size=4", "train.micro_batch_size=4", "train.lr=0.005"),
        *("federation.num_clients=3", "federation.clients_per_round=2", "federation.rounds=2"),
        *("federation.wait_seconds=5", "federation.rehearsal_steps=0", f"output={folder / name}", *overrides),
    )
    settings.run_id = name
    return settings


def run(settings: Settings, folder: Path) -> RunResults:
    grid = InProcessGrid(client_app, settings.federation.num_clients, {"memory": str(folder / "memory")})
    return run_federation(grid, settings)


def test_a_federation_runs_with_all_that_the_page_brings(installed: Path, tmp_path: Path) -> None:
    settings = federation(tmp_path, "all", "codec.down_bits=1")
    check_settings(settings)
    planned = plan_of(settings)
    results = run(settings, tmp_path)
    assert {uplink.payload_bytes for uplink in results.uplinks} == {planned.payload_bytes}
    assert planned.payload_bytes is not None
    assert 2 * planned.layout.num_parameters < planned.payload_bytes < 2.1 * planned.layout.num_parameters
    assert results.heldout_loss[-1] < results.heldout_loss[0]


def test_a_resumed_run_goes_on_with_what_the_strategy_remembers(installed: Path, tmp_path: Path) -> None:
    whole = run(federation(tmp_path / "a", "run", "federation.rounds=2"), tmp_path / "a")
    half = federation(tmp_path / "b", "run", "federation.rounds=1")
    run(half, tmp_path / "b")
    half.resume, half.federation.rounds = half.output, 2
    assert run(half, tmp_path / "b").heldout_loss == whole.heldout_loss


FLOWERS: dict[str, Callable[..., Strategy]] = {
    "flowers-krum": lambda settings, arguments: Krum(num_malicious_nodes=0, **arguments),
    "fedyogi": lambda settings, arguments, eta=0.01: FedYogi(eta=eta, **arguments),
    "dp": lambda settings, arguments: DifferentialPrivacyServerSideFixedClipping(FedAvg(**arguments), 1e-3, 1.0, 2),
}


@pytest.fixture(params=FLOWERS)
def flowers(request: pytest.FixtureRequest) -> Iterator[str]:
    strategies_settings.PLUGINS.add(request.param, FLOWERS[request.param])
    yield request.param
    strategies_settings.PLUGINS.remove(request.param)


def test_flowers_own_strategies_come_by_a_function_of_a_line(flowers: str, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", codec=CodecSettings("sign", bits=None), federation__rounds=1)
    settings.strategy = StrategySettings(flowers)
    results = run(settings, tmp_path)
    assert results.heldout_loss[-1] < results.heldout_loss[0]


def test_flowers_optimizers_are_known_to_remember() -> None:
    one, other = (FLOWERS["fedyogi"](None, {}) for _ in range(2))
    moments = {f"{moment}/layer": torch.rand(3) for moment in ("m_t", "v_t")}
    restore_optimizer(one, moments)
    restore_optimizer(other, optimizer_state(one))
    assert all(torch.equal(optimizer_state(other)[key], tensor) for key, tensor in moments.items())


@pytest.mark.parametrize(
    ("result", "said"), [(None, "of 2 replies the strategy makes nothing"), (ArrayRecord(), "other tensors")]
)
def test_a_strategy_that_makes_no_adapter_ends_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: ArrayRecord | None, said: str
) -> None:
    monkeypatch.setattr(FedAvg, "aggregate_train", lambda self, server_round, replies: (result, MetricRecord()))
    settings = settings_for(tmp_path, "run", arm="dense", federation__rounds=1, federation__retries=0)
    with pytest.raises(FederationError, match=said):
        run(settings, tmp_path)


def test_a_node_without_the_plug_in_says_so(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = federation(tmp_path, "node")
    own = (("model-path", settings.model.path),)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(installed)])
    look_again()
    with pytest.raises(ValueError, match=r"task.name='sums' is none of .*, the tasks that are installed here"):
        trainer_for(settings.to_json(), own)
    settings.task = TaskSettings()
    with pytest.raises(CodecError, match=r"codec.name='grid' is none of .*, the codecs that are installed here"):
        trainer_for(settings.to_json(), own)
    settings.codec = CodecSettings("sign")
    assert trainer_for(settings.to_json(), own).settings.strategy.name == "fedavg"  # the strategy is the server's alone


def test_options_are_checked_before_any_work(installed: Path) -> None:
    for override, said in (
        ("codec.options.width=2", r"codec.options.width: the codec grid has no such option: it has wide"),
        ("codec.options.wide=2", r"codec.options.wide=2: a value like False is expected"),
        ("codec.options.wide=[1]", r"codec.options.wide=\[1\]: a finite number, a text, true or false is expected"),
        ("task.options.seed=nan", r"task.options.seed=nan: a finite number"),
        ("task.options.count_=3", r"task.options.count_: there is no such option, but digits, count"),
        ("strategy.options.kep=1", r"strategy.options.kep: there is no such option, but keep"),
    ):
        with pytest.raises(ValueError, match=said):
            check_settings(composed("codec=grid", "task=sums", "strategy=slow", override))
    for override, said in (
        ("task.options.x=1", "task.options.x: the task stdlib has no options"),
        ("strategy.options.x=1", "strategy.options.x: the strategy fedavg has no options"),
        ("codec.options.x=1", "codec.options.x: the codec learned has no such option: it has none"),
    ):
        with pytest.raises(ValueError, match=said):
            check_settings(composed(override))


def test_what_a_plug_in_refuses_or_does_wrong_is_said_with_its_name(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TaskSettings("sums", options={"digits": 0})
    with pytest.raises(ValueError, match=r"^task.name=sums: task.options.digits=0 must be at least 1"):
        client_records(settings, 2)
    settings.options = {"digits": "two"}
    with pytest.raises(
        ValueError, match=r"task.name=sums: the distribution my-plug-ins 1.0 \(sums:sums\) failed: Type"
    ):
        client_records(settings, 2)
    wrong = {"name": lambda settings, common: settings.unexpected, "kind": lambda settings, common: settings}
    for what, said in (
        ("name", r"the distribution my-plug-ins 1.0 .*unexpected"),
        ("kind", "gives no strategy of Flower"),
    ):
        monkeypatch.setitem(strategies_settings.PLUGINS._loaded, "slow", wrong[what])
        with pytest.raises(FederationError, match=f"strategy.name=slow: .*{said}"):
            build_inner(StrategySettings("slow"))


def test_the_strategys_memory_goes_out_and_comes_back(installed: Path) -> None:
    one, other = (build_inner(StrategySettings("slow")) for _ in range(2))
    restore_optimizer(one, {"layer": torch.ones(3)})
    restore_optimizer(other, optimizer_state(one))
    assert torch.equal(optimizer_state(other)["layer"], torch.ones(3))


@pytest.mark.parametrize("has_plug_in", [False, True])
def test_directions_of_a_family_are_what_its_plug_in_says(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_plug_in: bool
) -> None:
    monkeypatch.setenv("CG_FEDLLM_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    if has_plug_in:
        request.getfixturevalue("installed")
    shapes = {
        f"base_model.model.gpt_neox.layers.0.mlp.{name}.lora_{factor}.weight": shape
        for name, factor, shape in (("dense_h_to_4h", "B", (48, 2)), ("dense_4h_to_h", "B", (32, 2)))
    }
    priors = priors_of(ModelSettings(path=str(tmp_path / "model")), Layout.of(shapes))
    half, rest = (
        model.gpt_neox.layers[0].mlp.get_submodule(n).weight.double() for n in ("dense_h_to_4h", "dense_4h_to_h")
    )
    gram = half @ half.T / (half @ half.T).trace()
    if has_plug_in:
        gram = (gram + rest.T @ rest / (rest.T @ rest).trace()) / 2
    prior = priors["base_model.model.gpt_neox.layers.0.mlp.dense_h_to_4h.lora_B.weight"]
    strongest = torch.linalg.eigvalsh(gram).flip(0)
    torch.testing.assert_close(
        prior.shares_K.double(), strongest[: len(prior.shares_K)].clamp_min(0), atol=1e-6, rtol=0
    )
    assert len(priors) == 2, "of the other factor its own weights say"


def test_a_plug_in_that_is_broken_breaks_no_other_codec(
    tmp_path: Path, path: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.py").write_text("import not_there_at_all\n")
    (tmp_path / "halves.py").write_text(
        "from gradcodec.registry import CodecEntry\n"
        "def fails(): raise KeyError('why')\n"
        "def absent(): return CodecEntry('absent', 'nowhere_at_all:Codec')\n"
    )
    entries = {
        "broken": "broken:ENTRY",
        "other": "gradcodec.registry:_OURS",
        "fails": "halves:fails",
        "absent": "halves:absent",
    }
    install(tmp_path, "broken", {"gradcodec.codecs": {**entries, "sign": "broken:SIGN"}})
    path(tmp_path)
    check_codec(CodecSettings("sign"))
    assert "'sign' of the distribution broken 1.0 is left out: there is one of ours" in caplog.text
    with pytest.raises(CodecError, match=r"'broken' of the distribution broken 1.0 cannot be loaded: ModuleNotFound"):
        check_codec(CodecSettings("broken"))
    with pytest.raises(CodecError, match=r"'other' of the distribution broken 1.0 .* a CodecEntry of that name"):
        check_codec(CodecSettings("other"))
    with pytest.raises(CodecError, match=r"'fails' of the distribution broken 1.0 \(halves:fails\): KeyError\('why'\)"):
        check_codec(CodecSettings("fails"))
    with pytest.raises(CodecError, match=r"nowhere_at_all:Codec cannot be loaded: ModuleNotFound"):
        build_codec(CodecSettings("absent"), Layout.of({"x": (2, 3)}))
    assert "rotated" in registry.names_with_a_rate()
    assert caplog.text.count("cannot be loaded") == 1, "said once"
    registry.names_with_a_rate()
    assert caplog.text.count("cannot be loaded") == 1
    with pytest.raises(ValueError, match=r"'broken' is registered already, as the distribution broken 1.0"):
        registry.register(registry.CodecEntry("broken", "broken:Codec"))


def test_a_name_that_two_packages_offer_is_nobodys(tmp_path: Path, path: Callable[[Path], None]) -> None:
    for name in ("one", "two"):
        install(tmp_path / name, name, {"gradcodec.codecs": {"twice": "gradcodec.registry:_OURS"}})
        path(tmp_path / name)
    with pytest.raises(CodecError, match=r"offered by the distribution \w+ 1.0 and by the distribution \w+ 1.0"):
        check_codec(CodecSettings("twice"))


def test_nothing_is_brought_under_a_name_that_is_taken() -> None:
    plugins = Plugins("nobody.offers.this", own=lambda: ("ours",))
    plugins.add("mine", 1)
    with pytest.raises(ValueError, match="'ours' is taken: there is one of ours"):
        plugins.add("ours", 2)
    with pytest.raises(ValueError, match="'mine' is taken: this process"):
        plugins.add("mine", 2)
    plugins.remove("mine")
    assert plugins.names == ()


def test_names_are_found_without_loading_what_they_name(installed: Path) -> None:
    assert "grid" in registry.codec_names()
    assert "grid" not in sys.modules
    settings = CodecSettings("grid", options={"wide": True})
    layout = Layout.of({"x": (2, 3)})
    assert payload_bytes(settings, layout) == 16 + 1 + 4 + 2 * 6
    assert payload_bytes(dataclasses.replace(settings, options={}), layout) == 16 + 1 + 4 + 6


def test_a_flower_app_of_anybodys_takes_it_with_its_options(installed: Path) -> None:
    layout = Layout.of({"x": (2, 3)})
    ids = {
        codec_of_rounds(CodecSettings("grid", options=options), layout, "cpu")(Held.at_start(torch.zeros(2, 3))).id
        for options in ({}, {"wide": True})
    }
    assert len(ids) == 2


def test_the_two_copies_are_alike() -> None:
    one, other = ((CHECKOUT / folder / "plugins.py").read_text() for folder in ("gradcodec", "adapters"))
    assert one.replace("adapters.plugins", "gradcodec.plugins") == other
