"""One client's work in one round, or on what came out of it, and what comes of that. No torch here: see ``link.py``."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradcodec.transfers import Broadcast

Arrays = dict[str, NDArray[np.float32]]
Overrides = tuple[tuple[str, str], ...]
"""What a node says by its node config: its own paths (``model-path``, ``task-path``, ``codec-artifact``), ``TRUST``,
``MAX_EPSILON``, ``MAX_BITS``, ``MAX_RANK``, and ``LINE`` with
``UPLOAD_SECONDS``."""
TRUST = "trust-remote-code"
"""``true`` if the node's owner lets a model's own Python code run: a server alone cannot."""
NODE_KEY = "node-key"
"""Where the node's own key lies, with which it signs its clients' keys for masked sums."""
PEER_KEYS = "peer-keys"
"""A folder with all nodes' public keys, by which the keys of the others in a masked sum are checked."""
MAX_EPSILON = "max-epsilon"
"""What all runs together may give away of the node's data, by its owner."""
MAX_BITS = "max-bits"
"""A parameter, that this node sends at most, by its owner: its line is slower than others'."""
LINE, UPLOAD_SECONDS = "line", "upload-seconds"
"""Where it stands how fast this node's line is (``line.py``), and for how long a payload may take it."""
MAX_RANK = "max-rank"
"""Of what this node trains, by its owner: its GPU is smaller than others'."""


@dataclass(frozen=True)
class Summed:
    """What the integers of a masked sum depend on, beside settings, adapter and round."""

    announced: bytes  # ``gradcodec.announcement``
    clients: int  # that are invited to the sum
    identity: str  # how the server will name the sum


@dataclass(frozen=True)
class Work:
    """To train on one partition, from the global adapter."""

    adapter: Arrays | None  # None: ``broadcast`` leads to it
    side: NDArray[np.float32] | None  # the codec's side information of this round
    partition: int
    server_round: int
    accepted: str  # digest of this client's last payload that the server took
    memory: Path  # folder of this run's residuals, and of what the client holds
    broadcast: Broadcast | None = None
    sum: Summed | None = None  # the update goes into a sum
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)  # all noise comes from it


@dataclass(frozen=True)
class Evaluated:
    """What the global adapter loses on a client's held-out windows; nothing, if it ``lacks`` what leads to the adapter
    (as in ``Trained``)."""

    loss: float  # mean over the tokens that count, nats
    tokens: int
    windows: int
    seconds: float
    lacks: str | None = None

    @classmethod
    def nothing(cls, lacks: str) -> Evaluated:
        """Of a client that lacks what the broadcast starts from."""
        return cls(0.0, 0, 0, 0.0, lacks)


@dataclass(frozen=True)
class Trained:
    """The dense adapter or the payload, whichever the arm sends; neither, if nothing was trained since the client
    ``lacks`` what the broadcast starts from: its claim of what it holds (``gradcodec.broadcast.Held``)."""

    adapter: Arrays | None
    payload: bytes | None
    num_examples: int
    train_loss: float
    seconds_train: float
    seconds_encode: float
    lacks: str | None = None
    rank: int | None = None  # of every factor the first so many rows were trained; None: all

    @classmethod
    def nothing(cls, lacks: str) -> Trained:
        """Of a client that lacks what the broadcast starts from."""
        return cls(None, None, 0, 0.0, 0.0, 0.0, lacks)
