"""Settings of the job that makes and checks manifests."""

from typing import Any

from pydantic import Field

from batchcls.config.common_config import Address, JobConfig, KeptColumns


class ManifestFromFolderConfig(JobConfig):
    """Make a manifest from a folder of images."""

    folder: Address = Field(
        min_length=1, description="Folder with images, local or s3://, searched at any depth; or a glob."
    )
    output: Address = Field(min_length=1, description="Parquet file to write.")
    labels_from_folders: bool = Field(
        default=False, description="Fill the column label with the path of the folder an image lies in."
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object for non-local storage."
    )


class ManifestCheckConfig(JobConfig):
    """Validate a manifest and say what is in it."""

    manifest: Address = Field(min_length=1, description="Parquet file, folder or glob, local or s3://.")
    id_column: str = Field(default="item_id", min_length=1, description="The column with unique ids.")
    keep: KeptColumns = Field(
        default_factory=list, description="Columns that the job would pass through, by commas."
    )
    limit: int | None = Field(default=None, ge=1, description="Only the first N rows, as the job would.")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object for non-local storage."
    )
