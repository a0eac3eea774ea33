"""Trains a model bundle on a labeled manifest."""
