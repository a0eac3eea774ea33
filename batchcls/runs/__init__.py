"""What a run is on storage: plan, parts, commit, publish. Knows no Ray."""
