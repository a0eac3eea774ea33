"""Names of architectures: the zoo's short ones, a library's own, and both libraries' with a prefix.

resnet50                      the zoo's name
mobilenetv1_100               a library's own name; torchvision is asked first, then timm
timm:resnet50                 that library's architecture, whatever others have of that name
resnet50.IMAGENET1K_V1        any of them with a tag of published weights
"""

import difflib
import re
from collections.abc import Mapping
from typing import cast

from batchcls.errors import InputError
from batchcls.models.library import Library
from batchcls.models.spec import Arguments, ModelSpec, SourceName
from batchcls.models.timm_library import TimmLibrary
from batchcls.models.torchvision_library import TorchvisionLibrary
from batchcls.models.zoo import find_record, zoo_records

# In the order in which a bare name is looked up.
LIBRARIES: Mapping[SourceName, Library] = {"torchvision": TorchvisionLibrary(), "timm": TimmLibrary()}

_SUGGESTIONS = 3
_BARE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")


def is_model_name(text: str) -> bool:
    """Whether `--model` names an architecture, known or not, and cannot be meant as a folder's path."""
    return text.partition(":")[0] in LIBRARIES or find_name(text) is not None


def find_name(text: str) -> str | None:
    """`SOURCE:ARCHITECTURE` behind a bare name of the zoo or of a library; None for any other text."""
    if not _BARE_NAME.fullmatch(text):
        return None
    base, dot, tag = text.partition(".")
    if (record := find_record(base)) is not None:
        return f"{record.source}:{record.architecture}{dot}{tag}"
    for source, library in LIBRARIES.items():
        if base in library.names():
            return f"{source}:{text}"
    return None


def library_of(spec: ModelSpec) -> Library:
    """The library an architecture comes from."""
    return LIBRARIES[spec.source]


def find_model(text: str, arguments: Arguments) -> ModelSpec:
    """The spec behind a name, completed with what its weights ask for.

    Raises:
        InputError: no such architecture or tag (names the closest ones), or an argument that is
            settled elsewhere.
    """
    source, _, architecture = (find_name(text) or text).partition(":")
    spec = ModelSpec(cast("SourceName", source), architecture, dict(arguments))
    library = library_of(spec)
    if not library.check(architecture):
        raise InputError(f"there is no model {text}{suggestions(architecture)}")
    return library.complete(spec)


def suggestions(name: str) -> str:
    """The end of an error message: names of the zoo and the libraries that are close to this one."""
    base = name.partition(".")[0].lower()
    zoo = [record.name for record in zoo_records()]
    close = difflib.get_close_matches(base, zoo, n=_SUGGESTIONS)
    close += [
        f"{source}:{match}"
        for source, library in LIBRARIES.items()
        for match in difflib.get_close_matches(base, library.names(), n=_SUGGESTIONS)
        if match not in close
    ]
    if not close:
        return "; `python -m batchcls.jobs.bundle zoo` shows names, and any of timm or torchvision will do"
    return f"; did you mean {', '.join(close)}?"
