"""Reads and writes weights, and loads them strictly.

A state maps names to tensors. Reading a file never executes code from it: a safetensors file contains only numbers, and
a pickled checkpoint is read with PyTorch's restricted unpickler, which rejects everything except tensors and plain
containers.
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

# Training programs store the state under one of these names, next to the optimizer and the epoch.
_STATE_KEYS = ("state_dict", "model")
_PARALLEL_PREFIX = "module."

# BatchNorm's batch counter, which evaluation never reads.
_COUNTER = "num_batches_tracked"
_MAX_LISTED = 5


def to_safetensors(state: Mapping[str, torch.Tensor]) -> bytes:
    """Serialize a state as a safetensors file; equal states give equal bytes."""
    # Copies, because safetensors rejects tensors that share memory or are not contiguous.
    return safetensors.torch.save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    )


def from_safetensors(data: bytes, name: str) -> State:
    """Return the state in the bytes of a safetensors file.

    Args:
        data: content of the file.
        name: name of the file in error messages.

    Raises:
        InputError: the bytes are not a safetensors file, or the file is truncated.
    """
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise InputError(
            f"{name} is not a complete safetensors file ({error}); copy it again or convert it again"
        ) from error


def read_weights(uri: str, storage: Storage) -> tuple[State, bytes]:
    """Read the state of a `.safetensors`, `.pth`, `.pt` or `.bin` file, and its bytes as safetensors.

    The bytes of a safetensors file are returned unchanged, so that their digest is that of the file.

    Raises:
        InputError: the file does not exist, has another type, is damaged, or is a pickle with other objects than
            tensors.
    """
    name = redact_uri(uri)
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix != _SAFETENSORS and suffix not in _PICKLED:
        kinds = ", ".join([_SAFETENSORS, *sorted(_PICKLED)])
        raise InputError(f"--weights {name}: unknown file type; supported are {kinds}")
    with explain(uri):
        data = storage.read_bytes(uri)
    if suffix == _SAFETENSORS:
        return from_safetensors(data, name), data
    state = from_checkpoint(data, name)
    return state, to_safetensors(state)


def from_checkpoint(data: bytes, name: str) -> State:
    """Return the state in a pickled PyTorch checkpoint, without executing code from it.

    The checkpoint is a state, or contains one under `state_dict` or `model`. The prefix `module.` of every name, which
    data-parallel training adds, is removed.

    Raises:
        InputError: the file would execute code, is damaged, or contains no state.
    """
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{name} is a pickle that contains other objects than tensors, and loading it could execute arbitrary "
            "code; ask its author for the state_dict alone, preferably as .safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{name} is not a readable PyTorch checkpoint ({error}); copy it again or save it again"
        ) from error
    return _without_parallel_prefix(_find_state(content, name))


def load_strictly(module: nn.Module, state: Mapping[str, torch.Tensor], name: str) -> None:
    """Load a state into a module, with exactly the module's keys and shapes.

    Raises:
        InputError: keys are missing, unexpected or have another shape, or a value is not finite; the message counts
            them and names the first few. The module may then be partially loaded.
    """
    non_finite = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if non_finite:
        raise InputError(
            f"{name} contains NaN or infinity in {_list_some(non_finite)}; use another checkpoint of this training"
        )
    expected = module.state_dict()
    try:
        module.load_state_dict(_with_metadata(state, expected), strict=True)
    except RuntimeError as error:
        differences = _differences(expected, state)
        raise InputError(
            f"{name} does not fit {type(module).__name__}: {differences or error}; check the name of the architecture "
            "and --model-args, or use the weights of this architecture"
        ) from error


def _with_metadata(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> State:
    """Return the state as the current version of the module would have saved it.

    Files have no version numbers of modules, which some modules (MNASNet) require, and old files do not have
    BatchNorm's batch counter.
    """
    counters = {k: v for k, v in expected.items() if k.endswith(_COUNTER) and k not in state}
    complete: OrderedDict[str, torch.Tensor] = OrderedDict({**state, **counters})
    complete._metadata = getattr(expected, "_metadata", {})  # type: ignore[attr-defined]
    return complete


def _find_state(content: object, name: str) -> State:
    if isinstance(content, Mapping):
        for key in _STATE_KEYS:
            if isinstance(content.get(key), Mapping):
                return _find_state(content[key], name)
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {str(key): value for key, value in content.items()}
    raise InputError(
        f"{name} contains no state_dict (a dict of names to tensors), at the top level or under "
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
    differences = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{len(keys)} {kind}: {_list_some(keys)}" for kind, keys in differences.items() if keys)


def _list_some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return ", ".join(keys[:_MAX_LISTED]) + more
