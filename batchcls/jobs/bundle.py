"""`python -m batchcls.jobs.bundle`: make a bundle from bare weights, or look into one."""

import logging

from rich.console import Console

from batchcls.config.bundle import BundleCreateConfig, BundleInspectConfig
from batchcls.console import bundle_line, results_console
from batchcls.errors import ExitCode
from batchcls.jobs.command import Command, main
from batchcls.models.bundle import Bundle
from batchcls.models.library import PreprocessingOverrides
from batchcls.models.resolve import ModelChoices, parse_model_arguments, resolve_model
from batchcls.storage import Storage, explain, redact_uri

_logger = logging.getLogger("batchcls.jobs.bundle")  # __name__ is __main__ here

_CREATE_EXAMPLES = """examples:
  python -m batchcls.jobs.bundle create --model timm:mobilenetv3_large_100 --output models/v1
  python -m batchcls.jobs.bundle create --model timm:resnet18 --weights shop.safetensors --labels shop.txt \\
      --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --input-size 224 --crop-pct 0.875 --interpolation bilinear --output models/v2
"""
_INSPECT_EXAMPLES = """examples:
  python -m batchcls.jobs.bundle inspect models/v1
"""


def create(config: BundleCreateConfig, console: Console) -> ExitCode:
    """Build the model once, strictly, and write it as a bundle."""
    del console
    storage = Storage(config.storage_options)
    given = {
        name: value
        for name in PreprocessingOverrides.model_fields
        if (value := getattr(config, name)) is not None
    }
    choices = ModelChoices(
        weights=config.weights,
        labels=config.labels,
        arguments=parse_model_arguments(config.model_args or ""),
        overrides=PreprocessingOverrides(**given),
    )
    bundle = resolve_model(config.model, choices, storage)
    with explain(config.output):
        bundle.save(config.output, storage)
    _logger.info("%s: %s", redact_uri(config.output), bundle_line(bundle))
    return ExitCode.DONE


def inspect(config: BundleInspectConfig, console: Console) -> ExitCode:
    """Print what a bundle holds, after checking that it is whole."""
    del console
    bundle = Bundle.load(config.bundle, Storage(config.storage_options))
    out = results_console()
    out.print(bundle_line(bundle))
    out.print(f"fingerprint {bundle.fingerprint}")
    shown = bundle.config.model_dump(mode="json", exclude={"labels", "category_paths"})
    out.print_json(data=shown | {"labels": f"{len(bundle.config.labels)} labels"})
    return ExitCode.DONE


COMMANDS = (
    Command("create", BundleCreateConfig, create, _CREATE_EXAMPLES),
    Command("inspect", BundleInspectConfig, inspect, _INSPECT_EXAMPLES, ("bundle",)),
)

if __name__ == "__main__":
    main("bundle", COMMANDS)
