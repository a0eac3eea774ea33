"""`batchcls classify`: reads a manifest, writes predictions and embeddings, and publishes them."""

from typing import TYPE_CHECKING

from rich.console import Console

from batchcls.cli.app import Command, main, resumes_after_interrupt
from batchcls.cli.console import results_console
from batchcls.cli.tables import bottleneck_table, counts_table, gates_table
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import ExitCode
from batchcls.storage.filesystem import join, redact_uri

if TYPE_CHECKING:
    from batchcls.jobs.classify_run import CommittedRun

_EXAMPLES = """examples:
  batchcls classify --manifest catalog.parquet --model timm:mobilenetv3_large_100 --output out
  batchcls classify --config jobs/classify.toml
  batchcls classify --manifest catalog.parquet --model models/small,models/large --cascade auto --output out
  batchcls classify --manifest s3://shop/catalog/ --model s3://shop/models/v7 --output s3://shop/out

The same command resumes a run that was killed or stopped, and publishes a run that was committed but not published.

exit codes: 0 success; 1 unexpected error; 2 invalid configuration or input, nothing was written;
            3 committed, but a gate failed and the run was not published: the same command evaluates the gates again,
              with its own limits, and computes nothing;
            4 stopped by the error budget, storage or another job: run the same command again to resume the run, or to
              publish it if it was committed
"""


def classify(config: ClassifyConfig, console: Console) -> ExitCode:
    """Run the job and print its results; errors are raised as `errors.BatchclsError`."""
    # Ray takes a second to import, and --help and errors in the arguments do not need it.
    from batchcls.api import run_classify  # noqa: PLC0415

    is_committed = False

    def on_commit(committed: "CommittedRun") -> None:
        nonlocal is_committed
        is_committed = True
        _print_summary(committed)

    # Once a run is committed, and possibly published, the same command may start a new run.
    with resumes_after_interrupt(lambda: not is_committed):
        run = run_classify(config, console, on_commit)
    out = results_console()
    out.print(gates_table(run.gates))
    if run.published:
        out.print(f"published: {redact_uri(join(run.output, 'current.json'))}")
    elif run.error is None:
        reason = "; ".join(run.unpublishable) or "--no-publish"
        out.print(f"not published: {reason}")
    if run.report is not None:
        out.print(f"report: {redact_uri(run.report)}")
    if run.error is not None:
        raise run.error
    return ExitCode.DONE


def _print_summary(committed: "CommittedRun") -> None:
    """Print what this process computed, as soon as the run is committed."""
    summary = committed.summary
    if summary is None:
        return
    out, totals = results_console(), summary.totals
    if summary.bottleneck is not None:
        out.print(bottleneck_table(summary.bottleneck))
        rate, achieved = summary.images_per_second, summary.bottleneck.images_per_second_after_start
        out.print(f"{rate:.1f} images/s in the pipeline, {achieved:.1f} after startup")
        out.print(f"advice: {summary.bottleneck.advice}")
    out.print(counts_table(totals.counts))
    out.print(f"{totals.rows} rows, {summary.seconds:.1f} s")
    out.print(f"results: {redact_uri(committed.record.folder)}")


COMMANDS = (Command("classify", ClassifyConfig, classify, _EXAMPLES),)

if __name__ == "__main__":
    main("classify", COMMANDS)
