"""Command line: arguments, console output and tables."""
