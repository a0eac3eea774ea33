"""Pages and pictures for people. Knows no Ray."""
