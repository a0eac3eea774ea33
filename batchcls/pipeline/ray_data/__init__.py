"""The Ray Data graph for clusters with GPUs: load, predict and write."""
