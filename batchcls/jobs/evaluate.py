"""`batchcls evaluate`: measures accuracy, calibrates probabilities and fits thresholds on labeled rows."""

from rich.console import Console

from batchcls.cli.app import Command, main
from batchcls.config.evaluate_config import EvaluateConfig
from batchcls.errors import ExitCode

_EXAMPLES = """examples:
  batchcls evaluate --manifest validation.parquet --model models/v1 --output evaluated
  batchcls evaluate --manifest validation.parquet --model models/v1 --output evaluated \\
      --target-precision 0.95 --write-bundle models/v1-calibrated
  batchcls evaluate --manifest s3://shop/labeled/ --run s3://shop/out --output s3://shop/evaluated
  batchcls evaluate --manifest validation.parquet --model models/small,models/large --cascade \\
      --output evaluated --write-bundle models/small-cascade
  batchcls evaluate --config jobs/evaluate.toml

`batchcls classify --model models/v1-calibrated --abstain ...` then sets the label of predictions below
their threshold to null.
exit codes: 0 success; 1 unexpected error; 2 invalid configuration or input, nothing written;
            4 stopped after some files were written; 130 interrupted
"""


def evaluate(config: EvaluateConfig, console: Console) -> ExitCode:
    """Evaluate the bundle or the run and write all outputs. Raises `BatchclsError` on expected errors."""
    from batchcls.jobs.input_check import check_evaluate  # noqa: PLC0415

    manifest = check_evaluate(config)
    # PyTorch takes seconds to import.
    if config.cascade:
        from batchcls.jobs import evaluate_cascade  # noqa: PLC0415

        return evaluate_cascade.evaluate(config, manifest, console)
    from batchcls.jobs import evaluate_run  # noqa: PLC0415

    return evaluate_run.evaluate(config, manifest, console)


COMMANDS = (Command("evaluate", EvaluateConfig, evaluate, _EXAMPLES),)

if __name__ == "__main__":
    main("evaluate", COMMANDS)
