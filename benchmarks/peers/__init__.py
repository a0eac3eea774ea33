"""The programs that this job is measured beside, each a process of its own that says how long it took."""
