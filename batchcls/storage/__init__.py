"""Local disk, object stores and every other filesystem that fsspec supports."""
