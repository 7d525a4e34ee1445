"""Flower's SuperNode with times in its log. It is run as ``flower-supernode`` is, with the same options."""

from __future__ import annotations

import logging
import time

from flwr.supercore.logger import update_console_handler


def log_with_times() -> None:
    """Flower's lines in this process's log: with times in UTC, without colours, each of them once."""
    logging.Formatter.converter = time.gmtime
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    update_console_handler(timestamps=True, colored=False)


def main() -> None:
    from flwr.supernode.cli.flower_supernode import flower_supernode  # here, as the executor needs but the above

    log_with_times()
    flower_supernode()


if __name__ == "__main__":
    main()
