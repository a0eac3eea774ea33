"""Settings of the `runs` commands."""

from typing import Any

from pydantic import Field, model_validator

from batchcls.config.common_config import Address, JobConfig, KeptColumns

_RUN = (
    "ID of a run or an unambiguous prefix of it, or published, previous (the one published before) or latest (the "
    "newest committed run)."
)


class RunsConfig(JobConfig):
    """Settings of all `runs` commands."""

    output: Address = Field(min_length=1, description="Folder with runs/ and current.json, local or s3://.")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object with options for remote storage."
    )


class RunsListConfig(RunsConfig):
    """List the runs of an output folder, the newest first."""


class RunsShowConfig(RunsConfig):
    """Show the contents of a run and its gate results."""

    run: str = Field(default="published", min_length=1, description=_RUN)


class RunsDiffConfig(RunsConfig):
    """Compare two runs: new, removed and changed items, label changes and their causes."""

    old: str = Field(min_length=1, description=_RUN)
    new: str = Field(min_length=1, description="Run to compare with the old one, in the same form.")
    to: Address | None = Field(
        default=None,
        min_length=1,
        description="Folder for diff-items.parquet, flows.parquet and diff.json. Default: no files are written.",
    )
    largest: int = Field(default=20, ge=1, description="Number of most frequent label changes to show.")


class RunsReportConfig(RunsConfig):
    """Write the report of a run, report.html, again."""

    run: str = Field(default="published", min_length=1, description=_RUN)
    before: str | None = Field(
        default=None,
        min_length=1,
        description="Run to compare with. Default: the baseline run of its gates.",
    )


class RunsRelabelConfig(RunsConfig):
    """Apply a label map to a run: start a run with the same settings that takes its predictions, and publish it."""

    run: str = Field(default="published", min_length=1, description=_RUN)
    label_map: Address = Field(
        min_length=1,
        description="TOML file that renames, merges, retires and splits labels of the bundle, as in `classify`.",
    )
    keep: KeptColumns = Field(
        default_factory=list,
        description="Manifest columns to copy to the predictions in addition to those of the run, such as the columns "
        "by which labels are split, separated by commas.",
    )
    ray_address: str | None = Field(
        default=None, description="Address of Ray, as for `batchcls classify`. Default: that of the run."
    )


class RunsPublishConfig(RunsConfig):
    """Publish a committed run."""

    run: str = Field(min_length=1, description=_RUN)
    force: bool = Field(
        default=False,
        description="Publish despite a failed gate, over a run that was started later, or over a damaged current.json. "
        "Runs with random weights or on a part of the manifest are still rejected.",
    )
    verify: bool = Field(
        default=False,
        description="Read and verify every file first; otherwise only existence and sizes are checked.",
    )


class RunsRollbackConfig(RunsConfig):
    """Publish the previously published run again, if it is intact."""

    verify: bool = Field(
        default=True,
        description="Read and verify every file first; otherwise only existence and sizes are checked.",
    )


class RunsPruneConfig(RunsConfig):
    """Delete old runs. Without --yes, only list them."""

    keep: int | None = Field(default=None, ge=0, description="Number of newest committed runs to keep.")
    older_than_days: float | None = Field(default=None, ge=0, description="Delete only runs older than this.")
    grace_hours: float = Field(
        default=24.0,
        ge=0,
        description="Keep runs that were published or started within this time, because readers or jobs may still use "
        "them.",
    )
    keep_previous: bool = Field(
        default=True, description="Keep the run that `batchcls runs rollback` would publish."
    )
    yes: bool = Field(default=False, description="Delete the runs.")

    @model_validator(mode="after")
    def _require_criterion(self) -> "RunsPruneConfig":
        if self.keep is None and self.older_than_days is None:
            raise ValueError("specify what to delete with --keep N, --older-than-days D, or both")
        return self


class RunsVerifyConfig(RunsConfig):
    """Read all files of a run and verify them against its run.json."""

    run: str = Field(default="published", min_length=1, description=_RUN)
