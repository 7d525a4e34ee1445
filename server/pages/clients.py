"""Of a run's report what is said of its clients: who took part, what failed and why, what each did.

What the run's privacy withholds is in no part of it: ``Withheld`` says what that is, and everything here asks it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import fmean

from report import charts
from report.charts import Cell, Row
from report.page import Figure, Part, Table, Text
from server.records.results import RunResults
from strategies.outcomes import FAILED, KINDS

MOST_FIELDS = 3000
"""Clients times rounds that are drawn one by one."""
MOST_LINES = 7
"""Clients that have a line of their own in a chart."""
MOST_BARS = 40
OWN_WORDS = "withheld: a client's own words may quote its data"
NODE_LOSS = "loss on the nodes, nats per token"


@dataclass(frozen=True)
class Withheld:
    """What this run's privacy keeps out of every report."""

    losses: bool  # of single clients, their numbers of examples, their seconds, the norms of their updates
    texts: bool
    who: bool  # who took part when

    @classmethod
    def of(cls, results: RunResults) -> Withheld:
        privacy = results.settings.privacy
        return cls(privacy.protects, privacy.protects, privacy.secret_sampling)


def who(results: RunResults, withheld: Withheld) -> list[Part]:
    if not results.uplinks and not results.faults:
        return []
    if withheld.who:
        return [Text("Who takes part is drawn in secret in this run, and told to nobody.")]
    outcomes = {(one.server_round, one.partition): one.kind for one in results.faults if not one.evaluating}
    outcomes |= {(uplink.server_round, uplink.partition): "accepted" for uplink in results.uplinks}
    table = results.participation()
    columns = ("asked", "accepted", *KINDS)
    parts: list[Part] = []
    if len(outcomes) <= MOST_FIELDS:
        fields: list[Row] = [
            {"round": number, "client": client, "what became of it": outcome}
            for (number, client), outcome in sorted(outcomes.items())
        ]
        parts.append(
            Figure(
                "Rounds and clients",
                "A mark for each client that was asked in a round; an empty field: it was not asked. Of "
                f"{len(fields):,} times, its reply was used {len([f for f in outcomes.values() if f == 'accepted']):,} "
                "times.",
                charts.heat_map(fields, "round", "client", "what became of it"),
                fields,
            )
        )
    rows = [[client, *(row[column] for column in columns)] for client, row in table.items()]
    return [*parts, Table("How often each client took part", ("client", *columns), rows)]


def on_the_nodes(results: RunResults) -> list[Part]:
    """What the global adapter loses on the clients' own held-out text, and how fair it is to each of them."""
    found = results.federated_loss
    if not found:
        return []
    rows: list[Row] = [
        {"round": one.server_round, NODE_LOSS: loss, "of": whose}
        for one in found
        for whose, loss in (("all tokens", one.loss), ("the median client", one.middle), ("the worst", one.worst.loss))
    ]
    last = found[-1]
    worse = last.worse_than_before
    said = "" if worse is None or not last.server_round else f" {worse:.0%} of them are worse off than before."
    alt = (
        f"What nodes say of their own held-out text: after round {last.server_round}, {last.loss:.4f} over all tokens "
        f"of {len(last.answers):,} clients, {last.worst.loss:.4f} at the worst.{said}"
    )
    parts: list[Part] = [Figure("Loss on the nodes", alt, charts.lines(rows, "round", NODE_LOSS, "of"), rows)]
    cells = [[one.partition, last.before.get(one.partition), one.loss, one.tokens, one.windows] for one in last.answers]
    columns = ("client", "before the first round", f"after round {last.server_round}", "tokens", "windows")
    return [*parts, Table("Loss by client, in its own words", columns, cells)]


def faults(results: RunResults, withheld: Withheld) -> list[Part]:
    parts: list[Part] = []
    if withheld.who:
        kinds = Counter(fault.kind for fault in results.faults)
        if kinds:
            parts.append(
                Table("Replies of no use", ("kind", "times"), [[kind, times] for kind, times in kinds.most_common()])
            )
    else:
        found: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for fault in results.faults:
            reason = OWN_WORDS if withheld.texts and fault.kind == FAILED else fault.reason
            found[fault.kind, reason].append((fault.server_round, fault.partition))
        rows: list[list[Cell]] = [
            [kind, reason, len(when), _some({client for _, client in when}), _some({number for number, _ in when})]
            for (kind, reason), when in sorted(found.items(), key=lambda item: -len(item[1]))
        ]
        if rows:
            parts.append(Table("Replies of no use", ("kind", "why", "times", "clients", "rounds"), rows))
    refused: list[list[Cell]] = [[str(one.node), one.reason] for one in results.refused_nodes]
    if refused:
        parts.append(Table("Nodes that may not take part", ("node", "why"), refused))
    if not parts and results.uplinks:
        parts.append(Text("None: every reply that was asked for came and was used, and no node was turned away."))
    return parts


def _some(numbers: set[int]) -> str:
    first = sorted(numbers)[:12]
    return ", ".join(map(str, first)) + (
        f" and {len(numbers) - len(first):,} more" if len(numbers) > len(first) else ""
    )


def clients(results: RunResults, withheld: Withheld) -> list[Part]:
    if not results.uplinks:
        return []
    if withheld.who:
        return [Text("Nothing is said of single clients: who takes part is drawn in secret.")]
    accounts = results.accounts_of_clients()
    parts: list[Part] = []
    if len(accounts) <= MOST_BARS:
        bars: list[Row] = [
            {"client": str(client), "bytes": size, "way": way}
            for client, one in accounts.items()
            for way, size in (("up", one.up), ("down", one.down))
        ]
        alt = "What each client sent and was sent in rounds, in bytes: the same values are in the table below."
        parts.append(Figure("Bytes by client", alt, charts.bars(bars, "client", "bytes", "way"), bars))
    if withheld.losses:
        said = "Training losses, numbers of examples, norms and times of single clients are withheld: they would tell."
        rows: list[list[Cell]] = [[client, one.up, one.down] for client, one in accounts.items()]
        return [Text(said), *parts, Table("Bytes by client", ("client", "bytes up", "bytes down"), rows)]
    return [*_train_losses(results), *parts, _client_table(results)]


def _train_losses(results: RunResults) -> list[Part]:
    what = "train loss, nats per token"
    told = [uplink for uplink in results.uplinks if uplink.train_loss is not None]
    partitions = sorted({uplink.partition for uplink in told})
    if not told:
        return []
    if len(partitions) <= MOST_LINES:
        rows: list[Row] = [
            {"round": one.server_round, what: one.train_loss, "client": f"client {one.partition}"}
            for one in sorted(told, key=lambda one: (one.partition, one.server_round))
        ]
        alt = "The mean loss of each client's own training in the rounds in which it took part, as it says itself."
        return [Figure("Train loss by client", alt, charts.lines(rows, "round", what, "client"), rows)]
    by_round: dict[int, list[float]] = defaultdict(list)
    for one in told:
        assert one.train_loss is not None
        by_round[one.server_round].append(one.train_loss)
    means: list[Row] = [
        {"round": number, what: fmean(losses), "least": min(losses), "most": max(losses)}
        for number, losses in sorted(by_round.items())
    ]
    alt = "The mean over a round's clients of their own training losses, as they say; the band is from least to most."
    return [Figure("Train loss of the clients", alt, charts.lines(means, "round", what, band=("least", "most")), means)]


def _client_table(results: RunResults) -> Table:
    accounts = results.accounts_of_clients()
    rows: list[list[Cell]] = []
    for client, account in accounts.items():
        own = [uplink for uplink in results.uplinks if uplink.partition == client]
        examples = [uplink.num_examples for uplink in own if uplink.num_examples is not None]
        losses = [uplink.train_loss for uplink in own if uplink.train_loss is not None]
        rows.append(
            [
                client,
                round(fmean(examples)) if examples else None,
                losses[0] if losses else None,
                losses[-1] if losses else None,
                fmean(uplink.update_norm for uplink in own) if own else None,
                sum(uplink.scale < 1 for uplink in own),
                account.up,
                account.down,
                sum(uplink.seconds_train for uplink in own),
            ]
        )
    columns = [
        "client", "examples a round", "first train loss", "last train loss", "mean norm of its updates", "scaled",
        "bytes up", "bytes down", "seconds of training",
    ]  # fmt: skip
    if ranks := {uplink.partition: uplink.rank for uplink in results.uplinks if uplink.rank is not None}:
        columns.append("rank that it trained")
        for row, client in zip(rows, accounts, strict=True):
            row.append(ranks.get(client, results.settings.lora.rank))
    return Table("By client", columns, rows)
