"""What a program does before it loads torch and the libraries around it."""

from __future__ import annotations

import gc


def collect_seldom() -> None:
    """Lets Python look for cycles of garbage a seventieth as often as it does by itself.

    Loading torch and transformers makes millions of objects that stay: with Python's own thresholds a good part of the
    time goes into looking at them again and again.
    """
    gc.set_threshold(50_000, 20, 100)
