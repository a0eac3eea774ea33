"""A linear classifier trained on frozen embeddings."""
