"""The linear classifier of a bundle as arrays, and the fingerprints of the parts of a bundle; without PyTorch.

Letters: N images, K classes, D embedding dimension.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from batchcls.errors import InputError
from batchcls.models.mapped_classes import MappedClasses
from batchcls.models.model_bundle import CONFIG_FILE, WEIGHTS_FILE, Bundle, sha256_hex
from batchcls.storage.documents import StoredRecord

Floats = npt.NDArray[np.float32]

_FLOATS: Mapping[str, type[np.floating[Any]]] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
_BFLOAT16 = "BF16"
_COUNTER = ".num_batches_tracked"  # evaluation does not read it, and old files lack it


class ModelLayers(StoredRecord):
    """Fingerprints of the parts of a bundle on which a prediction depends, from the pixels to the label.

    Training settings, lineage and golden outputs are not included, and neither is the type in which the weights are
    stored, because a network holds them in float32.

    Attributes:
        preprocessing: of the preprocessing.
        trunk: of the architecture, the embedding tap, and all weights up to the embedding; of all weights if the
            classifier is not separable.
        head: `ClassifierHead.digest`; empty if the classifier is not one linear layer on the embedding, or if the
            bundle does not record it.
        classes: of the sums of a label map, `ClassGroups.digest`; empty if no classes are merged or retired.
        labels, category_paths: of these lists, and of the rules that split labels.
        temperature: of the calibration, 1 without one.
        thresholds: of the thresholds for labels and for depths of the category tree.
    """

    preprocessing: str
    trunk: str
    head: str
    classes: str = ""
    labels: str
    category_paths: str
    temperature: float
    thresholds: str

    @property
    def network(self) -> str:
        """Fingerprint of everything that determines the embedding of an image."""
        return sha256_hex(f"{self.preprocessing} {self.trunk}".encode())


@dataclass(frozen=True)
class ClassifierHead:
    """The linear layer that maps embeddings to logits: `weight` is K,D and `bias` K, float32."""

    weight: Floats
    bias: Floats

    @classmethod
    def of(cls, bundle: Bundle) -> Self | None:
        """The classifier of a bundle; None if it is not one linear layer on the embedding, or not recorded.

        Raises:
            InputError: the weights contain no such classifier.
        """
        names = bundle.config.head_tensors
        return cls.from_weights(bundle.weights, names) if names else None

    @classmethod
    def from_weights(cls, weights: bytes, names: Sequence[str]) -> Self:
        """The classifier in a safetensors file.

        Args:
            weights: the bytes of the file.
            names: names of its weight (K,D or K,D,1,1) and, if it has one, its bias.

        Raises:
            InputError: the file contains no such classifier.
        """
        tensors = dict(_tensors(weights))
        if not tensors.keys() >= set(names):
            raise InputError(
                f"{CONFIG_FILE} names the classifier {', '.join(names)}, which {WEIGHTS_FILE} does not contain; "
                "create the bundle again"
            )
        matrix, *bias = (_as_float32(tensors[name]) for name in names)
        matrix = matrix.reshape(len(matrix), -1)
        return cls(matrix, bias[0] if bias else np.zeros(len(matrix), np.float32))

    @classmethod
    def from_safetensors(cls, data: bytes) -> Self:
        """Read the bytes that `to_safetensors` returned.

        Raises:
            InputError: the bytes are damaged.
        """
        try:
            tensors = safetensors.numpy.load(data)
            return cls(tensors["weight"], tensors["bias"])
        except (safetensors.SafetensorError, KeyError) as error:
            raise InputError(f"the stored classifier is damaged ({error})") from error

    def to_safetensors(self) -> bytes:
        """The head as a safetensors file with the tensors `weight` and `bias`; equal heads give equal bytes."""
        data: bytes = safetensors.numpy.save(
            {"weight": np.ascontiguousarray(self.weight), "bias": np.ascontiguousarray(self.bias)}
        )
        return data

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the values."""
        return sha256_hex(self.to_safetensors())

    def logits(self, embedding: Floats) -> Floats:
        """Return N,K float32 logits of N,D float32 embeddings."""
        values: Floats = embedding @ self.weight.T
        values += self.bias
        return values


def layers_of(bundle: Bundle, mapped: MappedClasses | None = None) -> ModelLayers:
    """Compute the fingerprints of the parts of a bundle.

    Args:
        bundle: the bundle.
        mapped: its classes after a label map; None without one.

    Raises:
        InputError: the weights do not contain the classifier that the bundle records.
    """
    config, head = bundle.config, ClassifierHead.of(bundle)
    mapped = mapped or MappedClasses(config)
    calibration = mapped.config.calibration
    label_map = mapped.label_map
    splits = label_map.model_dump(mode="json")["split"] if label_map is not None else {}
    excluded = set(config.head_tensors or ())
    trunk = {
        "source": config.source,
        "architecture": config.architecture,
        "arguments": config.arguments,
        "embedding_tap": config.embedding_tap,
        "tensors": [
            [name, tensor["shape"], hashlib.sha256(_canonical(tensor)).hexdigest()]
            for name, tensor in _tensors(bundle.weights)
            if name not in excluded and not name.endswith(_COUNTER)
        ],
    }
    thresholds = calibration and [calibration.thresholds, calibration.depth_thresholds]
    return ModelLayers(
        preprocessing=_digest(config.preprocessing.model_dump(mode="json")),
        trunk=_digest(trunk),
        head="" if head is None else head.digest,
        classes="" if mapped.groups is None else mapped.groups.digest,
        labels=_digest([mapped.config.labels, splits] if splits else mapped.config.labels),
        category_paths=_digest(mapped.config.category_paths),
        temperature=1.0 if calibration is None else calibration.temperature,
        thresholds=_digest(thresholds),
    )


def _tensors(weights: bytes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield name and contents (dtype, shape, data) of the tensors of a safetensors file, sorted by name."""
    deserialize: Any = safetensors.deserialize
    try:
        tensors = deserialize(weights)
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{WEIGHTS_FILE} is not a complete safetensors file ({error}); copy the bundle again or create it again"
        ) from error
    yield from sorted(tensors, key=lambda pair: pair[0])


def _canonical(tensor: Mapping[str, Any]) -> bytes:
    """The values of a tensor as the network holds them: float32, or those of another type unchanged."""
    is_float = tensor["dtype"] in _FLOATS or tensor["dtype"] == _BFLOAT16
    return _as_float32(tensor).tobytes() if is_float else bytes(tensor["data"])


def _as_float32(tensor: Mapping[str, Any]) -> Floats:
    """The values of a floating-point tensor in its shape."""
    data = bytes(tensor["data"])
    if tensor["dtype"] == _BFLOAT16:  # the upper half of a float32
        values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, _FLOATS[tensor["dtype"]]).astype(np.float32, copy=False)
    return values.reshape(tensor["shape"])


def _digest(value: object) -> str:
    return sha256_hex(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
