"""What travels between the strategy and the mod: names, and one Array for what is one. Each pair of inverses side by
side.

No torch here: who imports this may be a process that lives for one message.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict

from gradcodec.errors import CodecError

PAYLOAD, PAYLOAD_TYPE = "payload", "gradcodec/1"
BUNDLE, BUNDLE_TYPE = "bundle", "gradcodec-bundle/1"


def in_one_array(name: str, stype: str, data: bytes) -> ArrayRecord:
    """Bytes as one Array of their own serialisation type: every Array is a request of its own."""
    return ArrayRecord({name: Array("uint8", (len(data),), stype, data)})


def from_one_array(content: RecordDict, key: str, name: str, stype: str) -> bytes:
    """Inverse of ``in_one_array``, of the message's record ``key``. Raises CodecError: it holds something else."""
    record = content.array_records.get(key)
    array = None if record is None else record.get(name)
    if record is None or array is None or len(record) != 1 or array.stype != stype:
        raise CodecError(f"it holds no single {stype!r} array under {key!r}/{name!r}")
    return bytes(array.data)
