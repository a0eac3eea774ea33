"""`timm:NAME` and `torchvision:NAME`: the table of libraries, and names looked up in it."""

import difflib
from collections.abc import Mapping
from typing import cast

from batchcls.errors import InputError
from batchcls.models.library import Library, ModelSpec, SourceName
from batchcls.models.timm_library import TimmLibrary
from batchcls.models.torchvision_library import TorchvisionLibrary

LIBRARIES: Mapping[SourceName, Library] = {"timm": TimmLibrary(), "torchvision": TorchvisionLibrary()}

_SUGGESTIONS = 3


def is_library_name(text: str) -> bool:
    """Whether `--model` names a library's architecture and not a bundle folder."""
    return text.partition(":")[0] in LIBRARIES


def library_of(spec: ModelSpec) -> Library:
    """The library an architecture comes from."""
    return LIBRARIES[spec.source]


def find_model(text: str, arguments: Mapping[str, bool | int | float | str | None]) -> ModelSpec:
    """The spec behind `timm:NAME` or `torchvision:NAME`, completed with what its weights ask for.

    Raises:
        InputError: no such architecture or tag (names the closest ones of both libraries), or an
            argument that is settled elsewhere.
    """
    source, _, architecture = text.partition(":")
    spec = ModelSpec(cast("SourceName", source), architecture, dict(arguments))
    library = library_of(spec)
    if not library.check(architecture):
        raise InputError(f"there is no model {text}{_suggestions(architecture)}")
    return library.complete(spec)


def _suggestions(architecture: str) -> str:
    base = architecture.partition(".")[0].lower()
    close = [
        f"{source}:{name}"
        for source, library in LIBRARIES.items()
        for name in difflib.get_close_matches(base, library.names(), n=_SUGGESTIONS)
    ]
    if not close:
        return "; timm.list_models() and torchvision.models.list_models() show what there is"
    return f"; did you mean {', '.join(close)}?"
