"""Vega, Vega-Lite and Vega-Embed as one script to be written into a page, out of ``vl-convert-python``.

It takes seconds to be put together: once for a process, and once for a user, who has it in ``$CG_FEDLLM_CACHE`` or
``~/.cache/cg-fedllm`` from then on.
"""

from __future__ import annotations

import contextlib
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path

from conf.output import OutputError, write_text

LEAST = 100_000
"""Characters; what is shorter is no bundle."""


@cache
def vega() -> str:
    """The script; it sets ``vegaEmbed``. Raises ImportError: ``vl-convert-python`` is not installed."""
    place = _cached()
    try:
        script = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        script = ""
    if len(script) < LEAST:
        script = _made()
        with contextlib.suppress(OSError, OutputError):  # of what cannot be kept the next process makes another
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(script, place)
    return script


def _cached() -> Path:
    folder = Path(os.environ.get("CG_FEDLLM_CACHE") or "~/.cache/cg-fedllm")
    with contextlib.suppress(RuntimeError):  # nobody's home
        folder = folder.expanduser()
    return folder / f"vega-{version('vl-convert-python')}.js"


def _made() -> str:
    import vl_convert

    script = str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub misses the defaults
    return script.replace("</script", "<\\/script")
