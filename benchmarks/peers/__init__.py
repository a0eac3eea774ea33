"""Programs to compare with; each runs in a separate process and reports its time."""
