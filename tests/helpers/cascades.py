"""Two small networks that predict different labels for drawn images, and a classify job in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from batchcls.images.transform import Transform
from batchcls.inference.golden_record import with_golden
from batchcls.jobs import classify_reuse, classify_run
from batchcls.models.build import build_backbone
from batchcls.models.engines.torch_eager import TorchEager
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.storage.filesystem import Storage
from tests.helpers import crash_night
from tests.helpers.drawing import draw

LABELS = [f"kind {i}" for i in range(4)]
_DRAWN = 60


def write_varied_bundle(folder: Path, seed: int, input_size: int, labels: list[str] | None = None) -> str:
    """Write a bundle with random weights whose head spreads drawn images over its labels; returns its folder."""
    folder.mkdir(parents=True)
    (folder / "labels.txt").write_text("\n".join(labels or LABELS))
    torch.manual_seed(seed)
    overrides = PreprocessingOverrides(input_size=input_size)
    choices = ModelChoices(labels=str(folder / "labels.txt"), overrides=overrides, allow_random=True)
    bundle = resolve_model("timm:test_resnet", choices, Storage())
    preprocessing = bundle.config.preprocessing
    transform = Transform(preprocessing)
    pixels = np.stack([transform(np.array(draw(number, 90, 70))) for number in range(_DRAWN)])
    embedding = TorchEager(build_backbone(bundle), preprocessing, "cpu", "fp32", 1).predict(pixels).embedding
    mean = embedding.mean(axis=0)
    weight = np.random.default_rng(seed).normal(0, 1, (len(labels or LABELS), embedding.shape[1]))
    weight /= ((embedding - mean) @ weight.T).std(axis=0)[:, None] / 2
    state = dict(from_safetensors(bundle.weights, "weights"))
    state["fc.weight"] = torch.tensor(weight, dtype=torch.float32)
    state["fc.bias"] = torch.tensor(-weight @ mean, dtype=torch.float32)
    with_golden(bundle.with_weights(to_safetensors(state))).save(str(folder / "model"), Storage())
    return str(folder / "model")


@contextmanager
def jobs_without_ray() -> Iterator[None]:
    """Run classify jobs in this process: fragments are processed sequentially, and nothing else is replaced."""
    with (
        patch.object(classify_run, "ray_session", crash_night.no_cluster),
        patch.object(classify_run, "plan_on_cluster", crash_night.plan_for_one_cpu),
        patch.object(classify_run, "execute", crash_night.execute_here),
        patch.object(classify_run, "copy_predictions", crash_night.copy_predictions_here),
        patch.object(classify_reuse, "measure_on_cluster", crash_night.measure_agreement_here),
    ):
        yield
