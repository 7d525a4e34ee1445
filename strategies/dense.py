"""The dense twin of ``coded.py``: replies are adapters in fp32 (LoRA-FT), checked before they are averaged."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from strategies.records import ARRAYS
from strategies.tensors import check_values, from_record, to_record
from strategies.wrapping import AdapterStrategy


class DenseStrategy(AdapterStrategy):
    """Leaves out, with a warning, every reply that is not an adapter like the one that was sent."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, self.enough(server_round, self._checked(replies)))

    def _checked(self, replies: Iterable[Message]) -> Iterable[Message]:
        """Every reply that fits, its tensors in the order of the global adapter: strategies zip them by position."""
        for reply in replies:
            try:
                adapter = self._adapter_of(reply.content.array_records[ARRAYS])
            except ValueError as error:
                self.refuse(reply.metadata.src_node_id, str(error))
                continue
            reply.content = RecordDict({**reply.content, ARRAYS: to_record(adapter)})
            yield reply

    def _adapter_of(self, arrays: ArrayRecord) -> dict[str, Tensor]:
        """Raises ValueError: it is not an adapter like the global one."""
        if arrays.keys() != self.current.keys():
            raise ValueError("it has other tensors than the global one")
        if any(array.dtype != "float32" for array in arrays.values()):
            raise ValueError("its tensors are not all float32")
        try:
            adapter = from_record(arrays)
        except Exception as error:  # whatever NumPy makes of bytes that a stranger sent
            raise ValueError(f"its arrays cannot be read: {error}") from None
        for name, tensor in adapter.items():
            if tensor.shape != self.current[name].shape:
                raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}")
            check_values(name, tensor)
        return {name: adapter[name] for name in self.current}
