"""The dense arm's receiver: replies are adapters in fp32 (LoRA-FT). The coded one's twin is ``coded.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from gradcodec.errors import CodecError
from gradcodec.exchange import digest_of
from gradcodec.state import State, pairs, table_of
from strategies.outcomes import Uplink
from strategies.receive import Adapter, Asked
from strategies.tensors import check_values
from strategies.wire import ARRAYS, unwrap_adapter

REMEMBERED_ROUNDS = 64


class DenseReceiver:
    """Checks that a reply is an adapter like the one that was sent.

    Nothing in an adapter says whose it is, so one that was taken before, from anybody, is not taken again.
    """

    side: Tensor | None = None

    def __init__(self) -> None:
        self.taken: dict[int, list[str]] = {}  # round -> digests of what was taken in it

    def outgoing(self, partition: int) -> tuple[RecordDict, ConfigRecord]:
        return RecordDict(), ConfigRecord()

    def adapter_of(self, content: RecordDict, asked: Asked, current: Mapping[str, Tensor]) -> Adapter:
        found = {name: torch.from_numpy(array) for name, array in unwrap_adapter(content).items()}
        if found.keys() != current.keys():
            raise CodecError("its adapter has other tensors than the global one")
        for name, tensor in found.items():
            if tensor.shape != current[name].shape:
                raise CodecError(f"tensor {name!r} of its adapter has shape {tuple(tensor.shape)}")
            check_values(name, tensor)
        digest = digest_of(b"".join(array.data for array in content.array_records[ARRAYS].values()))
        for server_round, digests in self.taken.items():
            if digest in digests:
                raise CodecError(f"its adapter is one of round {server_round}, sent again")
        return {name: found[name] for name in current}

    def foresee(self, step: Adapter) -> None:
        """Adapters travel as they are, whatever is expected of them."""

    def averaged(self, uplinks: Iterable[Uplink], step: Adapter) -> None:
        """An adapter that did not change says nothing: many clients may send the same one."""
        for uplink in uplinks:
            if uplink.update_norm > 0:
                self.taken.setdefault(uplink.server_round, []).append(uplink.payload_digest)
        self.taken = dict(sorted(self.taken.items())[-REMEMBERED_ROUNDS:])

    def state(self) -> State:
        return State({"taken": pairs(self.taken)})

    def load_state(self, state: State) -> None:
        self.taken = table_of(state.values["taken"], list)
