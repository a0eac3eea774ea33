"""Normalize, join and redact URIs and local paths.

A plain path is a local file; `file://` URIs are percent-decoded; everything else is `scheme://...`.
What a user gives to a job is brought into its normal form once, by `normal`, where the settings are
checked (docs/decisions/023).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from batchcls.errors import InputError

LOCAL = "file"
"""The scheme of local files, however they are written."""

S3_SCHEMES = frozenset({"s3", "s3a"})

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(?:::[^/]*)?://")
_FILE_PATH = re.compile(r"(file|local):(?=/)", re.IGNORECASE)
_LOCAL_SPELLINGS = frozenset({"file", "local"})
_ALIASES = {"s3a": "s3", "gcs": "gs"}
_HTTP = frozenset({"http", "https"})
_ONE_SLASH = re.compile(r"(s3|s3a|s3n|gs|gcs|abfs|abfss|az|hdfs|https?):/?(?!/)", re.IGNORECASE)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_LIKE_A_MODEL = re.compile(r"[A-Za-z0-9_.]+|[a-z]+:[^/].*")
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
"""Options whose values are shown; a new option is a secret until it is named here."""


def normalize_uri(address: str) -> str:
    """The one form of an address that a user gives, whatever its spelling.

    Local: an absolute path without `.`, `..` and repeated slashes, `~` being the home folder, and
    `file:` URIs decoded. Symbolic links stay as they are named, except in front of a `..`, which is
    the parent of where the link leads. Elsewhere keys are opaque: only the scheme (`S3://`, `s3a://`)
    and slashes at the end change; of http(s), which may be signed, the scheme alone.

    Raises:
        InputError: no place can be meant: a Windows path, a scheme with too few slashes, no bucket, a
            null byte, a host in `file://`.
    """
    if "\0" in address:
        raise InputError(f"{redact_uri(address)!r} holds a null byte, which no address can")
    if is_remote(address):
        return _normal_remote(address)
    if has_scheme(address):
        return _absolute(local_path(address))
    if _WINDOWS.match(address):
        raise InputError(
            f"{address} is a Windows path; write it as this machine names it, such as /mnt/c/folder "
            f"(or ./{address} if it is a name in this folder)"
        )
    match = _ONE_SLASH.match(address)
    if match:
        rest = address[match.end() :].lstrip("/")
        raise InputError(
            f"{redact_uri(f'{match.group(1)}://{rest}')} was written with too few slashes; write "
            f"{match.group(1).lower()}://... (or ./{match.group(1)}:... for a local path)"
        )
    return _absolute(_home_expanded(address))


def _home_expanded(address: str) -> str:
    """`~` and `~user` in front, as a shell has them, unless a file here has the name `~...`."""
    first, slash, rest = address.partition("/")
    if not first.startswith("~") or (first != "~" and os.path.lexists(first)):
        return address
    home = os.path.expanduser(first)  # noqa: PTH111 - Path raises where this answers with its argument
    if home == first:
        raise InputError(
            f"{address}: {first} has no home folder; write ./{address} for a name in this folder"
        )
    return f"{home}{slash}{rest}"


def _normal_remote(address: str) -> str:
    head, mark, rest = address.partition("://")
    name, chain, inner = head.partition("::")
    name = _ALIASES.get(name.lower(), name.lower())
    if name in _HTTP:
        return f"{name}{mark}{rest}"
    if name in ("s3", "gs") and rest[:1] in ("", "/"):
        raise InputError(f"{redact_uri(address)} names no bucket; write {name}://bucket/key")
    return f"{name}{chain}{inner}{mark}{rest.rstrip('/') or rest[:1]}"


def _absolute(path: str) -> str:
    """Absolute, without `.`, `..` and repeated slashes; only `..` looks at the disk, for links before it."""
    made = ""
    for part in os.path.join(os.getcwd(), path).split("/"):  # noqa: PTH109, PTH118 - the text itself matters
        if part == "..":
            made = os.path.dirname(os.path.realpath(made or "/")).rstrip("/")  # noqa: PTH120
        elif part not in ("", "."):
            made = f"{made}/{part}"
    return made or "/"


def normalize_model(model: str) -> str:
    """What `--model` takes: names of architectures as they are, everything else in its normal form."""
    return model if looks_like_model_name(model) else normalize_uri(model)


def looks_like_model_name(model: str) -> bool:
    """Whether `--model` may be an architecture's name; otherwise it is a bundle's folder."""
    return _LIKE_A_MODEL.fullmatch(model) is not None


def canonical_location(address: str) -> str:
    """The same text for one place however it is reached: local paths without links, remote ones redacted."""
    return redact_uri(address) if is_remote(address) else os.path.realpath(local_path(address))


def scheme(uri: str) -> str:
    """The scheme in lower case; `file` for plain paths. For `a::b://...` it is `a`."""
    match = _SCHEME.match(uri)
    name = match.group(1).lower() if match else LOCAL
    return LOCAL if name in _LOCAL_SPELLINGS else name


def has_scheme(uri: str) -> bool:
    """Whether the URI says its scheme (`file:/path` does, too); without one it is a path."""
    return _SCHEME.match(uri) is not None or _FILE_PATH.match(uri) is not None


def is_remote(uri: str) -> bool:
    """Whether the URI is anything but a local path."""
    return scheme(uri) != LOCAL


def is_http(uri: str) -> bool:
    """Whether the URI is one of http(s), which knows no folders."""
    return scheme(uri) in _HTTP


def local_path(uri: str) -> str:
    """The path of a local URI: plain paths as they are, `file:` without scheme and percent-decoded.

    Bytes that are no UTF-8 come out as Python's file functions want them.

    Raises:
        InputError: `file://HOST/...` names another machine.
    """
    match = _SCHEME.match(uri) or _FILE_PATH.match(uri)
    if match is None:
        return uri
    host, slash, path = uri[match.end() :].partition("/")
    if host not in ("", "localhost"):
        raise InputError(f"{redact_uri(uri)}: a file:// URI must not name a host; write file:///path")
    return unquote(slash + path, errors="surrogateescape")


def parent_folder(uri: str) -> str:
    """The folder that a file lies in, so that `relative_path(uri, parent_folder(uri))` is its name.

    An object whose key holds an empty segment in front of its name keeps both slashes.
    """
    folder, slash, _ = uri.rpartition("/")
    if not slash:
        return "."
    return f"{folder}/" if folder == "" or (is_remote(uri) and folder.endswith("/")) else folder


def relative_path(uri: str, folder: str) -> str:
    """The path of a file below a folder, with single slashes only where the file has them."""
    return uri.removeprefix(folder.removesuffix("/") + "/")


def join(uri: str, *parts: str) -> str:
    """Append path segments with single slashes; `parts` are taken as they are, not decoded."""
    if is_remote(uri):
        return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])
    return str(Path(local_path(uri)).joinpath(*parts))


def redact_uri(uri: str) -> str:
    """The URI without user, password, query and fragment: safe to log. Local paths stay whole."""
    head, mark, rest = uri.partition("://")
    if not mark or not is_remote(uri):
        return uri
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    return f"{head}{mark}{authority.rpartition('@')[2]}{slash}{path}"


def redact_options(options: Mapping[str, object]) -> dict[str, object]:
    """Storage options that are safe to log and to save: only harmless values are shown, at any depth."""
    return {name: _redacted(name, value) for name, value in options.items()}


def _redacted(name: str, value: object) -> object:
    if name not in _HARMLESS_OPTIONS:
        return "***"
    if isinstance(value, Mapping):
        return redact_options(value)
    return redact_uri(value) if isinstance(value, str) else value
