"""Addresses as text: schemes, joining, and what may be shown of them.

A plain path is a local file and stays as it is written; `file://` URIs are percent-decoded;
everything else is `scheme://...`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from batchcls.errors import InputError

LOCAL = "file"
"""The scheme of local files, however they are written."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(?:::[^/]*)?://")
_LOCAL_SPELLINGS = frozenset({"file", "local"})
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


def scheme(uri: str) -> str:
    """The scheme in lower case; `file` for plain paths. For `a::b://...` it is `a`."""
    match = _SCHEME.match(uri)
    name = match.group(1).lower() if match else LOCAL
    return LOCAL if name in _LOCAL_SPELLINGS else name


def has_scheme(uri: str) -> bool:
    """Whether the URI says its scheme; without one it is a path."""
    return _SCHEME.match(uri) is not None


def is_remote(uri: str) -> bool:
    """Whether the URI is anything but a local path."""
    return scheme(uri) != LOCAL


def local_path(uri: str) -> str:
    """The path of a local URI: plain paths as they are, `file://` without scheme and percent-decoded.

    Raises:
        InputError: `file://HOST/...` names another machine.
    """
    match = _SCHEME.match(uri)
    if match is None:
        return uri
    host, slash, path = uri[match.end() :].partition("/")
    if host not in ("", "localhost"):
        raise InputError(f"{redact_uri(uri)}: a file:// URI must not name a host; write file:///path")
    return unquote(slash + path)


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
