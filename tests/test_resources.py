"""The table of what a federation takes: it is what dry runs say, and the page's is the program's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from conf.schema import Settings, register_schemas, settings_of
from server.federate import planned
from server.resources import COLUMNS, GEOMETRIES, USUAL, table_of

PAGE = Path("docs/resources.md")


def settings_with(*overrides: str) -> Settings:
    register_schemas()
    with initialize_config_dir(str(Path("conf").absolute()), version_base="1.3"):
        return settings_of(compose("federate", ["output=out", *USUAL, *overrides]))


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]


def test_the_table_of_the_page_is_the_programs() -> None:
    """Of two geometries; the others take a minute."""
    (table,) = re.findall(r"<!-- resources -->\n(.*)<!-- /resources -->", PAGE.read_text(), re.DOTALL)
    head, _, *rows = rows_of(table)
    assert tuple(head) == COLUMNS
    assert {row[0].split()[0] for row in rows} == {path.name for path in GEOMETRIES.iterdir()}
    for name in ("qwen2.5-1.5b", "llama-7b"):
        made = rows_of("\n".join(table_of(settings_with(f"model.path={GEOMETRIES / name}"))))
        assert made[2:] == [row for row in rows if row[0].startswith(f"{name} ")]


def test_a_row_is_what_a_dry_run_says() -> None:
    settings = settings_with(f"model.path={GEOMETRIES / 'qwen2.5-1.5b'}", "lora.rank=4", "dry_run=true")
    _, _, _, row = rows_of("\n".join(table_of(settings)))
    plan = planned(replace(settings, model=replace(settings.model, dtype="bfloat16", quantization="nf4")))
    assert row[1] == "nf4"
    assert row[2] == f"{plan.layout.num_parameters / 1e6:.1f} M"
    assert row[3] == f"{plan.client_memory.total / 2**30:.1f} GiB"
    assert plan.payload_bytes is not None and row[6] == f"{plan.payload_bytes / 1e3:.1f} KB"
    assert row[8] == f"{4 * plan.layout.num_parameters / 1e6:.1f} MB"


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.path='/no/such'"):
        list(table_of(settings_with("model.path=/no/such")))
