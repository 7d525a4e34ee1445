"""The errors of a federation: a node, a round or a setting that it cannot go on with."""

from __future__ import annotations


class FederationError(ValueError):
    """The federation cannot run as asked for; the message says which node or setting, and what to do."""


class RoundError(FederationError):
    """A round came to nothing. The server's state is what it was before, so that the round can be tried again."""
