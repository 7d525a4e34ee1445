"""A codec for updates of neural networks, LoRA adapters above all: tens of times smaller, nothing lost for good.

    layout = Layout.of(shapes)                       # which tensors there are
    codec = build_codec(CodecSettings(), layout)     # the learned codec, with the artifact that it comes with
    payload, residual = encode_update(update, None, codec=codec, max_bytes=budget)
    decoded = decode_update(payload, codec=codec)    # on the other end; decoded + residual.error_RC is the update

Needs torch, numpy, safetensors and constriction; knows no Flower and no models (``gradcodec.flower`` is for Flower's
apps). Errors are ``CodecError`` and its kinds. A codec of one's own: ``register``, or an entry point
``gradcodec.codecs``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcodec.artifact import Artifact, load_artifact
    from gradcodec.build import build_codec
    from gradcodec.errors import CodecError
    from gradcodec.exchange import Residual, decode_update, encode_update
    from gradcodec.layout import Layout
    from gradcodec.registry import register
    from gradcodec.settings import CodecSettings

__all__ = [
    "Artifact",
    "CodecError",
    "CodecSettings",
    "Layout",
    "Residual",
    "build_codec",
    "decode_update",
    "encode_update",
    "load_artifact",
    "register",
]
_PLACES = {
    "Artifact": "artifact",
    "CodecError": "errors",
    "CodecSettings": "settings",
    "Layout": "layout",
    "Residual": "exchange",
    "build_codec": "build",
    "decode_update": "exchange",
    "encode_update": "exchange",
    "load_artifact": "artifact",
    "register": "registry",
}


def __getattr__(name: str) -> Any:  # settings and their checks are read by programs that load no torch
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
