"""Compares backbones on the same hardware, without Ray."""
