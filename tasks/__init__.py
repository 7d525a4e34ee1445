"""What is trained and evaluated on: corpora, one client's share of them, windows, held-out loss."""
