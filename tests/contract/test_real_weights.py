"""Models with pretrained weights predict real photographs as published, and as without batchcls."""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.build import build_backbone
from batchcls.models.engines.torch_eager import TorchEager
from batchcls.models.imagenet_labels import imagenet_labels
from batchcls.models.model_bundle import Bundle, sha256_hex
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage
from tests.helpers.tiers import long_except

EVERY = 5
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Published:
    """Metadata of the weights: how to create the network, and its expected accuracy."""

    name: str
    file: str
    arguments: dict[str, str]
    overrides: PreprocessingOverrides
    sha256: str
    top1: float


MODELS = [
    Published(
        "timm:mobilenetv2_100",
        "mobilenetv2_100.safetensors",
        {"pad_type": "same"},
        PreprocessingOverrides(mean=HALF, std=HALF, interpolation="bilinear"),
        "36ac6d6baf6a1e22dc3d481c49c2cdde64c4f2d46abd0c00b5a46e67902b8e32",
        0.894,
    ),
    Published(
        "torchvision:squeezenet1_1",
        "squeezenet1_1.safetensors",
        {},
        PreprocessingOverrides(),
        "369721ac401b1366a9309d44756a8e3f403cc4400396277a0eb7ad1dd662d96a",
        0.612,
    ),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine, PyTorch's threads spend far more time waiting for each other than computing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photographs(shared: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every fifth photograph as uint8 N,224,224,3, resized by Pillow, and its class index."""
    folder = shared / "data" / "imagenet"
    with (folder / "classes.csv").open(newline="") as file:
        index = {row["wnid"]: int(row["index"]) for row in csv.DictReader(file)}
    files = sorted(folder.glob("*.JPEG"))[::EVERY]
    pixels = np.stack([_reference_pixels(file) for file in files])
    return pixels, np.array([index[file.name.partition("_")[0]] for file in files])


def _reference_pixels(file: Path) -> np.ndarray:
    """Resize the short side to 256 with bilinear interpolation, and crop the central 224 x 224."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


def _bundle(shared: Path, model: Published, **changes: object) -> Bundle:
    choices = {"weights": str(shared / "weights" / model.file), "arguments": model.arguments}
    return resolve_model(
        model.name, ModelChoices(**{**choices, "overrides": model.overrides, **changes}), Storage()
    )


def _intact(shared: Path, model: Published) -> torch.nn.Module:
    """The network as created by its library, without batchcls."""
    if model.name.startswith("timm:"):
        import timm

        network = timm.create_model("mobilenetv2_100", pad_type="same")
    else:
        import torchvision

        network = torchvision.models.squeezenet1_1()
    network.load_state_dict(load_file(shared / "weights" / model.file), strict=True)
    return network.eval()


def _normalized(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    images = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def _logits(predict: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([predict(batch) for batch in images.split(15)])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_real_weights_load_strictly_and_keep_their_digest(shared, model):
    config = _bundle(shared, model).config
    assert config.weights.sha256 == model.sha256 == sha256_hex((shared / "weights" / model.file).read_bytes())
    assert config.labels == imagenet_labels()
    preprocessing = config.preprocessing
    assert (preprocessing.input_height, preprocessing.resize_height) == (224, 256)
    assert preprocessing.interpolation == "bilinear"


@pytest.mark.parametrize(
    "model", long_except({"torchvision:squeezenet1_1"}, MODELS), ids=lambda model: model.name
)
def test_split_backbone_predicts_like_the_original_on_photographs(shared, photographs, model):
    pixels, truth = photographs
    bundle = _bundle(shared, model)
    preprocessing = bundle.config.preprocessing
    images = _normalized(pixels, preprocessing.mean, preprocessing.std)
    network, backbone = _intact(shared, model), build_backbone(bundle)
    expected, logits = _logits(network, images), _logits(lambda batch: backbone(batch)[0], images)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
    right = float(np.mean(expected.argmax(1).numpy() == truth))
    assert abs(right - model.top1) < _three_standard_errors(model.top1, len(truth))

    engine = TorchEager(backbone, preprocessing, "cpu", "fp32", 1)
    predicted = np.concatenate([engine.predict(pixels[i : i + 15]).logits for i in range(0, len(pixels), 15)])
    np.testing.assert_array_equal(predicted.argmax(1), expected.argmax(1).numpy())


def test_wrong_normalization_and_a_missing_argument_change_predictions(shared, photographs):
    pixels, truth = photographs
    right = build_backbone(_bundle(shared, MODELS[0]))
    without_padding = build_backbone(_bundle(shared, MODELS[0], arguments={}))
    images = _normalized(pixels, HALF, HALF)
    of_imagenet = _normalized(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def count(backbone: Backbone, images: torch.Tensor) -> int:
        return int((_logits(lambda batch: backbone(batch)[0], images).argmax(1).numpy() == truth).sum())

    assert count(right, of_imagenet) < count(without_padding, images) < count(right, images)


def test_bundle_of_real_weights_round_trips_through_s3(shared, s3):
    made = _bundle(shared, MODELS[1])
    uri = f"s3://{s3.bucket}/models/squeezenet"
    storage = Storage({"endpoint_url": s3.endpoint_url})
    made.save(uri, storage)
    loaded = Bundle.load(uri, storage)
    assert loaded.fingerprint == made.fingerprint
    assert loaded.weights == made.weights
    for missing, message in (
        (f"s3://{s3.bucket}/models/none", "is not a bundle"),
        ("s3://there-is-no-such-bucket/models", "there is no such bucket"),
    ):
        with pytest.raises(InputError, match=message):
            Bundle.load(missing, storage)


def _three_standard_errors(share: float, count: int) -> float:
    return 3 * (share * (1 - share) / count) ** 0.5
