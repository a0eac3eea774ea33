"""Settings of the `manifest` commands."""

from typing import Any

from pydantic import Field

from batchcls.config.common_config import Address, JobConfig, KeptColumns


class ManifestFromFolderConfig(JobConfig):
    """Create a manifest from a folder of images."""

    folder: Address = Field(
        min_length=1, description="Folder with images, local or s3://, searched recursively; or a glob."
    )
    output: Address = Field(min_length=1, description="Parquet file to write.")
    labels_from_folders: bool = Field(
        default=False, description="Set the column label to the path of the folder that contains the image."
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object with options for remote storage."
    )


class ManifestCheckConfig(JobConfig):
    """Validate a manifest and describe its contents."""

    manifest: Address = Field(min_length=1, description="Parquet file, folder or glob, local or s3://.")
    id_column: str = Field(default="item_id", min_length=1, description="Column with unique IDs.")
    keep: KeptColumns = Field(
        default_factory=list, description="Columns to copy to the predictions, separated by commas."
    )
    limit: int | None = Field(default=None, ge=1, description="Use only the first N rows.")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object with options for remote storage."
    )
