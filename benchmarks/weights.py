"""Weights for a benchmark without a network: drawn from a seed, then fitted to photographs.

    python -m benchmarks.weights --images LIST --model resnet50 --output resnet50.safetensors

How fast a network is does not depend on its weights, but what is measured here does: the job takes
bf16 and int8 only where they keep the answers of fp32, and answers are compared between programs. In a
network fresh from its initialization activations shrink to nothing and all photographs get one answer;
with drawn weights of full size rounding grows from block to block. So the statistics of the
normalizations are taken from photographs, each residual block adds a fifth, as trained ones add a
part, and the classifier tells ten groups of photographs apart, to which the first ten classes belong.
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
_GROUPS = 10
_SHARPNESS = 0.5
_OUT_OF_REACH = -20.0


def make_network(model: str, paths: list[str]) -> nn.Module:
    """The timm network with weights of seed 0, fitted to the first 128 photographs."""
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
            module.momentum = None  # a mean over the batches
        if isinstance(module, Bottleneck) or (isinstance(module, InvertedResidual) and module.has_skip):
            nn.init.constant_(module.bn3.weight, _RESIDUAL)  # type: ignore[arg-type]
    network.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    network.eval()


def _fit_classifier(classifier: nn.Linear, features: torch.Tensor) -> None:
    """Make the first ten classes the groups that N,D features fall into by k-means.

    A logit is minus the squared distance to the middle of its group, along the strongest directions
    of the standardized features, less what all logits have in common, so it is linear.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0) + 1e-3
    standard = (features - mean) / deviation
    directions = torch.linalg.svd(standard, full_matrices=False).Vh[:_DIRECTIONS]
    points = standard @ directions.T
    middles = _group(points)
    spread = points.var(dim=0).sum()
    with torch.no_grad():
        nn.init.zeros_(classifier.weight)
        nn.init.constant_(classifier.bias, _OUT_OF_REACH)
        weight = _SHARPNESS * _DIRECTIONS * 2 / spread * (middles @ directions) / deviation
        offset = -_SHARPNESS * _DIRECTIONS / spread * middles.square().sum(dim=1)
        classifier.weight[:_GROUPS] = weight
        classifier.bias[:_GROUPS] = offset - weight @ mean


def _group(points: torch.Tensor) -> torch.Tensor:
    """Middles of ten groups of N,P points, by k-means from ten points far from each other."""
    chosen = [0]
    while len(chosen) < _GROUPS:
        chosen.append(int(torch.cdist(points, points[chosen]).amin(dim=1).argmax()))
    middles = points[chosen].clone()
    for _ in range(30):
        nearest = torch.cdist(points, middles).argmin(dim=1)
        for group in torch.unique(nearest).tolist():
            middles[group] = points[nearest == group].mean(dim=0)
    return middles


def main() -> None:
    """Write the weights of one architecture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="text file with one photograph path per line")
    parser.add_argument("--model", required=True, help="timm architecture")
    parser.add_argument("--output", required=True, help="safetensors file to write")
    given = parser.parse_args()
    network = make_network(given.model, read_lines(given.images))
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, given.output)


if __name__ == "__main__":
    main()
