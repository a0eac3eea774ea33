"""PyTorch, compiled for a GPU: kernels by inductor, launched all at once as a CUDA graph.

A graph is made for one number of images, so batches are filled up to one of a few sizes.
"""

import os

import torch
from torch import nn

from batchcls.models.backbone import Backbone
from batchcls.models.engines.cuda_pipeline import CudaPipeline, Forward
from batchcls.models.engines.engine import BaseEngine, Device, EngineConfig, EngineName, Precision
from batchcls.models.engines.torch_eager import NormalizedBackbone
from batchcls.preprocessing import Preprocessing

_STEP = 4


class TorchCudaGraphs(BaseEngine):
    """A network under `torch.compile`, with CUDA graphs."""

    name: EngineName = "compile"
    device: Device = "cuda"

    def __init__(
        self, backbone: Backbone, preprocessing: Preprocessing, precision: Precision, place: EngineConfig
    ) -> None:
        """Move the backbone to the GPU; it is compiled when the first batches come.

        Args:
            backbone: owned by the engine afterwards.
            preprocessing: of the backbone's weights; mean, std and input size are used.
            precision: fp32, bf16 or fp16.
            place: what inductor compiles is kept in its conversions, for the next start.
        """
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place.compile_cache.folder / "inductor"))
        self.precision = precision
        work = CudaPipeline(
            NormalizedBackbone(backbone, preprocessing, "cuda", precision),
            preprocessing.shape,
            compiled=_with_graphs,
            padded=lambda count: graph_size(count, place.batch_size),
        )
        self.in_flight = work.in_flight
        super().__init__(preprocessing.shape, (backbone.classes, backbone.dimension), work.submit)


def graph_size(count: int, batch_size: int) -> int:
    """How many images to compute for `count` of them.

    A full batch, or a quarter of it, or a quarter of that, and so on: a few graphs serve all, a batch
    of four does not cost as much as a full one, and a batch that was halved because memory ran out is
    soon a smaller graph. More than a full batch is computed as it is.
    """
    size = batch_size
    while size > 1 and -(-size // _STEP) >= count:
        size = -(-size // _STEP)
    return max(size, count)


def _with_graphs(program: nn.Module) -> Forward:
    compiled: Forward = torch.compile(program, mode="reduce-overhead", dynamic=False)

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # What the last pass answered has been put on its way to the host already.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return compiled(images)

    return forward
