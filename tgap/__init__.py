"""TGAP: temporal-ensemble gradient-aware pre-training of the codec, a program of its own."""

from conf.startup import collect_seldom

collect_seldom()
