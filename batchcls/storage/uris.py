"""Normalize, join and redact URIs and local paths.

A plain path is a local file; `file://` URIs are percent-decoded; everything else is `scheme://...`. Paths and URIs
that users pass to a job are normalized once, by `normalize_uri`, when the configuration is validated
(docs/decisions/023).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from batchcls.errors import InputError

LOCAL = "file"
"""Scheme of local files, whether written as a path or as a URI."""

S3_SCHEMES = frozenset({"s3", "s3a"})

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(?:::[^/]*)?://")
_FILE_PATH = re.compile(r"(file|local):(?=/)", re.IGNORECASE)
_LOCAL_SPELLINGS = frozenset({"file", "local"})
_ALIASES = {"s3a": "s3", "gcs": "gs"}
_HTTP = frozenset({"http", "https"})
_TOO_FEW_SLASHES = re.compile(r"(s3|s3a|s3n|gs|gcs|abfs|abfss|az|hdfs|https?):/?(?!/)", re.IGNORECASE)
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_MODEL_NAME = re.compile(r"[A-Za-z0-9_.]+|[a-z]+:[^/].*")
_HARMLESS_OPTIONS = frozenset(
    {
        "addressing_style",
        "anon",
        "cache_regions",
        "client_kwargs",
        "config_kwargs",
        "connect_timeout",
        "default_block_size",
        "endpoint_url",
        "fixed_upload_size",
        "max_attempts",
        "max_concurrency",
        "max_pool_connections",
        "mode",
        "read_timeout",
        "region_name",
        "requester_pays",
        "retries",
        "s3",
        "signature_version",
        "total_max_attempts",
        "use_listings_cache",
        "use_ssl",
        "verify",
        "version_aware",
    }
)
"""Storage options whose values may be shown; all others are treated as secrets."""


def normalize_uri(uri: str) -> str:
    """Return the normalized form of a path or URI given by a user.

    Local paths become absolute, without `.`, `..` and repeated slashes; `~` is expanded and `file:` URIs are decoded.
    Symbolic links are kept, except in front of `..`, which is the parent of the link's target. In remote URIs the
    key is opaque: only the scheme (`S3://`, `s3a://`) and trailing slashes change, and for http(s) URLs, which may
    be signed, only the scheme.

    Raises:
        InputError: the URI is invalid: a Windows path, a scheme with too few slashes, no bucket, a null byte, or
            a host in `file://`.
    """
    if "\0" in uri:
        raise InputError(f"{redact_uri(uri)!r} contains a null byte; remove it")
    if is_remote(uri):
        return _normalize_remote(uri)
    if has_scheme(uri):
        return _absolute(local_path(uri))
    if _WINDOWS_PATH.match(uri):
        raise InputError(
            f"{uri} is a Windows path; use its path on this machine, such as /mnt/c/folder "
            f"(or ./{uri} if it is a name in the working directory)"
        )
    match = _TOO_FEW_SLASHES.match(uri)
    if match:
        rest = uri[match.end() :].lstrip("/")
        raise InputError(
            f"{redact_uri(f'{match.group(1)}://{rest}')} was written with too few slashes; write "
            f"{match.group(1).lower()}://... (or ./{match.group(1)}:... for a local path)"
        )
    return _absolute(_expand_home(uri))


def _expand_home(path: str) -> str:
    """Expand a leading `~` or `~user` as a shell does, unless the working directory has a file of that name."""
    first, slash, rest = path.partition("/")
    if not first.startswith("~") or (first != "~" and os.path.lexists(first)):
        return path
    home = os.path.expanduser(first)  # noqa: PTH111 - Path raises if there is no such user
    if home == first:
        raise InputError(
            f"{path}: {first} has no home directory; write ./{path} for a name in the working directory"
        )
    return f"{home}{slash}{rest}"


def _normalize_remote(uri: str) -> str:
    head, separator, rest = uri.partition("://")
    name, chain, inner = head.partition("::")
    name = _ALIASES.get(name.lower(), name.lower())
    if name in _HTTP:
        return f"{name}{separator}{rest}"
    if name in ("s3", "gs") and rest[:1] in ("", "/"):
        raise InputError(f"{redact_uri(uri)} contains no bucket; write {name}://bucket/key")
    return f"{name}{chain}{inner}{separator}{rest.rstrip('/') or rest[:1]}"


def _absolute(path: str) -> str:
    """Make a path absolute, without `.`, `..` and repeated slashes. Only `..` accesses the disk, to resolve links."""
    absolute = ""
    for part in os.path.join(os.getcwd(), path).split("/"):  # noqa: PTH109, PTH118 - Path would change the text
        if part == "..":
            absolute = os.path.dirname(os.path.realpath(absolute or "/")).rstrip("/")  # noqa: PTH120
        elif part not in ("", "."):
            absolute = f"{absolute}/{part}"
    return absolute or "/"


def normalize_model(model: str) -> str:
    """Normalize a value of `--model`: names of architectures are kept, paths of bundles are normalized."""
    return model if looks_like_model_name(model) else normalize_uri(model)


def looks_like_model_name(model: str) -> bool:
    """Whether a value of `--model` can be the name of an architecture; otherwise it is the folder of a bundle."""
    return _MODEL_NAME.fullmatch(model) is not None


def canonical_location(uri: str) -> str:
    """A text that is equal for equal locations: local paths with links resolved, remote URIs redacted."""
    return redact_uri(uri) if is_remote(uri) else os.path.realpath(local_path(uri))


def scheme(uri: str) -> str:
    """The scheme in lower case: `file` for plain paths, and `a` for `a::b://...`."""
    match = _SCHEME.match(uri)
    name = match.group(1).lower() if match else LOCAL
    return LOCAL if name in _LOCAL_SPELLINGS else name


def has_scheme(uri: str) -> bool:
    """Whether this is a URI, including `file:/path`; otherwise it is a path."""
    return _SCHEME.match(uri) is not None or _FILE_PATH.match(uri) is not None


def is_remote(uri: str) -> bool:
    """Whether the URI is not a local path."""
    return scheme(uri) != LOCAL


def is_http(uri: str) -> bool:
    """Whether this is an http(s) URL, for which folders cannot be listed."""
    return scheme(uri) in _HTTP


def local_path(uri: str) -> str:
    """The path of a local URI: plain paths unchanged, `file:` URIs without the scheme and percent-decoded.

    Bytes that are not valid UTF-8 become surrogates, as Python's file functions expect.

    Raises:
        InputError: `file://HOST/...` refers to another machine.
    """
    match = _SCHEME.match(uri) or _FILE_PATH.match(uri)
    if match is None:
        return uri
    host, slash, path = uri[match.end() :].partition("/")
    if host not in ("", "localhost"):
        raise InputError(f"{redact_uri(uri)}: a file:// URI must not contain a host; write file:///path")
    return unquote(slash + path, errors="surrogateescape")


def parent_folder(uri: str) -> str:
    """The folder that contains a file, so that `relative_path(uri, parent_folder(uri))` is the file name.

    If the last segment of an object key before the name is empty, both slashes are kept.
    """
    folder, slash, _ = uri.rpartition("/")
    if not slash:
        return "."
    return f"{folder}/" if folder == "" or (is_remote(uri) and folder.endswith("/")) else folder


def relative_path(uri: str, folder: str) -> str:
    """The path of a file relative to a folder that contains it."""
    return uri.removeprefix(folder.removesuffix("/") + "/")


def join(uri: str, *parts: str) -> str:
    """Append path segments with single slashes; `parts` are not percent-decoded."""
    if is_remote(uri):
        return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])
    return str(Path(local_path(uri)).joinpath(*parts))


def redact_uri(uri: str) -> str:
    """The URI without user, password, query and fragment, safe to log. Local paths are unchanged."""
    head, separator, rest = uri.partition("://")
    if not separator or not is_remote(uri):
        return uri
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    return f"{head}{separator}{authority.rpartition('@')[2]}{slash}{path}"


def redact_options(options: Mapping[str, object]) -> dict[str, object]:
    """Storage options that are safe to log and to save: all values are hidden unless known to be harmless."""
    return {name: _redacted(name, value) for name, value in options.items()}


def _redacted(name: str, value: object) -> object:
    if name not in _HARMLESS_OPTIONS:
        return "***"
    if isinstance(value, Mapping):
        return redact_options(value)
    return redact_uri(value) if isinstance(value, str) else value
