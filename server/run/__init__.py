"""A run, from its first adapter to its report: rounds, evaluation, checkpoints, what it promises of privacy.

Knows settings, strategies and Flower's ``Grid``; must not know what carries messages (``backends``).
"""
