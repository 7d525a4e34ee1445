"""The report of one finished run: whether to trust it, what it reached, and what it took. Written once it has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from conf.console import bytes_text, seconds_text
from conf.output import provenance
from conf.standard import command, flat, set_by_hand
from report import charts
from report.charts import Cell, Row
from report.page import Facts, Figure, Part, Section, Table, Text, write_page
from server.live.progress import label
from server.pages.clients import Withheld, clients, faults, on_the_nodes, who
from server.pages.costs import size_parts, time_parts
from server.pages.terms import TERMS
from server.records.curves import bytes_by_round
from server.records.results import RunResults, perplexity

NAME = "report.html"
LOSS = "held-out loss, nats per token"
IN_ALL = "bytes in all"


def write_run_page(results: RunResults, output: Path, answers: Sequence[Mapping[str, str]] = ()) -> None:
    """Writes ``report.html`` and ``report.json`` into the run's folder.

    Args:
        results: of a run that has ended.
        output: its folder.
        answers: of ``sample_answers``; left out where the run protects texts.

    Raises:
        OutputError: a file cannot be written.
        ValueError: there is no report of such results.
    """
    title = f"{label(results.settings)}, seed {results.settings.seed}"
    made_with = provenance()
    write_page(output / NAME, title, lead_of(results), sections_of(results, answers, made_with), made_with)


def lead_of(results: RunResults) -> str:
    """The outcome in one sentence."""
    losses, account = [*results.deciding_losses.values()], results.account()
    clients = results.settings.federation.num_clients
    cost = f" of {clients:,} clients, for {bytes_text(account.total)} in all" if results.uplinks else ""
    early = f" The run ended early, {results.ended_early}." if results.ended_early else ""
    early += f" Then it failed: {results.failed.rstrip('.')}." if results.failed else ""
    rounds = f"{results.rounds_done:,} rounds{cost}.{early}"
    if not losses:
        return f"Nobody measured a loss. The adapter is that of {rounds}"
    if len(losses) < 2:
        return f"The base model, untrained, has a held-out loss of {losses[-1]:.4f} nats per token."
    way = "fell" if losses[-1] < losses[0] else "rose" if losses[-1] > losses[0] else "stayed"
    where = "held-out loss" if results.heldout_loss else "loss on the nodes"
    return f"The {where} {way} from {losses[0]:.4f} to {losses[-1]:.4f} nats per token in {rounds}"


def sections_of(
    results: RunResults, answers: Sequence[Mapping[str, str]], made_with: Mapping[str, str]
) -> list[Section]:
    """All of a page, without what there is nothing to say of."""
    withheld = Withheld.of(results)
    sections = [
        Section("Whether to trust it", [_facts(results), _checks(results, withheld)]),
        Section("Held-out loss", _losses(results)),
        Section("Loss on the nodes", on_the_nodes(results)),
        Section("Who took part", who(results, withheld)),
        Section("Faults and refusals", faults(results, withheld)),
        Section("Clients", clients(results, withheld)),
        Section("Bytes", size_parts(results)),
        Section("Time", time_parts(results, withheld)),
        Section("Privacy", _privacy(results)),
        Section("Answers before and after", _answers([] if withheld.texts else answers)),
        *_settings(results, made_with),
        Section("What the words mean", [Table("Words", ("word", "meaning"), [*TERMS.items()])], closed=True),
    ]
    return [section for section in sections if section.parts]


def _facts(results: RunResults) -> Facts:
    losses, federation = [*results.deciding_losses.values()], results.settings.federation
    facts: dict[str, Cell] = {"held-out loss before": losses[0]} if losses else {}
    if len(losses) > 1:
        facts |= {"held-out loss after": losses[-1], "perplexity after": perplexity(losses[-1])}
    if results.rounds_done:
        facts["rounds"] = f"{results.rounds_done:,} of {federation.rounds:,}"
    if results.uplinks:
        facts["clients a round"] = f"{federation.clients_per_round:,} of {federation.num_clients:,}"
        facts[IN_ALL] = results.account().total
        facts["bytes up per client and round"] = round(results.payload_bytes_per_client_round)
        facts["bits per parameter, up"] = results.bits_per_parameter
    return Facts({**facts, "adapter parameters": results.num_parameters, "time": seconds_text(results.seconds)})


def _checks(results: RunResults, withheld: Withheld) -> Table:
    """Questions that a reader asks first."""
    losses, federation = results.deciding_losses, results.settings.federation
    rows: list[list[Cell]] = []

    def ask(question: str, found: str, fine: bool) -> None:
        rows.append([question, found, "fine" if fine else "look at it"])

    if done := results.rounds_done:
        said = results.failed or results.ended_early or f"{done:,} of {federation.rounds:,}"
        ask("Were all rounds done?", said, done >= federation.rounds and not results.failed)
        if not losses:
            ask("Was a loss measured?", "no: federation.evaluate_every=0, and the server holds no base model", False)
    if len(losses) > 1:
        best, first, last = min(losses, key=losses.__getitem__), losses[min(losses)], losses[max(losses)]
        ask("Did it learn?", f"{first - last:+.4f} nats per token better than before", last < first)
        ask("Is the last round the best?", f"the best is round {best}: {losses[best]:.4f}", best == max(losses))
    if results.uplinks:
        lost = sum(not fault.evaluating for fault in results.faults)
        used = f"{len(results.uplinks):,} of {len(results.uplinks) + lost:,}"
        ask("Were the replies used that were asked for?", used, not lost)
        if not withheld.who:
            heard = {uplink.partition for uplink in results.uplinks}
            ask(
                "Was every client heard?",
                f"{len(heard):,} of {federation.num_clients:,}",
                len(heard) == federation.num_clients,
            )
        scaled = sum(uplink.scale < 1 for uplink in results.uplinks)
        ask("Were updates cut down for their length?", f"{scaled:,} of {len(results.uplinks):,}", not scaled)
    if results.refused_nodes:
        ask("Were nodes turned away?", f"{len(results.refused_nodes):,}", False)
    if results.settings.privacy.noise_seed is not None:
        ask("Does the noise protect?", "no: privacy.noise_seed is set, and it can be repeated", False)
    return Table("What to look at first", ("question", "found", "so"), rows)


def _losses(results: RunResults) -> list[Part]:
    losses = results.heldout_loss
    if len(losses) < 2:
        return []
    rows: list[Row] = [
        {"round": number, LOSS: loss, "perplexity": perplexity}
        for number, (loss, perplexity) in enumerate(zip(losses, results.heldout_perplexity, strict=True))
    ]
    parts: list[Part] = [
        Figure(
            "Loss over rounds",
            f"The held-out loss after each round, from {losses[0]:.4f} before the first to {losses[-1]:.4f} after the "
            "last.",
            charts.lines(rows, "round", LOSS),
            rows,
        )
    ]
    if results.uplinks:
        total = results.account()
        sizes = bytes_by_round(
            [(uplink.server_round, uplink.payload_bytes) for uplink in results.uplinks],
            [(downlink.server_round, downlink.total_bytes) for downlink in results.downlinks],
            results.delivery_bytes,
            total.artifact + total.recording,
            len(losses) - 1,
        )
        over: list[Row] = [
            {"round": row["round"], IN_ALL: size, LOSS: row[LOSS]} for row, size in zip(rows, sizes, strict=True)
        ]
        parts.append(
            Figure(
                "Loss over bytes",
                "The same over all bytes up to each round, both ways, with what would bring every client to the "
                f"adapter of that round: {bytes_text(sizes[-1])} in the end.",
                charts.lines(over, IN_ALL, LOSS),
                over,
            )
        )
    return parts


def _privacy(results: RunResults) -> list[Part]:
    paragraphs = [text for texts in results.notes().values() for text in texts]
    if not paragraphs and results.uplinks:
        paragraphs = ["Nothing was promised: privacy=none, and the server saw every update."]
    return [Text("\n\n".join(paragraphs))] if paragraphs else []


def _answers(answers: Sequence[Mapping[str, str]]) -> list[Part]:
    if not answers:
        return []
    columns = list(answers[0])
    said = "Greedy continuations of held-out text, a few words each: for a look, and no measure."
    return [Text(said), Table("Continuations", columns, [[row[column] for column in columns] for row in answers])]


def _settings(results: RunResults, made_with: Mapping[str, str]) -> list[Section]:
    settings = flat(dataclasses.asdict(results.settings))
    by_hand = set_by_hand(settings)
    rows: list[list[Cell]] = [[key, _told(value)] for key, value in by_hand.items()]
    own: list[Part] = [Table("Settings that are not the standard ones", ("setting", "value"), rows)] if rows else []
    again = [Text("This command starts the same run again:"), Text(command(by_hand), code=True)]
    everything: list[list[Cell]] = [[key, _told(value)] for key, value in settings.items()]
    versions: list[list[Cell]] = [[key, value] for key, value in made_with.items()]
    return [
        Section("Settings", [*own, *again]),
        Section("All settings", [Table("Every setting", ("setting", "value"), everything)], closed=True),
        Section("Versions", [Table("What it was made with", ("what", "version"), versions)], closed=True),
    ]


def _told(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
