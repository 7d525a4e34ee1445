"""What the strategy tells the mod beside the arrays, in a ConfigRecord of its own, and what the mod answers.

CODING    ConfigRecord: the settings of the run and of this message
EXACT     ArrayRecord: what travels as it is; left out if there is none
LACKS     ConfigRecord of an answer: the client could not take in what it was sent, and what it holds (a claim)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from flwr.app import ConfigRecord

from gradcodec.errors import CodecError
from gradcodec.flower.arrays import AppArrays
from gradcodec.settings import CodecSettings, check_codec
from gradcodec.transfers import Broadcast

CODING, EXACT, LACKS = "gradcodec", "gradcodec.exact", "gradcodec.lacks"
HOLDS = "holds"
_MAY_BE_EMPTY = {"accepted": "", "held_before": "", "arrays": b""}
"""Left out then: Flower's ConfigRecord cannot count the bytes of an empty value."""
_OF_THE_SERVER = ("artifact", "basis")
"""Settings that a client does not take from the network: a path, and what it would read of a base model."""


@dataclass(frozen=True)
class Turn:
    """One message's."""

    settings: CodecSettings
    run_id: str
    server_round: int
    arrays_key: str  # of the record that the app's arrays have
    accepted: str  # digest of the client's last payload that the server used
    held_before: str
    held: str
    arrays: AppArrays | None  # sent to clients that hold nothing

    def pack(self) -> ConfigRecord:
        """As it travels."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        settings = {key: value for key, value in asdict(self.settings).items() if key not in _OF_THE_SERVER}
        entries["settings"] = json.dumps(settings)
        entries["arrays"] = b"" if self.arrays is None else self.arrays.pack()
        return ConfigRecord({name: value for name, value in entries.items() if value not in ("", b"")})

    @classmethod
    def unpack(cls, record: ConfigRecord, artifact: str | None = None) -> Turn:
        """Inverse of ``pack``; ``artifact`` is this end's own.

        Raises:
            CodecError: it is none, or asks for a codec that is not here.
        """
        try:
            found = {**_MAY_BE_EMPTY, **record}
            entries: dict[str, Any] = {field.name: found[field.name] for field in fields(cls)}
            given = json.loads(str(entries.pop("settings")))
            given |= {"artifact": artifact, "basis": "auto"}
            settings = CodecSettings(**given)
            arrays = entries.pop("arrays")
            known = AppArrays.unpack(arrays) if arrays else None
            entries["server_round"] = int(entries["server_round"])
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CodecError(f"the server's message cannot be read, or is another version's: {error!r}") from None
        check_codec(settings)
        return cls(settings, arrays=known, **entries)

    def broadcast(self, bundle: bytes) -> Broadcast:
        """With the bundle that the message brings."""
        return Broadcast(bundle, self.held_before, self.held)
