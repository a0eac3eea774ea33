"""`batchcls compare`: benchmarks backbones and engines on the nodes of a cluster and recommends one."""

from rich.console import Console

from batchcls.cli.app import Command, main
from batchcls.config.compare_config import CompareConfig
from batchcls.errors import ExitCode

_EXAMPLES = """examples:
  batchcls compare --manifest sample.parquet --models resnet50,efficientnet_b4 --output compared
  batchcls compare --config jobs/compare.toml --target-ms 100 --price-per-hour 0.40
  batchcls compare --manifest s3://shop/catalog/ --models s3://shop/models/v7,convnext_tiny \\
      --engines torch:bf16 --device cuda --output s3://shop/compared

Running the same command again resumes; more models can be added to the same output.
exit codes: 0 success; 1 unexpected error, or nothing could be measured; 2 invalid configuration or input,
            nothing written; 4 stopped, the finished measurements are kept; 130 interrupted
"""


def compare(config: CompareConfig, console: Console) -> ExitCode:
    """Measure all candidates and write all outputs. Raises `BatchclsError` on expected errors."""
    from batchcls.jobs.input_check import check_compare  # noqa: PLC0415

    manifest = check_compare(config)
    from batchcls.jobs import compare_run  # noqa: PLC0415 - PyTorch takes seconds to import

    return compare_run.compare(config, manifest, console)


COMMANDS = (Command("compare", CompareConfig, compare, _EXAMPLES),)

if __name__ == "__main__":
    main("compare", COMMANDS)
