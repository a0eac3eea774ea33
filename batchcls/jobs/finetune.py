"""`batchcls finetune`: trains a model bundle for `classify` from two labeled manifests."""

from rich.console import Console

from batchcls.cli.app import Command, main
from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import ExitCode

_EXAMPLES = """examples:
  batchcls finetune --manifest train.parquet --validation validation.parquet \\
      --model efficientnet_b0 --output models/shop-v1
  batchcls finetune --config jobs/finetune.toml
  batchcls finetune --manifest s3://shop/train/ --validation s3://shop/validation/ \\
      --model s3://shop/models/v1 --output s3://shop/models/v2 --recipe modern \\
      --min-workers 2 --max-workers 8

  batchcls finetune --manifest train.parquet --validation validation.parquet \\
      --model models/shop-v1 --output models/shop-probe --recipe linear-probe

  batchcls finetune --manifest train.parquet --validation validation.parquet \\
      --model mobilenetv2_100 --teacher models/large-v1 --output models/small-v1

  batchcls finetune --manifest train.parquet --validation validation.parquet \\
      --model efficientnet_b0 --output models/shop-v1 --tune 12

The same command resumes an unfinished run.
exit codes: 0 success; 1 unexpected error, can be resumed; 2 invalid configuration or input;
            4 too many images cannot be read
"""


def finetune(config: FinetuneConfig, console: Console) -> ExitCode:
    """Train a bundle from manifests; errors are raised as `errors.BatchclsError`."""
    from batchcls.jobs.input_check import check_finetune  # noqa: PLC0415

    manifests = check_finetune(config)
    from batchcls.jobs import finetune_run  # noqa: PLC0415 - PyTorch takes seconds to import

    return finetune_run.finetune(config, manifests, console)


COMMANDS = (Command("finetune", FinetuneConfig, finetune, _EXAMPLES),)

if __name__ == "__main__":
    main("finetune", COMMANDS)
