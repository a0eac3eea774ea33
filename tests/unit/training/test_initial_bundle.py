"""Tests for the initial bundle: a new classifier for the categories on a pretrained backbone."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.images.load_config import decode_limits, fetch_policy
from batchcls.inference.golden_record import with_golden
from batchcls.manifest.labeled_manifest import open_labeled_manifest, read_label_column
from batchcls.models.build import build_model
from batchcls.models.model_bundle import Bundle, BundleConfig, Calibration, HeldOut
from batchcls.storage.filesystem import Storage
from batchcls.training.categories import complete_category_paths
from batchcls.training.initial_bundle import TrainingExamples, make_initial_bundle, open_initial_bundle
from batchcls.training.linear_probe.embeddings import EmbeddingSettings, embed_images
from batchcls.training.linear_probe.extended_bundle import images_of_manifest
from batchcls.training.linear_probe.labeled_embeddings import LinearHead
from batchcls.training.linear_probe.probe_job import replace_head
from batchcls.training.trained_bundle import TrainingResult, trained_bundle
from tests.helpers.color_images import color_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ("bag", "cap", "mug")


def config(model: str, **changes: object) -> FinetuneConfig:
    known = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": 64, "crop_pct": 0.9}
    chosen = (known if model.startswith("timm:") else {}) | changes
    return FinetuneConfig(manifest="m", validation="v", output="o", model=model, **chosen)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    return str(path)


def start(chosen: FinetuneConfig, labels: tuple[str, ...] = LABELS) -> Bundle:
    return make_initial_bundle(chosen, open_initial_bundle(chosen, Storage()), labels, Storage())


def test_named_weights_get_a_zero_classifier(weights: str):
    made = start(config("timm:test_resnet", weights=weights))
    assert made.config.labels == LABELS
    assert made.config.untrained_head
    assert not made.publishable
    model = build_model(made).eval()
    assert not model.fc.weight.any()
    assert torch.equal(model(torch.randn(2, 3, 64, 64)), torch.zeros(2, 3))
    trained = timm.create_model("test_resnet", num_classes=7)
    trained.load_state_dict(load_file(weights))
    assert torch.equal(model.conv1[0].weight, trained.conv1[0].weight)


def test_bundle_keeps_its_classifier_if_the_categories_are_equal(weights: str, tmp_path: Path):
    made = start(config("timm:test_resnet", weights=weights))
    state = build_model(made).state_dict()
    moved = {k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()}
    trained = trained_bundle(made, TrainingResult(moved, ()), "run-1", {"digest": "x"})
    assert trained.publishable
    assert trained.config.golden is not None
    assert trained.config.preprocessing == made.config.preprocessing
    assert trained.config.lineage["start"]["weights"]["kind"] == "file"
    folder = str(tmp_path / "bundle")
    trained.save(folder, Storage())
    again = start(config(folder))
    assert again.fingerprint == trained.fingerprint
    other = start(config(folder), ("bowl", "plate"))
    assert other.config.labels == ("bowl", "plate")
    assert not build_model(other).fc.weight.any()
    assert torch.equal(build_model(other).conv1[0].weight, build_model(trained).conv1[0].weight)


def with_random_head(bundle: Bundle) -> Bundle:
    state = build_model(bundle).state_dict()
    state |= {"fc.weight": torch.randn(3, 96), "fc.bias": torch.randn(3)}
    return trained_bundle(bundle, TrainingResult(state, ()), "run-1", {"digest": "x"})


def test_known_categories_keep_their_rows_in_another_order(weights: str, tmp_path: Path):
    trained = with_random_head(start(config("timm:test_resnet", weights=weights)))
    trained.save(str(tmp_path / "bundle"), Storage())
    made = start(config(str(tmp_path / "bundle")), ("mug", "plate", "bag"))
    before, after = build_model(trained).state_dict(), build_model(made).state_dict()
    for name, value in before.items():
        if not name.startswith("fc."):
            assert torch.equal(after[name], value), name
            continue
        assert torch.equal(after[name][0], value[LABELS.index("mug")])
        assert torch.equal(after[name][2], value[LABELS.index("bag")])
        torch.testing.assert_close(after[name][1], value[[0, 2]].mean(0))
    assert made.config.labels == ("mug", "plate", "bag")
    assert not made.publishable
    assert made.config.lineage["kept_categories"] == 2


def test_new_categories_start_from_their_images(weights: str, tmp_path: Path):
    trained = with_random_head(start(config("timm:test_resnet", weights=weights)))
    trained.save(str(tmp_path / "bundle"), Storage())
    uri = color_manifest(tmp_path, "train", 36, 0, ("bag", "cap", "red"), {"bag": "blue", "cap": "green"})
    chosen, storage = config(str(tmp_path / "bundle")), Storage()
    manifest = open_labeled_manifest(uri, storage, "label")
    examples = TrainingExamples(manifest, read_label_column(manifest, storage))
    labels = ("bag", "cap", "red")
    made = make_initial_bundle(chosen, open_initial_bundle(chosen, storage), labels, storage, examples)
    before, after = build_model(trained).state_dict(), build_model(made).eval()
    assert torch.equal(after.fc.weight[:2], before["fc.weight"][:2])
    assert torch.equal(after.fc.bias[:2], before["fc.bias"][:2])
    network = with_golden(made)
    images = images_of_manifest(manifest, examples.labels, dict.fromkeys(labels), storage)
    embedding = EmbeddingSettings(fetch_policy(chosen), decode_limits(chosen))
    embedded = embed_images(network, images.rows, images.base, embedding)
    is_red = torch.tensor([label == "red" for label in images.labels])
    with torch.no_grad():
        predicted = after.fc(torch.from_numpy(embedded.values)).argmax(1) == 2
    assert predicted[is_red].float().mean() > 0.9
    assert predicted[~is_red].float().mean() < 0.1


def test_from_scratch_keeps_the_initial_values_of_the_library():
    made = start(config("timm:test_resnet", from_scratch=True))
    assert made.config.weights.kind == "random"
    assert build_model(made).fc.weight.any()


def test_flags_that_contradict_a_bundle_are_rejected(weights: str, tmp_path: Path):
    folder = str(tmp_path / "bundle")
    start(config("timm:test_resnet", weights=weights)).save(folder, Storage())
    with pytest.raises(InputError, match="--from-scratch: --model is a bundle"):
        open_initial_bundle(config(folder, from_scratch=True), Storage())
    with pytest.raises(InputError, match="not possible with a bundle as --model"):
        open_initial_bundle(config(folder, input_size=96), Storage())


PATHS = (("wear", "bag"), ("wear", "cap"), ("home", "mug"))


def calibrated(bundle: Bundle, **changes: object) -> Bundle:
    """A bundle as written by `evaluate --write-bundle`, with a category tree."""
    found = Calibration(
        temperature=1.7,
        ece_before=0.1,
        ece_after=0.05,
        target_precision=0.95,
        thresholds=(0.5,) * len(bundle.config.labels),
        depth_thresholds=(0.4, 0.6),
        held_out=HeldOut(rows=10, precision=0.95, coverage=0.5),
        rows=10,
        manifest_fingerprint="m",
    )
    record = bundle.config.model_dump() | {"calibration": found, "category_paths": PATHS} | changes
    return with_golden(Bundle(BundleConfig.model_validate(record), bundle.weights))


def trained_on(bundle: Bundle) -> Bundle:
    state = build_model(bundle).state_dict()
    moved = {k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()}
    return trained_bundle(bundle, TrainingResult(moved, ()), "run-1", {"digest": "x"})


@pytest.mark.parametrize(
    ("labels", "paths"),
    [
        (LABELS, PATHS),
        (LABELS[::-1], PATHS[::-1]),
        (("cap", "bag"), (PATHS[1], PATHS[0])),
        (("bag", "cap", "mug", "plate"), (*PATHS, ("plate",))),
        (("bowl", "plate"), None),
    ],
)
@pytest.mark.parametrize("probe", [False, True])
def test_training_from_a_calibrated_bundle_drops_invalid_metadata(
    weights: str, tmp_path: Path, log: pytest.LogCaptureFixture, labels: tuple[str, ...], paths, probe: bool
):
    named = start(config("timm:test_resnet", weights=weights))
    before = calibrated(named, embedding_tap="stage2", embedding_dimension=32, untrained_head=False)
    before.save(str(tmp_path / "calibrated"), Storage())
    chosen = config(str(tmp_path / "calibrated"))
    opened = open_initial_bundle(chosen, Storage())
    if probe:
        head = LinearHead(torch.randn(len(labels), 96), torch.zeros(len(labels)))
        after = replace_head(
            opened, head, labels, complete_category_paths(opened.config, labels), "run-1", {}
        )
    else:
        after = trained_on(make_initial_bundle(chosen, opened, labels, Storage()))
        assert "the calibration of --model (temperature 1.7 and thresholds)" in log.text
        assert ("the category paths of --model name none of the categories" in log.text) == (paths is None)
    after.save(str(tmp_path / "made"), Storage())
    found = Bundle.load(str(tmp_path / "made"), Storage()).config
    assert found.calibration is None
    assert found.category_paths == paths
    assert (found.embedding_tap, found.embedding_dimension) == ("stage2", 32)
    assert found.golden is not None
    assert found.golden != opened.config.golden
    assert (after.publishable, found.weights.kind, found.weights.name) == (True, "trained", "run-1")


def test_invalid_bundle_is_not_saved(weights: str, tmp_path: Path):
    made = start(config("timm:test_resnet", weights=weights))
    made.save(str(tmp_path / "bundle"), Storage())
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "bundle").iterdir())
    # model_copy does not validate, so it can create such a record
    broken = Bundle(
        made.config.model_copy(update={"labels": ("bag",), "category_paths": PATHS}), made.weights
    )
    with pytest.raises(InputError, match="category_paths has 3 entries for 1 labels"):
        broken.save(str(tmp_path / "bundle"), Storage())
    assert before == sorted((path.name, path.read_bytes()) for path in (tmp_path / "bundle").iterdir())
    with pytest.raises(InputError, match="contains NaN or infinity"):
        trained_bundle(
            made,
            TrainingResult({k: v * float("nan") for k, v in build_model(made).state_dict().items()}, ()),
            "run-1",
            {},
        )
