"""What a person sees of TGAP: a bar with the loss and the time left, and the table of fidelities."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from conf.console import steps
from gradcodec.training.fit import Progress as OnStep
from gradcodec.training.measure import Row


@contextmanager
def training_shown(name: str) -> Iterator[OnStep]:
    with steps(f"training {name}") as shown:
        yield lambda step, total, loss: shown(step, total, f"loss {loss:.4g}")


def print_table(rows: Sequence[Row]) -> None:
    """Fidelity on updates that the codecs were not trained on, to standard output."""
    table = Table(title="fidelity on held-out updates (single updates, no error feedback, every byte counted)")
    for column in ("codec", "held out", "bits/param", "cosine", "SNR dB", "aggregate", "Gaussian", "updates"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("codec", "held out") else "right")
    for row in rows:
        table.add_row(
            row.codec,
            row.heldout,
            f"{row.bits:.3f}",
            f"{row.cosine:.3f}",
            f"{row.snr_db:.2f}",
            f"{row.aggregate_cosine:.3f}",
            f"{row.gaussian_bound_cosine:.3f}",
            str(row.num_updates),
        )
    Console(width=100 if not sys.stdout.isatty() else None).print(table)
