"""Resolves names of architectures without importing torch, timm or torchvision, which takes seconds.

resnet50                      a name of the zoo
mobilenetv1_100               a name of a library; torchvision is searched first, then timm
timm:resnet50                 the architecture of this library
resnet50.IMAGENET1K_V1        any of these with the tag of pretrained weights

Both libraries register an architecture with a decorator on a function of the same name, so the names are read from
their source files. A test compares them with the names that the libraries report.
"""

import difflib
import importlib.util
import re
from functools import cache
from pathlib import Path

from batchcls.models.model_spec import SourceName
from batchcls.models.registry import find_record, zoo_records

# In the order in which a bare name is looked up.
SOURCES: tuple[SourceName, ...] = ("torchvision", "timm")

_SUGGESTIONS = 3
_BARE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
_REGISTERED = re.compile(
    r"^@register_model(?:\([^\n]*\))?\n(?:@[^\n]*(?:\n[^d\n@][^\n]*)*\n)*def (\w+)\(", re.MULTILINE
)
_DEPRECATED = re.compile(r"register_model_deprecations\(__name__, \{(.*?)\}\)", re.DOTALL)
_KEY = re.compile(r"^\s*['\"](\w+)(?:\.\w+)?['\"]\s*:", re.MULTILINE)


@cache
def library_names(source: SourceName) -> frozenset[str]:
    """Return the names of all architectures of a library, without tags and without deprecated names."""
    return frozenset(name for text in _sources(source) for name in _REGISTERED.findall(text))


def is_known_architecture(source: SourceName, architecture: str) -> bool:
    """Return whether a library has an architecture, including deprecated names; the tag is ignored."""
    base = architecture.partition(".")[0]
    return base in library_names(source) or base in _deprecated(source)


def is_model_name(text: str) -> bool:
    """Return whether `--model` is the name of an architecture, existing or not, rather than the path of a folder."""
    return text.partition(":")[0] in SOURCES or qualified_name(text) is not None


def qualified_name(text: str) -> str | None:
    """Return `SOURCE:ARCHITECTURE` for a bare name of the zoo or of a library; None for any other text."""
    if not _BARE_NAME.fullmatch(text):
        return None
    base, dot, tag = text.partition(".")
    if (record := find_record(base)) is not None:
        return f"{record.source}:{record.architecture}{dot}{tag}"
    return next((f"{source}:{text}" for source in SOURCES if base in library_names(source)), None)


def suggest_names(name: str) -> str:
    """Return the end of an error message, which suggests similar names of the zoo and of the libraries."""
    base = name.partition(":")[2] or name
    base = base.partition(".")[0].lower()
    close = difflib.get_close_matches(base, [record.name for record in zoo_records()], n=_SUGGESTIONS)
    close += [
        f"{source}:{match}"
        for source in SOURCES
        for match in difflib.get_close_matches(base, sorted(library_names(source)), n=_SUGGESTIONS)
        if match not in close
    ]
    if not close:
        return "; use a name of `batchcls bundle zoo`, timm:NAME or torchvision:NAME"
    return f"; did you mean {', '.join(close)}?"


@cache
def _deprecated(source: SourceName) -> frozenset[str]:
    blocks = (block for text in _sources(source) for block in _DEPRECATED.findall(text))
    return frozenset(name for block in blocks for name in _KEY.findall(block))


def _sources(source: SourceName) -> list[str]:
    """Return the source of a library's architectures. Raises ModuleNotFoundError if it is not installed."""
    spec = importlib.util.find_spec(source)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {source}", name=source)
    folder = Path(spec.submodule_search_locations[0]) / "models"
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
