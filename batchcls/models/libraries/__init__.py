"""Adapters for the libraries that provide architectures and weights."""
