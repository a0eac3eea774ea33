"""`batchcls manifest`: creates a manifest from a folder of images, or validates one."""

import logging
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from batchcls.cli.app import Command, main
from batchcls.cli.console import results_console
from batchcls.config.manifest_config import ManifestCheckConfig, ManifestFromFolderConfig
from batchcls.errors import ExitCode, InputError
from batchcls.manifest.ids import find_invalid_ids
from batchcls.manifest.image_files import find_images
from batchcls.manifest.snapshot import open_manifest
from batchcls.storage.data_files import DataFiles
from batchcls.storage.filesystem import Storage, explain, redact_uri
from batchcls.storage.uris import relative_path

_logger = logging.getLogger("batchcls.jobs.manifest")  # __name__ is __main__ here

_ROW_GROUP_ROWS = 65_536
_LARGE_ROW_GROUP_ROWS = 262_144

_FROM_FOLDER_EXAMPLES = """examples:
  batchcls manifest from-folder photos/ --output catalog.parquet
  batchcls manifest from-folder s3://shop/photos --output s3://shop/catalog.parquet --labels-from-folders
"""
_CHECK_EXAMPLES = """examples:
  batchcls manifest check catalog.parquet
  batchcls manifest check 's3://shop/catalog/*.parquet' --id-column sku --keep shop,price
"""


def from_folder(config: ManifestFromFolderConfig, console: Console) -> ExitCode:
    """Write a manifest of all images in a folder; item_id is the path relative to the folder."""
    del console
    storage = Storage(config.storage_options)
    found = find_images(config.folder, storage)
    table = _table(found, config)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
    with explain(config.output):
        storage.write_atomic(config.output, sink.getvalue().to_pybytes())
    labels = f", {pc.count_distinct(table['label']).as_py()} labels" if config.labels_from_folders else ""
    _logger.info("%s: %d images%s", redact_uri(config.output), table.num_rows, labels)
    return ExitCode.DONE


def _table(found: DataFiles, config: ManifestFromFolderConfig) -> pa.Table:
    names = [relative_path(info.uri, found.base) for info in found.files]
    columns = {
        "item_id": pa.array(names, pa.string()),
        "uri": pa.array([info.uri for info in found.files], pa.string()),
        "version": pa.array([info.etag for info in found.files], pa.string()),
    }
    if config.labels_from_folders:
        parents = [str(PurePosixPath(name).parent) for name in names]
        if all(parent == "." for parent in parents):
            raise InputError(
                f"--labels-from-folders: no image is in a subfolder of {redact_uri(found.base)}, so there are no "
                "labels; specify the folder that contains one folder per label, or omit the flag"
            )
        columns["label"] = pa.array([None if parent == "." else parent for parent in parents], pa.string())
    return pa.table(columns)


def check(config: ManifestCheckConfig, console: Console) -> ExitCode:
    """Validate a manifest in the same way as `classify`, and summarize its contents."""
    del console
    storage = Storage(config.storage_options)
    manifest = open_manifest(
        config.manifest, storage, id_column=config.id_column, keep=config.keep, limit=config.limit
    )
    invalid = find_invalid_ids(manifest, storage)
    largest = max(rows for file in manifest.files for rows in file.row_groups)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("files", f"{len(manifest.files)}"),
        ("rows", f"{manifest.rows}"),
        ("images", " and ".join(name for name in (manifest.columns.uri, manifest.columns.image) if name)),
        ("base of relative URIs", redact_uri(manifest.base)),
        ("null ids", f"{len(invalid.null)}"),
        ("repeated ids", f"{len(invalid.duplicate)}"),
        ("largest row group", f"{largest} rows"),
        ("fingerprint", manifest.fingerprint),
    ):
        table.add_row(name, value)
    out = results_console()
    out.print(table)
    if largest > _LARGE_ROW_GROUP_ROWS:
        out.print(f"hint: row groups of at most {_ROW_GROUP_ROWS} rows are faster to read in parallel")
    return ExitCode.DONE


COMMANDS = (
    Command("from-folder", ManifestFromFolderConfig, from_folder, _FROM_FOLDER_EXAMPLES, ("folder",)),
    Command("check", ManifestCheckConfig, check, _CHECK_EXAMPLES, ("manifest",)),
)

if __name__ == "__main__":
    main("manifest", COMMANDS)
