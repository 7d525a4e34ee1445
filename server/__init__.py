"""The server program: starts federations, aggregates, evaluates, reports."""
