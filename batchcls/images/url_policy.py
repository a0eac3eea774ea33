"""Restrict the addresses that a manifest can make this program read.

Manifests are untrusted: their URIs must access neither files outside the allowed folders nor services that only the
network of this machine can reach (cloud metadata at 169.254.169.254, admin pages on loopback). Hosts are checked by
the address that a socket is about to connect to, so names, redirects and unusual notations of numbers cannot bypass
the check.
"""

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from batchcls.storage.uris import has_scheme, is_remote, join

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_FORBIDDEN_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "2002::/16",  # 6to4 and, in the next line, Teredo: embedded IPv4 addresses
        "2001::/32",
        "fec0::/10",  # site-local, which ipaddress considers global
        "192.0.0.0/24",  # protocol assignments, including the metadata service of a cloud
        "168.63.129.16/32",  # agent of another cloud, on a public address
    )
)

INDIRECT_SCHEMES = frozenset(
    {
        *("zip", "tar", "libarchive", "dir", "reference", "generic", "git", "dvc"),
        *("simplecache", "filecache", "blockcache", "cached"),
        *("async_wrapper", "asyncwrapper", "asynclocal"),
    }
)
"""fsspec filesystems that open another address themselves, which cannot be checked here."""

HOST_SCHEMES = frozenset(
    {
        "ftp",
        "sftp",
        "ssh",
        "smb",
        "hdfs",
        "arrow_hdfs",
        "webhdfs",
        "webdav",
        "jlab",
        "jupyter",
        "dask",
        "root",
    }
)
"""fsspec filesystems whose URI contains the host, and whose connections cannot be checked here."""


_MAX_OPEN_ATTEMPTS = 3


class ForbiddenAddressError(PermissionError):
    """The address is not allowed; the message contains the reason, but not the address."""


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """Addresses that may be read.

    `allowed_roots`: folders that must contain local paths after `..` and symbolic links are resolved; if empty, all
    local paths are allowed. `allow_private_addresses`: http(s) may also access loopback, private and link-local
    addresses.
    """

    allowed_roots: tuple[str, ...] = ()
    allow_private_addresses: bool = False

    def open_path(self, path: str, flags: int) -> int:
        """Open a local path and return its descriptor, which the caller closes.

        If paths are restricted, no folder of the path can be replaced between check and opening: links are resolved
        first, and the result is opened folder by folder below the root without following links. If a link appears in
        the meantime, both steps are repeated.

        Args:
            path: path in the manifest, absolute or relative to the working directory.
            flags: flags of `os.open`.

        Raises:
            ForbiddenAddressError: the path is outside all allowed roots, or contains a null byte.
            OSError: the path cannot be opened; ELOOP if links keep appearing.
        """
        if "\0" in path:
            raise ForbiddenAddressError("the path contains a null byte")
        if not self.allowed_roots:
            return os.open(path, flags | os.O_CLOEXEC)
        error: OSError = ForbiddenAddressError("the path is outside the allowed roots")
        for _ in range(_MAX_OPEN_ATTEMPTS):
            resolved = self._resolve(path)
            if resolved is None:
                continue  # A root that is a link may have changed during the resolution.
            try:
                return _open_without_links(*resolved, flags)
            except OSError as open_error:
                if open_error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                error = open_error
        raise error

    def _resolve(self, path: str) -> tuple[str, list[str]] | None:
        """Resolve links; return the allowed root that contains the path and the names below it."""
        roots = [os.path.realpath(root) for root in self.allowed_roots]
        resolved = Path(os.path.realpath(path))
        for root in roots:
            if resolved.is_relative_to(root):
                return root, list(resolved.relative_to(root).parts)
        return None

    def check_ip(self, text: str) -> None:
        """Raise ForbiddenAddressError unless the IP address (v4 or v6, with or without zone) is allowed."""
        if not self.allow_private_addresses and not is_public(text):
            raise ForbiddenAddressError("the host is a private, loopback, link-local or reserved address")

    def check_scheme(self, name: str) -> None:
        """Raise ForbiddenAddressError for a scheme whose hosts cannot be checked."""
        if name in HOST_SCHEMES and not self.allow_private_addresses:
            raise ForbiddenAddressError(f"hosts of {name}:// cannot be checked; allow private addresses")

    def open_socket(self, address: tuple[object, ...]) -> socket.socket:
        """Create a socket for a result of getaddrinfo, after checking the address.

        Raises:
            ForbiddenAddressError: the address is not allowed.
        """
        family, kind, protocol, _, target = address
        self.check_ip(str(target[0]))  # type: ignore[index]
        return socket.socket(family=family, type=kind, proto=protocol)  # type: ignore[arg-type]


def _open_without_links(root: str, names: list[str], flags: int) -> int:
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    if not names:  # The root itself is a file.
        return os.open(root, flags)
    folder_flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    folder = os.open(root, folder_flags)
    try:
        for name in names[:-1]:
            subfolder = os.open(name, folder_flags | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = subfolder
        return os.open(names[-1], flags, dir_fd=folder)
    finally:
        os.close(folder)


def is_public(text: str) -> bool:
    """Whether an IP address is public; IPv4 addresses embedded in IPv6 are checked as IPv4.

    Notations that only the resolver of the system supports (`127.1`, `2130706433`) are not public.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(str(address.ipv4_mapped))
        if address in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))
    if any(address in network for network in _FORBIDDEN_NETWORKS):
        return False
    return address.is_global and not (address.is_reserved or address.is_multicast)


def resolve_uri(uri: str, base: str) -> str:
    """Resolve a `uri` of the manifest against the folder `base`; absolute URIs and paths are unchanged.

    In stores, `..` stops at the bucket or host, as in browsers, and keys are opaque except for dot segments. On local
    disk, `..` is not limited; restrict local paths with `AddressPolicy.allowed_roots`.
    """
    if has_scheme(uri) or uri.startswith("/"):
        return uri
    if not is_remote(base):
        return join(base, uri)
    head, separator, rest = base.removesuffix("/").partition("://")
    bucket, *folders = rest.split("/")
    for segment in uri.split("/"):
        if segment == "..":
            del folders[-1:]
        elif segment != ".":
            folders.append(segment)
    return f"{head}{separator}{'/'.join([bucket, *folders])}"
