"""This job beside others, on the same images, weights and machine: `make bench`."""
