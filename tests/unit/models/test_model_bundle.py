import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from batchcls.errors import InputError
from batchcls.models.build import build_backbone
from batchcls.models.model_bundle import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Bundle,
    BundleConfig,
    WeightsOrigin,
    sha256_hex,
)
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.preprocessing import Preprocessing
from batchcls.storage.filesystem import Storage

pytestmark = pytest.mark.usefixtures("one_thread")

PINNED_FINGERPRINT = "8825d449c0ba535148bb4d2ceaca410876b88d0a45b1baf10abf8c90cdc5944b"


def _bundle(folder: Path, seed_labels: str = "mug\nplate\nvase\n") -> Bundle:
    labels = folder / "labels.txt"
    labels.write_text(seed_labels)
    choices = ModelChoices(
        labels=str(labels),
        arguments={"pad_type": "same"},
        overrides=PreprocessingOverrides(input_size=64),
        allow_random=True,
        lineage={"made_by": "a test"},
    )
    return resolve_model("timm:mobilenetv3_small_050", choices, Storage())


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return _bundle(tmp_path)


def _edit(folder: Path, **changes) -> None:
    record = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**record, **changes}))


def test_saved_bundle_loads_unchanged(bundle, tmp_path):
    bundle.save(str(tmp_path / "b"), Storage())
    loaded = Bundle.load(str(tmp_path / "b"), Storage())
    assert loaded == bundle
    assert loaded.fingerprint == bundle.fingerprint
    assert loaded.config.arguments == {"pad_type": "same"}
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_bundle_round_trips_through_memory_store(bundle):
    bundle.save("memory://models/b", Storage())
    assert Bundle.load("memory://models/b", Storage()) == bundle


class _Recorder(Storage):
    """A storage that records the order of its writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def write_atomic(self, uri: str, data: bytes) -> None:
        super().write_atomic(uri, data)
        self.written.append(Path(uri).name)


def test_record_is_written_last(bundle, tmp_path):
    storage = _Recorder()
    bundle.save(str(tmp_path / "b"), storage)
    assert storage.written == [WEIGHTS_FILE, CONFIG_FILE]


def test_backbone_has_the_weights_of_the_bundle(bundle):
    state = from_safetensors(bundle.weights, "x")
    state["classifier.bias"] += torch.tensor([0.0, 1000.0, 0.0])
    weights = to_safetensors(state)
    config = bundle.config.model_copy(
        update={"weights": bundle.config.weights.model_copy(update={"sha256": sha256_hex(weights)})}
    )
    backbone = build_backbone(Bundle(config, weights))
    logits, embedding = backbone(torch.zeros(1, 3, 64, 64))
    assert int(logits.argmax()) == 1
    assert embedding.shape[1] == config.embedding_dimension == backbone.dimension


def test_fingerprint_is_independent_of_key_order(bundle, tmp_path):
    bundle.save(str(tmp_path / "b"), Storage())
    record = json.loads((tmp_path / "b" / CONFIG_FILE).read_text())
    (tmp_path / "b" / CONFIG_FILE).write_text(json.dumps(dict(reversed(record.items()))))
    assert Bundle.load(str(tmp_path / "b"), Storage()).fingerprint == bundle.fingerprint


def test_fingerprint_is_stable():
    weights = b"any bytes"
    config = BundleConfig(
        source="timm",
        architecture="resnet18",
        arguments={"drop_rate": 0.1, "act_layer": None},
        labels=("Tasse für Tee", "mug"),
        preprocessing=Preprocessing(
            input_height=224,
            input_width=224,
            resize_height=256,
            resize_width=256,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        embedding_dimension=512,
        weights=WeightsOrigin(kind="file", name="w.safetensors", sha256=sha256_hex(weights)),
    )
    assert Bundle(config, weights).fingerprint == PINNED_FINGERPRINT


def test_fingerprint_covers_every_part_of_the_bundle(bundle, tmp_path):
    config = bundle.config
    mean = config.preprocessing.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    state = from_safetensors(bundle.weights, "x")
    state["classifier.bias"] += 1
    weights = to_safetensors(state)
    origin = config.weights.model_copy(update={"sha256": sha256_hex(weights)})
    changed = [
        Bundle(config.model_copy(update={"labels": ("plate", "mug", "vase")}), bundle.weights),
        Bundle(config.model_copy(update={"preprocessing": mean}), bundle.weights),
        Bundle(config.model_copy(update={"lineage": {}}), bundle.weights),
        Bundle(config.model_copy(update={"weights": origin}), weights),
    ]
    assert len({bundle.fingerprint, *(other.fingerprint for other in changed)}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [float("nan"), 0.5, 0.5]}, "NaN is not a JSON value"),
        ({"std": [0.5, float("inf"), 0.5]}, "Infinity is not a JSON value"),
        ({"mean": [0.5, -0.5, 0.5]}, r"mean: .*mean must be in 0\.\.1"),
        ({"mean": [123.675, 116.28, 103.53]}, r"mean: .*mean must be in 0\.\.1"),
        ({"std": [0.5, 0.0, 0.5]}, "std: .*std must be above 0"),
        ({"std": [-0.5, 0.5, 0.5]}, "std: .*std must be above 0"),
        ({"std": [1e-40, 0.5, 0.5]}, "std: .*std must be above 0"),
        ({"std": [1e300, 0.5, 0.5]}, "std: .*std must be above 0"),
        ({"input_height": 10**6, "resize_height": 10**6}, "input_height: .*less than or equal to 4096"),
        ({"resize_width": 10**6}, "resize_width: .*less than or equal to 16384"),
        ({"input_width": 10**400}, "input_width|damaged"),
    ],
)
def test_invalid_preprocessing_is_rejected(bundle, tmp_path, changes, message):
    bundle.save(str(tmp_path / "b"), Storage())
    record = json.loads((tmp_path / "b" / CONFIG_FILE).read_text())
    _edit(tmp_path / "b", preprocessing=record["preprocessing"] | changes)
    with pytest.raises(InputError, match=message):
        Bundle.load(str(tmp_path / "b"), Storage())


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_numbers_that_overflow_are_rejected(bundle, tmp_path, number):
    bundle.save(str(tmp_path / "b"), Storage())
    text = (tmp_path / "b" / CONFIG_FILE).read_text()
    for name in ("mean", "std"):
        start = text.index("[", text.index(f'"{name}"')) + 1
        (tmp_path / "b" / CONFIG_FILE).write_text(f"{text[:start]}{number}{text[text.index(',', start) :]}")
        with pytest.raises(InputError, match=f"{name} must be"):
            Bundle.load(str(tmp_path / "b"), Storage())


def test_deeply_nested_record_is_rejected(tmp_path):
    (tmp_path / CONFIG_FILE).write_text("[" * 100_000)
    with pytest.raises(InputError, match="is damaged"):
        Bundle.load(str(tmp_path), Storage())


def test_non_finite_lineage_values_are_saved_as_null(bundle, tmp_path):
    history = {"loss": [1.0, float("nan"), float("inf")], "best": (float("-inf"), 1)}
    config = BundleConfig.model_validate(bundle.config.model_dump() | {"lineage": history})
    Bundle(config, bundle.weights).save(str(tmp_path / "b"), Storage())
    loaded = Bundle.load(str(tmp_path / "b"), Storage())
    assert loaded.config.lineage == {"loss": [1.0, None, None], "best": [None, 1]}
    assert loaded.fingerprint == Bundle(config, bundle.weights).fingerprint


def test_folder_without_record_is_rejected_with_a_remedy(tmp_path):
    with pytest.raises(InputError, match=r"is not a bundle.*bundle create.*timm:NAME"):
        Bundle.load(str(tmp_path), Storage())


def test_missing_folder_is_rejected_with_a_similar_name(bundle, tmp_path):
    bundle.save(str(tmp_path / "shop-v8"), Storage())
    with pytest.raises(InputError, match=r"shop-v9 does not exist; did you mean shop-v8\?.*timm:NAME"):
        Bundle.load(str(tmp_path / "shop-v9"), Storage())


def test_bundle_without_weights_is_rejected(bundle, tmp_path):
    bundle.save(str(tmp_path / "b"), Storage())
    (tmp_path / "b" / WEIGHTS_FILE).unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: there is no such file"):
        Bundle.load(str(tmp_path / "b"), Storage())


def test_flipped_bit_in_weights_is_detected(bundle, tmp_path):
    bundle.save(str(tmp_path / "b"), Storage())
    data = bytearray(bundle.weights)
    data[-100] ^= 1
    (tmp_path / "b" / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(InputError, match=r"is not the file that bundle\.json describes"):
        Bundle.load(str(tmp_path / "b"), Storage())


def test_files_of_two_bundles_are_detected(bundle, tmp_path):
    bundle.save(str(tmp_path / "b"), Storage())
    other = _bundle(tmp_path, "red\ngreen\n")
    (tmp_path / "b" / WEIGHTS_FILE).write_bytes(other.weights)
    with pytest.raises(InputError, match=r"copy the bundle again or create it again"):
        Bundle.load(str(tmp_path / "b"), Storage())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, r"has format version 1, but this version of batchcls reads 2"),
        ({"color": "red"}, r"color: Extra inputs are not permitted"),
        ({"source": "keras"}, r"source: Input should be 'timm' or 'torchvision'"),
        ({"labels": ["mug", "mug", "vase"]}, r"'mug' is a duplicate of 1"),
        ({"category_paths": [["home", "mugs"]]}, r"1 entries for 3 labels"),
        ({"embedding_dimension": 0}, r"embedding_dimension: .*greater than 0"),
    ],
)
def test_inconsistent_record_is_rejected(bundle, tmp_path, changes, message):
    bundle.save(str(tmp_path / "b"), Storage())
    _edit(tmp_path / "b", **changes)
    with pytest.raises(InputError, match=message):
        Bundle.load(str(tmp_path / "b"), Storage())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe"])
def test_record_that_is_not_json_is_rejected(bundle, tmp_path, data):
    bundle.save(str(tmp_path / "b"), Storage())
    (tmp_path / "b" / CONFIG_FILE).write_bytes(data)
    with pytest.raises(InputError, match=r"bundle\.json (is damaged|has format version None)"):
        Bundle.load(str(tmp_path / "b"), Storage())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("mug", "plate")}, r"classifier\.weight is \(3, \d+\) and should be \(2, \d+\)"),
        ({"embedding_dimension": 5}, r"bundle\.json specifies 5"),
        ({"architecture": "mobilenetv3_huge"}, r"there is no model timm:mobilenetv3_huge"),
        ({"architecture": "mobilenetv2_100"}, r"model\.safetensors does not fit EfficientNet"),
        ({"arguments": {"checkpoint_path": "x"}}, r"--model-args checkpoint_path"),
    ],
)
def test_record_that_does_not_fit_the_weights_is_rejected(bundle, changes, message):
    with pytest.raises(InputError, match=message):
        build_backbone(replace(bundle, config=bundle.config.model_copy(update=changes)))


def test_random_weights_are_not_publishable(bundle):
    assert not bundle.publishable
    trained = bundle.config.weights.model_copy(update={"kind": "trained", "name": "run-1"})
    assert Bundle(bundle.config.model_copy(update={"weights": trained}), bundle.weights).publishable


def test_bundle_modified_during_transfer_is_rejected(bundle):
    expected = bundle.fingerprint
    pickle.loads(pickle.dumps(bundle)).verify(expected)
    renamed = pickle.loads(pickle.dumps(bundle))
    object.__setattr__(renamed, "config", bundle.config.model_copy(update={"labels": ("a", "b", "c")}))
    with pytest.raises(InputError, match="another model"):
        renamed.verify(expected)
    damaged = pickle.loads(pickle.dumps(bundle))
    object.__setattr__(damaged, "weights", bundle.weights[:-1] + b"?")
    with pytest.raises(InputError, match="sha256"):
        damaged.verify(expected)


@pytest.mark.parametrize(
    ("kind", "name", "text"), [("file", "shop.pth", "file shop.pth"), ("random", "random", "random")]
)
def test_origin_of_weights_is_readable(kind: str, name: str, text: str):
    origin = WeightsOrigin.model_validate({"kind": kind, "name": name, "sha256": "0" * 64})
    assert str(origin) == text
