"""The errors of this library. All are ``ValueError``: somebody's input was wrong, and the message says which.

A message says what is wrong in the library's own terms. What to do about it, by which setting or command, is said by
the program that catches it; kinds of errors with a remedy of their own have a class of their own.
"""


class CodecError(ValueError):
    """A payload, an artifact or a geometry that this codec cannot serve. Parsers raise this and nothing else."""


class BudgetError(CodecError):
    """The byte budget is smaller than the smallest payload that the codec can make."""


class DivergedError(CodecError):
    """An update holds NaN, infinity or values too large to be coded: the training that made it diverged."""


class ArtifactError(CodecError):
    """A trained codec that is missing, damaged, of another kind, or trained for another geometry."""
