"""Searches settings of a training recipe with Ray Tune, on held-out training images."""
