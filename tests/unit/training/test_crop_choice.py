"""Tests for the choice of the crop from the training images."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.images.load_config import decode_limits, fetch_policy
from batchcls.manifest.labeled_manifest import open_labeled_manifest, read_label_column
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.preprocessing import Preprocessing
from batchcls.storage.filesystem import Storage
from batchcls.training import crop_choice
from batchcls.training.crop_choice import CropChoice, CropScore, choose_crop, with_chosen_crop
from batchcls.training.initial_bundle import TrainingExamples
from batchcls.training.linear_probe.embeddings import EmbeddingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH = 128, 64
COLORS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def photographs(folder: Path, count: int, rows: slice, name: str = "train") -> str:
    """Write images of noise that are twice as high as wide, in whose `rows` the color of the category is."""
    random = np.random.default_rng(3)
    table = []
    for number in range(count):
        pixels = random.integers(90, 160, (HEIGHT, WIDTH, 3), np.uint8)
        label = number % len(COLORS)
        pixels[rows] = COLORS[label]
        path = folder / f"{name}-{number}.png"
        Image.fromarray(pixels).save(path)
        table.append({"item_id": str(number), "uri": path.name, "label": f"label {label}"})
    manifest = folder / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(table), manifest)
    return str(manifest)


@pytest.fixture(scope="module")
def network() -> Bundle:
    overrides = PreprocessingOverrides(input_size=64, crop_pct=0.75)
    return resolve_model("timm:test_resnet", ModelChoices(overrides=overrides, allow_random=True), Storage())


def examples(manifest: str) -> TrainingExamples:
    opened = open_labeled_manifest(manifest, Storage(), "label")
    return TrainingExamples(opened, read_label_column(opened, Storage()))


def config(folder: Path, manifest: str, **changes: object) -> FinetuneConfig:
    output = str(folder / "model")
    return FinetuneConfig(
        manifest=manifest, validation=manifest, output=output, model="timm:test_resnet", **changes
    )


def choose(folder: Path, network: Bundle, manifest: str) -> CropChoice | None:
    settings = config(folder, manifest)
    embedding = EmbeddingSettings(fetch_policy(settings), decode_limits(settings))
    return choose_crop(network, examples(manifest), embedding, str(folder / "crop.json"), Storage())


def test_whole_images_are_chosen_if_the_category_is_at_their_edge(network: Bundle, tmp_path: Path):
    found = choose(tmp_path, network, photographs(tmp_path, 240, slice(HEIGHT - 16, HEIGHT)))
    assert found is not None
    first, *others = found.scores
    assert first.preprocessing == network.config.preprocessing
    assert (first.gain, first.gain_error) == (0, 0)
    assert first.top1 < 0.5
    assert found.chosen.crop_mode in ("border", "squash")
    chosen = next(score for score in others if score.preprocessing == found.chosen)
    assert chosen.top1 > 0.9
    assert chosen.visible > 0.95 > first.visible
    sizes = {(score.preprocessing.input_height, score.preprocessing.input_width) for score in found.scores}
    assert sizes == {(64, 64), (96, 48)}
    assert found.images == 240


def test_crop_of_the_weights_is_kept_without_a_reason_to_change_it(network: Bundle, tmp_path: Path):
    found = choose(tmp_path, network, photographs(tmp_path, 240, slice(0, HEIGHT)))
    assert found is not None
    assert found.chosen == network.config.preprocessing
    assert all(score.top1 == 1 for score in found.scores)


def test_few_images_keep_the_crop_of_the_weights(
    network: Bundle, tmp_path: Path, log: pytest.LogCaptureFixture
):
    assert choose(tmp_path, network, photographs(tmp_path, 30, slice(0, HEIGHT))) is None
    assert "30 images of categories with at least 5 images are too few to compare crops" in log.text
    assert not (tmp_path / "crop.json").exists()


def test_slow_network_keeps_the_crop_of_the_weights(
    network: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
):
    monkeypatch.setattr(crop_choice, "_MAX_CPU_SECONDS", 0.001)
    assert choose(tmp_path, network, photographs(tmp_path, 240, slice(0, HEIGHT))) is None
    assert "too slow to compare crops" in log.text


def test_resumed_run_uses_the_recorded_choice(network: Bundle, tmp_path: Path):
    manifest = photographs(tmp_path, 240, slice(HEIGHT - 16, HEIGHT))
    first = choose(tmp_path, network, manifest)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert choose(tmp_path, network, manifest) == first


def test_bundle_that_knows_a_category_keeps_its_crop(network: Bundle, tmp_path: Path):
    manifest = photographs(tmp_path, 240, slice(HEIGHT - 16, HEIGHT))
    labels = ("label 0", "label 7")
    known = network.with_weights(network.weights, labels=labels, untrained_head=False)
    settings = config(tmp_path, manifest)
    assert with_chosen_crop(settings, known, known, examples(manifest), Storage()) == (known, None)
    changed, choice = with_chosen_crop(settings, network, None, examples(manifest), Storage())
    assert choice is not None
    assert changed.config.preprocessing == choice.chosen != network.config.preprocessing
    unchanged = config(tmp_path, manifest, crop="weights")
    assert with_chosen_crop(unchanged, network, None, examples(manifest), Storage()) == (network, None)


@pytest.mark.parametrize(
    ("area", "aspect", "expected"),
    [
        (224 * 224, 4 / 3, (256, 192)),
        (224 * 224, 3 / 4, (192, 256)),
        (224 * 224, 1.05, (224, 224)),
        (224 * 224, 16 / 9, (288, 160)),
        (64 * 64, 2.0, (96, 48)),
        (32 * 32, 1 / 8, (16, 64)),
    ],
)
def test_rectangle_has_the_aspect_ratio_of_the_images(area: int, aspect: float, expected: tuple[int, int]):
    assert crop_choice._rectangle(area, aspect) == expected


def scored(losses: list[np.ndarray], last: Preprocessing) -> list[CropScore]:
    """Scores of candidates with these losses; the last one has the preprocessing `last`."""
    square = Preprocessing(
        input_height=64, input_width=64, resize_height=64, resize_width=64, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    scores = []
    for number, values in enumerate(losses):
        gain, gain_error = crop_choice._difference(losses[0], values)
        preprocessing = last if number == len(losses) - 1 else square
        scores.append(
            CropScore(
                name=str(number),
                preprocessing=preprocessing,
                top1=0.5,
                loss=float(values.mean()),
                visible=1.0,
                gain=gain,
                gain_error=gain_error,
            )
        )
    return scores


@pytest.mark.parametrize(
    ("gain_in_errors", "best_gain", "trains_network", "expected"),
    [
        (0.5, 0.5, True, 2),
        (-0.5, 0.5, True, 2),
        (-1.5, 0.5, True, 1),
        (0.5, 0.5, False, 1),
        (0.5, 0.0, True, 0),
    ],
)
def test_trained_network_gets_the_rectangle_unless_it_is_worse_than_the_crop_of_the_weights(
    gain_in_errors: float, best_gain: float, trains_network: bool, expected: int
):
    """The standard error of a difference is known: half of its values deviate by one in each direction."""
    count = 400
    deviation = np.tile(np.array([1.0, -1.0], np.float32), count // 2)
    weights = np.full(count, 2.0, np.float32)
    best = weights - np.float32(best_gain) + 0.1 * deviation
    rectangle = weights - np.float32(gain_in_errors / count**0.5) + deviation
    shape = Preprocessing(
        input_height=96, input_width=48, resize_height=96, resize_width=48, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    scores = scored([weights, best, rectangle], shape)
    assert crop_choice._select(scores, trains_network=trains_network).name == str(expected)
