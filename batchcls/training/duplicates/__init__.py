"""Finds copies of images within and between the training and the validation rows, before training."""
