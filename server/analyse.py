"""The paper's analyses on runs of one's own: what the codec does to their updates, and what their bytes bought.

python -m server.analyse outputs/federate/dense outputs/federate/coded      # analyses.json, .html and CSV files
python -m server.analyse RUN --codec outputs/codec --codec outputs/codec-resnet   # with artifacts of your own
python -m server.analyse RUN --only noise,damage --rate 0.1                 # some of them, at another rate
python -m server.analyse CODED DENSE --only loss --link 10mbit:1mbit/50ms   # over the seconds of a link (down, up)

RUN is a run's output folder, or a recording of updates alone (FILE.safetensors). Losses over bytes and seconds come
from results.json. All else needs the recording that `server.federate arm=dense record=FILE` or `tgap record=FILE` made;
it is looked for where it was written, and beside the results. Codecs are trained on the first third of a recording's
rounds and measured on the last of the rest. docs/analyses.md says what each analysis means.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.console import printable, say
from conf.output import open_output, provenance, write_text
from server.quiet import quiet

if TYPE_CHECKING:  # slow to import, and not needed for --help or to refuse an argument
    from server.analysis.analyses import Found, Wanted

CODECS = "learned,rotated,identity,resnet,resnet-literal,cnn1d,uformer"
ANALYSES = "snr,rate,noise,damage,transfer,spectra,work,loss"


def main() -> None:
    """The program: ends with the files that it wrote, or with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m server.analyse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's output folder, or a recording")
    parser.add_argument("--output", type=Path, default=Path("outputs/analyses"), metavar="DIR")
    parser.add_argument(
        "--codec", type=Path, action="append", default=[], metavar="ARTIFACT", help="an artifact of your own; again"
    )
    parser.add_argument("--codecs", default=CODECS, metavar="NAMES", help=f"side by side (default {CODECS})")
    parser.add_argument("--only", default=ANALYSES, metavar="NAMES", help=f"some of {ANALYSES}")
    parser.add_argument("--bits", default="0.05,0.1,0.25,0.5,1", help="of the rate-distortion curve, a parameter")
    parser.add_argument("--rate", type=float, default=0.5, help="bits a parameter of all else (default 0.5)")
    parser.add_argument("--updates", type=int, default=8, help="most updates of a recording that are tried (default 8)")
    parser.add_argument(
        "--network-steps", type=int, default=100, help="training of the paper's networks (default 100; 0: without them)"
    )
    parser.add_argument("--link", action="append", default=[], help="RATE[:RATE][/DELAY], again (default 10mbit/50ms)")
    parser.add_argument("--seed", type=int, default=0, help="of noise, damage and training")
    args = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, for their developers
    try:
        check_arguments(args)
        open_output(args.output)
        places = run(args)
    except ValueError as error:
        sys.exit(f"error: {printable(error, 2000)}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    print("\n".join(map(str, places)))


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError naming the first argument that cannot be served. Loads nothing slow."""
    for text in args.runs:
        check_run(text)
    for folder in args.codec:
        if not folder.is_dir():
            raise ValueError(f"--codec {folder} is no folder: give an artifact that `python -m tgap` wrote")
    if unknown := [name for name in names_in(args.only) if name not in ANALYSES.split(",")]:
        raise ValueError(f"--only holds {unknown[0]!r}, which is none of {ANALYSES}")
    if not all(0 < rate <= 64 for rate in (*rates_in(args.bits), args.rate)):
        raise ValueError(f"--bits {args.bits} --rate {args.rate:g}: bits a parameter are more than 0 and at most 64")
    for name, least in (("updates", 1), ("network_steps", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")


def check_run(text: str) -> None:
    """Raises ValueError: it is neither a run's output folder nor a recording."""
    path = Path(text)
    if path.is_dir() and not (path / "results.json").is_file():
        raise ValueError(f"{text} holds no results.json: give the output folder of a run that has ended")
    if not path.is_dir() and not (path.is_file() and path.suffix == ".safetensors"):
        raise ValueError(f"{text} is neither a run's output folder nor a recording (FILE.safetensors)")


def names_in(text: str) -> list[str]:
    """Those between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def rates_in(text: str) -> list[float]:
    """Raises ValueError: one is no number."""
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError:
        raise ValueError(f"--bits {text}: numbers with commas between them are expected") from None


def run(args: argparse.Namespace) -> list[Path]:
    """Reads, analyses, writes; the files. Raises ValueError: something cannot be done as asked for."""
    from server.analysis.analyses import Wanted, analyse
    from server.analysis.contenders import Given, check_names
    from server.analysis.links import Link
    from server.analysis.subjects import read_subjects

    names = names_in(args.codecs)
    check_names(names)
    links = [Link.of(text) for text in args.link or ["10mbit/50ms"]]
    given = Given(names, args.codec, args.network_steps, args.seed)
    wanted = Wanted(names_in(args.only), given, rates_in(args.bits), args.rate, args.updates, links)
    found = analyse(read_subjects(args.runs), wanted, say)
    for note in found.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    return written(found, wanted, args.output)


def written(found: Found, wanted: Wanted, output: Path) -> list[Path]:
    """``analyses.json``, a CSV file a section, and the page, where what it is made with is installed."""
    made_with = provenance()
    about = {
        "rate": wanted.rate,
        "links": ", ".join(link.name for link in wanted.links),
        "updates": wanted.updates,
        "network_steps": wanted.given.network_steps,
        "seed": wanted.given.seed,
    }
    places = [output / "analyses.json"]
    write_text(as_json({"asked": about, "notes": found.notes, **found.rows, "made_with": made_with}), places[0])
    for section, rows in found.rows.items():
        places.append(output / f"{section}.csv")
        write_text(as_csv(rows), places[-1])
    try:
        from server.analysis.page import page

        places.append(output / "analyses.html")
        write_text(page(found, about, made_with), places[-1])
    except ImportError as error:
        places.pop()
        print(f"note: no analyses.html: {error.name} is not installed (pip install {error.name})", file=sys.stderr)
    return places


def as_json(content: dict[str, Any]) -> str:
    """A line for each row, so that two files compare by rows."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row, allow_nan=False, ensure_ascii=False) for row in value)
            parts.append(f' "{key}": [\n  {rows}\n ]' if value else f' "{key}": []')
        else:
            parts.append(f' "{key}": {json.dumps(value, allow_nan=False, ensure_ascii=False)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """With a head; lists stand in one cell, blanks between their numbers."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()})
    return text.getvalue()


if __name__ == "__main__":
    main()
