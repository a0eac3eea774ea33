from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from batchcls.config.common_config import FetchSettings
from batchcls.errors import InputError
from batchcls.images.load_config import DecodeLimits, fetch_policy
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.golden_record import with_golden
from batchcls.manifest.labeled_manifest import open_labeled_manifest
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import REFERENCE, EngineConfig
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage
from batchcls.training.linear_probe.embeddings import EmbeddingSettings
from batchcls.training.linear_probe.fit import LinearSettings
from batchcls.training.linear_probe.label_noise import NOISE_SCHEMA
from batchcls.training.linear_probe.probe_job import (
    LinearProbeResult,
    ProbeSettings,
    linear_probe_bundle,
    with_pooled_embedding,
)
from tests.helpers.color_images import COLORS, PIXELS, color_manifest, draw_color

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """A small network with random weights and an embedding tap in the middle."""
    labels = tmp_path_factory.mktemp("labels") / "labels.txt"
    labels.write_text("mug\nplate\n")
    choices = ModelChoices(
        labels=str(labels),
        tap="stage2",
        overrides=PreprocessingOverrides(input_size=PIXELS),
        allow_random=True,
    )
    return with_golden(resolve_model("timm:test_resnet", choices, Storage()))


def _settings(folder: Path, **changes) -> ProbeSettings:
    embedding = EmbeddingSettings(
        fetch_policy(FetchSettings()), DecodeLimits(), choice=REFERENCE, cache_dir=str(folder / "cache")
    )
    return replace(
        ProbeSettings(embedding, LinearSettings(folds=2), name="run-1", max_noise_rows=5), **changes
    )


def _probe(bundle: Bundle, train: str, validation: str | None, settings: ProbeSettings) -> LinearProbeResult:
    opened = [uri and open_labeled_manifest(uri, Storage(), "label") for uri in (train, validation)]
    return linear_probe_bundle(bundle, opened[0], opened[1], settings, Storage())


@pytest.fixture(scope="module")
def probed(bundle, tmp_path_factory) -> tuple[LinearProbeResult, Path]:
    folder = tmp_path_factory.mktemp("shop")
    train = color_manifest(folder, "train", 60, 0, wrong="green", unlabeled=None, broken="red")
    (folder / "train-broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no image")
    validation = color_manifest(folder, "validation", 30, 1000, unseen="purple", lost="red", blank=" ")
    (folder / "validation-lost.png").unlink()
    return _probe(bundle, train, validation, _settings(folder)), folder


def test_bundle_predicts_with_the_new_head_in_the_engine_of_classify(probed, bundle, tmp_path):
    found, _ = probed
    found.bundle.save(str(tmp_path / "b"), Storage())
    loaded = Bundle.load(str(tmp_path / "b"), Storage())
    config = loaded.config
    assert loaded.publishable
    assert config.labels == ("blue", "green", "red")
    assert config.preprocessing == bundle.config.preprocessing
    assert (config.embedding_tap, config.embedding_dimension) == ("stage2", bundle.config.embedding_dimension)
    assert (config.weights.kind, config.weights.name) == ("trained", "run-1")
    engine_config = EngineConfig("cpu", 1, 4, CompileCache(tmp_path / "engines"))
    engine, _ = start_tested_engine(loaded, REFERENCE, engine_config)
    rng = np.random.default_rng(9)
    pixels = np.stack([rng.normal(COLORS[label], 25, (PIXELS, PIXELS, 3)) for label in config.labels])
    output = engine.predict(pixels.clip(0, 255).astype(np.uint8))
    assert output.logits.argmax(1).tolist() == [0, 1, 2]
    other, _ = start_tested_engine(with_pooled_embedding(bundle), REFERENCE, engine_config)
    embedding = torch.from_numpy(other.predict(pixels.clip(0, 255).astype(np.uint8)).embedding)
    np.testing.assert_allclose(
        output.logits, found.probe.head.logits(embedding).numpy(), rtol=1e-3, atol=1e-3
    )


def test_every_row_is_counted_once(probed):
    found, _ = probed
    metrics = found.metrics
    assert metrics["training_rows"] == 61
    assert metrics["training_failed"] == {"corrupt": 1} or list(metrics["training_failed"].values()) == [1]
    validation = metrics["validation"]
    assert validation["rows"] == 33
    assert validation["predicted"] == 31
    assert validation["of_unseen_categories"] == 1
    assert validation["failed"] == {"not_found": 1}
    assert validation["without_label"] == 1
    assert validation["top1"] == pytest.approx(30 / 31)
    assert found.bundle.config.lineage["metrics"] == metrics
    assert any("purple" in note for note in found.categories.warnings)


def test_wrong_label_is_first_in_the_noise_report(probed):
    found, folder = probed
    assert found.noise.schema == NOISE_SCHEMA
    assert found.noise.num_rows == 5
    first = found.noise.slice(0, 1).to_pylist()[0]
    assert first["row"] == 60
    assert first["item_id"] == "train60"
    assert first["uri"] == str(folder / "train-wrong.png")
    assert (first["label"], first["suggested"], first["confident"]) == ("green", "red", True)


def test_embeddings_are_reused_and_only_failed_fetches_are_retried(probed, bundle):
    before, folder = probed
    for image in folder.glob("*.png"):
        image.unlink()
    draw_color(folder, "validation-lost.png", "red", 5)
    again = _probe(
        bundle, str(folder / "train.parquet"), str(folder / "validation.parquet"), _settings(folder)
    )
    assert again.metrics["validation"]["failed"] == {}
    assert again.metrics["validation"]["predicted"] == 32
    assert torch.equal(again.probe.head.weight, before.probe.head.weight)


def test_manifest_without_readable_images_is_rejected(bundle, tmp_path):
    train = color_manifest(tmp_path, "train", 6, 0)
    for image in tmp_path.glob("*.png"):
        image.unlink()
    with pytest.raises(InputError, match=r"none of the labeled training rows has an image.*not_found"):
        _probe(bundle, train, None, _settings(tmp_path))


def test_network_without_a_linear_head_is_rejected(tmp_path):
    squeezenet = resolve_model(
        "torchvision:squeezenet1_1",
        ModelChoices(allow_random=True, overrides=PreprocessingOverrides(input_size=64)),
        Storage(),
    )
    with pytest.raises(InputError, match="not one linear layer on its embedding"):
        with_pooled_embedding(squeezenet)
