"""HTML reports and plots. Does not import Ray."""
