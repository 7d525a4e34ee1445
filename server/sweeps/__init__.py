"""Sweeps: jobs, their table and report, and what a search is told."""
