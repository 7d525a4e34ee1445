"""The analyses as one page: what each says in a sentence, its figures, and the values of each figure under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gradcodec.analysis.places import VECTOR, A, B
from report.charts import Row, heat_map, lines
from report.page import Facts, Figure, Part, Section, Table, Text, page_of
from server.analysis.analyses import Found

BOUND = "i.i.d. Gaussian bound"
ERROR, BITS = "error energy / energy", "bits per parameter"
WHOLE = "all"


def page(found: Found, asked: Mapping[str, Any], made_with: Mapping[str, str]) -> str:
    """HTML without outside parts. Raises ImportError: what draws its figures is not installed."""
    sections = [Section("What was analysed", list(_runs(found, asked)))]
    for title, key, parts in SECTIONS:
        if found.rows.get(key):
            sections.append(Section(title, list(parts(found.rows))))
    tables = [_table(title, found.rows[key]) for key, title in LONG.items() if found.rows.get(key)]
    if tables:
        sections.append(Section("All values", tables, closed=True))
    return page_of("Analyses of the codec", _lead(found), sections, made_with)


def _lead(found: Found) -> str:
    """What the control found, since everything else hangs on it."""
    said = "What coding does to recorded updates, where it breaks, and what its bytes buy."
    control = found.rows.get("control", [])
    if not control:
        return said
    deaf = sorted({row["codec"] for row in control if not row["reads_input"]})
    if not deaf:
        return f"{said} Every codec here reads its input."
    return f"{said} The output of {', '.join(deaf)} does not depend on what the client sends: see the control."


def _runs(found: Found, asked: Mapping[str, Any]) -> Iterator[Part]:
    yield Facts({key.replace("_", " "): value for key, value in asked.items()})
    yield _table("Runs", found.rows.get("runs", []))
    if found.notes:
        yield Text("\n\n".join(found.notes))


def _snr(rows: Mapping[str, Sequence[Row]]) -> Iterator[Part]:
    yield Text(
        "Energy of the update over energy of the error, in dB, summed over the clients of a round. The paper's own "
        "definition sets the summed square of the update against the mean square of the error: it is larger by ten "
        "times the logarithm of the number of values, whatever the codec."
    )
    whole = [row for row in rows["snr"] if row["layer"] == WHOLE]
    shown = ("run", "codec", "round", "num_values", "snr_db", "paper_snr_db")
    yield _table("Whole updates", whole, shown)
    for run, of_run in _by(rows["snr"], "run"):
        last = max(number for row in of_run if isinstance(number := row["round"], int))
        for factor in (A, B, VECTOR):
            drawn = [
                {"layer": row["layer"], "SNR, dB": row["snr_db"], "codec": row["codec"]}
                for row in of_run
                if row["round"] == last and row["factor"] == factor and isinstance(row["layer"], int)
            ]
            if drawn:
                yield Figure(
                    f"{run}, {'vectors' if factor == VECTOR else f'factor {factor}'}, round {last}",
                    "Signal-to-noise ratio by layer, a line a codec; what loses nothing has no line.",
                    lines(drawn, "layer", "SNR, dB", "codec"),
                    drawn,
                )


def _rate(rows: Mapping[str, Sequence[Row]]) -> Iterator[Part]:
    yield Text(
        "Single updates of later rounds than codecs were trained on, every byte of a payload counted, without error "
        "feedback. The bound is that of independent Gaussian values, 4 to the power of minus the bits: updates have "
        "structure, so that a codec may lie below it."
    )
    for run, of_run in _by(rows["rate"], "run"):
        lossy = [row for row in of_run if row["error"]]
        drawn = [{BITS: row["bits"], ERROR: row["error"], "codec": row["codec"]} for row in lossy]
        highest = max((row["bits"] for row in lossy if isinstance(row["bits"], float)), default=1.0)
        steps = [0.03 * (highest / 0.03) ** (i / 24) for i in range(25)]
        drawn += [{BITS: bits, ERROR: 4.0**-bits, "codec": BOUND} for bits in steps]
        yield Figure(
            run,
            "Error energy over bits per parameter, a line a codec.",
            lines(drawn, BITS, ERROR, "codec", log_x=True),
            drawn,
        )


def _noise(rows: Mapping[str, Sequence[Row]]) -> Iterator[Part]:
    yield Text(
        "The control. A codec whose output does not depend on its input is robust against any noise, and useless. Each "
        "block's columns are shifted by half its width before encoding: the innovation cosine is between the change of "
        "the input and that of the output, 1 if all of it comes through and 0 if the codec does not read where values "
        "lie. Errors are against the update that was meant."
    )
    yield _table("Does it read its input?", rows["control"])
    yield Text("White noise is added before encoding; errors are against the update without it.")
    for run, of_run in _by(rows.get("noise", []), "run"):
        drawn = [{"sigma": row["sigma"], ERROR: row["error"], "codec": row["codec"]} for row in of_run if row["sigma"]]
        yield Figure(
            f"{run}: noise before encoding",
            "Error energy against the clean update over the noise's deviation, a line a codec. The line that stays "
            "level at 1 belongs to codecs that send nothing.",
            lines(drawn, "sigma", ERROR, "codec", log_x=True, log_y=True),
            drawn,
        )


def _damage(rows: Mapping[str, Sequence[Row]]) -> Iterator[Part]:
    yield Text(
        "A damaged payload should be refused: the client's next one then carries the whole update. Unchecked says what "
        "the same damage would have come to without the checksum."
    )
    kinds = {"bits": "flipped bits", "packets": "lost packets of 1,400 bytes"}
    summed = [
        {
            "run": run,
            "codec": codec,
            "damage": kinds[kind],
            "refused": _mean(of_kind, "refused"),
            "unchecked: refused": _mean(of_kind, "unchecked_refused"),
            "unchecked: worst error": max(
                (r["unchecked_worst"] for r in of_kind if r["unchecked_worst"]), default=None
            ),
        }
        for run, of_run in _by(rows["damage"], "run")
        for codec, of_codec in _by(of_run, "codec")
        for kind, of_kind in _by(of_codec, "kind")
    ]
    yield _table("Shares of damaged payloads, whatever the amount of damage", summed)


def _transfer(rows: Mapping[str, Sequence[Row]]) -> Iterator[Part]:
    yield Text("One artifact on the recordings of all runs; on its own recording it was trained on other rounds.")
    served = [row for row in rows["transfer"] if row["error"] is not None]
    drawn = [{"measured on": row["run"], "artifact": row["artifact"], ERROR: row["error"]} for row in served]
    if drawn:
        chart = heat_map(drawn, "measured on", "artifact", ERROR)
        yield Figure("Error energy", "A field for each artifact and recording, darker for more error.", chart, drawn)
    yield _table("All artifacts", rows["transfer"])


def _spectra(rows: Mapping[str, Sequence[Row]]) -> Iterator[Part]:
    yield Text(
        "Of each factor's update in a round, a mean over blocks: shares of the energy by singular value, their "
        "entropy, whose exponential is the effective rank, and excess kurtosis of the values, 0 for a Gaussian. "
        "Factors are defined up to an invertible matrix between them, and singular values up to an orthogonal one."
    )
    for run, of_run in _by(rows["spectra"], "run"):
        for column, title in (("effective_rank", "effective rank"), ("kurtosis", "excess kurtosis")):
            drawn: list[Row] = [
                {"round": row["round"], title: row[column], "of": f"{row['factor']}, {row['of']}"} for row in of_run
            ]
            yield Figure(f"{run}: {title}", f"{title} over rounds.", lines(drawn, "round", title, "of"), drawn)
        ends = {min(r["round"] for r in of_run), max(r["round"] for r in of_run)}
        own = [row for row in of_run if row["of"] == "clients" and row["round"] in ends]
        shares: list[Row] = [
            {"singular value": k, "share of the energy": share, "of": f"{row['factor']}, round {row['round']}"}
            for row in own
            for k, share in enumerate(_list(row["shares"]), 1)
        ]
        yield Figure(
            f"{run}: singular values",
            "Shares of the energy of clients' updates by singular value, first and last round.",
            lines(shares, "singular value", "share of the energy", "of", log_y=True),
            shares,
        )
        bins: list[Row] = [
            {"value / rms": _centre(i, len(_list(row["histogram"]))), "share of the values": share, "of": name}
            for row in own
            for name in [f"{row['factor']}, round {row['round']}"]
            for i, share in enumerate(_list(row["histogram"]))
        ]
        yield Figure(
            f"{run}: histogram of values",
            "Values of clients' updates over their block's root mean square; what lies beyond counts in the last bins.",
            lines(bins, "value / rms", "share of the values", "of"),
            bins,
        )


def _work(rows: Mapping[str, Sequence[Row]]) -> Iterator[Part]:
    yield Text(
        "Operations are those of matrix products and convolutions, two for a multiplication and an addition; range "
        "coding and element-wise steps are in the seconds alone, which were measured on this machine's CPU."
    )
    yield _table("Codecs, one update", rows["work"])
    if rows.get("model"):
        yield _table("The language model, one local step of a client", rows["model"])


def _loss(rows: Mapping[str, Sequence[Row]]) -> Iterator[Part]:
    yield Text(
        "Bytes count the whole exchange, as if the run had ended after the round. Seconds are those of the rounds: "
        "each waits for its slowest client, with what training and encoding took it as measured."
    )
    loss, sent, waited = "held-out loss, nats per token", "bytes of the whole exchange", "seconds, transfers alone"
    for link, of_link in _by(rows["loss"], "link"):
        drawn = [
            {
                sent: r["bytes"],
                waited: r["link_seconds"],
                "seconds": r["seconds"],
                loss: r["heldout_loss"],
                "run": r["run"],
            }
            for r in of_link
        ]
        for axis in (sent, waited, "seconds"):
            chart = lines(drawn, axis, loss, "run", log_x=axis == sent)
            yield Figure(f"Loss over {axis}, {link}", f"Held-out loss over {axis}, a line a run.", chart, drawn)


SECTIONS: tuple[tuple[str, str, Callable[[Mapping[str, Sequence[Row]]], Iterator[Part]]], ...] = (
    ("Does the codec read its input, and what does noise do?", "control", _noise),
    ("Rate and distortion", "rate", _rate),
    ("Signal-to-noise ratio", "snr", _snr),
    ("Damage on the way", "damage", _damage),
    ("One artifact elsewhere", "transfer", _transfer),
    ("Spectra and histograms of A and B", "spectra", _spectra),
    ("Parameters, operations, memory, time", "work", _work),
    ("Loss over bytes and seconds", "loss", _loss),
)
"""Title, the rows without which there is none, and its parts."""
LONG = {
    "damage": "Damage, by amount",
    "rate": "Rate and distortion",
    "noise": "Noise, with another client's input as control",
    "loss": "Loss",
}
"""Rows that are shown in figures, and whose whole table is for who asks for it -> its title."""


def _by(rows: Sequence[Any], key: str) -> Iterator[tuple[str, list[Any]]]:
    """The rows of each value of a column, in their order."""
    for value in dict.fromkeys(row[key] for row in rows):
        yield str(value), [row for row in rows if row[key] == value]


def _table(title: str, rows: Sequence[Row], columns: Sequence[str] | None = None) -> Table:
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    return Table(title, [key.replace("_", " ") for key in columns], [[row.get(key) for key in columns] for row in rows])


def _mean(rows: Sequence[Any], key: str) -> float:
    return float(sum(row[key] for row in rows) / len(rows))


def _list(value: Any) -> list[float]:
    return list(value)


def _centre(number: int, count: int) -> float:
    from gradcodec.analysis.spectra import REACH

    return -REACH + 2 * REACH * (number + 0.5) / count
