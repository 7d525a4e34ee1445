"""The client program: local fine-tuning and encoding, on every node."""

from conf.startup import collect_seldom

collect_seldom()
