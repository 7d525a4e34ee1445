"""Every codec in one table: what is known of it before its code is loaded. Loads no torch.

A new codec is one class that follows ``gradcodec.codec.Codec`` and one entry here, or a call of ``register``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class CodecEntry:
    """What a codec says of itself.

    Attributes:
        name: by which settings and artifacts call it.
        codec: its class as ``module:Class``, imported when it is first built.
        has_rate: whether it takes a byte budget. One that does not has ``stream_bytes`` (``gradcodec.codec.OneRate``).
        needs_artifact: whether it is made from a trained artifact, by ``from_artifact(artifact, layout, device)``, and
            not from the layout alone, by ``Class(layout)``.
        uses_last_update: whether it has side information, which comes from the last global update.
        derives_directions: whether it can take its directions along the width from the base model (``rounds.py``).
        any_layout: whether one artifact serves adapters of every shape; true of all that need none.
        general_artifact: folder in this package with an artifact for adapters of any model, taken where no other is
            named; or None.
        trainer: the function that trains it as ``module:function`` (``gradcodec.training.fit.Trainer``), or None.
        trained_as: the names by which training is asked for its variants; all give artifacts of this codec.
        encoding_updates: memory that encoding one update takes on the update's device, the update itself included, at
            most, in updates of float32.
        decoding_updates: the same for decoding one.
    """

    name: str
    codec: str
    has_rate: bool = False
    needs_artifact: bool = False
    uses_last_update: bool = False
    any_layout: bool = True
    derives_directions: bool = False
    general_artifact: str | None = None
    trainer: str | None = None
    trained_as: tuple[str, ...] = ()
    encoding_updates: int = 6
    decoding_updates: int = 3


def register(entry: CodecEntry) -> None:
    """Adds a codec. Raises ValueError: the name, or one that it is trained by, is taken."""
    if entry.name in _ENTRIES:
        raise ValueError(f"codec {entry.name!r} is registered already, as {_ENTRIES[entry.name].codec}")
    if taken := sorted(set(entry.trained_as) & set(trainable_names())):
        raise ValueError(f"codec {entry.name!r} cannot be trained as {taken[0]!r}: another one is")
    _ENTRIES[entry.name] = entry


def unregister(name: str) -> None:
    """Inverse of ``register``. Raises KeyError: no such codec."""
    del _ENTRIES[name]


def entry_of(name: str) -> CodecEntry:
    """The entry of a registered codec. Raises KeyError: no such codec."""
    return _ENTRIES[name]


def codec_names() -> tuple[str, ...]:
    """All registered codecs, in the order of their registration."""
    return tuple(_ENTRIES)


def names_with_a_rate() -> tuple[str, ...]:
    """Those that take a byte budget."""
    return tuple(entry.name for entry in _ENTRIES.values() if entry.has_rate)


def names_for_any_layout() -> tuple[str, ...]:
    """Those that serve adapters of every shape, once trained if they are."""
    return tuple(entry.name for entry in _ENTRIES.values() if entry.any_layout)


def trainable_names() -> tuple[str, ...]:
    """What training can be asked for: codecs that learn, and their variants."""
    return tuple(name for entry in _ENTRIES.values() for name in entry.trained_as)


def trained_by(name: str) -> CodecEntry:
    """The codec that training of this name gives. Raises KeyError: none."""
    for entry in _ENTRIES.values():
        if name in entry.trained_as:
            return entry
    raise KeyError(name)


def loaded(location: str) -> Any:
    """What ``module:attribute`` names, imported now."""
    module, _, attribute = location.partition(":")
    return getattr(import_module(module), attribute)


_ENTRIES: dict[str, CodecEntry] = {}

_PAPER, _PAPER_FIT = "gradcodec.paper.resnet:ResnetCodec", "gradcodec.paper.fit:train"
register(CodecEntry("identity", "gradcodec.codec:IdentityCodec"))
register(
    CodecEntry(
        "learned",
        "gradcodec.learned.codec:LearnedCodec",
        has_rate=True,
        needs_artifact=True,
        uses_last_update=True,
        derives_directions=True,
        general_artifact="general",
        trainer="gradcodec.learned.fit:train",
        trained_as=("learned",),
        encoding_updates=5,
    )
)
for _name in ("resnet", "cnn1d", "uformer"):
    register(
        CodecEntry(
            _name,
            _PAPER,
            needs_artifact=True,
            any_layout=False,
            trainer=_PAPER_FIT,
            trained_as=("resnet", "resnet-literal") if _name == "resnet" else (_name,),
        )
    )
register(CodecEntry("bf16", "gradcodec.peers.casts:Bf16Codec"))
register(CodecEntry("int8", "gradcodec.peers.casts:Int8Codec"))
register(CodecEntry("nf4", "gradcodec.peers.casts:Nf4Codec"))
register(CodecEntry("sign", "gradcodec.peers.casts:SignCodec"))
register(CodecEntry("eden", "gradcodec.peers.eden:EdenCodec", has_rate=True))
register(CodecEntry("projection", "gradcodec.peers.projection:ProjectionCodec", has_rate=True))
register(CodecEntry("topk", "gradcodec.peers.topk:TopkCodec", has_rate=True))
register(CodecEntry("powersgd", "gradcodec.peers.powersgd:PowersgdCodec", has_rate=True))
register(CodecEntry("b-only", "gradcodec.peers.b_only:BOnlyCodec", has_rate=True, uses_last_update=True))
register(CodecEntry("rotated", "gradcodec.peers.rotated:RotatedCodec", has_rate=True, uses_last_update=True))
