"""Demos and measurements. Every figure in the documentation comes from a command in this folder."""

from conf.startup import collect_seldom

collect_seldom()
