"""The import of torchvision and timm without PyTorch's compiler, each in a new process."""

import subprocess
import sys

import pytest

_PREPARE = """
import sys
import batchcls
assert "torch" not in sys.modules
import torch, torchvision, timm
from timm.data.imagenet_info import ImageNetInfo
assert len(ImageNetInfo().label_names()) == 1000  # a file of the package
assert not [name for name in sys.modules if name.startswith("torch._dynamo")]
"""

_ROI_ALIGN = """
from torchvision.ops import roi_align
boxes = torch.tensor([[0.0, 0, 0, 2, 2]])
found = roi_align(torch.arange(16.0).reshape(1, 1, 4, 4), boxes, output_size=1, sampling_ratio=2)
assert found.item() == 5.0, found
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu") is True
import torch._dynamo
assert torch._dynamo.utils.is_compile_supported("cpu") is True
"""

_COMPILE = """
compiled = torch.compile(torch.nn.Linear(3, 2).requires_grad_(False), backend="eager")
assert compiled(torch.ones(1, 3)).shape == (1, 2)
assert "torch._dynamo" in sys.modules
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
assert type(torch._dynamo.utils) is type(sys)
"""

# The network whose method timm excludes from compilation, compiled and not compiled.
_DISABLED = """
from timm.models import naflexvit
network = timm.create_model("naflexvit_base_patch16_gap", num_classes=2, embed_dim=64, depth=1, num_heads=2)
network = network.requires_grad_(False).eval()
image = torch.rand(1, 3, 64, 64)
plain = network(image)
assert plain.shape == (1, 2)
torch.testing.assert_close(torch.compile(network, backend="eager")(image), plain)
iterators = [torch.compiler.disable(lambda: 7), torch.compiler.disable()(lambda: 7)]
assert [call() for call in iterators] == [7, 7]
"""


def _run(program: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def test_compiler_is_imported_when_it_is_used(clean_environment: dict[str, str]):
    _run(_PREPARE + _ROI_ALIGN + _COMPILE + _DISABLED, clean_environment)


def test_other_attributes_import_the_compiler_while_a_library_is_imported(
    clean_environment: dict[str, str], tmp_path
):
    """A later version of a library that needs more of the compiler gets the real module."""
    (tmp_path / "timm.py").write_text(
        "import torch\n"
        "from torch._dynamo.utils import is_compile_supported\n"
        "import torch._dynamo.config\n"
        "from torch._dynamo.utils import same\n"
        "assert torch._dynamo.config.suppress_errors is False\n"
        "assert torch._dynamo.config is torch._dynamo.convert_frame.config\n"
        "assert same([1], [1])\n"
    )
    environment = clean_environment | {"PYTHONPATH": f"{tmp_path}:{clean_environment['PYTHONPATH']}"}
    _run(
        "import batchcls, timm, sys\n"
        f"assert timm.__file__.startswith({str(tmp_path)!r})\n"
        "assert sys.modules['torch._dynamo.utils'].is_compile_supported('cpu') is True\n",
        environment,
    )


@pytest.mark.long
def test_compiler_that_is_imported_already_is_used(clean_environment: dict[str, str]):
    _run(
        "import batchcls, sys, torch._dynamo\n"
        "before = sys.modules['torch._dynamo']\n"
        "import torchvision\n"
        "assert sys.modules['torch._dynamo'] is before\n"
        "assert sys.modules['torchvision.ops.roi_align'].is_compile_supported is before.utils.is_compile_supported\n",
        clean_environment,
    )
