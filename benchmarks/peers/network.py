"""The network of the programs to compare with, in eager PyTorch.

This module imports timm, so only the process with the network should import it.
"""

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.peers.task import TOP


class Network:
    """A timm network that predicts the top-5 labels of normalized images."""

    def __init__(self, model: str, weights: str, labels: list[str], *, tuned: bool, threads: int) -> None:
        """Create the network and load its weights.

        Args:
            model: timm architecture.
            weights: safetensors file.
            labels: class names in order.
            tuned: use channels last, bf16 autocast and `threads` CPU threads; otherwise use fp32 and the
                default number of threads of the process.
            threads: number of CPU threads if `tuned`.
        """
        if tuned:
            torch.set_num_threads(threads)
        network: nn.Module = timm.create_model(model, pretrained=False)
        network.load_state_dict(load_file(weights))
        network.eval()
        self._network = network.to(memory_format=torch.channels_last) if tuned else network
        self._labels = labels
        self._tuned = tuned

    def __call__(self, images: torch.Tensor) -> tuple[list[list[str]], list[list[float]]]:
        """Top-5 labels and probabilities of N x 3 x H x W float32 images, in descending order."""
        if self._tuned:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._tuned):
            best = self._network(images).float().softmax(dim=1).topk(TOP)
        labels = [[self._labels[index] for index in row] for row in best.indices.tolist()]
        return labels, best.values.tolist()
