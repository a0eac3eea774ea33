"""Build the URL of an http(s) request from the text in the manifest, without changing path and query.

A signature covers path and query exactly as written: `%2F` is not `/`, `%7e` is not `~`, and dot segments are part of
a key. Only characters that are invalid in URLs are percent-encoded, as UTF-8. Scheme and authority, which signatures
do not cover as text, are normalized.
"""

import re

from yarl import URL

from batchcls.images.retry import permanent_error
from batchcls.schema import Reason

_ABSOLUTE = re.compile(r"(https?)://([^/?#]*)([^#]*)", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_RELATIVE = re.compile(r"([^?#]*)(\??[^#]*)")
# RFC 3986: a percent sign precedes two hexadecimal digits, and no other characters are allowed.
_INVALID_IN_URL = re.compile(r"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]")
_INVALID_IN_AUTHORITY = re.compile(r"[\x00-\x20\x7f\"<>\\^`{|}]")


def parse_url(text: str) -> URL:
    """Parse an http(s) URL; path and query are unchanged, and the fragment is removed.

    Trailing line breaks and tabs, which often come from text files, are ignored.

    Raises:
        AttemptError: `forbidden_uri`, if this is not an http(s) URL or its host is missing or invalid.
    """
    match = _ABSOLUTE.match(text.rstrip("\t\r\n"))
    if match is None or _INVALID_IN_AUTHORITY.search(match[2]):
        raise permanent_error(Reason.FORBIDDEN_URI, "not a valid URL")
    try:
        origin = URL(f"{match[1]}://{match[2]}")
    except ValueError:
        raise permanent_error(Reason.FORBIDDEN_URI, "not a valid URL") from None
    if not origin.host:
        raise permanent_error(Reason.FORBIDDEN_URI, "the URL has no host")
    return URL(str(origin).rstrip("/") + _percent_encode(match[3]), encoded=True)


def redirect_target(url: URL, location: str | None) -> URL:
    """Return the target of a redirect, which must be http(s) and must not change from https to http.

    An absolute `location` is used verbatim, a relative one is resolved according to RFC 3986.

    Raises:
        AttemptError: `fetch_failed` without a location, `forbidden_uri` if the target is not allowed.
    """
    if not location:
        raise permanent_error(Reason.FETCH_FAILED, "a redirect without a location")
    if location.startswith("//"):
        location = f"{url.scheme}:{location}"
    if _SCHEME.match(location) is None:
        return _resolve(url, location)
    if not location.lower().startswith(("http:", "https:")):
        raise permanent_error(Reason.FORBIDDEN_URI, "a redirect to a scheme other than http(s)")
    target = parse_url(location)
    if url.scheme == "https" and target.scheme == "http":
        raise permanent_error(Reason.FORBIDDEN_URI, "a redirect from https to http")
    return target


def _resolve(url: URL, reference: str) -> URL:
    """Resolve a reference without scheme and authority according to RFC 3986, 5.2.2."""
    match = _RELATIVE.match(reference)
    assert match is not None
    path, query = _percent_encode(match[1]), _percent_encode(match[2])
    if not path:
        path, query = url.raw_path, query or (f"?{url.raw_query_string}" if url.raw_query_string else "")
    else:
        folder = url.raw_path.rpartition("/")[0]
        path = _remove_dot_segments(path if path.startswith("/") else f"{folder}/{path}")
    return URL(f"{url.scheme}://{url.raw_authority}{path}{query}", encoded=True)


def _percent_encode(text: str) -> str:
    return _INVALID_IN_URL.sub(lambda match: _encode_character(match[0]), text)


def _encode_character(character: str) -> str:
    # Bytes of a header that are not valid UTF-8 are represented as surrogates.
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))


def _remove_dot_segments(path: str) -> str:
    """Remove `.` and `..` from an absolute path (RFC 3986, 5.2.4), keeping empty segments."""
    *folders, last = path.removeprefix("/").split("/")
    kept: list[str] = []
    for segment in folders:
        if segment == "..":
            kept[-1:] = []
        elif segment != ".":
            kept.append(segment)
    if last == "..":
        kept[-1:] = []
    return "/".join(["", *kept, "" if last in (".", "..") else last])
