"""Which addresses a manifest may make this program read.

A manifest is written by others: its URIs must reach neither a file outside the folders that the job
allows nor a service that only this machine's network can see (a cloud's metadata at
169.254.169.254, an admin page on loopback). Hosts are judged by the address a socket is about to
connect to, so names, redirects and odd spellings of numbers cannot go around it.
"""

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from batchcls.storage.uris import has_scheme, is_remote, join

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "2002::/16",  # 6to4 and, below, Teredo: IPv4 addresses in disguise
        "2001::/32",
        "fec0::/10",  # site-local, which ipaddress takes for global
        "192.0.0.0/24",  # protocol assignments, one cloud's metadata among them
        "168.63.129.16/32",  # another cloud's agent, on a public address
    )
)

INDIRECT_SCHEMES = frozenset(
    {
        *("zip", "tar", "libarchive", "dir", "reference", "generic", "git", "dvc"),
        *("simplecache", "filecache", "blockcache", "cached"),
        *("async_wrapper", "asyncwrapper", "asynclocal"),
    }
)
"""Filesystems of fsspec that open another address inside, which no check here would see."""

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
"""Filesystems whose URI names the host to connect to, through libraries that this guard cannot enter."""


_TRIES_TO_OPEN = 3


class ForbiddenAddressError(PermissionError):
    """The address is not allowed; the text says why, without repeating the address."""


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """What may be read.

    `allowed_roots`: folders that local paths must lie in, after `..` and symbolic links are resolved;
    empty allows every local path. `allow_private_addresses`: http(s) may reach loopback, private
    and link-local addresses too.
    """

    allowed_roots: tuple[str, ...] = ()
    allow_private_addresses: bool = False

    def open_path(self, path: str, flags: int) -> int:
        """Open a local path and return its descriptor, which the caller closes.

        Where paths are confined no step of the way can be changed between the check and the opening:
        the links are resolved first, and what they lead to is opened folder by folder below the root,
        following none. A link that appears meanwhile makes it begin again.

        Args:
            path: as the manifest has it, absolute or relative to the working directory.
            flags: those of `os.open`.

        Raises:
            ForbiddenAddressError: it lies outside of every allowed root, or holds a null byte.
            OSError: what opening raises; ELOOP where links keep appearing on the way.
        """
        if "\0" in path:
            raise ForbiddenAddressError("the path holds a null byte")
        if not self.allowed_roots:
            return os.open(path, flags | os.O_CLOEXEC)
        error: OSError = ForbiddenAddressError("the path is outside of the allowed roots")
        for _ in range(_TRIES_TO_OPEN):
            place = self._place(path)
            if place is None:
                continue  # a root that is a link may have been changed between the two
            try:
                return _open_without_links(*place, flags)
            except OSError as refused:
                if refused.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                error = refused
        raise error

    def _place(self, path: str) -> tuple[str, list[str]] | None:
        """The allowed root, and the names below it, that a path leads to once its links are resolved."""
        roots = [os.path.realpath(root) for root in self.allowed_roots]
        resolved = Path(os.path.realpath(path))
        for root in roots:
            if resolved.is_relative_to(root):
                return root, list(resolved.relative_to(root).parts)
        return None

    def check_ip(self, text: str) -> None:
        """Raise ForbiddenAddressError unless the IP address (v4, v6, with or without zone) is allowed."""
        if not self.allow_private_addresses and not is_public(text):
            raise ForbiddenAddressError("the host is a private, loopback, link-local or reserved address")

    def check_scheme(self, name: str) -> None:
        """Raise ForbiddenAddressError for a scheme whose host nothing here can check."""
        if name in HOST_SCHEMES and not self.allow_private_addresses:
            raise ForbiddenAddressError(f"hosts of {name}:// cannot be checked; allow private addresses")

    def open_socket(self, address: tuple[object, ...]) -> socket.socket:
        """A socket for one answer of getaddrinfo, refused before it can connect.

        Raises:
            ForbiddenAddressError: the address is not allowed.
        """
        family, kind, protocol, _, target = address
        self.check_ip(str(target[0]))  # type: ignore[index]
        return socket.socket(family=family, type=kind, proto=protocol)  # type: ignore[arg-type]


def _open_without_links(root: str, names: list[str], flags: int) -> int:
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    if not names:  # a root that is itself a file
        return os.open(root, flags)
    step = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    folder = os.open(root, step)
    try:
        for name in names[:-1]:
            below = os.open(name, step | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        return os.open(names[-1], flags, dir_fd=folder)
    finally:
        os.close(folder)


def is_public(text: str) -> bool:
    """Whether an IP address is one of the open internet; IPv4 inside IPv6 is judged as IPv4.

    Spellings that only the system's resolver understands (`127.1`, `2130706433`) are not public.
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
    if any(address in network for network in _REFUSED):
        return False
    return address.is_global and not (address.is_reserved or address.is_multicast)


def resolve_uri(uri: str, base: str) -> str:
    """A manifest's `uri`: absolute ones as they are, relative ones under the folder `base`.

    In a store `..` stops at the bucket or host, as it does in a browser, and keys are opaque beside dot
    segments; on local disk `..` does not stop: confine local paths with `AddressPolicy.allowed_roots`.
    """
    if has_scheme(uri) or uri.startswith("/"):
        return uri
    if not is_remote(base):
        return join(base, uri)
    head, mark, rest = base.removesuffix("/").partition("://")
    place, *folders = rest.split("/")
    for segment in uri.split("/"):
        if segment == "..":
            del folders[-1:]
        elif segment != ".":
            folders.append(segment)
    return f"{head}{mark}{'/'.join([place, *folders])}"
