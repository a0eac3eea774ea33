"""Classify whole image catalogs, every night, on Ray."""

__version__ = "0.1.0"
