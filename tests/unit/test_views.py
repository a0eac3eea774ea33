"""Test-time augmentation against torchvision's crops and a plain loop over the views."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchvision.transforms.v2 import functional

from batchcls.errors import InputError
from batchcls.images.loader import pack_pixels
from batchcls.images.transform import Transform
from batchcls.inference.predictor import Predictor
from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.backbone import Backbone
from batchcls.models.engines.engine import CompletedOutput
from batchcls.models.engines.torch_eager import TorchEager
from batchcls.models.model_spec import PreprocessingOverrides
from batchcls.models.sources import find_model, get_library
from batchcls.preprocessing import Preprocessing, views_of
from batchcls.schema import loaded_schema
from tests.helpers.drawing import draw

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = tuple(f"label {i}" for i in range(7))


def preprocessing(resize: int = 40, crop_mode: str = "center") -> Preprocessing:
    return Preprocessing(
        input_height=32, input_width=32, resize_height=resize, resize_width=resize, crop_mode=crop_mode,
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3),
    )  # fmt: skip


def drawn_images() -> list[np.ndarray]:
    sizes = [(61, 47), (47, 61), (90, 90), (33, 120)]
    return [np.array(draw(seed, *size)) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("resize", [32, 40, 41])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_five_crops_match_torchvision(resize, crop_mode):
    record = preprocessing(resize, crop_mode)
    for image in drawn_images():
        height, width = image.shape[:2]
        size = [resize, resize]
        if crop_mode == "center":
            short = min(height, width)
            size = [int(resize * height / short), int(resize * width / short)]
        resized = functional.resize(torch.from_numpy(image).permute(2, 0, 1), size, antialias=True)
        expected = torch.stack(functional.five_crop(resized, [32, 32])).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(Transform(record, views_of("five-crop", record))(image), expected)


def test_corner_crops_of_padded_images_are_rejected():
    with pytest.raises(InputError, match="border"):
        views_of("ten-crop", preprocessing(crop_mode="border"))
    assert views_of("hflip", preprocessing(crop_mode="border")).count == 2


@pytest.fixture(scope="module")
def engine() -> TorchEager:
    spec = find_model("timm:test_resnet", {})
    library = get_library(spec)
    model = library.build(spec, len(LABELS))
    library.preprocessing(spec, PreprocessingOverrides())
    backbone = Backbone(model, library.classifiers(model), (32, 32))
    return TorchEager(backbone, preprocessing(), device="cpu", precision="fp32", threads=1)


def block(images: list[np.ndarray | None]) -> pa.Table:
    n = len(images)
    schema = loaded_schema()
    columns = {field.name: pa.nulls(n, field.type) for field in schema}
    columns |= {
        "row": pa.array(range(n), pa.int64()),
        "attempts": pa.array([1] * n, pa.int32()),
        "fetch_seconds": pa.array([0.0] * n, pa.float32()),
        "decode_seconds": pa.array([0.0] * n, pa.float32()),
        "pixels": pack_pixels(images),
    }
    return pa.table(columns, schema=schema)


def plain_loop(engine: TorchEager, image: np.ndarray, tta: str) -> tuple[np.ndarray, np.ndarray]:
    """Predict the views sequentially in separate batches, and return the mean of the predictions."""
    crops = Transform(preprocessing(), views_of("five-crop", preprocessing()))(image)
    chosen = list(crops) if tta in ("five-crop", "ten-crop") else [crops[4]]
    if tta in ("hflip", "ten-crop"):
        chosen += [crop[:, ::-1] for crop in chosen]
    outputs = [engine.predict(np.ascontiguousarray(crop)[np.newaxis]) for crop in chosen]
    probabilities = [torch.softmax(torch.from_numpy(output.logits), 1).numpy()[0] for output in outputs]
    return np.mean(probabilities, axis=0), np.mean([output.embedding[0] for output in outputs], axis=0)


@pytest.mark.parametrize("l2_normalize", [False, True])
@pytest.mark.parametrize("tta", ["none", "hflip", "five-crop", "ten-crop"])
def test_predictions_are_means_over_the_views(engine, tta, l2_normalize):
    views = views_of(tta, preprocessing())
    settings = PredictSettings(
        labels=LABELS, top_k=7, embedding=pa.float32(), embedding_dimension=96, l2_normalize=l2_normalize,
        views=views, input_shape=(32, 32, 3), normalize="engine", batch_size=3, kept=(),
    )  # fmt: skip
    transform = Transform(preprocessing(), views)
    images = [transform(image) for image in drawn_images()]
    predicted = Predictor(engine, settings)(block([images[0], None, *images[1:]]))
    rows = [row for row in predicted.to_pylist() if row["label"] is not None]
    assert [row["row"] for row in rows] == [0, 2, 3, 4]
    for row, image in zip(rows, drawn_images(), strict=True):
        probabilities, embedding = plain_loop(engine, image, tta)
        if l2_normalize:
            embedding = embedding / np.linalg.norm(embedding)
        found = {entry["class_index"]: entry["probability"] for entry in row["top_k"]}
        assert [found[i] for i in range(7)] == pytest.approx(probabilities.tolist(), abs=1e-6)
        assert np.allclose(row["embedding"], embedding, atol=1e-5)


def test_non_finite_view_fails_only_its_image(engine):
    class Broken(TorchEager):
        in_flight = 1

        def __init__(self) -> None:
            pass

        def submit(self, pixels):
            return CompletedOutput(self.predict(pixels))

        def predict(self, pixels):
            output = engine.predict(pixels)
            output.logits[(pixels == 255).all(axis=(1, 2, 3))] = np.inf
            return output

    views = views_of("five-crop", preprocessing())
    settings = PredictSettings(LABELS, 1, None, 96, False, views, (32, 32, 3), "engine", 4, ())
    images = [Transform(preprocessing(), views)(image) for image in drawn_images()[:2]]
    images[0][3] = 255
    reasons = Predictor(Broken(), settings)(block(images)).column("reason").to_pylist()
    assert reasons == ["non_finite", None]
