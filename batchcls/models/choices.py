"""What a user may say about a model beside its name. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from batchcls.models.spec import Arguments, PreprocessingOverrides


@dataclass(frozen=True, slots=True)
class ModelChoices:
    """What a user may say beside `--model`; a bundle, being complete, takes none of it."""

    weights: str | None = None
    labels: str | None = None
    category_paths: str | None = None
    tap: str = "pooled"
    new_head: bool = False
    dropout: float | None = None
    trainable: tuple[str, ...] = ("*",)
    arguments: Arguments = field(default_factory=dict)
    overrides: PreprocessingOverrides = field(default_factory=PreprocessingOverrides)
    allow_random: bool = False
    lineage: Mapping[str, Any] = field(default_factory=dict)
