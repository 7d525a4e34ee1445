"""Reports: a page shows what its JSON holds, nothing in it runs or asks a network, and what is withheld stays so."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from browsers import WIDTHS, chromium, in_a_browser, opened
from run_results import HOSTILE, pretended_results, standard_settings

from adapters.settings import TrainSettings
from adapters.windows import Windows
from bench import demo_grpc
from bench.demo_page import write_demo_page
from conf.schema import FederationSettings, Settings, changed, register_schemas, settings_of
from conf.standard import OF_THIS_RUN, command, flat, set_by_hand, standard
from report import charts
from report.charts import Row
from report.look import STYLE
from report.page import LARGEST_PAGE, Facts, Figure, Section, Table, page_of, shown, values_of, write_csv, write_page
from server.backends.inprocess import run_in_process
from server.compare import main as compare
from server.pages.clients import OWN_WORDS
from server.pages.comparison import differing_settings, kinds_of, on_the_front, write_comparison
from server.pages.run import sections_of, write_run_page
from server.records.curves import bytes_by_round, pareto_front
from server.records.finished import read_run, read_runs
from server.records.results import RunResults
from server.run import finish
from server.run.answers import PROMPT_TOKENS, _split
from server.run.evaluate import Evaluator
from strategies.outcomes import FAILED, Fault, NodeLoss
from tasks.settings import TaskSettings

ANSWERS = [{"prompt": f"say {HOSTILE}", "before": "a\nb", "after": "c", "how it really goes on": "d"}]


class Page(HTMLParser):
    """Tables, texts and addresses of a page, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.values: list[float] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str, str]] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "data":
            self.values.append(float(dict(attrs)["value"] or "nan"))
        elif tag == "script":
            self.scripts.append((str(dict(attrs).get("type", "")), ""))
        elif tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data
        elif "h2" in self._open:
            self.headings[-1] += data


def parts_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for section in content["sections"] for part in section["parts"]]


def tables_of(content: dict[str, Any]) -> list[list[list[str]]]:
    """What a page must show of its JSON's tables, in order."""
    return [
        [part["columns"], *([shown(cell) for cell in row] for row in part["rows"])]
        for part in parts_of(content)
        if part["kind"] in ("table", "figure")
    ]


def numbers_of(content: dict[str, Any]) -> list[float]:
    found: list[float] = []
    for part in parts_of(content):
        cells = part["values"].values() if part["kind"] == "facts" else [c for row in part.get("rows", []) for c in row]
        found += [cell for cell in cells if isinstance(cell, (int, float)) and not isinstance(cell, bool)]
    return found


def written(results: RunResults, folder: Path) -> tuple[str, dict[str, Any]]:
    write_run_page(results, folder, ANSWERS)
    return (folder / "report.html").read_text(), json.loads((folder / "report.json").read_text())


def test_a_page_shows_the_values_of_its_json(tmp_path: Path) -> None:
    text, content = written(pretended_results(), tmp_path)
    page = Page(text)
    assert page.tables == tables_of(content)
    assert page.values == numbers_of(content) and len(page.values) > 100
    assert page.headings == [section["title"] for section in content["sections"]]


def test_the_json_holds_the_values_of_the_run(tmp_path: Path) -> None:
    results = pretended_results()
    _, content = written(results, tmp_path)
    parts = {part["title"]: part for part in parts_of(content) if "title" in part}
    assert [row[1] for row in parts["Loss over rounds"]["rows"]] == results.heldout_loss
    assert parts["Loss over bytes"]["rows"][-1][1] == results.account().total
    counted = {row[0]: row[1] for row in parts["Everything counted"]["rows"]}
    assert counted["total"] == results.account().total == sum(counted[part] for part in list(counted)[:5])
    assert {(row[0], row[1]): row[2] for row in parts["Rounds and clients"]["rows"]}[2, 1] == "failed"
    assert [row[2] for row in parts["Rounds and clients"]["rows"]].count("accepted") == len(results.uplinks) == 21
    took = {row[0]: row[1:] for row in parts["How often each client took part"]["rows"]}
    assert took[1] == [4, 3, 0, 1, 0] and took[5] == [4, 4, 0, 0, 0]
    (failed,) = (row for row in parts["Replies of no use"]["rows"] if row[0] == "failed")
    assert failed[1:] == [HOSTILE, 1, "1", "2"]
    assert parts["Nodes that may not take part"]["rows"] == [[str(2**62 + 5), HOSTILE]]
    by_client = {row[0]: row for row in parts["By client"]["rows"]}
    assert by_client[5][1] == 80 and by_client[5][6] == sum(
        u.payload_bytes for u in results.uplinks if u.partition == 5
    )
    seconds = {row[0]: row[1] for row in parts["Seconds by phase"]["rows"]}
    assert seconds == {"training": 42.0, "encoding": 5.25, "decoding": 2.625, "the rest": 60 - 4 * 2.25 - 2.625}
    checks = {row[0]: row[2] for row in parts["What to look at first"]["rows"]}
    assert checks["Were all rounds done?"] == checks["Did it learn?"] == "fine"
    assert checks["Were the replies used that were asked for?"] == "look at it"
    assert {row[0] for row in parts["Settings that are not the standard ones"]["rows"]} == {
        "federation.rounds",
        "federation.num_clients",
        "federation.clients_per_round",
    }
    assert parts["Continuations"]["rows"] == [[*ANSWERS[0].values()]]
    assert "fell from 3.6140" in content["lead"]


@pytest.mark.parametrize("arm", ["base", "centralised"])
def test_arms_without_clients_have_what_there_is(arm: str, tmp_path: Path) -> None:
    settings = standard_settings()
    settings.arm = arm
    losses = [3.6] if arm == "base" else [3.6, 3.4, 3.1]
    _, content = written(RunResults(settings, 10, losses, seconds=2.0), tmp_path)
    titles = {section["title"] for section in content["sections"]}
    assert "Whether to trust it" in titles and ("Held-out loss" in titles) == (arm == "centralised")
    assert not titles & {"Bytes", "Clients", "Who took part"}


def test_a_server_without_base_model_tells_what_its_nodes_said(tmp_path: Path) -> None:
    results = pretended_results()
    results.settings.server.base, results.heldout_loss = "none", []
    silent = tmp_path / "silent"
    silent.mkdir()
    _, content = written(results, silent)
    assert content["lead"].startswith("Nobody measured a loss. The adapter is that of 4 rounds")
    with pytest.raises(ValueError, match=r"it has no loss of every round: federation\.evaluate_every=1"):
        read_run(run_folder(tmp_path / "run", results))
    results.node_losses = [
        NodeLoss(number, client, 3.5 - 0.1 * number + 0.2 * client, 100 * (1 + client), 4, 0.5)
        for number in range(5)
        for client in range(2)
    ]
    results.faults.append(Fault(4, 3, "it does not answer", FAILED, 5, evaluating=True))
    _, content = written(results, tmp_path)
    assert "fell from 3.6333 to 3.2333 nats per token in 4 rounds" in content["lead"]
    (section,) = (one for one in content["sections"] if one["title"] == "Loss on the nodes")
    assert section["parts"][1]["rows"][1] == pytest.approx([1, 3.7, 3.3, 200, 4])
    assert ["Were the replies used that were asked for?", "21 of 24", "look at it"] in parts_of(content)[1]["rows"]
    assert read_run(run_folder(tmp_path / "again", results)).losses == pytest.approx(
        [3.6333, 3.5333, 3.4333, 3.3333, 3.2333], abs=1e-4
    )


def test_nothing_of_a_page_runs_or_asks_a_network_but_its_own_script(tmp_path: Path) -> None:
    """Texts of runs, nodes and users are hostile, in the page and in the JSON inside it."""
    text, _ = written(pretended_results(), tmp_path)
    page = Page(text)
    assert [kind for kind, _ in page.scripts] == ["application/json", "", ""]
    drawn = [attrs for tag, attrs in page.tags if tag == "div" and attrs.get("class") == "chart"]
    assert len(drawn) == 7 and all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in drawn)
    assert not {"img", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    addresses = [attrs[key] for _, attrs in page.tags for key in ("src", "href", "action", "srcset") if key in attrs]
    assert addresses and all(address == "data:," or str(address).startswith("#section-") for address in addresses)
    (policy,) = (attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "unsafe-eval" not in policy
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for k, s in page.scripts if not k
    }
    scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert set(scripts.split()[1:]) == hashes
    assert HOSTILE not in text and "url(" not in text.split("</style>")[0]


def test_texts_lose_what_cannot_be_seen() -> None:
    page = Page(
        page_of(
            "x",
            "y",
            [
                Section(
                    "t",
                    [
                        Table(
                            "t",
                            ("a",),
                            [
                                [
                                    "red\x1b[31m \u202eevil\x00",
                                ]
                            ],
                        )
                    ],
                )
            ],
            {},
        )
    )
    assert page.tables == [[["a"], ["red[31m evil"]]]


def test_numbers_that_json_lacks_are_words(tmp_path: Path) -> None:
    rows: list[Row] = [{"x": 1, "y": 2.0}, {"x": 2, "y": float("inf")}, {"x": 3, "y": None}]
    figure = Figure("f", "f", charts.lines(rows, "x", "y"), rows)
    assert figure.chart["data"]["values"] == [{"x": 1, "y": 2.0}]
    write_page(tmp_path / "p.html", "t", "l", [Section("s", [figure, Facts({"n": float("nan")})])], {})
    content = json.loads((tmp_path / "p.json").read_text(), parse_constant=pytest.fail)
    assert content["sections"][0]["parts"][0]["rows"] == [[1, 2.0], [2, "inf"], [3, None]]
    assert content["sections"][0]["parts"][1]["values"] == {"n": "nan"}


def test_a_large_run_stays_within_the_limit(tmp_path: Path) -> None:
    text, content = written(pretended_results(rounds=60, clients=50), tmp_path)
    assert len(text.encode()) <= LARGEST_PAGE
    assert (tmp_path / "report.html").stat().st_size == len(text.encode())
    parts = {part["title"]: part for part in parts_of(content) if "title" in part}
    assert len(parts["Rounds and clients"]["rows"]) == 3000
    assert "more rows are in the page&#x27;s JSON file" in text or "more rows are in the page's JSON file" in text


def test_a_page_that_cannot_be_small_is_refused() -> None:
    rows: list[Row] = [{"x": number, "y": number} for number in range(100_000)]
    with pytest.raises(ValueError, match=r"the page 't' comes to [\d,]+ bytes: give its charts fewer rows"):
        page_of("t", "l", [Section("s", [Figure("f", "f", charts.points(rows, "x", "y"), rows)])], {})


def test_a_figure_needs_a_width() -> None:
    rows: list[Row] = [{"x": 1, "y": 1}]
    with pytest.raises(ValueError, match=r"section 's' is shut"):
        page_of("t", "l", [Section("s", [Figure("f", "f", charts.bars(rows, "x", "y"), rows)], closed=True)], {})


@pytest.mark.parametrize(
    ("privacy", "gone"),
    [
        ({"name": "client_dp"}, {"Answers before and after"}),
        ({"secure_aggregation": True}, {"Answers before and after"}),
        ({"name": "client_dp", "noise": "sum", "secret_sampling": True}, {"Answers before and after"}),
    ],
)
def test_what_privacy_withholds_does_not_come_back(privacy: dict[str, Any], gone: set[str], tmp_path: Path) -> None:
    results = pretended_results()
    results.uplinks = [dataclasses.replace(one, seconds_train=123.456, update_norm=77.7) for one in results.uplinks]
    results.settings.privacy = dataclasses.replace(results.settings.privacy, **privacy)
    text, content = written(results, tmp_path)
    assert not gone & {section["title"] for section in content["sections"]}
    everything = text + json.dumps(content)
    for secret in (
        "123.456",
        "77.7",
        "train loss",
        "examples a round",
        ANSWERS[0]["before"] + "</td>",
        "Continuations",
    ):
        assert secret not in everything
    if not results.settings.privacy.secret_sampling:
        (faults,) = (part for part in parts_of(content) if part.get("title") == "Replies of no use")
        assert {row[0]: row[1] for row in faults["rows"]} == {
            "absent": "its node is not connected",
            "failed": OWN_WORDS,
            "refused": "too long",
        }
    else:
        titles = {part["title"] for part in parts_of(content) if "title" in part}
        assert not titles & {"Rounds and clients", "How often each client took part", "Bytes by client", "By client"}
        (kinds,) = (part for part in parts_of(content) if part.get("title") == "Replies of no use")
        assert kinds["columns"] == ["kind", "times"]  # neither who nor when
        assert "Was every client heard?" not in everything


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 has it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_texts_and_marks_stand_out_on_light_dark_and_paper() -> None:
    """Level AA: 4.5 to 1 for texts, 3 to 1 for marks."""
    blocks = re.findall(r"\{([^{}]*--page: #[^{}]*)\}", STYLE)
    themes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(themes) == 4  # light, dark by the system, dark by hand, paper
    for theme in themes:
        for text in ("ink", "quiet", "link"):
            assert min(contrast(theme[text], theme[page]) for page in ("page", "panel")) >= 4.5, (text, theme)
        assert min(contrast(colour, theme["page"]) for colour in charts.COLOURS) >= 3, theme


def test_the_standard_settings_are_those_that_hydra_makes() -> None:
    register_schemas()
    with hydra.initialize_config_module("conf", version_base="1.3"):
        composed = settings_of(hydra.compose("federate", overrides=["output=x"]))
    usual = standard()
    assert set_by_hand(flat(dataclasses.asdict(composed))) == {}
    assert {*flat(dataclasses.asdict(composed))} - {*OF_THIS_RUN} == {*usual} - {*OF_THIS_RUN}


def test_the_command_makes_the_settings_again() -> None:
    settings = standard_settings()
    settings.arm, settings.codec.down_bits, settings.task.path = "dense", 0.25, "/data/it's (mine)"
    settings.federation.min_clients, settings.train.update = 3, "gradient"
    by_hand = set_by_hand(flat(dataclasses.asdict(settings)))
    said = command(by_hand)
    assert said.startswith("python -m server.federate arm=dense ") and "train.update=gradient" in said
    register_schemas()
    with hydra.initialize_config_module("conf", version_base="1.3"):
        again = settings_of(hydra.compose("federate", overrides=["output=x", *shlex.split(said)[3:]]))
    assert flat(dataclasses.asdict(again)) | {"output": ""} == flat(dataclasses.asdict(settings)) | {"output": ""}


def test_bytes_by_round_end_at_the_total() -> None:
    assert bytes_by_round([(1, 10), (2, 20)], [(1, 1), (3, 2)], [100, 50], 5, 2) == [5, 116, 88]
    results = pretended_results()
    up = [(one.server_round, one.payload_bytes) for one in results.uplinks]
    down = [(one.server_round, one.total_bytes) for one in results.downlinks]
    assert bytes_by_round(up, down, results.delivery_bytes, 0, 4)[-1] == results.account().total


def test_the_front_is_what_no_other_betters() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 4.0), (4.0, 3.0), (1.0, 6.0), (4.0, 3.0)]
    assert pareto_front(points) == [True, True, False, True, False, True]


def run_folder(folder: Path, results: RunResults) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results.to_json()))
    return folder


def test_runs_beside_each_other(tmp_path: Path) -> None:
    plan = [(bits, seed) for bits in (0.5, 0.1) for seed in (0, 1)]
    folders = [run_folder(tmp_path / f"{b}-{s}", pretended_results(s, bits=b)) for b, s in plan]
    worse = pretended_results(0, bits=2.0)
    worse.heldout_loss[-1] = 3.5
    runs, failures = read_runs([*folders, run_folder(tmp_path / "worse", worse)])
    assert failures == []
    kinds = kinds_of(runs)
    assert differing_settings(runs) == ["seed", "codec.bits"]
    assert [(kind.label, len(kind.runs)) for kind in kinds] == [
        ("codec.bits=0.5", 2),
        ("codec.bits=0.1", 2),
        ("codec.bits=2.0", 1),
    ]
    assert on_the_front(kinds) == [True, True, False]
    losses = [pretended_results(seed, bits=0.1).heldout_loss[-1] for seed in (0, 1)]
    assert kinds[1].loss == pytest.approx(sum(losses) / 2)
    assert kinds[1].spread == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5) and kinds[2].spread is None
    write_comparison(runs, failures, tmp_path / "out", "Beside each other")
    text, content = (
        (tmp_path / "out" / "report.html").read_text(),
        json.loads((tmp_path / "out" / "report.json").read_text()),
    )
    assert Page(text).tables == tables_of(content)
    front = next(part for part in parts_of(content) if part.get("title") == "Pareto front of loss over bytes")
    assert [row[-1] for row in front["rows"]] == [True, True, False]
    lines = (tmp_path / "out" / "report.csv").read_text().splitlines()
    assert len(lines) == 6 and lines[0].startswith("run,seed,held-out loss")


def test_a_sweep_with_jobs_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run_folder(tmp_path / "sweep" / "0", pretended_results())
    jobs = [
        {"folder": str(good), "state": "finished", "reason": ""},
        {"folder": str(tmp_path / "sweep" / "1"), "state": "failed", "reason": HOSTILE},
        {"folder": str(tmp_path / "sweep" / "2"), "state": "finished", "reason": ""},
    ]
    (tmp_path / "sweep" / "summary.json").write_text(json.dumps({"jobs": jobs}))
    sys_argv = ["compare", str(tmp_path / "sweep"), "--output", str(tmp_path / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys_argv)
        compare()
    assert "report: " in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    (failed,) = (part for part in parts_of(content) if part.get("title") == "Runs without results")
    assert [row[1] for row in failed["rows"]] == [
        HOSTILE,
        f"{tmp_path / 'sweep' / '2' / 'results.json'} is not here: the run did not finish",
    ]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "holds no results.json, no summary.json and no folders of runs"),
        (lambda path: path.write_text("{"), "cannot be read"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda path: path.write_text("[]"), "is not what a run writes"),
        (lambda path: path.write_text("[" * 100_000), "cannot be read"),
        (lambda path: path.write_text('{"heldout_loss": []}'), "is not what a run writes"),
        (lambda path: changed_json(path, heldout_loss=["x"]), "is not what a run writes"),
        (
            lambda path: changed_json(path, uplinks=[{"server_round": -1, "payload_bytes": 1}]),
            "is not what a run writes",
        ),
        (lambda path: changed_json(path, settings=3), "is not what a run writes"),
        (lambda path: changed_json(path, bits_per_parameter=float("nan")), "is not what a run writes"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(spoil: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", pretended_results())
    spoil(folder / "results.json")
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_runs([folder])
    assert "\n" not in str(error.value)


def changed_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_spreadsheet_finds_no_formula(tmp_path: Path) -> None:
    write_csv(Table("t", ("a", "b"), [["=1+1", -2.5], ["x,y", None]]), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == 'a,b\n\'=1+1,-2.5\n"x,y",\n'


def test_a_comparison_loads_no_engine() -> None:
    asked = "import server.compare, sys; print(*(m for m in ('torch', 'flwr', 'altair', 'numpy') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_demos_write_the_same_kind_of_page(tmp_path: Path) -> None:
    results = json.loads(Path("bench/results/demo-real.json").read_text())
    write_demo_page(results, tmp_path / "report.html")
    content = json.loads((tmp_path / "report.json").read_text())
    assert Page((tmp_path / "report.html").read_text()).tables == tables_of(content)
    arms = {row[0]: row for row in parts_of(content)[0]["rows"]}
    assert arms["coded"][2] == pytest.approx(100 * results["kept_fraction"], abs=0.5)  # of means, and a mean
    assert arms["base"][2] is None and arms["dense"][2] == 100
    assert [section["title"] for section in content["sections"]][:2] == ["Arms", "Loss"]
    assert {*results["tables"]} <= {section["title"] for section in content["sections"]}
    over_rounds = next(part for part in parts_of(content) if part.get("title") == "Loss over rounds")
    dense = [row for row in over_rounds["rows"] if row[0] == "dense"]
    assert [row[2] for row in dense] == results["arms"]["dense"]["heldout_loss"]
    last = [run["arms"]["dense"]["heldout_loss"][-1] for run in results["runs"]]
    assert dense[-1][3:] == [min(last), max(last)]


def test_the_demo_over_grpc_writes_one_too() -> None:
    wire = {"up": {"all": 9000, "polling": 600}, "down": {"all": 5000, "polling": 300}}
    results = {
        "payloads_equal": True,
        "payload_digests": {"grpc": ["1/0/ab"], "simulation": ["1/0/ab"]},
        "heldout_loss": {"grpc": [3.6, 3.5, 3.4, 3.3], "simulation": [3.6, 3.5, 3.4, 3.3]},
        "payload_bytes_per_client_round": 2000.0,
        "wire_bytes_per_client": [wire, wire],
        "rounds": 3,
        "seconds": 9.0,
    }
    content = values_of("t", demo_grpc.lead_of(results), demo_grpc.sections_of(results), {})
    assert "the same payloads, to the bit; held-out loss 3.6000 -> 3.3000" in content["lead"]
    (sizes,) = (part for part in parts_of(content) if part["kind"] == "table" and part["columns"][0] == "node")
    assert sizes["rows"][1] == [1, 2000, 200, 800, 3000, 100, 1667]


def test_prompts_end_where_answers_begin() -> None:
    ids = torch.arange(64)[None]
    prompt, true = _split(Windows.whole(ids), None)
    assert prompt.tolist() == [*range(PROMPT_TOKENS)] and int(true[0]) == PROMPT_TOKENS
    counted = torch.zeros(1, 64, dtype=torch.bool)
    counted[:, 40:50] = True
    prompt, true = _split(Windows(ids, counted).trimmed(), None)
    assert prompt.tolist() == [*range(40)] and true.tolist()[:2] == [40, 41]
    prompt, _ = _split(Windows(ids, counted), 20)
    assert len(prompt) <= 20 and int(prompt[-1]) == 39  # what the model takes, less what it is to write


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResults]:
    """A real run: two rounds of three clients."""
    folder = tmp_path_factory.mktemp("reported")
    (folder / "texts.jsonl").write_text("\n".join([json.dumps({"text": "Every client keeps its text. " * 40})] * 9))
    settings = Settings(
        arm="dense",
        output=str(folder / "run"),
        run_id="reported",
        task=TaskSettings(name="jsonl", path=str(folder / "texts.jsonl"), window=32, heldout_windows=2),
        train=TrainSettings(update="delta", lr=0.005, steps=1, batch_size=2, micro_batch_size=2),
        federation=FederationSettings(rounds=2, num_clients=3, clients_per_round=2, sample_answers=2),
    )
    settings.backend.name = "inprocess"
    return folder / "run", run_in_process(settings)


def test_a_run_leaves_a_report_with_its_answers(small_run: tuple[Path, RunResults]) -> None:
    folder, _ = small_run
    content = json.loads((folder / "report.json").read_text())
    parts = {part["title"]: part for part in parts_of(content) if "title" in part}
    written = json.loads((folder / "results.json").read_text())
    assert [row[1] for row in parts["Loss over rounds"]["rows"]] == written["heldout_loss"]
    assert parts["Loss over bytes"]["rows"][-1][1] == written["bytes"]["total"]
    assert [row[1] for row in parts["By client"]["rows"]] == [2] * len(parts["By client"]["rows"])  # one step of two
    assert parts["Continuations"]["columns"] == ["prompt", "before", "after", "how it really goes on"]
    assert len(parts["Continuations"]["rows"]) == 2 and all(row[0] for row in parts["Continuations"]["rows"])
    assert Page((folder / "report.html").read_text()).tables == tables_of(content)
    (run,) = read_runs([folder])[0]
    assert run.bytes_by_round[-1] == written["bytes"]["total"] and run == read_run(folder)


def test_a_report_that_cannot_be_written_fails_no_run(
    small_run: tuple[Path, RunResults],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    results = dataclasses.replace(small_run[1], settings=changed(small_run[1].settings, [f"output={tmp_path}"]))
    (tmp_path / "report.html").write_text("of an earlier run")

    def fail(*args: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(finish, "write_run_page", fail)
    monkeypatch.setattr(finish, "sample_answers", fail)
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.initial = {}
    try:
        finish.report_on(results, evaluator, {})
    finally:
        logger.removeHandler(caplog.handler)
    assert "the report has no sample answers" in caplog.text and "is not written: OSError('no room')" in caplog.text
    assert not (tmp_path / "report.html").exists()


def test_sections_without_answers_are_left_out() -> None:
    titles = [section.title for section in sections_of(pretended_results(), [], {})]
    assert "Answers before and after" not in titles and titles[0] == "Whether to trust it"


@in_a_browser
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_browser_shows_it(kind: str, tmp_path: Path) -> None:
    """Without an error, as wide as its window, with the values of the JSON, in every light."""
    if kind == "run":
        write_run_page(pretended_results(), tmp_path, ANSWERS)
    else:
        folders = [run_folder(tmp_path / str(b), pretended_results(bits=b)) for b in (0.5, 0.1)]
        write_comparison(*read_runs(folders), tmp_path, "Beside each other")
    content = json.loads((tmp_path / "report.json").read_text())
    figures = [part for part in parts_of(content) if part["kind"] == "figure"]
    address = (tmp_path / "report.html").as_uri()
    with chromium() as browser:
        for width in WIDTHS:
            for light in ("light", "dark"):
                page, said, asked = opened(browser, address, width, light)
                page.wait_for_function("document.documentElement.dataset.drawn !== undefined")
                assert said == [] and asked == [address]
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.evaluate("document.querySelectorAll('.chart svg').length") == len(figures)
                ends = "[...document.querySelectorAll('.chart svg')].map(s => s.getBoundingClientRect().right)"
                assert max(page.evaluate(ends)) <= width
                values = page.evaluate("[...document.querySelectorAll('data')].map(d => Number(d.value))")
                assert values == numbers_of(content)
                ink = "getComputedStyle(document.body).backgroundColor"
                colours = ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]
                before, after = colours if light == "light" else colours[::-1]
                assert page.evaluate(ink) == before
                page.focus("#theme")
                page.keyboard.press("Enter")
                assert page.evaluate(ink) == after
                page.focus("summary")
                page.keyboard.press("Enter")
                assert page.evaluate("document.querySelector('details').open")
                page.context.close()
