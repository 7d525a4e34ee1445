"""What a run that has ended leaves for people: its report. Nothing here makes a finished run fail."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from server.pages.clients import Withheld
from server.pages.run import NAME, write_run_page
from server.records.results import RunResults
from server.run.answers import sample_answers
from server.run.evaluate import Evaluator
from server.run.outline import Outline

_LOG = logging.getLogger("flwr")  # which a run shows and keeps


def report_on(
    results: RunResults, evaluator: Outline | None = None, adapter: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Writes the report of a run whose results are written, or that failed; what is wrong with it is a warning.

    Args:
        results: of the run.
        evaluator: its model, if there is one, which holds ``adapter`` afterwards; None: no answers are wanted.
        adapter: the final one.
    """
    output = Path(results.settings.output)
    try:
        for name in (NAME, str(Path(NAME).with_suffix(".json"))):
            (output / name).unlink(missing_ok=True)  # of an earlier run in the same folder
        write_run_page(results, output, _answers(results, evaluator, adapter))
    except Exception as error:
        _LOG.warning("the run has ended, but its report %s is not written: %r", output / NAME, error)


def _answers(results: RunResults, evaluator: Outline | None, adapter: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """None where texts are protected, where there is no model, and where it does not generate."""
    count = results.settings.federation.sample_answers
    if not isinstance(evaluator, Evaluator) or not count or Withheld.of(results).texts:
        return []
    before = {"before": evaluator.initial}
    adapters = before if results.settings.arm == "base" else before | {"after": adapter}
    try:
        return sample_answers(evaluator, adapters, count)
    except Exception as error:  # of memory, or of a model that has its own way to generate
        _LOG.warning("the report has no sample answers: %r", error)
        return []
