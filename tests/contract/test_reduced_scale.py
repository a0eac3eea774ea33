"""The scale of reduced decoding is determined with images of the catalog and pretrained weights."""

import io
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchcls.images.decode import decode
from batchcls.images.transform import Transform
from batchcls.inference.agreement import AccuracyTolerance
from batchcls.inference.engine_record import EngineRequest, EngineSelectionRecord
from batchcls.inference.golden_record import with_golden
from batchcls.inference.scaled_decode import MARGINS, DecodedSample, measure_scaled_decode, scaled_images
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import EngineConfig
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage
from tests.helpers.pillow_reference import LIMITS

PHOTOGRAPHS = 60


def _enlarged(path: Path, short_side: int) -> bytes:
    with Image.open(path) as image:
        factor = short_side / min(image.size)
        size = (max(short_side, round(image.width * factor)), max(short_side, round(image.height * factor)))
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()


@pytest.fixture(scope="module")
def bundle(shared: Path) -> Bundle:
    choices = ModelChoices(weights=str(shared / "weights" / "squeezenet1_1.safetensors"))
    return with_golden(resolve_model("torchvision:squeezenet1_1", choices, Storage()))


class Photographs:
    """Photographs that are just large enough for half the scale with a margin, with a record of their decodes."""

    def __init__(self, shared: Path, bundle: Bundle, margin: float) -> None:
        preprocessing = bundle.config.preprocessing
        self.transform = Transform(preprocessing)
        side = round(2 * margin * preprocessing.resize_height)
        paths = sorted((shared / "data" / "imagenet").glob("*.JPEG"))[: 4 * PHOTOGRAPHS : 4]
        self.files = [_enlarged(path, side) for path in paths]
        whole = [decode(data, LIMITS) for data in self.files]
        self.images = DecodedSample(
            full=np.stack([self.transform(one.pixels) for one in whole]),
            sizes=np.array([(one.height, one.width) for one in whole], np.int32),
            decode_scaled=self.decode_scaled,
        )
        self.margins: list[float] = []

    def decode_scaled(self, margin: float) -> np.ndarray:
        self.margins.append(margin)
        least = self.transform.min_decoded_size(margin)
        decoded = (decode(data, LIMITS, least) for data in self.files)
        return np.stack([self.transform(one.pixels, one.extent) for one in decoded])


@pytest.fixture(scope="module")
def photographs(shared: Path, bundle: Bundle) -> Photographs:
    return Photographs(shared, bundle, 2.0)


def _measure(
    bundle: Bundle,
    photographs: Photographs,
    tmp_path: Path,
    tolerance: AccuracyTolerance = AccuracyTolerance(),  # noqa: B008 - frozen
):
    photographs.margins.clear()
    chosen = EngineSelectionRecord(
        created=datetime.now(UTC), request=EngineRequest(tolerance=tolerance), bundle_fingerprint=bundle.fingerprint,
        hardware_key="0" * 12, hardware="this machine", versions={}, device="cpu", threads=2, manifest="m",
        images=PHOTOGRAPHS, seconds=1, reference="torch fp32", engine="torch", precision="bf16", batch_size=8,
        images_per_second=1, candidates=(), notes=(),
    )  # fmt: skip
    engine_config = EngineConfig("cpu", 2, 8, CompileCache(tmp_path))
    return measure_scaled_decode(bundle, chosen, engine_config, photographs.images)


def test_images_with_large_differences_are_decoded_at_full_scale(bundle, photographs, tmp_path):
    """With the tolerance of fp32 itself no margin passes, and margins that reduce few images are not measured."""
    found = _measure(
        bundle, photographs, tmp_path, AccuracyTolerance(min_top1_agreement=1.0, min_embedding_cosine=1.0)
    )
    assert found.margin is None
    assert [entry.margin for entry in found.results] == [1.5, 2.0] == photographs.margins
    assert all(entry.rejected is not None and entry.images == PHOTOGRAPHS for entry in found.results)
    assert "0 of 60 images are large enough for a margin of 3" in str(found)


def test_smallest_sufficient_margin_is_selected(bundle, photographs, tmp_path):
    found = _measure(
        bundle, photographs, tmp_path, AccuracyTolerance(min_top1_agreement=0.8, min_embedding_cosine=0.9)
    )
    assert found.margin == 1.5 == found.results[-1].margin
    assert photographs.margins == [1.5]
    assert found.results[-1].rejected is None
    assert 0.8 <= found.results[-1].top1_agreement <= 1
    assert "on 60 images" in str(found)


def test_reported_error_combines_scale_and_engine(bundle, photographs, tmp_path):
    loose = AccuracyTolerance(min_top1_agreement=0.0, min_embedding_cosine=-1.0)
    (entry,) = _measure(bundle, photographs, tmp_path, loose).results
    # Half the scale at twice the needed size changes the pixels and therefore the embedding slightly.
    assert 0.99 < entry.mean_cosine < 1 - 1e-6


def test_unreadable_images_are_not_compared(bundle, photographs, tmp_path):
    fewer = replace(photographs.images, decode_scaled=lambda margin: photographs.decode_scaled(margin)[:-1])
    photographs_that_fail = Photographs.__new__(Photographs)
    photographs_that_fail.images, photographs_that_fail.margins = fewer, photographs.margins
    found = _measure(bundle, photographs_that_fail, tmp_path)
    assert found.margin is None
    assert "second time" in str(found)


def test_images_that_a_margin_reduces(bundle):
    preprocessing = bundle.config.preprocessing
    side = preprocessing.resize_height
    sizes = np.array(
        [(side, side), (3 * side, 4 * side), (6 * side, 7 * side), (20 * side, 20 * side)], np.int32
    )
    found = {margin: scaled_images(sizes, preprocessing, margin).tolist() for margin in MARGINS}
    assert found[1.5] == [False, True, True, True]
    assert found[2.0] == found[3.0] == [False, False, True, True]
    assert found[4.0] == [False, False, False, True]
