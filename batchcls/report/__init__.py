"""Pages and images for people. Knows no Ray."""
