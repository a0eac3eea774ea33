"""Create fsspec filesystems with the default options of this package."""

import inspect
from collections.abc import Mapping
from typing import Any

from fsspec.registry import get_filesystem_class

from batchcls.errors import InputError
from batchcls.storage.store_errors import UnsupportedSchemeError
from batchcls.storage.uris import S3_SCHEMES, redact_uri

# botocore retries 429, 5xx and lost connections; s3fs also retries responses that are interrupted. With both, a run
# completes even if half of all requests fail.
_S3_CONFIG = {
    "connect_timeout": 10,
    "read_timeout": 60,
    "max_pool_connections": 64,
    "retries": {"mode": "standard", "total_max_attempts": 6},
}
_S3FS_ATTEMPTS = 5


def filesystem_class(name: str, uri: str) -> Any:
    """Return the fsspec class for a scheme. Raises UnsupportedSchemeError if none is installed."""
    try:
        return get_filesystem_class(name)
    except ValueError:
        raise UnsupportedSchemeError(
            f"{redact_uri(uri)}: no filesystem supports '{name}://'; use a local path, s3:// or "
            "another scheme that fsspec supports"
        ) from None
    except ImportError as error:
        raise UnsupportedSchemeError(
            f"{redact_uri(uri)}: a package for '{name}://' is missing: {error}"
        ) from None


def make_filesystem(name: str, kind: Any, options: dict[str, object]) -> Any:
    """Create a filesystem for a scheme. Raises InputError if it rejects the options."""
    if name in S3_SCHEMES:
        options = _s3_options(kind, options)
    try:
        filesystem = kind(**options, skip_instance_cache=True)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"invalid storage options for '{name}://' ({type(error).__name__}); the given options are "
            f"{', '.join(sorted(options)) or 'none'}"
        ) from None
    if name in S3_SCHEMES:
        filesystem.retries = _S3FS_ATTEMPTS
    return filesystem


def _s3_options(kind: Any, given: Mapping[str, object]) -> dict[str, object]:
    """Add default options to the given ones and reject unknown options here, not at the first request."""
    options: dict[str, Any] = {"use_listings_cache": False, **given}
    region = options.pop("region_name", None)
    if region is not None:
        options["client_kwargs"] = {"region_name": region, **options.get("client_kwargs", {})}
    options["config_kwargs"] = {**_S3_CONFIG, **options.get("config_kwargs", {})}
    known = {*inspect.signature(kind.__init__).parameters, "profile", "use_listings_cache", "region_name"}
    unknown = sorted(set(options) - known)
    if unknown:
        names = ", ".join(sorted(known - {"self", "kwargs"}))
        raise InputError(f"unknown storage options for s3: {', '.join(unknown)}; supported are {names}")
    return options
