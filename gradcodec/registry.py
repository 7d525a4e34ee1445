"""Every codec in one table: what is known of it before its code is loaded. Loads no torch.

A new codec is one class that follows ``gradcodec.codec.Codec`` and one entry: here, in the metadata of a distribution
of its own (an entry point in the group ``gradcodec.codecs`` that names the entry, or a function that gives it), or by a
call of ``register``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from gradcodec.errors import CodecError
from gradcodec.plugins import PluginError, Plugins

_LOG = logging.getLogger(__name__)
_WARNED: set[str] = set()
PLUGINS = Plugins("gradcodec.codecs", own=lambda: _ENTRIES)


@dataclass(frozen=True)
class CodecEntry:
    """What a codec says of itself.

    Attributes:
        name: by which settings and artifacts call it.
        codec: its class as ``module:Class``, imported when it is first built; or, in one process alone, the class.
        has_rate: whether it takes a byte budget. One that does not has ``stream_bytes`` (``gradcodec.codec.OneRate``).
        needs_artifact: whether it is made from a trained artifact, by ``from_artifact(artifact, layout, device)``, and
            not from the layout alone, by ``Class(layout)``.
        options: its own settings, name -> the value that holds unless another of the same type is given. The class,
            ``from_artifact`` and ``stream_bytes`` take them by name, and its ``id`` covers them (``codec_id``).
        check: the function that refuses values of them with a ValueError whose text begins with the option's name, as
            ``module:function`` or itself; it takes them by name. None: every value of the type will do.
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
    codec: str | type
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
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    check: str | Callable[..., None] | None = None


def register(entry: CodecEntry) -> None:
    """Adds a codec to this process. Raises ValueError: the name, or one that it is trained by, is taken."""
    if entry.name in codec_names():
        ours = _ENTRIES.get(entry.name)
        whose = PLUGINS.origin(entry.name) if ours is None else ours.codec
        raise ValueError(f"codec {entry.name!r} is registered already, as {whose}")
    _check_trained_as(entry)
    PLUGINS.add(entry.name, entry)


def unregister(name: str) -> None:
    """Inverse of ``register``. Raises KeyError: no such codec was registered in this process."""
    PLUGINS.remove(name)


def entry_of(name: str) -> CodecEntry:
    """The entry of a codec, ours or a plug-in's.

    Raises:
        KeyError: no such codec.
        CodecError: a plug-in offers it, and what it offers cannot be used.
    """
    if name in _ENTRIES:
        return _ENTRIES[name]
    try:
        found = PLUGINS.load(name)
    except PluginError as error:
        raise CodecError(f"codec {error}") from error
    try:
        entry = found() if callable(found) else found
    except Exception as error:  # it is another's code, which may raise anything
        raise CodecError(f"codec {name!r} of {PLUGINS.origin(name)}: {error!r}") from error
    if not isinstance(entry, CodecEntry) or entry.name != name:
        said = f"the entry of {entry.name!r}" if isinstance(entry, CodecEntry) else repr(entry)
        raise CodecError(f"codec {name!r} of {PLUGINS.origin(name)} is {said}: a CodecEntry of that name is expected")
    return entry


def codec_names() -> tuple[str, ...]:
    """All codecs: ours, those registered in this process, and those that plug-ins offer."""
    return (*_ENTRIES, *PLUGINS.names)


def names_with_a_rate() -> tuple[str, ...]:
    """Those that take a byte budget."""
    return tuple(entry.name for entry in _entries() if entry.has_rate)


def names_for_any_layout() -> tuple[str, ...]:
    """Those that serve adapters of every shape, once trained if they are."""
    return tuple(entry.name for entry in _entries() if entry.any_layout)


def trainable_names() -> tuple[str, ...]:
    """What training can be asked for: codecs that learn, and their variants."""
    return tuple(name for entry in _entries() for name in entry.trained_as)


def trained_by(name: str) -> CodecEntry:
    """The codec that training of this name gives. Raises KeyError: none."""
    for entry in _entries():
        if name in entry.trained_as:
            return entry
    raise KeyError(name)


def options_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A codec's own settings, those that are not given as its entry has them.

    Raises:
        KeyError: no such codec.
        CodecError: an option that the codec does not have, or a value of another type; the text begins with its key.
    """
    entry = entry_of(name)
    if not isinstance(given, Mapping):
        raise CodecError(f"options={given!r}: values by name are expected")
    if unknown := sorted(given.keys() - entry.options.keys()):
        has = f"it has {', '.join(entry.options)}" if entry.options else "it has none"
        raise CodecError(f"options.{unknown[0]}: the codec {name} has no such option: {has}")
    return {key: _typed(key, given.get(key, default), default) for key, default in entry.options.items()}


def loaded(location: str | type | Callable[..., Any]) -> Any:
    """What ``module:attribute`` names, imported now; a class or a function is itself. Raises CodecError: it is not
    there, as may be with a plug-in's."""
    if not isinstance(location, str):
        return location
    module, _, attribute = location.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise CodecError(f"{location} cannot be loaded: {error!r}") from error


def _entries() -> Iterator[CodecEntry]:
    """Ours, and those of plug-ins that can be used; what is wrong with others is said, once."""
    yield from _ENTRIES.values()
    for name in PLUGINS.names:
        try:
            yield entry_of(name)
        except CodecError as error:
            if name not in _WARNED:
                _WARNED.add(name)
                _LOG.warning("it is left out: %s", error)


def _check_trained_as(entry: CodecEntry) -> None:
    if taken := sorted(set(entry.trained_as) & set(trainable_names())):
        raise ValueError(f"codec {entry.name!r} cannot be trained as {taken[0]!r}: another one is")


def _typed(key: str, value: Any, default: Any) -> Any:
    """The value in the type of the default, as equal settings must be equal bytes on both ends."""
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default) or (isinstance(value, float) and not math.isfinite(value)):
        raise CodecError(f"options.{key}={value!r}: a value like {default!r} is expected")
    return value


_PAPER, _PAPER_FIT = "gradcodec.paper.resnet:ResnetCodec", "gradcodec.paper.fit:train"
_OURS = (
    CodecEntry("identity", "gradcodec.codec:IdentityCodec"),
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
    ),
    *(
        CodecEntry(
            name,
            _PAPER,
            needs_artifact=True,
            any_layout=False,
            trainer=_PAPER_FIT,
            trained_as=("resnet", "resnet-literal") if name == "resnet" else (name,),
        )
        for name in ("resnet", "cnn1d", "uformer")
    ),
    CodecEntry("bf16", "gradcodec.peers.casts:Bf16Codec"),
    CodecEntry("int8", "gradcodec.peers.casts:Int8Codec"),
    CodecEntry("nf4", "gradcodec.peers.casts:Nf4Codec"),
    CodecEntry("sign", "gradcodec.peers.casts:SignCodec"),
    CodecEntry("eden", "gradcodec.peers.eden:EdenCodec", has_rate=True),
    CodecEntry("projection", "gradcodec.peers.projection:ProjectionCodec", has_rate=True),
    CodecEntry("topk", "gradcodec.peers.topk:TopkCodec", has_rate=True),
    CodecEntry("powersgd", "gradcodec.peers.powersgd:PowersgdCodec", has_rate=True),
    CodecEntry("b-only", "gradcodec.peers.b_only:BOnlyCodec", has_rate=True, uses_last_update=True),
    CodecEntry("rotated", "gradcodec.peers.rotated:RotatedCodec", has_rate=True, uses_last_update=True),
)
_ENTRIES: dict[str, CodecEntry] = {entry.name: entry for entry in _OURS}
