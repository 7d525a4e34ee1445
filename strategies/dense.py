"""The dense twin of ``coded.py``: replies are adapters in fp32 (LoRA-FT), checked before they are averaged."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from gradcodec.errors import CodecError
from strategies.records import ARRAYS, unwrap_adapter
from strategies.tensors import check_values, to_record
from strategies.wrapping import FacingClients


class DenseStrategy(FacingClients):
    """Leaves out, with a warning, every reply that is not an adapter like the one that was sent."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, self.enough(server_round, self._checked(replies)))

    def _checked(self, replies: Iterable[Message]) -> Iterable[Message]:
        """Every reply that fits, its tensors in the order of the global adapter: strategies zip them by position."""
        for reply in replies:
            try:
                adapter = self._adapter_of(reply.content)
            except CodecError as error:
                self.refuse(reply.metadata.src_node_id, str(error))
                continue
            reply.content = RecordDict({**reply.content, ARRAYS: to_record(adapter)})
            yield reply

    def _adapter_of(self, content: RecordDict) -> dict[str, Tensor]:
        """Raises CodecError: it is not an adapter like the global one."""
        adapter = {name: torch.from_numpy(array) for name, array in unwrap_adapter(content).items()}
        if adapter.keys() != self.current.keys():
            raise CodecError("it has other tensors than the global one")
        for name, tensor in adapter.items():
            if tensor.shape != self.current[name].shape:
                raise CodecError(f"tensor {name!r} has shape {tuple(tensor.shape)}")
            check_values(name, tensor)
        return {name: adapter[name] for name in self.current}
