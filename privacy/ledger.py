"""Who released how often: the count that a privacy budget is kept by, written down before anything is released.

It only grows: what was asked for and got lost, was refused, or was in a round that is done again counts as released.
Knows numbers; where it is kept is the ``write`` of who made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from privacy.errors import BudgetSpentError, PrivacyError

Write = Callable[[dict[str, Any]], None]
Fits = Callable[[Sequence[tuple[int, int]], int], bool]
"""All rounds, of each how many were drawn of how many, and the releases of the client that released most."""


class Ledger:
    """Of one run, on one of its ends."""

    def __init__(self, allowed: int | None, write: Write, fits: Fits | None = None) -> None:
        """
        Args:
            allowed: how often one client may release; None: as often as it likes.
            write: keeps ``state()``, at once and for good; its errors are the caller's.
            fits: whether the run as a whole stays within its budget; None: clients' own counts are all that bounds it.
        """
        self.allowed = allowed
        self._write = write
        self._fits = fits
        self.releases: dict[int, int] = {}  # client -> how often it may have released
        self.rounds: list[tuple[int, int, int]] = []  # round, how many were drawn for it, of how many
        self.closed: set[int] = set()  # clients that release nothing more, whatever is allowed

    def is_spent(self, client: int) -> bool:
        return client in self.closed or (self.allowed is not None and self.releases.get(client, 0) >= self.allowed)

    def close(self, client: int) -> None:
        """This client releases nothing more, by its own count: it may know what bounds it, and this end not."""
        self.closed.add(client)
        self._write(self.state())

    def spend(self, server_round: int, clients: Iterable[int], drawn: int, pool: int) -> None:
        """One release more of each of these, written down.

        Args:
            drawn: how many were drawn for the round, those that are asked now among them.
            pool: out of how many.

        Raises:
            BudgetSpentError: one of them may release nothing more. Nothing was counted.
        """
        asked = sorted(clients)
        for client in asked:
            if self.is_spent(client):
                times = self.releases.get(client, 0)
                raise BudgetSpentError(f"client {client} has released {times} times, all that its budget allows")
        releases = self.releases | {client: self.releases.get(client, 0) + 1 for client in asked}
        rounds = [*self.rounds, (server_round, drawn, pool)]
        sizes = [(size, of) for _, size, of in rounds]
        if self._fits is not None and not self._fits(sizes, max(releases.values(), default=0)):
            raise BudgetSpentError(f"round {server_round} is more than the privacy budget of the run allows")
        self.releases, self.rounds = releases, rounds
        self._write(self.state())

    @property
    def most(self) -> int:
        """Releases of the client that released most."""
        return max(self.releases.values(), default=0)

    def state(self) -> dict[str, Any]:
        return {
            "releases": {str(client): count for client, count in sorted(self.releases.items())},
            "rounds": [list(entry) for entry in self.rounds],
            "closed": sorted(self.closed),
        }

    def load_state(self, state: object) -> None:
        """Inverse of ``state``. Raises PrivacyError: it is none, so that nobody knows what was spent."""
        try:
            assert isinstance(state, dict)
            releases = {int(client): count for client, count in state["releases"].items()}
            rounds = [(entry[0], entry[1], entry[2]) for entry in state["rounds"]]
            closed = list(state.get("closed", []))
            numbers = [*releases, *releases.values(), *(number for entry in rounds for number in entry), *closed]
            assert all(type(number) is int and number >= 0 for number in numbers)
        except (AssertionError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise PrivacyError(f"the count of what was released cannot be read: {error!r}") from None
        self.releases, self.rounds, self.closed = releases, rounds, set(closed)
