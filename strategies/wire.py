"""The names both apps use in Flower's records, and what goes into them, each pair of inverses side by side.

No torch here: the ClientApp's process is a fresh one for every message, and torch takes seconds to load.

An adapter and a payload each travel in ONE Array of their own serialisation type: every Array is a request of its own,
so that an adapter of 192 tensors in as many Arrays made a round of 16 s out of one of 8, and 1 MiB in 200 Arrays cost
37 % more on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from gradcodec.errors import CodecError
from gradcodec.flower.wire import BUNDLE, BUNDLE_TYPE, PAYLOAD, PAYLOAD_TYPE, from_one_array, in_one_array

Floats = NDArray[np.float32]

ARRAYS = "arrays"  # the global adapter to clients; payload or dense adapter back
CONFIG = "config"
SIDE = "side"  # the codec's side information of the round
METRICS = "metrics"
ADAPTER, ADAPTER_TYPE = "adapter", "safetensors"

NUM_EXAMPLES = "num-examples"
PARTITION = "partition-id"
TRAIN_LOSS = "train-loss"
SECONDS_TRAIN = "seconds-train"
SECONDS_ENCODE = "seconds-encode"

SERVER_ROUND = "server-round"

HELDOUT_LOSS = "heldout-loss"  # mean over a node's own held-out tokens, nats
HELDOUT_TOKENS = "heldout-tokens"  # those of them that are predicted and count
HELDOUT_WINDOWS = "heldout-windows"
SECONDS_EVALUATE = "seconds-evaluate"

PRIVATE_METRICS = (NUM_EXAMPLES, PARTITION, SERVER_ROUND, SECONDS_TRAIN, SECONDS_ENCODE)
REPLY_METRICS = (*PRIVATE_METRICS, TRAIN_LOSS)
"""All that a reply must say, and no more: round and partition, too, so that one of an earlier round is noticed. Where
the clients' data are protected the loss is withheld: no noise is in it."""

RANK = "rank"
"""A reply may say it as well: of every factor the first so many rows were trained."""

EVALUATION_METRICS = (PARTITION, SERVER_ROUND, HELDOUT_LOSS, HELDOUT_TOKENS, HELDOUT_WINDOWS, SECONDS_EVALUATE)
"""All that the answer to a message of the kind ``evaluate`` says, and no more. Its round is the one that the adapter
came out of; 0: the first adapter."""
MOST_LOSS = 1000.0
"""Nats a token: what a node says of an adapter whose loss is larger or not finite."""

SETTINGS = "settings"  # the run's resolved settings, as JSON
MEMORY_VARIABLE = "CG_FEDLLM_MEMORY"  # environment: where the clients of a simulation keep residuals
TRUST_VARIABLE = "CG_FEDLLM_TRUST_REMOTE_CODE"  # environment: the clients of a simulation run a model's own code
ACCEPTED = "accepted"  # digest of the client's last payload that the server took
HELD_BEFORE, HELD = "held-before", "held"  # digests of what a client holds before it takes in a bundle, and after
LACKS = "lacks"  # a reply: the client's claim of what it holds, as it cannot take in the bundle that it was sent
SPENT = "budget-spent"  # a reply: the client's own privacy budget allows no answer
PUBLISHED = "published"  # the roll call: a client's public key for masked sums (privacy.secagg)
INVITATION, ANNOUNCED = "invitation", "announced"  # to a masked sum, and how strong it is expected to be
UNMASK = "query.unmask"  # the kind of message that asks to open a sum
REQUEST, UNMASKED = "request", "unmasked"  # what it asks, and what opens the sum
RUN_ID = "run-id"
REFUSAL = "refusal"  # why a node cannot take part, at the roll call


def array_of(array: Floats) -> Array:
    """A float32 array of any shape as Flower's Array."""
    return Array(np.ascontiguousarray(array))


def arrays_of(record: ArrayRecord) -> dict[str, Floats]:
    """Arrays made by ``array_of`` -> float32 arrays of the same names, which may be written to."""
    return {name: np.array(array.numpy(), np.float32) for name, array in record.items()}


def wrap_adapter(adapter: Mapping[str, Floats]) -> ArrayRecord:
    """An adapter, tensor name -> float32 array, in one Array of safetensors."""
    return in_one_array(ADAPTER, ADAPTER_TYPE, save({name: np.ascontiguousarray(a) for name, a in adapter.items()}))


def unwrap_adapter(content: RecordDict) -> dict[str, Floats]:
    """Inverse of ``wrap_adapter``, names ascending; the arrays may be written to.

    Raises:
        CodecError: the message holds something else, or tensors that are not float32.
    """
    try:
        adapter = load(from_one_array(content, ARRAYS, ADAPTER, ADAPTER_TYPE))
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type that NumPy lacks
        raise CodecError(f"its adapter cannot be read: {error!r}") from None
    if any(array.dtype != np.float32 for array in adapter.values()):
        raise CodecError("the tensors of its adapter are not all float32")
    return adapter


def wrap_payload(payload: bytes) -> ArrayRecord:
    """A payload of ``gradcodec.exchange`` in one Array."""
    return in_one_array(PAYLOAD, PAYLOAD_TYPE, payload)


def unwrap_payload(content: RecordDict) -> bytes:
    """Inverse of ``wrap_payload``. Raises CodecError: the reply holds something else."""
    return from_one_array(content, ARRAYS, PAYLOAD, PAYLOAD_TYPE)


def wrap_bundle(bundle: bytes) -> ArrayRecord:
    """A bundle of ``gradcodec.broadcast`` in one Array."""
    return in_one_array(BUNDLE, BUNDLE_TYPE, bundle)


def unwrap_bundle(content: RecordDict) -> bytes | None:
    """Inverse of ``wrap_bundle``; None: the message brings the adapter itself."""
    if BUNDLE not in content.array_records.get(ARRAYS, {}):
        return None
    return from_one_array(content, ARRAYS, BUNDLE, BUNDLE_TYPE)


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
