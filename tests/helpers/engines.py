"""Simulates that only some engines are installed."""

import pytest

from batchcls.inference import engine_record


def only_installed(monkeypatch: pytest.MonkeyPatch, *engines: str) -> None:
    """Make all other engines unavailable for the duration of the test."""
    monkeypatch.setattr(
        engine_record,
        "missing_package",
        lambda engine: None if engine in engines else f"{engine} is not installed",
    )
