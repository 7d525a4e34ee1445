"""Rounds of which the server learns a sum: what clients send is masked, added up, and opened with one trip more.

``federated.py`` has the round, ``privacy.secagg`` the protocol, ``gradcodec.sums`` what the integers mean; here they
meet. The strategy inside is shown one reply a round: the mean of all that is in the sum, each counted alike.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from gradcodec.errors import CodecError
from gradcodec.linear import LinearCode, Terms
from gradcodec.rounds import Codecs
from gradcodec.sums import SumIntake, basis_at
from privacy.errors import PrivacyError
from privacy.secagg import Contribution, Invitation, LostSumError, Opening, Published, threshold_warning
from privacy.settings import MIN_CLIENTS
from strategies.coded import IntakeReceiver
from strategies.errors import RoundError
from strategies.federated import FederatedStrategy
from strategies.messages import Mailbox, in_order
from strategies.outcomes import REFUSED, Downlink, Uplink
from strategies.peer_text import clean
from strategies.receive import Adapter, Asked, Refused, checked, uplink_of
from strategies.tensors import from_record, moved_to_record
from strategies.wire import (
    ANNOUNCED,
    ARRAYS,
    CONFIG,
    INVITATION,
    METRICS,
    NUM_EXAMPLES,
    REQUEST,
    RUN_ID,
    UNMASK,
    UNMASKED,
    config_of,
    unwrap_payload,
)

GRACE_SECONDS = 15.0
"""Once a sum can be opened, so long is waited for the others: one that is gone is known to be only after a minute."""
_PAUSE_SECONDS = 0.1


class SumReceiver(IntakeReceiver):
    """What a round's clients are told so that their integers add up, and what becomes of the sum."""

    intake: SumIntake

    def __init__(
        self,
        intake: SumIntake,
        codecs: Codecs,
        terms_of: Callable[[int], Terms],
        next_number: Callable[[], int],
        least_stay: Callable[[int], int],
        *,
        sends_side: bool = True,
    ) -> None:
        """
        Args:
            intake: remembers sums.
            codecs: of every round; ``learned``, whose tables say where updates are strong.
            terms_of: the number of clients that are invited -> the terms of their sum.
            next_number: of a sum, higher than any that clients of this run have seen.
            least_stay: the number of clients that are invited -> how many must stay to the end.
            sends_side: clients do not find the codec's side information out by themselves.
        """
        super().__init__(intake, codecs, sends_side=sends_side)
        self._terms_of = terms_of
        self._next_number = next_number
        self._least_stay = least_stay
        self._announced = b""
        self._code: LinearCode | None = None
        self._opening: Opening | None = None

    @property
    def opening(self) -> Opening:
        """Of the round's sum."""
        assert self._opening is not None, "begin() comes first"
        return self._opening

    def begin(self, server_round: int, members: Mapping[int, Published], current: Mapping[str, Tensor]) -> None:
        """Invites to a sum.

        Every attempt of a round is a sum of its own: clients take part in each number once.

        Raises:
            PrivacyError: they are too few.
            CodecError: nothing is known of the updates to come.
        """
        threshold = self._least_stay(len(members))
        basis = basis_at(self.codecs, current, self.intake.layout, self.side)
        public = self.intake.begin(server_round, self._terms_of(len(members)), basis)
        self._code = public.code(basis, self.intake.run_id)
        self._announced = public.announcement
        invitation = Invitation(
            self.intake.run_id,
            self._next_number(),
            tuple(member for _, member in sorted(members.items())),
            threshold,
            self._code.modulus,
            self._code.num_integers,
        )
        if (warning := threshold_warning(len(members), threshold)) is not None:
            log(WARNING, "%s (privacy.threshold)", warning)
        self._opening = Opening(invitation)

    def outgoing(self, partition: int) -> tuple[RecordDict, ConfigRecord]:
        records, entries = super().outgoing(partition)
        entries[INVITATION] = self.opening.invitation.pack()
        entries[ANNOUNCED] = self._announced
        return records, entries

    def add(self, partition: int, payload: bytes) -> None:
        """A client's masked integers. Raises PrivacyError or CodecError: they are none."""
        assert self._code is not None
        contribution = Contribution.unpack(payload, self.opening.invitation)
        self.opening.add(partition, contribution, self._code.unpack(contribution.masked))

    def opened(self) -> Adapter:
        """The mean of all updates in the sum. Raises LostSumError: it stays masked."""
        assert self._code is not None
        return self.intake.opened(self._code, self.opening.total().astype("int64"), self.opening.summed)

    def adapter_of(self, content: RecordDict, asked: Asked, current: Mapping[str, Tensor]) -> Adapter:
        raise AssertionError("a masked reply stands for no adapter")

    def averaged(self, uplinks: Iterable[Uplink], step: Adapter) -> None:
        self.intake.used([uplink.partition for uplink in uplinks], self.opening.invitation.tag.hex(), step)


class SecureStrategy(FederatedStrategy):
    """A federated round whose ``ways.up`` is a ``SumReceiver``."""

    receiver: SumReceiver

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._suspects: set[int] = set()  # partitions that spoiled a sum in this process

    @property
    def least_clients(self) -> int:
        return max(super().least_clients, MIN_CLIENTS)

    def _begin(self, server_round: int, arrays: ArrayRecord, grid: Grid) -> None:
        self._grid = grid
        members: dict[int, Published] = {}
        for partition, node in sorted(self._nodes.items()):
            try:
                member = Published.unpack(self.roll.published.get(node, b""))
                if member.partition != partition:
                    raise PrivacyError(f"its key for secure aggregation is of partition {member.partition}")
                if partition in self._suspects:
                    raise PrivacyError("it spoiled a sum: the shares that it dealt opened nothing")
                members[partition] = member
            except PrivacyError as error:
                self._fault(server_round, partition, Refused(REFUSED, clean(error)))
        for partition in _with_the_same_key(members):
            self._fault(server_round, partition, Refused(REFUSED, "another partition has its key for masked sums"))
            del members[partition]
        self._nodes = {partition: node for partition, node in self._nodes.items() if partition in members}
        try:
            self.receiver.begin(server_round, members, from_record(arrays))
        except PrivacyError as error:
            raise RoundError(f"round {server_round}: {error}") from None

    def _usable(
        self, server_round: int, replies: Iterable[Message], taken: list[Uplink], too_long: list[Uplink]
    ) -> Iterator[Message]:
        """One message: the mean of the round's sum. Raises RoundError: there is none, and nothing is averaged."""
        came: dict[int, Uplink] = {}
        for partition, reply in in_order(sorted(self._nodes), self._outbox.partition_of, replies):
            found = self._taken_in(Asked(server_round, partition, 1.0, self.limits.says_loss), reply)
            if isinstance(found, Refused):
                self._fault(server_round, partition, found)
            else:
                self.broadcaster.answered(partition)
                came[partition] = found
        if len(came) < self.limits.min_replies:
            raise RoundError(
                f"round {server_round}: {len(came)} usable replies, federation.min_replies={self.limits.min_replies}; "
                "see above"
            )
        try:
            answers = self._asked_to_open(server_round)
            mean = self.receiver.opened()
        except LostSumError as error:
            for partition in error.suspects:
                self._suspects.add(partition)
                self._fault(server_round, partition, Refused(REFUSED, "the shares that it dealt open nothing"))
            raise RoundError(f"round {server_round}: {error}") from None
        for partition, uplink in came.items():
            taken.append(dataclasses.replace(uplink, payload_bytes=uplink.payload_bytes + answers.get(partition, 0)))
            self.observer.uplink(taken[-1])
        adapter = {name: mean[name].add_(tensor) for name, tensor in self.current.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in adapter.values()):
            raise RoundError(f"round {server_round}: the sum decodes to NaN or infinity")
        content = RecordDict({ARRAYS: moved_to_record(adapter), METRICS: MetricRecord({NUM_EXAMPLES: len(came)})})
        yield Message(content, self._nodes[min(came)], "train")

    def _taken_in(self, asked: Asked, reply: Message | None) -> Uplink | Refused:
        metrics = checked(reply, asked)
        if isinstance(metrics, Refused):
            return metrics
        assert reply is not None
        try:
            self.receiver.add(asked.partition, unwrap_payload(reply.content))
        except (CodecError, PrivacyError) as error:
            return Refused(REFUSED, clean(error))
        return uplink_of(reply.content, metrics, asked)

    def _asked_to_open(self, server_round: int) -> dict[int, int]:
        """Partition -> bytes of what it gave to open the sum.

        Raises:
            LostSumError: too few messages came.
        """
        opening, mailbox = self.receiver.opening, Mailbox(self._grid)
        partition_of: dict[str, int] = {}
        for partition in opening.close():
            request = opening.request(partition).pack()
            self.observer.downlink(Downlink(server_round, partition, side_bytes=len(request)))
            content = RecordDict({CONFIG: ConfigRecord({REQUEST: request, RUN_ID: opening.invitation.run})})
            mailbox.send([Message(content, self._nodes[partition], UNMASK)])
            partition_of |= dict.fromkeys(mailbox.unanswered.keys() - partition_of.keys(), partition)
        sizes, began = dict[int, int](), time.monotonic()
        while mailbox.unanswered:
            for reply in mailbox.arrived():
                partition = partition_of[reply.metadata.reply_to_message_id]
                if (reason := self._take_answer(partition, reply, sizes)) is not None:
                    log(WARNING, "partition %s does not help to open the sum: %s", partition, reason)
            passed = time.monotonic() - began
            if passed > (GRACE_SECONDS if opening.can_open else self.limits.wait_seconds):
                break
            time.sleep(_PAUSE_SECONDS)
        return sizes

    def _take_answer(self, partition: int, reply: Message, sizes: dict[int, int]) -> str | None:
        """Takes what a client gave; gives why it is of no use."""
        if reply.has_error():
            return clean(reply.error.reason or "") or f"Flower's error {reply.error.code}"
        try:
            answer = config_of(reply.content).get(UNMASKED)
            if not isinstance(answer, bytes):
                raise PrivacyError("its reply holds nothing that opens a sum")
            self.receiver.opening.take(partition, answer)
            sizes[partition] = len(answer)
        except ValueError as error:
            return clean(error)
        return None


def _with_the_same_key(members: Mapping[int, Published]) -> set[int]:
    """Partitions whose key another one has as well."""
    holders: dict[bytes, list[int]] = {}
    for partition, member in members.items():
        holders.setdefault(member.public_key, []).append(partition)
    return {partition for group in holders.values() if len(group) > 1 for partition in group}
