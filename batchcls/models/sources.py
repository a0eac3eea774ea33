"""The two libraries of architectures, and the one that a name belongs to."""

from collections.abc import Mapping
from typing import cast

from batchcls.errors import InputError
from batchcls.models.libraries.library import Library
from batchcls.models.libraries.timm_library import TimmLibrary
from batchcls.models.libraries.torchvision_library import TorchvisionLibrary
from batchcls.models.model_names import qualified_name, suggest_names
from batchcls.models.model_spec import Arguments, ModelSpec, SourceName

LIBRARIES: Mapping[SourceName, Library] = {"torchvision": TorchvisionLibrary(), "timm": TimmLibrary()}


def get_library(spec: ModelSpec) -> Library:
    """The library an architecture comes from."""
    return LIBRARIES[spec.source]


def find_model(text: str, arguments: Arguments) -> ModelSpec:
    """The spec behind a name, completed with what its weights ask for.

    Raises:
        InputError: no such architecture or tag (names the closest ones), or an argument that is
            settled elsewhere.
    """
    source, _, architecture = (qualified_name(text) or text).partition(":")
    spec = ModelSpec(cast("SourceName", source), architecture, dict(arguments))
    library = get_library(spec)
    if not library.check(architecture):
        raise InputError(f"there is no model {text}{suggest_names(architecture)}")
    return library.complete(spec)
