"""The compiled PyTorch engine on a GPU: kernels of inductor that are launched together as a CUDA graph.

A graph is captured for one batch size, so batches are padded to one of a few sizes.
"""

import os

import torch
from torch import nn

from batchcls.models.backbone import Backbone
from batchcls.models.engines.cuda_pipeline import CudaPipeline, Forward
from batchcls.models.engines.engine import BaseEngine, Device, EngineConfig, EngineName, Precision
from batchcls.models.engines.torch_eager import NormalizedBackbone
from batchcls.preprocessing import Preprocessing

_SIZE_RATIO = 4


class TorchCudaGraphs(BaseEngine):
    """A network under `torch.compile`, with CUDA graphs."""

    name: EngineName = "compile"
    device: Device = "cuda"

    def __init__(
        self, backbone: Backbone, preprocessing: Preprocessing, precision: Precision, config: EngineConfig
    ) -> None:
        """Move the backbone to the GPU; it is compiled during the first batches.

        Args:
            backbone: owned by the engine afterwards.
            preprocessing: of the backbone's weights; mean, std and input size are used.
            precision: fp32, bf16 or fp16.
            config: batch size, and the compile cache in which inductor stores its kernels for the next start.
        """
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(config.compile_cache.folder / "inductor"))
        self.precision = precision
        pipeline = CudaPipeline(
            NormalizedBackbone(backbone, preprocessing, "cuda", precision),
            preprocessing.shape,
            compile_forward=_compile_with_graphs,
            padded_size=lambda count: padded_batch_size(count, config.batch_size),
        )
        self.in_flight = pipeline.in_flight
        super().__init__(preprocessing.shape, (backbone.classes, backbone.dimension), pipeline.submit)


def padded_batch_size(count: int, batch_size: int) -> int:
    """Return the batch size to which `count` images are padded.

    The sizes are a full batch, a quarter of it, a quarter of that, and so on. A few graphs are then enough, a batch
    of four images does not cost as much as a full one, and a batch that was halved because memory ran out soon uses
    a smaller graph. A batch that is larger than a full one is not padded.
    """
    size = batch_size
    while size > 1 and -(-size // _SIZE_RATIO) >= count:
        size = -(-size // _SIZE_RATIO)
    return max(size, count)


def _compile_with_graphs(program: nn.Module) -> Forward:
    compiled: Forward = torch.compile(program, mode="reduce-overhead", dynamic=False)

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The copy of the previous outputs to the host is already on the stream, so a graph may overwrite them.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return compiled(images)

    return forward
