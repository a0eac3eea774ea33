"""Compares batchcls with other programs on the same images, weights and machine: `make bench`."""
