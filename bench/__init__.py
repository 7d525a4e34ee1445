"""Demos and measurements. Every figure in the documentation comes from a command in this folder."""
