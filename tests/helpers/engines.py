"""Engines as if only some of them were installed."""

import pytest

from batchcls.inference import engine_record


def only_installed(monkeypatch: pytest.MonkeyPatch, *engines: str) -> None:
    """Until the end of the test, all other engines are missing."""
    monkeypatch.setattr(
        engine_record,
        "missing_package",
        lambda engine: None if engine in engines else f"{engine} is not here",
    )
