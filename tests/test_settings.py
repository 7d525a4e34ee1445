"""Settings from Hydra: defaults that compose, and errors that name the key before any work starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from conf.schema import Settings, TgapRun, changed, check_settings, register_schemas, settings_of, tgap_run_of

register_schemas()


def composed(*overrides: str, name: str = "federate") -> Settings:
    with initialize_config_dir(str(Path("conf").absolute()), version_base="1.3"):
        config = compose(name, ["output=out", *overrides])
        return settings_of(config) if name == "federate" else tgap_run_of(config)


def test_the_defaults_are_served() -> None:
    settings = composed()
    check_settings(settings)
    assert (settings.arm, settings.codec.name, settings.codec.bits) == ("coded", "learned", 0.5)
    assert Path(settings.model.path).is_absolute()
    assert Settings.from_json(settings.to_json()) == settings


def test_tgap_records_densely_on_its_own_split() -> None:
    run = composed(name="tgap")
    check_settings(run)
    assert isinstance(run, TgapRun)
    assert (run.arm, run.task.split, composed().task.split) == ("dense", "tgap", "faf")


@pytest.mark.parametrize("group", ["codec", "strategy", "task", "train", "backend", "model"])
def test_every_option_of_every_group_composes(group: str) -> None:
    for option in Path("conf", group).glob("*.yaml"):
        extra = ["task.path=somewhere"] if option.stem in ("jsonl", "text", "chat", "ceval", "mmlu") else []
        check_settings(composed(f"{group}={option.stem}", *extra))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("arm=fast", "arm='fast' is none of base, centralised, dense, coded"),
        ("codec.name=zip", "codec.name='zip' is none of identity, learned, resnet"),
        ("codec.bits=-1", "codec.bits=-1.0"),
        ("codec.artifact=null", "codec.artifact=null: the codec learned needs"),
        ("codec.feedback=2", "codec.feedback=2.0"),
        ("model.path=nowhere", "nowhere' is no directory"),
        ("strategy.name=sum", "strategy.name='sum' is none of fedavg"),
        ("strategy.momentum=5", "strategy.momentum=5.0 must be at least 0 and less than 1"),
        ("strategy.beta_2=nan", "strategy.beta_2=nan"),
        ("strategy.tau=0", "strategy.tau=0.0 must be greater than 0"),
        ("model.device=gpu", "model.device='gpu' is no device: give auto, cpu, cuda or cuda:1"),
        ("backend.client_cpus=0", "backend.client_cpus=0"),
        ("backend.client_gpus=-1", "backend.client_gpus=-1.0"),
        ("federation.metrics_port=0", "federation.metrics_port=0 must lie between 1 and 65535"),
        ("federation.metrics_port=65536", "federation.metrics_port=65536"),
        ("backend.name=cloud", "backend.name='cloud' is none of simulation, superlink"),
        ("federation.clients_per_round=11", "federation.clients_per_round=11 is more than federation.num_clients=10"),
        ("federation.rounds=0", "federation.rounds=0"),
        ("train.steps=0", "train.steps=0"),
        ("task.name=poems", "task.name='poems'"),
        ("record=updates.safetensors", "record=... needs arm=dense"),
    ],
)
def test_a_wrong_value_is_named(override: str, said: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_settings(composed(override))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [("codec=zip", "identity"), ("federation.ronds=3", "ronds"), ("seed=many", "seed")],
)
def test_hydra_names_unknown_groups_keys_and_types(override: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        composed(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [("x=[1", "setting 'x=[1' is no key=value: while parsing"), ("sede=1", "sede"), ("seed=many", "settings: seed: ")],
)
def test_a_change_that_cannot_be_read_is_named_in_one_line(override: str, said: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        changed(Settings(), ["seed=3", override])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert changed(Settings(), ["seed=3", "model.dtype=bfloat16"]).model.dtype == "bfloat16"


def test_settings_from_a_stranger_are_checked_for_keys_and_types() -> None:
    for text in ('{"output": "${oc.env:HOME}"}', '{"sede": 1}', '{"seed": "x"}', '{"model": 3}', "[]", "{"):
        with pytest.raises(ValueError):  # noqa: PT011
            Settings.from_json(text)


@pytest.mark.parametrize(
    ("module", "override", "said"),
    [
        ("server.federate", "codec=zip", "identity"),
        ("server.federate", "arm=fast", "error: arm='fast'"),
        ("server.federate", "codec.artifact=/nowhere", "/nowhere holds no codec artifact"),
        ("tgap", "tgap.codecs=[zip]", "error: tgap.codecs holds 'zip'"),
        ("tgap", "tgap.record=/nowhere", "tgap.record=/nowhere is no file"),
    ],
)
def test_the_programs_say_it_in_one_line_and_fail(tmp_path: Path, module: str, override: str, said: str) -> None:
    command = [sys.executable, "-m", module, override, f"output={tmp_path / 'out'}", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unwritable_output_is_named_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "server.federate", "arm=base", f"hydra.run.dir={tmp_path / 'hydra'}"]
    done = subprocess.run([*command, f"output={tmp_path / 'file' / 'out'}"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "cannot be written to" in done.stderr
    assert {path.name for path in (tmp_path / "hydra").iterdir()} <= {".hydra"}
