"""Benchmarks backbones against each other on the same hardware, without Ray."""
