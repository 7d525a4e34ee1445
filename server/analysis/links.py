"""A run's loss over the bytes that it took and over the seconds that these take on a link.

Bytes count everything, as if the run had ended after that round: payloads and arrays both ways, catching up, the
adapter for every client, and what the codec's artifact cost (``account.py``). Seconds are those of the rounds: clients
send side by side, each over a link of its own, and a round waits for the slowest.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from server.records.account import account_of
from server.records.results import RunResults
from strategies.outcomes import Downlink, Uplink

_LINK = re.compile(
    r"(?P<down>RATE)(:(?P<up>RATE))?(/(?P<delay>[\d.]+)(?P<unit>ms|s))?".replace("RATE", r"[\d.]+[kmg]bit")
)
_BITS = {"k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Link:
    """Between a client and the server: bits a second down and up, and seconds that a message takes to arrive."""

    name: str
    down: float
    up: float
    delay: float

    @classmethod
    def of(cls, text: str) -> Link:
        """``10mbit``, ``10mbit/50ms`` or ``10mbit:1mbit/50ms`` (down, up, one way). Raises ValueError: it is none."""
        match = _LINK.fullmatch(text)
        try:
            assert match is not None
            down = _rate(match["down"])
            delay = float(match["delay"] or 0) * (1e-3 if match["unit"] == "ms" else 1.0)
            link = cls(text, down, _rate(match["up"]) if match["up"] else down, delay)
        except (AssertionError, ValueError):
            raise ValueError(f"{text!r}: a link is RATE[:RATE][/DELAY], as 10mbit:1mbit/50ms (down, up)") from None
        if not (link.down > 0 and link.up > 0):
            raise ValueError(f"{text!r}: a link's rates are greater than 0")
        return link

    def seconds(self, up_bytes: float, down_bytes: float) -> float:
        """What a client waits for in a round: a message down and one up."""
        return 2 * self.delay + 8 * (down_bytes / self.down + up_bytes / self.up)


@dataclass(frozen=True)
class Reached:
    """Where a run was after a round.

    Attributes:
        round: 0 before the first.
        heldout_loss: nats per token.
        bytes: of the whole exchange, as if it had ended here.
        link_seconds: of the rounds until here, transfers alone.
        seconds: the same with what the slowest client of each round trained and encoded, as it was measured.
    """

    round: int
    heldout_loss: float
    bytes: int
    link_seconds: float
    seconds: float


def course(results: RunResults, link: Link) -> list[Reached]:
    """Round by round. Raises ValueError: the run has no links."""
    if not results.uplinks:
        raise ValueError(f"arm={results.settings.arm} sent nothing, so that there is no loss over bytes")
    found, seconds, link_seconds = [], 0.0, 0.0
    for number, loss in enumerate(results.heldout_loss):
        up = [one for one in results.uplinks if one.server_round <= number]
        down = [one for one in results.downlinks if one.server_round <= number]
        delivery = results.delivery_bytes[number - 1] if 0 < number <= len(results.delivery_bytes) else 0
        account = account_of(up, down, delivery, results.codec_cost, results.settings.federation.num_clients)
        transfers, whole = _slowest(
            [one for one in up if one.server_round == number], [one for one in down if one.server_round == number], link
        )
        link_seconds, seconds = link_seconds + transfers, seconds + whole
        found.append(Reached(number, loss, account.total, link_seconds, seconds))
    return found


def _slowest(uplinks: Sequence[Uplink], downlinks: Sequence[Downlink], link: Link) -> tuple[float, float]:
    """Seconds of a round: of its longest transfer, and of its slowest client with its work."""
    up, down, work = (defaultdict[int, float](float) for _ in range(3))
    for sent in uplinks:
        up[sent.partition] += sent.payload_bytes
        work[sent.partition] += sent.seconds_train + sent.seconds_encode
    for received in downlinks:
        down[received.partition] += received.total_bytes
    clients = up.keys() | down.keys()
    transfers = {client: link.seconds(up[client], down[client]) for client in clients}
    return max(transfers.values(), default=0.0), max((transfers[one] + work[one] for one in clients), default=0.0)


def _rate(text: str) -> float:
    return float(text[:-4]) * _BITS[text[-4]]
