"""Codes for any app of Flower's Message API, in three lines.

    from gradcodec.flower import coded, Coded
    app = ClientApp(mods=[coded()])
    strategy = Coded(FedAvg())  # in place of FedAvg()

Imports Flower, NumPy, PyTorch and the codec, and nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcodec.flower.mod import coded
    from gradcodec.flower.strategy import Coded, CodedFedAvg

__all__ = ["Coded", "CodedFedAvg", "coded"]
_PLACES = {"coded": "mod", "Coded": "strategy", "CodedFedAvg": "strategy"}


def __getattr__(name: str) -> Any:  # wire.py is also imported by processes that load no torch
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
