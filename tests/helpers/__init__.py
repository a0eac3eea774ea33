"""Shared code of the tests: builders of inputs, servers, measurements."""
