"""Loss and bytes, round by round, as a run's results hold them. Loads no engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Sent = tuple[int, int]
"""A round, and bytes in it."""


def bytes_by_round(
    up: Iterable[Sent], down: Iterable[Sent], delivery: Sequence[int], before: int, num_rounds: int
) -> list[int]:
    """What a run has cost by the end of each round, 0 (before the first) among them, both ways and with everything
    counted; the last is ``Account.total``.

    Args:
        up: of each used reply.
        down: of each message to a client; what went out in a round that came to nothing counts to the last.
        delivery: after each round, what would bring every client to its adapter: it is paid once, at the end.
        before: what was paid before the first round, such as for copies of a codec.
        num_rounds: finished ones.
    """
    of_round = [0] * (num_rounds + 1)
    for server_round, size in (*up, *down):
        of_round[min(server_round, num_rounds)] += size
    total, totals = before, []
    for number, size in enumerate(of_round):
        total += size
        totals.append(total + (delivery[number - 1] if 0 < number <= len(delivery) else 0))
    return totals


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points no other betters: none costs as little or less (first) and ends as low or lower (second),
    and differs in one."""
    return [
        not any(cost <= point[0] and loss <= point[1] and (cost, loss) != point for cost, loss in points)
        for point in points
    ]
