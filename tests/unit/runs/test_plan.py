"""Fingerprints and the rule for reusing predictions, derived from the marks on the settings."""

import json
from typing import Any

from batchcls.config.classify_config import ClassifyConfig
from batchcls.models.label_map import LabelMap
from batchcls.runs.plan import Fingerprints, prediction_settings

PER_IMAGE: dict[str, Any] = {
    "abstain": False,
    "allow_private_addresses": False,
    "allowed_root": [],
    "cascade": None,
    "embedding_dtype": "float16",
    "l2_normalize": False,
    "max_image_bytes": 52428800,
    "max_image_pixels": 89478485,
    "min_image_side_pixels": 8,
    "normalize": "engine",
    "top_k": 5,
    "tta": "none",
}
OTHERS: dict[str, Any] = {
    "device": "auto",
    "engine": "auto",
    "id_column": "item_id",
    "int8_min_agreement": None,
    "keep": [],
    "limit": None,
    "min_embedding_cosine": 0.999,
    "min_top1_agreement": 0.99,
    "precision": "auto",
    "scaled_decode": "auto",
}
CONFIG = ClassifyConfig(manifest="catalog.parquet", model="m", output="out")


def test_fingerprints_hold_all_settings_that_change_results():
    """A setting that is missing here would let a run resume with other results; an extra one would block it."""
    settings = Fingerprints.of(CONFIG, "f", "m").settings
    assert json.dumps(settings, sort_keys=True) == json.dumps(PER_IMAGE | OTHERS, sort_keys=True)


def test_predictions_are_reused_by_settings_that_act_on_single_images():
    settings = prediction_settings(CONFIG, ["fp32", "bf16", "fp32"], 1.5)
    identity = {"precisions": ["bf16", "fp32"], "decode_margin": 1.5}
    assert json.dumps(settings, sort_keys=True) == json.dumps(PER_IMAGE | identity, sort_keys=True)


def test_settings_that_only_turn_embeddings_into_predictions():
    layers = CONFIG.setting_layers()
    assert layers.keys() == PER_IMAGE.keys()
    assert [name for name in sorted(layers) if layers[name] == "prediction"] == [
        "abstain",
        "cascade",
        "top_k",
    ]
    assert [name for name in sorted(layers) if layers[name] == "embedding"] == [
        "embedding_dtype",
        "l2_normalize",
    ]


def test_differences_name_the_changed_flags():
    changed = ClassifyConfig(manifest="catalog.parquet", model="m", output="out", top_k=3, fetch_attempts=2)
    differences = Fingerprints.of(CONFIG, "f", "m").differences(Fingerprints.of(changed, "f", "m"))
    assert differences == ["--top-k (it was 5 and is 3)"]


def test_contents_of_the_label_map_are_part_of_the_identity_and_its_path_is_not():
    plain, mapped = (
        Fingerprints.of(CONFIG, "f", "m", found) for found in (None, LabelMap(rename={"a": "b"}))
    )
    moved = CONFIG.model_copy(update={"label_map": "elsewhere.toml"})
    assert Fingerprints.of(moved, "f", "m", LabelMap(rename={"a": "b"})).differences(mapped) == []
    (difference,) = plain.differences(mapped)
    assert difference.startswith("the label map (it was none and is ")
