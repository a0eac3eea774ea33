"""From a labelled manifest to a model bundle."""
