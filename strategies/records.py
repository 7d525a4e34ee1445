"""The names both apps use in Flower's records, and what goes into them, each pair of inverses side by side.

No torch here: the ClientApp's process is a fresh one for every message, and torch takes seconds to load.

A whole payload travels in ONE Array of its own serialisation type: 1 MiB in 200 Arrays cost 37 % more on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from gradcodec.errors import CodecError

Floats = NDArray[np.float32]

ARRAYS = "arrays"  # the global adapter to clients; payload or dense adapter back
CONFIG = "config"
SIDE = "side"  # the codec's side information of the round
METRICS = "metrics"
PAYLOAD = "payload"
PAYLOAD_TYPE = "gradcodec/1"

NUM_EXAMPLES = "num-examples"
PARTITION = "partition-id"
TRAIN_LOSS = "train-loss"
SECONDS_TRAIN = "seconds-train"
SECONDS_ENCODE = "seconds-encode"

REPLY_METRICS = (NUM_EXAMPLES, PARTITION, TRAIN_LOSS, SECONDS_TRAIN, SECONDS_ENCODE)

SETTINGS = "settings"  # the run's resolved settings, as JSON
SERVER_ROUND = "server-round"
MEMORY_VARIABLE = "CG_FEDLLM_MEMORY"  # environment: where the clients of a simulation keep residuals
TRUST_VARIABLE = "CG_FEDLLM_TRUST_REMOTE_CODE"  # environment: the clients of a simulation run a model's own code
ACCEPTED = "accepted"  # digest of the client's last payload that the server took
REFUSAL = "refusal"  # why a node cannot take part, at the roll call


def record_of(arrays: Mapping[str, Floats]) -> ArrayRecord:
    """float32 arrays -> Arrays of the same names."""
    return ArrayRecord({name: array_of(array) for name, array in arrays.items()})


def array_of(array: Floats) -> Array:
    return Array(np.ascontiguousarray(array))


def arrays_of(record: ArrayRecord) -> dict[str, Floats]:
    """Inverse of ``record_of``; the arrays may be written to."""
    return {name: np.array(array.numpy(), np.float32) for name, array in record.items()}


def wrap_payload(payload: bytes) -> ArrayRecord:
    return ArrayRecord({PAYLOAD: Array("uint8", (len(payload),), PAYLOAD_TYPE, payload)})


def unwrap_payload(content: RecordDict) -> bytes:
    """Inverse of ``wrap_payload``. Raises CodecError: the reply holds something else."""
    record = content.array_records.get(ARRAYS)
    array = None if record is None else record.get(PAYLOAD)
    if record is None or array is None or len(record) != 1 or array.stype != PAYLOAD_TYPE:
        raise CodecError(f"the reply holds no single {PAYLOAD_TYPE!r} array under {ARRAYS!r}/{PAYLOAD!r}")
    return bytes(array.data)


def config_of(content: RecordDict) -> ConfigRecord:
    """The message's config. Raises ValueError: it has none."""
    record = content.config_records.get(CONFIG)
    if record is None:
        raise ValueError(f"the message has no ConfigRecord {CONFIG!r}")
    return record


def metric(record: MetricRecord, key: str) -> float:
    """One number of a MetricRecord. Raises ValueError: it is missing or a list."""
    value = record.get(key)
    if not isinstance(value, (int, float)):
        raise ValueError(f"the reply's metric {key!r} is {value!r}: a number is expected")
    return value
