"""From a labeled manifest to a model bundle."""
