"""What is shown of a run while it goes on: bar, status, page, metrics, trackers; all told from its event log."""
