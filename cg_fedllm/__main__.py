"""cg-fedllm COMMAND ...: what ``python -m`` does in the repository, from anywhere.

  cg-fedllm federate [OVERRIDES ...]   one federated run, or a sweep with -m   (python -m server.federate)
  cg-fedllm preview [OVERRIDES ...]    what a client would train on            (python -m server.preview)
  cg-fedllm server keys|start|...      the server's host                       (python -m server)
  cg-fedllm client --server ...        a node                                  (python -m client)
  cg-fedllm status [RUN]               how a run is doing                      (python -m server status)
  cg-fedllm watch [RUN]                a live view of a run, or its page       (python -m server.watch)
  cg-fedllm tgap [OVERRIDES ...]       trains an artifact of the codec         (python -m tgap)
  cg-fedllm compare RUN ...            finished runs beside each other         (python -m server.compare)
  cg-fedllm score RUN ...              benchmarks of what was trained          (python -m server.score)
  cg-fedllm export RUN ...             the adapter for other programs          (python -m server.export)
  cg-fedllm analyse RUN ...            the paper's analyses of runs            (python -m server.analyse)

cg-fedllm COMMAND --help says more of each.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

PROGRAMS: dict[str, tuple[str, ...]] = {
    "federate": ("server.federate",),
    "preview": ("server.preview",),
    "server": ("server",),
    "client": ("client",),
    "status": ("server", "status"),
    "watch": ("server.watch",),
    "tgap": ("tgap",),
    "compare": ("server.compare",),
    "score": ("server.score",),
    "export": ("server.export",),
    "analyse": ("server.analyse",),
}
"""Command -> module, and the arguments that it stands for."""


def app_folder() -> Path:
    """Where the folders lie: in this package once it is installed, beside it in the repository."""
    here = Path(__file__).resolve().parent
    return here if (here / "server").is_dir() else here.parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one program in this process; what that starts finds the same folders."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--version"]:
        print(f"cg-fedllm {version('cg-fedllm')}")
        return
    if not given or given[0] in ("-h", "--help", "help"):
        print(__doc__, end="")
        return
    if given[0] not in PROGRAMS:
        sys.exit(f"error: {given[0]!r} is none of {', '.join(PROGRAMS)}; cg-fedllm --help says what they do")
    module, *stands_for = PROGRAMS[given[0]]
    folder = str(app_folder())
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.argv = [f"cg-fedllm {given[0]}", *stands_for, *given[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
