"""Errors of the privacy library: what a setting, a peer or a budget does not allow."""

from __future__ import annotations


class PrivacyError(ValueError):
    """A setting that cannot be served, or a protocol that cannot go on."""


class BudgetSpentError(PrivacyError):
    """Nothing more may be released: the privacy budget does not allow another message."""
