"""Settings and layout -> the codec of every round, which both ends find out from what they hold."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from gradcodec.broadcast import Held
from gradcodec.build import build_codec
from gradcodec.codec import Codec
from gradcodec.layout import Layout
from gradcodec.learned.codec import LearnedCodec
from gradcodec.rounds import CodecAt
from gradcodec.settings import CodecSettings


def codec_of_rounds(settings: CodecSettings, layout: Layout, device: str) -> CodecAt:
    """``learned`` takes its directions along the width from how the arrays have moved; others are the same in all
    rounds. Raises ValueError: there is no such codec, or it does not serve this layout."""
    options = tuple(sorted(settings.options.items()))
    codec = _built(settings.name, options, settings.artifact, settings.digest, layout, device)
    if isinstance(codec, LearnedCodec) and codec.tables.serve_derived and not codec.tables.leading:
        return _Derived(codec)
    return lambda held: codec


@lru_cache(maxsize=8)
def _built(
    name: str,
    options: tuple[tuple[str, Any], ...],
    artifact: str | None,
    digest: str | None,
    layout: Layout,
    device: str,
) -> Codec:
    settings = CodecSettings(name=name, artifact=artifact, digest=digest, options=dict(options))
    return build_codec(settings, layout, device)


class _Derived:
    """Keeps the last one: a round's payloads have one."""

    def __init__(self, codec: LearnedCodec) -> None:
        self._codec = codec
        self._last: tuple[str, Codec] | None = None

    def __call__(self, held: Held) -> Codec:
        if self._last is None or self._last[0] != held.digest:
            self._last = None  # its directions' memory is needed
            self._last = held.digest, self._codec.starting_from({}, held.moved_RC)
        return self._last[1]
