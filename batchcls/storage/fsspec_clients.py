"""Create fsspec filesystems with the default options of this package."""

import inspect
from collections.abc import Mapping
from typing import Any

from fsspec.registry import get_filesystem_class

from batchcls.errors import InputError
from batchcls.storage.store_errors import UnsupportedSchemeError
from batchcls.storage.uris import S3_SCHEMES, redact_uri

# botocore repeats 429, 5xx and lost connections; s3fs repeats on top what broke off in the middle of an answer.
# Enough of both that a store which fails half of all requests lets a run end.
_S3_CONFIG = {
    "connect_timeout": 10,
    "read_timeout": 60,
    "max_pool_connections": 64,
    "retries": {"mode": "standard", "total_max_attempts": 6},
}
_S3FS_ATTEMPTS = 5


def filesystem_class(name: str, uri: str) -> Any:
    """The class of fsspec that speaks a scheme. Raises UnsupportedSchemeError where none is installed."""
    try:
        return get_filesystem_class(name)
    except ValueError:
        raise UnsupportedSchemeError(
            f"{redact_uri(uri)}: no filesystem speaks '{name}://'; use a local path, s3:// or "
            "another scheme that fsspec knows"
        ) from None
    except ImportError as error:
        raise UnsupportedSchemeError(
            f"{redact_uri(uri)}: a package for '{name}://' is missing: {error}"
        ) from None


def make_filesystem(name: str, kind: Any, options: dict[str, object]) -> Any:
    """A new filesystem object of a scheme. Raises InputError where it refuses the options."""
    if name in S3_SCHEMES:
        options = _s3_options(kind, options)
    try:
        filesystem = kind(**options, skip_instance_cache=True)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"storage options for '{name}://' do not fit ({type(error).__name__}): given are "
            f"{', '.join(sorted(options)) or 'none'}"
        ) from None
    if name in S3_SCHEMES:
        filesystem.retries = _S3FS_ATTEMPTS
    return filesystem


def _s3_options(kind: Any, given: Mapping[str, object]) -> dict[str, object]:
    """Our defaults under the given options; unknown ones are refused here, not at the first request."""
    options: dict[str, Any] = {"use_listings_cache": False, **given}
    region = options.pop("region_name", None)
    if region is not None:
        options["client_kwargs"] = {"region_name": region, **options.get("client_kwargs", {})}
    options["config_kwargs"] = {**_S3_CONFIG, **options.get("config_kwargs", {})}
    known = {*inspect.signature(kind.__init__).parameters, "profile", "use_listings_cache", "region_name"}
    unknown = sorted(set(options) - known)
    if unknown:
        names = ", ".join(sorted(known - {"self", "kwargs"}))
        raise InputError(f"unknown storage options for s3: {', '.join(unknown)}; known are {names}")
    return options
