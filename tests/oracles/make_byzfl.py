"""Records what byzfl 0.0.11 makes of small random updates: the oracle of ``strategies/rules.py``.

    pip download --no-deps byzfl==0.0.11 -d WHEELS
    python tests/oracles/make_byzfl.py WHEELS/byzfl-0.0.11-py3-none-any.whl

Only the wheel's module of aggregators is loaded, by itself: the package as a whole wants torchvision. Writes byzfl.json
beside this file. Nothing of byzfl is copied: it is asked. Its Krum and Multi-Krum sum over n - f - 1 neighbours, where
Blanchard et al. (2017) and this project have n - f - 2; the test asks ours for as many.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

VERSION = "0.0.11"
CASES = [(n, f, size) for n, f in ((5, 1), (7, 1), (7, 2), (9, 2), (10, 2), (11, 3)) for size in (6, 17)]


def main() -> None:
    wheel = Path(sys.argv[1])
    assert wheel.name.startswith(f"byzfl-{VERSION}-"), wheel
    with TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        byzfl = aggregators_of(Path(folder))
        cases = [case(byzfl, seed, *sizes) for seed, sizes in enumerate(CASES)]
    text = json.dumps({"byzfl": VERSION, "cases": cases}, indent=None, separators=(",", ":"))
    Path(__file__).with_name("byzfl.json").write_text(text.replace('{"n"', '\n{"n"') + "\n")


def aggregators_of(folder: Path) -> Any:
    """The module, without what the package imports of its own accord."""
    sys.path.insert(0, str(folder))
    for name in ("byzfl", "byzfl.aggregators"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    return importlib.import_module("byzfl.aggregators.aggregators")


def case(byzfl: Any, seed: int, n: int, f: int, size: int) -> dict[str, Any]:
    """Honest updates about a common one; the last f are an attacker's: far away in odd cases, near in even ones."""
    generator = np.random.default_rng(seed)
    updates = generator.normal(1.0, 0.5, (n, size)).astype(np.float32).astype(np.float64)
    updates[n - f :] *= -30.0 if seed % 2 else -1.0
    centre = generator.normal(1.0, 0.2, size)
    clipping = byzfl.CenteredClipping(L=3, tau=1.5)
    clipping.m = centre
    rules = {
        "krum": byzfl.Krum(f),
        "multikrum": byzfl.MultiKrum(f),
        "median": byzfl.Median(),
        "trimmed_mean": byzfl.TrMean(f),
        "geometric_median": byzfl.GeometricMedian(nu=1e-9, T=200),
        "centred_clip": clipping,
    }
    found = {name: rule(updates.copy()).tolist() for name, rule in rules.items()}
    return {"n": n, "f": f, "updates": updates.tolist(), "centre": centre.tolist(), "radius": 1.5, "rules": found}


if __name__ == "__main__":
    main()
