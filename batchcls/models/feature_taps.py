"""Taps: an embedding taken from the middle of a network, during the pass that gives the logits.

A *stage* is a place where a network has finished a feature map. Its embedding is the mean of that
map over space. Nothing is cut out and nothing runs twice: a tap keeps the map as it comes by.

Letters: N images, H x W pixels, C channels of a feature map, h x w its places.
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
    """A network does not take images of a size.

    Attributes:
        reason: what the network said, in one line.
    """

    def __init__(self, name: str, size: tuple[int, int], reason: str, remedy: str) -> None:
        super().__init__(f"{name} does not take images of {size[0]} x {size[1]} pixels ({reason}); {remedy}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class FeatureStage:
    """A feature map of a network, and how to average it.

    Attributes:
        name: `stage1`, `stage2`, ... from the image upwards.
        path: the module in the network whose output is the map.
        layout: NCHW (N,C,h,w), NHWC (N,h,w,C) or tokens (N,prefix + h*w,C).
        channels: C, the length of the embedding.
        reduction: side of the image divided by the side of the map, about.
        prefix: tokens in front that are no place in the image, such as the class token.
    """

    name: str
    path: str
    layout: Layout
    channels: int
    reduction: int
    prefix: int = 0

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """The mean over space of a map in the stage's layout: N,C float32, of any floating dtype."""
        if self.layout == "tokens":
            return features[:, self.prefix :].float().mean(1)
        return features.float().mean((2, 3) if self.layout == "NCHW" else (1, 2))


class FeatureTap:
    """Keeps a stage's embedding of the pass under way. Not made for several threads at once."""

    def __init__(self, model: nn.Module, stage: FeatureStage) -> None:
        """Listen at the stage's module.

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
        module.register_forward_hook(self._keep)

    def take(self) -> torch.Tensor:
        """The embedding (N,C float32) of the pass that has just ended; may be asked once a pass.

        Raises:
            RuntimeError: the stage's module did not run.
        """
        embedding, self._embedding = self._embedding, None
        if embedding is None:
            raise RuntimeError(f"{self.stage.path} did not run, so there is no {self.stage.name}")
        return embedding

    def _keep(self, _module: nn.Module, _given: object, output: object) -> None:
        # Averaged at once: a later layer that works in place would change the map.
        features = first_tensor(output)
        self._embedding = None if features is None else self.stage.pool(features)


def first_tensor(output: object) -> torch.Tensor | None:
    """What a module hands on: its output, or the first of several, which is the map in all libraries."""
    if isinstance(output, list | tuple) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


class StageProvider(Protocol):
    """What finds the stages of a network: a library of architectures."""

    def stages(self, model: nn.Module, input_size: tuple[int, int]) -> tuple[FeatureStage, ...]:
        """The stages of an intact network for images of H, W; none where it has no such thing."""


def find_tap(
    spec: object, model: nn.Module, library: StageProvider, name: str, input_size: tuple[int, int]
) -> FeatureStage | None:
    """The stage that `--embedding-tap` names, in a network that is not cut yet; None for `pooled`.

    Args:
        spec: what the model is called in messages.
        model: the network, with its weights loaded; its mode and statistics stay as they are.
        library: the library that the network comes from.
        name: `pooled`, `stage1`, `stage2`, ...
        input_size: H, W of the images.

    Raises:
        InputError: there is no such stage, or the network does not take this size.
    """
    if name == POOLED:
        return None
    if not _STAGE_NAME.fullmatch(name):
        raise InputError(f"--embedding-tap {name}: unknown; it is {POOLED}, or stage1, stage2, ...")
    stages = library.stages(model, input_size)
    found = next((stage for stage in stages if stage.name == name), None)
    if found is None:
        raise InputError(f"--embedding-tap {name}: {spec} has {_what_there_is(stages)}")
    return found


def _what_there_is(stages: tuple[FeatureStage, ...]) -> str:
    if not stages:
        return f"no stages; {POOLED} is what it has"
    names = [stage.name for stage in stages]
    first, last = (int(name.removeprefix("stage")) for name in (names[0], names[-1]))
    if len(names) > 2 and last - first + 1 == len(names):
        return f"{names[0]} to {names[-1]} and {POOLED}"
    return f"{', '.join(names)} and {POOLED}"


def random_image(input_size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """1,3,H,W float32 of noise as normalized pixels have it, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, *input_size, generator=generator)


def forward_full(model: nn.Module, images: torch.Tensor) -> Any:
    """What a network answers.

    Raises:
        ImageSizeError: it does not take images of this size.
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
    """What modules hand on for the random image, copied, in the order in which the modules ended.

    Raises:
        InputError: the network does not take this size.
    """
    seen: list[tuple[str, torch.Tensor]] = []
    with eval_mode(model), _listening(model, paths, seen):
        forward_full(model, random_image(input_size))
    return seen


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; every module is in its former mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _listening(
    model: nn.Module, paths: Iterable[str], seen: list[tuple[str, torch.Tensor]]
) -> Iterator[None]:
    def listen(path: str) -> RemovableHandle:
        def copy(_module: nn.Module, _given: object, output: object) -> None:
            features = first_tensor(output)
            if features is not None:
                seen.append((path, features.clone()))

        return model.get_submodule(path).register_forward_hook(copy)

    handles = [listen(path) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
