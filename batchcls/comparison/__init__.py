"""Backbones beside each other, measured on one kind of hardware. Knows no Ray."""
