"""What a client remembers between messages, in Flower's ``Context.state``.

That outlives messages, not a restart of the node: then the server sends all that it holds."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from gradcodec.broadcast import Held
from gradcodec.errors import CodecError
from gradcodec.exchange import Residual
from gradcodec.flower.arrays import AppArrays
from gradcodec.layout import Layout

_HEAD, _HELD, _RESIDUAL = "gradcodec.head", "gradcodec.held", "gradcodec.residual"


class ContextMemory:
    """Of one client (``gradcodec.client.Memory``). What another run left is forgotten."""

    def __init__(self, state: RecordDict, run_id: str) -> None:
        self._state = state
        self._kept: dict[str, ArrayRecord | ConfigRecord] = {}
        head = state.config_records.get(_HEAD)
        if head is None or head.get("run") != run_id:
            for name in (_HELD, _RESIDUAL):
                state.pop(name, None)
            state[_HEAD] = ConfigRecord({"run": run_id})
        for name in (_HELD, _RESIDUAL):
            if name in state.array_records:
                self._kept[name] = state.array_records[name]
        self._kept[_HEAD] = state.config_records[_HEAD]

    @property
    def arrays(self) -> AppArrays | None:
        """Names, types and shapes of the app's arrays, once they were sent."""
        found = self._head.get("arrays")
        with suppress(CodecError):
            return AppArrays.unpack(found) if isinstance(found, bytes) else None
        return None

    @arrays.setter
    def arrays(self, arrays: AppArrays) -> None:
        self._head["arrays"] = arrays.pack()

    def load_held(self, layout: Layout, start_RC: Tensor) -> Held:
        found = self._load(_HELD, layout, ("start", "moved"))
        if found is None:
            return Held.at_start(start_RC)
        return Held(found["start"], found["moved"], found.get("side"))

    def save_held(self, held: Held) -> None:
        side = {} if held.side is None else {"side": held.side}
        self._save(_HELD, {"start": held.start_RC, "moved": held.moved_RC, **side})

    def load_residual(self, layout: Layout, server_round: int) -> Residual | None:
        found = self._load(_RESIDUAL, layout, ("target", "error"))
        of_round = self._head.get("round")
        if found is None or not isinstance(of_round, int) or of_round >= server_round:
            return None
        return Residual(found["target"], found["error"], str(self._head.get("digest", "")))

    def save_residual(self, layout: Layout, server_round: int, residual: Residual) -> None:
        self._save(_RESIDUAL, {"target": residual.target_RC, "error": residual.error_RC})
        self._head["round"], self._head["digest"] = server_round, residual.payload_digest

    def keep_in(self, state: RecordDict) -> None:
        """Puts back what the app cleared, or into the state that it made anew."""
        for name in (_HEAD, _HELD, _RESIDUAL):
            if name in self._kept and name not in state:
                state[name] = self._kept[name]
        self._state = state

    @property
    def _head(self) -> ConfigRecord:
        return self._state.config_records[_HEAD]

    def _load(self, key: str, layout: Layout, names: tuple[str, ...]) -> dict[str, Tensor] | None:
        record = self._state.array_records.get(key)
        if record is None or not set(names) <= record.keys():
            return None
        try:
            found = {name: torch.from_numpy(np.array(array.numpy(), np.float32)) for name, array in record.items()}
        except (ValueError, TypeError, EOFError):
            return None
        fits = all(tuple(found[name].shape) == (layout.rank, layout.num_columns) for name in names)
        return found if fits else None

    def _save(self, key: str, tensors: dict[str, Tensor]) -> None:
        arrays = {name: Array(np.ascontiguousarray(tensor.cpu().numpy())) for name, tensor in tensors.items()}
        self._state[key] = self._kept[key] = ArrayRecord(arrays)
