"""The coded arm's receiver: payloads become adapters. The dense one's twin is ``dense.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from gradcodec.intake import Intake
from gradcodec.rounds import Codecs
from gradcodec.state import State
from gradcodec.sums import SumIntake
from strategies.outcomes import Uplink
from strategies.receive import Adapter, Asked
from strategies.tensors import check_values, to_record
from strategies.wire import ACCEPTED, SIDE, unwrap_payload


class IntakeReceiver:
    """What the server remembers between rounds of coded replies lies in an intake of ``gradcodec``."""

    intake: Intake | SumIntake

    def __init__(self, intake: Intake | SumIntake, codecs: Codecs, *, sends_side: bool = True) -> None:
        """
        Args:
            intake: what decodes.
            codecs: of every round.
            sends_side: clients do not find the codec's side information out by themselves.
        """
        self.intake = intake
        self.codecs = codecs
        self.sends_side = sends_side

    @property
    def side(self) -> Tensor | None:
        """The codec's side information of the next round."""
        return self.intake.side

    @side.setter
    def side(self, side: Tensor | None) -> None:
        self.intake.side = side

    def outgoing(self, partition: int) -> tuple[RecordDict, ConfigRecord]:
        records = RecordDict()  # every record costs a node requests of its own
        if self.side is not None and self.sends_side:
            records[SIDE] = to_record({SIDE: self.side})
        return records, ConfigRecord({ACCEPTED: self.intake.accepted.get(partition, "")})

    def foresee(self, step: Adapter) -> None:
        self.intake.foresee(step)

    def state(self) -> State:
        return self.intake.state()

    def load_state(self, state: State) -> None:
        self.intake.load_state(state)


class CodedReceiver(IntakeReceiver):
    """Decodes what clients encoded (``gradcodec.intake``), and adds the adapter that the round started from."""

    intake: Intake

    def adapter_of(self, content: RecordDict, asked: Asked, current: Mapping[str, Tensor]) -> Adapter:
        """Beside the adapter, only its blocks are ever held."""
        payload, codec = unwrap_payload(content), self.codecs.at(current)
        blocks_RC = self.intake.blocks_of(payload, asked.partition, asked.server_round, codec)
        adapter = {}
        for name, tensor in self.intake.layout.tensors(blocks_RC):
            tensor.add_(current[name])
            check_values(name, tensor)
            adapter[name] = tensor
        return {name: adapter[name] for name in current}

    def averaged(self, uplinks: Iterable[Uplink], step: Adapter) -> None:
        self.intake.used({uplink.partition: uplink.payload_digest for uplink in uplinks}, step)
