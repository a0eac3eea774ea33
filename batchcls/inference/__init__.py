"""Batch of pixels in, Arrow table of answers out. Knows no Ray."""
