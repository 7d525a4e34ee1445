"""Flower's SuperNode with times in its log. It is run as ``flower-supernode`` is, with the same options."""

from __future__ import annotations

from flwr.supercore.logger import update_console_handler
from flwr.supernode.cli.flower_supernode import flower_supernode


def main() -> None:
    update_console_handler(timestamps=True, colored=False)
    flower_supernode()


if __name__ == "__main__":
    main()
