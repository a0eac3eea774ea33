"""Weights in memory and in files: safetensors in and out, loaded strictly or not at all.

A state is a dict of names to tensors. Nothing here runs code that a file brings along: a
safetensors file holds numbers only, and a pickled checkpoint is read by PyTorch's restricted
unpickler, which refuses everything but tensors and plain containers.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from batchcls.errors import InputError
from batchcls.storage.filesystem import Storage, explain, redact_uri

State = dict[str, torch.Tensor]

_SAFETENSORS = ".safetensors"
_PICKLED = frozenset({".pth", ".pt", ".bin"})

# Training programs put the state beside optimizer and epoch, under one of these names.
_STATE_KEYS = ("state_dict", "model")
_PARALLEL_PREFIX = "module."

# BatchNorm's counter of batches seen, which evaluation never reads.
_COUNTER = "num_batches_tracked"
_SHOWN = 5


def to_safetensors(state: Mapping[str, torch.Tensor]) -> bytes:
    """A state as the bytes of a safetensors file; the same state gives the same bytes."""
    # A copy each: safetensors refuses tensors that share memory or are not contiguous.
    return safetensors.torch.save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    )


def from_safetensors(data: bytes, name: str) -> State:
    """The state inside a safetensors file's bytes; `name` says in errors which file it was.

    Raises:
        InputError: the bytes are no safetensors file, or it is cut short.
    """
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise InputError(
            f"{name} is no whole safetensors file ({error}); copy it again or convert it again"
        ) from error


def read_weights(uri: str, storage: Storage) -> tuple[State, bytes]:
    """State of a `.safetensors`, `.pth`, `.pt` or `.bin` file, and its bytes as safetensors.

    A safetensors file's bytes are returned as they are, so that their digest is the file's.

    Raises:
        InputError: the file is not there, of another kind, damaged, or a pickle that holds more
            than tensors.
    """
    name = redact_uri(uri)
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix != _SAFETENSORS and suffix not in _PICKLED:
        kinds = ", ".join([_SAFETENSORS, *sorted(_PICKLED)])
        raise InputError(f"--weights {name}: cannot tell what kind of file this is; known are {kinds}")
    with explain(uri):
        data = storage.read_bytes(uri)
    if suffix == _SAFETENSORS:
        return from_safetensors(data, name), data
    state = from_checkpoint(data, name)
    return state, to_safetensors(state)


def from_checkpoint(data: bytes, name: str) -> State:
    """The state inside a pickled PyTorch checkpoint, read without running anything in it.

    Takes a bare state, or one under `state_dict` or `model`; a `module.` before every name, left
    by data-parallel training, is taken off.

    Raises:
        InputError: the file wants to run code, is damaged, or holds no state.
    """
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{name} is a pickle with more than tensors in it, and loading that would run whatever code "
            "the file brings; have its author save the state_dict alone, best as .safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{name} is no PyTorch checkpoint that can be read ({error})") from error
    return _without_parallel_prefix(_find_state(content, name))


def load_strictly(module: nn.Module, state: Mapping[str, torch.Tensor], name: str) -> None:
    """Copy a state into a module: every key, no other key, every shape.

    Raises:
        InputError: keys are missing, unexpected or of another shape, or a value is not finite;
            the message counts them and names the first few. The module is then not to be used.
    """
    broken = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise InputError(
            f"{name} holds NaN or infinity in {_some(broken)}; take another checkpoint of this training"
        )
    expected = module.state_dict()
    try:
        module.load_state_dict(_versioned(state, expected), strict=True)
    except RuntimeError as error:
        differences = _differences(expected, state)
        raise InputError(
            f"{name} does not fit {type(module).__name__}: {differences or error}; check the architecture's "
            "name and --model-args, or take the weights that belong to it"
        ) from error


def _versioned(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> State:
    """The state as a module of today would have saved it.

    Files of numbers carry no version numbers of modules, which some modules (MNASNet) insist on,
    and files older than the counter of batches lack it.
    """
    counters = {k: v for k, v in expected.items() if k.endswith(_COUNTER) and k not in state}
    versioned: OrderedDict[str, torch.Tensor] = OrderedDict({**state, **counters})
    versioned._metadata = getattr(expected, "_metadata", {})  # type: ignore[attr-defined]
    return versioned


def _find_state(content: object, name: str) -> State:
    if isinstance(content, Mapping):
        for key in _STATE_KEYS:
            if isinstance(content.get(key), Mapping):
                return _find_state(content[key], name)
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {str(key): value for key, value in content.items()}
    raise InputError(
        f"{name} holds no state_dict (a dict of names to tensors), bare or under "
        f"{' or '.join(map(repr, _STATE_KEYS))}; save model.state_dict()"
    )


def _without_parallel_prefix(state: State) -> State:
    if all(key.startswith(_PARALLEL_PREFIX) for key in state):
        return {key.removeprefix(_PARALLEL_PREFIX): tensor for key, tensor in state.items()}
    return state


def _differences(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str:
    missing = [k for k in expected if k not in given and not k.endswith(_COUNTER)]
    unexpected = [k for k in given if k not in expected]
    shapes = [
        f"{k} is {tuple(given[k].shape)} and should be {tuple(expected[k].shape)}"
        for k in expected
        if k in given and given[k].shape != expected[k].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in found.items() if keys)


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
