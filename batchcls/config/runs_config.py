"""Settings of the job that looks after runs."""

from typing import Any

from pydantic import Field, model_validator

from batchcls.config.common_config import Address, JobConfig

_RUN = (
    "A run's id, or an unambiguous beginning of it; published, previous (the one before it) or latest (the "
    "newest committed one)."
)


class RunsConfig(JobConfig):
    """What all commands about runs have in common."""

    output: Address = Field(min_length=1, description="Folder with runs/ and current.json, local or s3://.")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object for non-local storage."
    )


class RunsListConfig(RunsConfig):
    """List the runs of an output folder, the newest first."""


class RunsShowConfig(RunsConfig):
    """Show what a run holds and what the gates said of it."""

    run: str = Field(default="published", min_length=1, description=_RUN)


class RunsDiffConfig(RunsConfig):
    """Compare two runs: items new, gone and changed, from which label to which, and why."""

    old: str = Field(min_length=1, description=_RUN)
    new: str = Field(min_length=1, description="The run to look at, in the same words.")
    to: Address | None = Field(
        default=None,
        min_length=1,
        description="Folder for diff-items.parquet, flows.parquet and diff.json; default: nothing is written.",
    )
    largest: int = Field(default=20, ge=1, description="How many of the largest flows to show.")


class RunsReportConfig(RunsConfig):
    """Draw a run's page, report.html, again."""

    run: str = Field(default="published", min_length=1, description=_RUN)
    before: str | None = Field(
        default=None,
        min_length=1,
        description="The run to compare with. Default: the one that its gates were held against.",
    )


class RunsPublishConfig(RunsConfig):
    """Make a committed run the current one."""

    run: str = Field(min_length=1, description=_RUN)
    force: bool = Field(
        default=False,
        description="Publish although a gate refused it, in place of a run that was begun later, or in place of a "
        "damaged current.json. Runs of random weights or of a part of the manifest are refused all the same.",
    )
    verify: bool = Field(
        default=False, description="Read every file first; else only their presence and sizes are held."
    )


class RunsRollbackConfig(RunsConfig):
    """Publish again the run that was published before, and is still whole."""

    verify: bool = Field(
        default=True, description="Read every file first; else only their presence and sizes are held."
    )


class RunsPruneConfig(RunsConfig):
    """Remove old runs; without --yes it only says which."""

    keep: int | None = Field(default=None, ge=0, description="Keep so many of the newest committed runs.")
    older_than_days: float | None = Field(
        default=None, ge=0, description="Remove only runs that are older than this."
    )
    grace_hours: float = Field(
        default=24.0,
        ge=0,
        description="Readers may have open what was published within this time, and jobs may be at work on "
        "what was begun within it: such runs stay.",
    )
    keep_previous: bool = Field(default=True, description="Keep the run that a rollback goes back to.")
    yes: bool = Field(default=False, description="Remove them.")

    @model_validator(mode="after")
    def _says_what_to_keep(self) -> "RunsPruneConfig":
        if self.keep is None and self.older_than_days is None:
            raise ValueError("say what may go: --keep N, --older-than-days D, or both")
        return self


class RunsVerifyConfig(RunsConfig):
    """Read a run again, all of it, and hold it against its run.json."""

    run: str = Field(default="published", min_length=1, description=_RUN)
