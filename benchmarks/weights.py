"""Creates weights for the benchmark without a download: random weights that are fitted to photographs.

    python -m benchmarks.weights --images LIST --model resnet50 --output resnet50.safetensors

The speed of a network does not depend on its weights, but the benchmark does: the job uses bf16 and int8 only
if they preserve the predictions of fp32, and predictions are compared between programs. In a newly initialized
network, activations shrink toward zero and all photographs get the same prediction; with larger random weights,
rounding errors grow from block to block. The statistics of the normalizations are therefore computed from
photographs, each residual block contributes a fifth, similar to trained ones, and the classifier distinguishes
ten clusters of photographs, which are the first ten classes.
"""

import argparse

import timm
import torch
from safetensors.torch import save_file
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import Bottleneck
from torch import nn

from benchmarks.peers.pixels import normalize, read_fast
from benchmarks.peers.task import read_lines

_PHOTOGRAPHS = 128
_BATCH = 32
_RESIDUAL = 0.2
_DIRECTIONS = 8
_CLUSTERS = 10
_SHARPNESS = 0.5
_UNUSED_CLASS_LOGIT = -20.0


def make_network(model: str, paths: list[str]) -> nn.Module:
    """Create a timm network with weights of seed 0, fitted to the first 128 photographs."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(model, pretrained=False)
    images = torch.stack([read_fast(path) for path in paths[:_PHOTOGRAPHS]])
    batches = [normalize(part) for part in torch.split(images, _BATCH)]
    _fit_normalizations(network, batches[:2])
    with torch.inference_mode():
        features = torch.cat(
            [network.forward_head(network.forward_features(part), pre_logits=True) for part in batches]  # type: ignore[operator]
        )
    _fit_classifier(network.get_classifier(), features.clone())  # type: ignore[operator]
    return network


def _fit_normalizations(network: nn.Module, batches: list[torch.Tensor]) -> None:
    """Set batch norm statistics from the batches; leaves the network in evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative average over the batches
        if isinstance(module, Bottleneck) or (isinstance(module, InvertedResidual) and module.has_skip):
            nn.init.constant_(module.bn3.weight, _RESIDUAL)  # type: ignore[arg-type]
    network.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    network.eval()


def _fit_classifier(classifier: nn.Linear, features: torch.Tensor) -> None:
    """Set the first ten classes to the k-means clusters of N x D features.

    A logit is the negative squared distance to the center of its cluster along the first principal directions
    of the standardized features. The terms that all logits share are dropped, which makes it linear.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0) + 1e-3
    standard = (features - mean) / deviation
    directions = torch.linalg.svd(standard, full_matrices=False).Vh[:_DIRECTIONS]
    points = standard @ directions.T
    centers = _cluster_centers(points)
    spread = points.var(dim=0).sum()
    with torch.no_grad():
        nn.init.zeros_(classifier.weight)
        nn.init.constant_(classifier.bias, _UNUSED_CLASS_LOGIT)
        weight = _SHARPNESS * _DIRECTIONS * 2 / spread * (centers @ directions) / deviation
        offset = -_SHARPNESS * _DIRECTIONS / spread * centers.square().sum(dim=1)
        classifier.weight[:_CLUSTERS] = weight
        classifier.bias[:_CLUSTERS] = offset - weight @ mean


def _cluster_centers(points: torch.Tensor) -> torch.Tensor:
    """Centers (10 x P) of the k-means clusters of N x P points, initialized with ten distant points."""
    chosen = [0]
    while len(chosen) < _CLUSTERS:
        chosen.append(int(torch.cdist(points, points[chosen]).amin(dim=1).argmax()))
    centers = points[chosen].clone()
    for _ in range(30):
        nearest = torch.cdist(points, centers).argmin(dim=1)
        for cluster in torch.unique(nearest).tolist():
            centers[cluster] = points[nearest == cluster].mean(dim=0)
    return centers


def main() -> None:
    """Write the weights of one architecture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="text file with one photograph path per line")
    parser.add_argument("--model", required=True, help="timm architecture")
    parser.add_argument("--output", required=True, help="safetensors file to write")
    arguments = parser.parse_args()
    network = make_network(arguments.model, read_lines(arguments.images))
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, arguments.output)


if __name__ == "__main__":
    main()
