"""`batchcls bundle`: create, extend, inspect, test and export bundles, and print the zoo."""

from rich.console import Console

from batchcls.cli.app import Command, main
from batchcls.config.bundle_config import (
    BundleCreateConfig,
    BundleExportConfig,
    BundleExtendConfig,
    BundleInspectConfig,
    BundleTestConfig,
    BundleZooConfig,
)
from batchcls.errors import ExitCode

_CREATE_EXAMPLES = """examples:
  batchcls bundle create --model mobilenet_v3_large --output models/v1
  batchcls bundle create --model timm:resnet18 --weights shop.safetensors --labels shop.txt \\
      --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --input-size 224 --crop-pct 0.875 --interpolation bilinear --output models/v2
  batchcls bundle create --model resnet50 --new-head --labels shop.txt --dropout 0.2 \\
      --trainable 'layer4.*,fc.*' --output models/to-train
"""
_EXTEND_EXAMPLES = """examples:
  batchcls bundle extend models/v1 --category skirt --images new/skirt --run predictions --output models/v2
  batchcls bundle extend models/v1 --category skirt --images new/skirt --category-path clothes/skirt \\
      --category hat --images new/hat --category-path clothes/hat --run predictions --output models/v2
  batchcls bundle extend models/v1 --manifest labeled.parquet --output models/v2
"""
_INSPECT_EXAMPLES = """examples:
  batchcls bundle inspect models/v1
"""
_TEST_EXAMPLES = """examples:
  batchcls bundle test models/v1
  batchcls bundle test s3://shop/models/v7 --engine openvino --precision bf16
"""
_EXPORT_EXAMPLES = """examples:
  batchcls bundle export models/v1 --output exported        # exported/model.onnx
  batchcls bundle export models/v1 --output exported --format torch-export
"""
_ZOO_EXAMPLES = """examples:
  batchcls bundle zoo
  batchcls bundle zoo resnet50
"""


def create(config: BundleCreateConfig, console: Console) -> ExitCode:
    """Build the model with strictly loaded weights, compute its golden outputs, and write it as a bundle."""
    from batchcls.jobs import bundle_run  # noqa: PLC0415 - PyTorch takes seconds to import

    return bundle_run.create(config, console)


def extend(config: BundleExtendConfig, console: Console) -> ExitCode:
    """Add categories to a bundle from a few labeled images, and write the new bundle."""
    from batchcls.jobs import bundle_run  # noqa: PLC0415 - PyTorch takes seconds to import

    return bundle_run.extend(config, console)


def inspect(config: BundleInspectConfig, console: Console) -> ExitCode:
    """Print the contents of a bundle, after checking that it is complete."""
    from batchcls.jobs import bundle_run  # noqa: PLC0415 - PyTorch takes seconds to import

    return bundle_run.inspect(config, console)


def test(config: BundleTestConfig, console: Console) -> ExitCode:
    """Load the bundle as an actor does, and print the deviation of its outputs from the golden outputs."""
    from batchcls.jobs import bundle_run  # noqa: PLC0415 - PyTorch takes seconds to import

    return bundle_run.test(config, console)


def export(config: BundleExportConfig, console: Console) -> ExitCode:
    """Export the network as a program, after testing the program with the golden outputs."""
    from batchcls.jobs import bundle_run  # noqa: PLC0415 - PyTorch takes seconds to import

    return bundle_run.export(config, console)


def zoo(config: BundleZooConfig, console: Console) -> ExitCode:
    """Print the zoo, or the record of one backbone."""
    from batchcls.jobs import bundle_run  # noqa: PLC0415 - PyTorch takes seconds to import

    return bundle_run.zoo(config, console)


COMMANDS = (
    Command("create", BundleCreateConfig, create, _CREATE_EXAMPLES),
    Command("extend", BundleExtendConfig, extend, _EXTEND_EXAMPLES, ("bundle",)),
    Command("inspect", BundleInspectConfig, inspect, _INSPECT_EXAMPLES, ("bundle",)),
    Command("test", BundleTestConfig, test, _TEST_EXAMPLES, ("bundle",)),
    Command("export", BundleExportConfig, export, _EXPORT_EXAMPLES, ("bundle",)),
    Command("zoo", BundleZooConfig, zoo, _ZOO_EXAMPLES, ("name",)),
)

if __name__ == "__main__":
    main("bundle", COMMANDS)
