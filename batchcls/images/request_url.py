"""The URL of an http(s) image as it is sent: the text of the manifest, byte for byte.

A signature covers the path and the query as their writer spelled them, so that `%2F` is not `/`, `%7e`
is not `~`, and a dot segment is part of a key. Only characters that no URL may hold are quoted, as
UTF-8; scheme and authority, which no signature covers as text, are brought to their normal form.
"""

import re

from yarl import URL

from batchcls.images.retry import permanent_error
from batchcls.schema import Reason

_ABSOLUTE = re.compile(r"(https?)://([^/?#]*)([^#]*)", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_RELATIVE = re.compile(r"([^?#]*)(\??[^#]*)")
# RFC 3986: a percent sign stands before two hexadecimal digits, and what is not listed here stands nowhere.
_NEVER_IN_A_URL = re.compile(r"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]")
_NEVER_IN_AN_AUTHORITY = re.compile(r"[\x00-\x20\x7f\"<>\\^`{|}]")


def parse_url(text: str) -> URL:
    """The URL that `text` stands for, its path and query unchanged, its fragment left out.

    Line breaks and tabs at the end, which come from text files, do not count.

    Raises:
        AttemptError: `forbidden_uri`; it is not http(s), or names no host that can be one.
    """
    match = _ABSOLUTE.match(text.rstrip("\t\r\n"))
    if match is None or _NEVER_IN_AN_AUTHORITY.search(match[2]):
        raise permanent_error(Reason.FORBIDDEN_URI, "this is no valid URL")
    try:
        origin = URL(f"{match[1]}://{match[2]}")
    except ValueError:
        raise permanent_error(Reason.FORBIDDEN_URI, "this is no valid URL") from None
    if not origin.host:
        raise permanent_error(Reason.FORBIDDEN_URI, "the URL names no host")
    return URL(str(origin).rstrip("/") + _quoted(match[3]), encoded=True)


def redirect_target(url: URL, location: str | None) -> URL:
    """Where a redirect leads, from http(s) to http(s) only, and never back from TLS to plain text.

    An absolute `location` is taken as it is written; a relative one is resolved as RFC 3986 says.

    Raises:
        AttemptError: `fetch_failed` without a location, `forbidden_uri` where it must not lead.
    """
    if not location:
        raise permanent_error(Reason.FETCH_FAILED, "a redirect that does not say where to")
    if location.startswith("//"):
        location = f"{url.scheme}:{location}"
    if _SCHEME.match(location) is None:
        return _resolved(url, location)
    if not location.lower().startswith(("http:", "https:")):
        raise permanent_error(Reason.FORBIDDEN_URI, "a redirect to something other than http(s)")
    target = parse_url(location)
    if url.scheme == "https" and target.scheme == "http":
        raise permanent_error(Reason.FORBIDDEN_URI, "a redirect from https to http")
    return target


def _resolved(url: URL, reference: str) -> URL:
    """RFC 3986, 5.2.2, for a reference without scheme and authority."""
    match = _RELATIVE.match(reference)
    assert match is not None
    path, query = _quoted(match[1]), _quoted(match[2])
    if not path:
        path, query = url.raw_path, query or (f"?{url.raw_query_string}" if url.raw_query_string else "")
    else:
        folder = url.raw_path.rpartition("/")[0]
        path = _without_dot_segments(path if path.startswith("/") else f"{folder}/{path}")
    return URL(f"{url.scheme}://{url.raw_authority}{path}{query}", encoded=True)


def _quoted(text: str) -> str:
    return _NEVER_IN_A_URL.sub(lambda found: _percent(found[0]), text)


def _percent(character: str) -> str:
    # A header that is no UTF-8 comes with its bytes as surrogates.
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))


def _without_dot_segments(path: str) -> str:
    """An absolute path without `.` and `..`, as RFC 3986, 5.2.4 has it: empty segments stay, the root is the end."""
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
