"""Conversion of batches of pixels to Arrow tables of predictions, without Ray."""
