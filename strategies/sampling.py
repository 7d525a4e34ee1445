"""Which partitions a round asks: drawn with the run's seed. Knows numbers only; must not know nodes or Flower.

Flower's node ids are random and its sampling is unseeded; partitions are numbered by the user. So the same seed picks
the same clients in every run and on every back end.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from gradcodec.state import pairs, table_of
from privacy.errors import BudgetSpentError
from privacy.ledger import Ledger
from strategies.errors import FederationError


class Sampling:
    """Draws each round's partitions among those that do not rest.

    One that fails ``max_failures`` times in a row (it answers nothing, or what the server cannot take) is left out for
    ``rest_rounds`` rounds: a round would wait for it. Absence is no failure: a round waits for nobody who is away.
    """

    def __init__(
        self,
        num_partitions: int,
        clients_per_round: int,
        seed: int | str,
        max_failures: int = 3,
        rest_rounds: int = 5,
        ledger: Ledger | None = None,
    ) -> None:
        """
        Args:
            seed: of the draws. A text that nobody else knows makes them secret.
            ledger: counts who was asked how often; who has spent a privacy budget is not asked again. None: no budget.
        """
        if not 1 <= clients_per_round <= num_partitions:
            raise FederationError(
                f"federation.clients_per_round={clients_per_round} of {num_partitions} clients: "
                f"choose 1 to {num_partitions}"
            )
        self.num_partitions = num_partitions
        self.clients_per_round = clients_per_round
        self.seed = seed
        self.max_failures = max_failures
        self.rest_rounds = rest_rounds
        self.ledger = ledger
        self._drawn = 0, 0  # how many were drawn last, of how many
        self.failures: dict[int, int] = {}  # partition -> failures in a row
        self.resting: dict[int, int] = {}  # partition -> the last round that it is left out of

    def sample(self, server_round: int, least: int = 1) -> list[int]:
        """The partitions of a round, ascending; depends on seed, round, who rests and who has spent its budget. All
        rest: all are awake.

        Raises:
            BudgetSpentError: of fewer than ``least`` the privacy budget allows another answer.
        """
        everyone = [p for p in range(self.num_partitions) if self.ledger is None or not self.ledger.is_spent(p)]
        if len(everyone) < least:
            raise BudgetSpentError(
                f"round {server_round}: the privacy budget allows {len(everyone)} of {self.num_partitions} clients "
                f"another answer, and a round needs {least}"
            )
        awake = [p for p in everyone if self.resting.get(p, 0) < server_round] or everyone
        again = ""  # of a secret draw: a round that is done again draws anew, as the accounts have it
        if isinstance(self.seed, str) and self.ledger is not None:
            again = f"/{len(self.ledger.rounds)}"
        order = random.Random(f"{self.seed}/{server_round}{again}")
        chosen = sorted(order.sample(awake, min(self.clients_per_round, len(awake))))
        self._drawn = len(chosen), len(awake)
        return chosen

    def asked(self, server_round: int, partitions: Iterable[int]) -> None:
        """These are asked now, of those that were drawn last: they may answer, and that counts. Raises
        BudgetSpentError: it is more than the run's budget allows; nobody may be asked."""
        if self.ledger is not None:
            self.ledger.spend(server_round, partitions, *self._drawn)

    def failed(self, server_round: int, partition: int) -> str:
        """Counts a failure; gives what follows from it in words, nothing if nothing does."""
        count = self.failures[partition] = self.failures.get(partition, 0) + 1
        if count < self.max_failures:
            return ""
        self.resting[partition] = server_round + self.rest_rounds
        return f"; it failed {count} times in a row and rests for {self.rest_rounds} rounds"

    def has_spent(self, partition: int) -> None:
        """It says that its privacy budget allows no more answers: it is not asked again."""
        if self.ledger is not None:
            self.ledger.close(partition)

    def answered(self, partition: int) -> None:
        """Its reply was used: what it failed before is forgotten."""
        self.failures.pop(partition, None)

    def state(self) -> dict[str, Any]:
        return {"failures": pairs(self.failures), "resting": pairs(self.resting)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``. Raises ValueError or KeyError: it is none."""
        self.failures, self.resting = table_of(state["failures"], int), table_of(state["resting"], int)
