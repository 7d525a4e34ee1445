"""A message's records in one object, and back.

Flower moves every record, Array and chunk of a message in a request of its own, with some 600 bytes of headers and
signature beside what it carries: at 0.1 bit a parameter they outweighed the payload. So all records travel as one,
deflated, but for the large ones.
"""

from __future__ import annotations

import zlib

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError

FOLDED = "records"
LARGE = 1 << 16
"""Bytes of arrays from which on a record travels by itself: requests of its own are nothing beside it, and all clients
of a round share one."""
_MOST_BYTES = 4 * LARGE
"""Of all records that are folded, before they are deflated."""


def fold(content: RecordDict) -> RecordDict:
    """The same records, the small ones in one. Arrays and values are as before; what is folded already stays so."""
    if FOLDED in content:
        return content
    large = {name: record for name, record in content.items() if _size(record) > LARGE}
    small = RecordDict({name: record for name, record in content.items() if name not in large})
    data = recorddict_to_proto(small).SerializeToString()
    if len(data) > _MOST_BYTES:
        return content
    return RecordDict({**large, FOLDED: ConfigRecord({FOLDED: zlib.compress(data)})})


def unfold(content: RecordDict) -> RecordDict:
    """Inverse of ``fold``; content that was not folded is given back as it is. Raises ValueError: what is folded is
    none, or too much."""
    if FOLDED not in content:
        return content
    record = content.config_records.get(FOLDED)
    data = None if record is None else record.get(FOLDED)
    if not isinstance(data, bytes):
        raise ValueError(f"its {FOLDED!r} are no folded records")
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(data, _MOST_BYTES + 1)
        if len(found) > _MOST_BYTES or not unpacker.eof:
            raise ValueError(f"its folded records are cut, or take more than {_MOST_BYTES:,} bytes")
        small = recorddict_from_proto(ProtoRecordDict.FromString(found))
    except (zlib.error, DecodeError) as error:
        raise ValueError(f"its folded records cannot be read: {error!r}") from None
    return RecordDict({**small, **{name: one for name, one in content.items() if name != FOLDED}})


def _size(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    return sum(len(array.data) for array in record.values()) if isinstance(record, ArrayRecord) else 0
