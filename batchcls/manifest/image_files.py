"""Lists the image files of a folder, recognized by their names."""

import logging

from batchcls.errors import InputError
from batchcls.storage.data_files import DataFiles, find_data_files
from batchcls.storage.filesystem import FileInfo, Storage, redact_uri
from batchcls.storage.missing_paths import missing_path_message

_logger = logging.getLogger(__name__)

_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
)


def find_images(folder: str, storage: Storage) -> DataFiles:
    """Find the images in a folder, recursively, or the matches of a glob; skipped entries are logged.

    Raises:
        InputError: the folder does not exist or has no images, or a name is not valid UTF-8, which a text column
            cannot store.
    """
    found = find_data_files(folder, storage, lambda name: name.lower().endswith(_SUFFIXES), images=True)
    skipped = "; ".join(filter(None, (found.skipped.unexpected, found.skipped.hidden))) if found else ""
    if found is None and (missing := missing_path_message(folder, storage)) is not None:
        raise InputError(missing)
    if found is None or not found.files:
        but = f" but {skipped}" if skipped else ""
        raise InputError(f"no images ({', '.join(_SUFFIXES)}) in {redact_uri(folder)}{but}")
    if skipped:
        _logger.warning("%s: skipped: %s", redact_uri(folder), skipped)
    _require_readable_names(list(found.files), folder)
    return found


def _require_readable_names(images: list[FileInfo], folder: str) -> None:
    invalid = [info.uri for info in images if not _is_utf8(info.uri)]
    if invalid:
        raise InputError(
            f"{len(invalid)} of {len(images)} images in {redact_uri(folder)} have names that are not valid UTF-8, the "
            f"first is {redact_uri(invalid[0])}; rename them"
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
