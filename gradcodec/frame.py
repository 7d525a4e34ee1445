"""Frame: codes <-> bytes, the wire format. Knows bytes only; must not know tensors, codecs or Flower.

Wire version 1, little-endian, nothing aligned:

    offset  size  field
    0       1     magic 0xC6
    1       1     version 1
    2       4     codec id      (Codec.id: which codec with which settings and weights)
    6       4     layout id     (Layout.id: which tensors of which shapes)
    10      2     gain          (float16, finite; what the decoded blocks are multiplied by)
    12      4     CRC-32 of the context, of bytes 0..11 and of everything after this field
    16      -     the codes: every stream but the last as a LEB128 length and its bytes; the last takes the rest

The *context* is what both ends know of a payload without being told, such as which run, round and sender it belongs to.
It goes into the checksum and not onto the wire: a payload that is sent twice, or as another's, costs no byte to notice.
It is no signature: whoever makes up a payload makes up its checksum as well.

Version rules: a reader refuses every version but its own. Any change of a field, of the order of a codec's streams or
of the meaning of a stream is a new version or a new codec id. The golden bytes of every released version stay in
``tests/test_frame.py``. A context is none of these: fields and streams are read as they always were, a frame without
one has the bytes that it always had, and both ends must agree on it beforehand, as on the codec's artifact.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from gradcodec.errors import CodecError

MAGIC = 0xC6
VERSION = 1
_FIELDS = struct.Struct("<BB4s4se")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
MAX_STREAMS = 64
MAX_LENGTH_BYTES = 5

Codes = tuple[bytes, ...]
"""What a codec sends: one or more streams of bytes, in an order that the codec fixes."""


@dataclass(frozen=True)
class Frame:
    """One payload, taken apart."""

    codec_id: bytes
    layout_id: bytes
    gain: float
    codes: Codes


def pack(frame: Frame, context: bytes = b"") -> bytes:
    """Frame -> payload, which ``unpack`` reads with the same context alone."""
    assert len(frame.codec_id) == len(frame.layout_id) == 4 and 1 <= len(frame.codes) <= MAX_STREAMS
    fields = _FIELDS.pack(MAGIC, VERSION, frame.codec_id, frame.layout_id, frame.gain)
    body = b"".join(pack_length(len(stream)) + stream for stream in frame.codes[:-1]) + frame.codes[-1]
    return fields + _CHECKSUM.pack(_checksum(context, fields, body)) + body


def unpack(payload: bytes, num_streams: int, context: bytes = b"") -> Frame:
    """Payload -> frame. It parses, or raises ``CodecError``, never anything else.

    Args:
        payload: as received; nothing is taken on trust.
        num_streams: how many streams the receiver's codec uses, 1 to 64.
        context: that of the payload which is expected.
    """
    if len(payload) < HEADER_BYTES:
        raise CodecError(f"payload of {len(payload)} bytes: a frame's header alone takes {HEADER_BYTES}")
    magic, version, codec_id, layout_id, gain = _FIELDS.unpack_from(payload)
    if magic != MAGIC:
        raise CodecError(f"payload starts with 0x{magic:02x}, not 0x{MAGIC:02x}: it is no gradcodec frame")
    if version != VERSION:
        raise CodecError(f"frame of wire version {version}; this side reads version {VERSION}: upgrade the older side")
    if not has_context(payload, context):
        raise CodecError(
            "checksum of the frame does not match: the payload was damaged or cut off"
            + (", or made for another context" if context else "")
        )
    body = payload[HEADER_BYTES:]
    if not math.isfinite(gain):
        raise CodecError(f"the frame's gain is {gain}: it must be finite")
    streams: list[bytes] = []
    offset = 0
    for _ in range(num_streams - 1):
        length, offset = unpack_length(body, offset)
        if length > len(body) - offset:
            raise CodecError(f"a stream of {length} bytes is announced, {len(body) - offset} are left")
        streams.append(body[offset : offset + length])
        offset += length
    return Frame(codec_id, layout_id, gain, (*streams, body[offset:]))


def has_context(payload: bytes, context: bytes) -> bool:
    """Whether the checksum of the payload is right for this context: it is whole, and was made for it. By chance that
    is so once in 2^32 payloads. Tells a payload of another context from a damaged one, for who can guess the context.
    """
    if len(payload) < HEADER_BYTES:
        return False
    (checksum,) = _CHECKSUM.unpack_from(payload, _FIELDS.size)
    view = memoryview(payload)
    return bool(_checksum(context, view[: _FIELDS.size], view[HEADER_BYTES:]) == checksum)


def with_body(payload: bytes, body: bytes, context: bytes = b"") -> bytes:
    """The payload with another body, and the checksum that goes with it: what damage would come to if nobody looked.
    For measurements."""
    fields = payload[: _FIELDS.size]
    return fields + _CHECKSUM.pack(_checksum(context, fields, body)) + body


def _checksum(context: bytes, fields: bytes | memoryview, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(fields, zlib.crc32(context)))


def pack_length(length: int) -> bytes:
    """A length, at least 0, as a varint (LEB128)."""
    packed = bytearray()
    while length >= 0x80:
        packed.append(length & 0x7F | 0x80)
        length >>= 7
    packed.append(length)
    return bytes(packed)


def packed_bytes(stream_bytes: Sequence[int]) -> int:
    """Size of the payload that ``pack`` makes of streams of these sizes."""
    return HEADER_BYTES + sum(stream_bytes) + sum(len(pack_length(size)) for size in stream_bytes[:-1])


def unpack_length(body: bytes, offset: int) -> tuple[int, int]:
    """Inverse of ``pack_length``: the length at an offset, and the offset behind it. Raises CodecError: there is none,
    or it takes more than ``MAX_LENGTH_BYTES``."""
    length = 0
    for position in range(MAX_LENGTH_BYTES):
        if offset + position >= len(body):
            raise CodecError("the payload ends inside a stream's length")
        byte = body[offset + position]
        length |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return length, offset + position + 1
    raise CodecError(f"a stream's length takes more than {MAX_LENGTH_BYTES} bytes")
