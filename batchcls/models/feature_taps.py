"""Feature taps: an embedding from the middle of a network, taken during the forward pass that computes the logits.

A *stage* is a module whose output is a feature map. Its embedding is the spatial mean of that map, which a tap computes
in a forward hook, without a second forward pass.

Shapes: N images, H x W pixels, C channels of a feature map, h x w its spatial size.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from batchcls.errors import InputError

Layout = Literal["NCHW", "NHWC", "tokens"]

POOLED = "pooled"
_STAGE_NAME = re.compile(r"stage[1-9]\d*")


class ImageSizeError(InputError):
    """A network does not accept images of a size.

    Attributes:
        reason: the error of the network, in one line.
    """

    def __init__(self, name: str, size: tuple[int, int], reason: str, remedy: str) -> None:
        super().__init__(
            f"{name} does not accept images of {size[0]} x {size[1]} pixels ({reason}); {remedy}"
        )
        self.reason = reason


@dataclass(frozen=True, slots=True)
class FeatureStage:
    """A feature map of a network, and how it is pooled.

    Attributes:
        name: `stage1`, `stage2`, ... from the input to the output.
        path: path of the module whose output is the feature map.
        layout: NCHW (N,C,h,w), NHWC (N,h,w,C) or tokens (N,prefix + h*w,C).
        channels: C, the length of the embedding.
        reduction: approximate side of the image divided by the side of the feature map.
        prefix: number of leading tokens that are not positions of the image, such as the class token.
    """

    name: str
    path: str
    layout: Layout
    channels: int
    reduction: int
    prefix: int = 0

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """Return the spatial mean (N,C float32) of a feature map in the stage's layout, of any floating dtype."""
        if self.layout == "tokens":
            return features[:, self.prefix :].float().mean(1)
        return features.float().mean((2, 3) if self.layout == "NCHW" else (1, 2))


class FeatureTap:
    """Stores a stage's embedding of the current forward pass. Not thread-safe."""

    def __init__(self, model: nn.Module, stage: FeatureStage) -> None:
        """Register a forward hook on the stage's module.

        Raises:
            InputError: the network has no module of that path.
        """
        self.stage = stage
        self._embedding: torch.Tensor | None = None
        try:
            module = model.get_submodule(stage.path)
        except AttributeError as error:
            raise InputError(
                f"{type(model).__name__} has no module {stage.path} for {stage.name}; choose another stage"
            ) from error
        module.register_forward_hook(self._store)

    def take(self) -> torch.Tensor:
        """Return and clear the embedding (N,C float32) of the last forward pass.

        Raises:
            RuntimeError: the stage's module has not run since the last call.
        """
        embedding, self._embedding = self._embedding, None
        if embedding is None:
            raise RuntimeError(f"{self.stage.path} did not run, so there is no {self.stage.name}")
        return embedding

    def _store(self, _module: nn.Module, _inputs: object, output: object) -> None:
        # Pooled immediately, because a later in-place layer would modify the feature map.
        features = first_tensor(output)
        self._embedding = None if features is None else self.stage.pool(features)


def first_tensor(output: object) -> torch.Tensor | None:
    """Return a module's output, or the first of several outputs, which is the feature map in all libraries."""
    if isinstance(output, list | tuple) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


class StageProvider(Protocol):
    """The part of a library of architectures that finds the stages of a network."""

    def stages(self, model: nn.Module, input_size: tuple[int, int]) -> tuple[FeatureStage, ...]:
        """Return the stages of an unmodified network for images of H, W; empty if it has no feature maps."""


def find_tap(
    spec: object, model: nn.Module, library: StageProvider, name: str, input_size: tuple[int, int]
) -> FeatureStage | None:
    """Find the stage that `--embedding-tap` names, in a network that is not split yet; None for `pooled`.

    Args:
        spec: name of the model in error messages.
        model: the network with its weights loaded; its training mode and statistics are not changed.
        library: the library that the network comes from.
        name: `pooled`, `stage1`, `stage2`, ...
        input_size: H, W of the images.

    Raises:
        InputError: there is no such stage, or the network does not accept this size.
    """
    if name == POOLED:
        return None
    if not _STAGE_NAME.fullmatch(name):
        raise InputError(f"--embedding-tap {name}: unknown; choose {POOLED}, or stage1, stage2, ...")
    stages = library.stages(model, input_size)
    found = next((stage for stage in stages if stage.name == name), None)
    if found is None:
        raise InputError(f"--embedding-tap {name}: {spec} has {_available_taps(stages)}")
    return found


def _available_taps(stages: tuple[FeatureStage, ...]) -> str:
    if not stages:
        return f"no stages; choose {POOLED}"
    names = [stage.name for stage in stages]
    first, last = (int(name.removeprefix("stage")) for name in (names[0], names[-1]))
    if len(names) > 2 and last - first + 1 == len(names):
        return f"{names[0]} to {names[-1]} and {POOLED}"
    return f"{', '.join(names)} and {POOLED}"


def random_image(input_size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Return 1,3,H,W float32 standard normal noise, like a normalized image; deterministic for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, *input_size, generator=generator)


def forward_full(model: nn.Module, images: torch.Tensor) -> Any:
    """Run an unmodified network and return its output.

    Raises:
        ImageSizeError: the network does not accept images of this size.
    """
    height, width = images.shape[2:]
    try:
        return model(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageSizeError(
            type(model).__name__, (height, width), reason, "check --input-size and --model-args"
        ) from error


def capture_outputs(
    model: nn.Module, paths: Iterable[str], input_size: tuple[int, int]
) -> list[tuple[str, torch.Tensor]]:
    """Return path and copied output of modules for a random image, in the order in which the modules finished.

    Raises:
        InputError: the network does not accept this size.
    """
    captured: list[tuple[str, torch.Tensor]] = []
    with eval_mode(model), _capturing(model, paths, captured):
        forward_full(model, random_image(input_size))
    return captured


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients inside the context, and restore the training mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _capturing(
    model: nn.Module, paths: Iterable[str], captured: list[tuple[str, torch.Tensor]]
) -> Iterator[None]:
    def register(path: str) -> RemovableHandle:
        def capture(_module: nn.Module, _inputs: object, output: object) -> None:
            features = first_tensor(output)
            if features is not None:
                captured.append((path, features.clone()))

        return model.get_submodule(path).register_forward_hook(capture)

    handles = [register(path) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
