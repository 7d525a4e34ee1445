"""The errors of this library. All are ``ValueError``: somebody's input was wrong, and the message says which."""


class CodecError(ValueError):
    """A payload, an artifact or a geometry that this codec cannot serve. Parsers raise this and nothing else."""


class BudgetError(CodecError):
    """The byte budget is smaller than the smallest payload that the codec can make."""
