"""What a run leaves in its folder, and what is read of it there: events, results, who is alive. Loads no engine."""
