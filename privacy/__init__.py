"""What a run gives away of its clients' data, and how that is bounded: differential privacy, secure aggregation."""
