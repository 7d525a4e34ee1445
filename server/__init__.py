"""The server program: starts federations, aggregates, evaluates, reports."""

from conf.startup import collect_seldom

collect_seldom()
