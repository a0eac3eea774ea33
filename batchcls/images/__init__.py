"""Bytes to pixels: fetch, decode, transform. Knows no model and no Ray."""
