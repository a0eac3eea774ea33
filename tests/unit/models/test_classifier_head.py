"""The linear classifier of a bundle without PyTorch, and the fingerprints of the parts of a bundle."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from batchcls.errors import InputError
from batchcls.inference.golden_record import with_golden
from batchcls.models.build import build_backbone
from batchcls.models.classifier_head import ClassifierHead, layers_of
from batchcls.models.label_map import LabelMap, LabelSplit, SplitRule
from batchcls.models.mapped_classes import MappedClasses
from batchcls.models.model_bundle import Bundle, Calibration, HeldOut
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.storage.filesystem import Storage

pytestmark = pytest.mark.usefixtures("one_thread")


def _bundle(tmp_path, name="timm:test_resnet", tap="pooled") -> Bundle:
    labels = tmp_path / "labels.txt"
    labels.write_text("mug\nplate\nvase\n")
    choices = ModelChoices(
        labels=str(labels), overrides=PreprocessingOverrides(input_size=64), tap=tap, allow_random=True
    )
    return with_golden(resolve_model(name, choices, Storage()))


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return _bundle(tmp_path)


def _with_config(bundle: Bundle, **changes) -> Bundle:
    return replace(bundle, config=bundle.config.model_copy(update=changes))


def _with_state(bundle: Bundle, change) -> Bundle:
    state = from_safetensors(bundle.weights, "w")
    change(state)
    return bundle.with_weights(to_safetensors(state))


def _changed(before: Bundle, after: Bundle) -> set[str]:
    first, second = layers_of(before), layers_of(after)
    return {name for name in type(first).model_fields if getattr(first, name) != getattr(second, name)}


CALIBRATION = Calibration(
    temperature=2.0,
    ece_before=0.1,
    ece_after=0.1,
    target_precision=0.9,
    thresholds=(0.5, 0.5, None),
    held_out=HeldOut(rows=1, precision=None, coverage=0.0),
    rows=1,
    manifest_fingerprint="f",
)


def test_logits_are_those_of_the_network(bundle):
    head = ClassifierHead.of(bundle)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits, embedding = build_backbone(bundle)(images)
    np.testing.assert_allclose(head.logits(embedding.numpy()), logits.numpy(), rtol=1e-4, atol=1e-5)
    read = ClassifierHead.from_safetensors(head.to_safetensors())
    assert (read.digest, read.weight.tolist()) == (head.digest, head.weight.tolist())


def test_each_change_affects_only_its_part(bundle):
    weight, bias = bundle.config.head_tensors
    calibrated = _with_config(bundle, calibration=CALIBRATION)
    preprocessing = bundle.config.preprocessing.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    assert _changed(bundle, _with_config(bundle, labels=("mug", "plate", "jar"))) == {"labels"}
    assert _changed(bundle, _with_config(bundle, category_paths=(("a",), ("b",), ("c",)))) == {
        "category_paths"
    }
    assert _changed(bundle, calibrated) == {"temperature", "thresholds"}
    assert _changed(bundle, _with_config(bundle, preprocessing=preprocessing)) == {"preprocessing"}
    assert _changed(bundle, _with_config(bundle, arguments={"act_layer": "silu"})) == {"trunk"}
    for name in (weight, bias):
        assert _changed(bundle, _with_state(bundle, lambda state, name=name: state[name].add_(1))) == {"head"}
    trunk = next(name for name in from_safetensors(bundle.weights, "w") if name.endswith("running_mean"))
    assert _changed(bundle, _with_state(bundle, lambda state: state[trunk].add_(1))) == {"trunk"}


def test_training_settings_and_stored_types_change_nothing(bundle):
    training = {"dropout": 0.3, "trainable": ("fc.*",), "lineage": {"by": "a test"}, "golden": None}
    assert _changed(bundle, _with_config(bundle, **training)) == set()
    rounded = _with_state(
        bundle,
        lambda state: state.update({k: v.half().float() for k, v in state.items() if v.is_floating_point()}),
    )
    half = _with_state(
        bundle, lambda state: state.update({k: v.half() for k, v in state.items() if v.is_floating_point()})
    )
    assert half.weights != rounded.weights
    assert _changed(rounded, half) == set()
    brain = _with_state(
        bundle,
        lambda state: state.update({k: v.bfloat16() for k, v in state.items() if v.is_floating_point()}),
    )
    widened = _with_state(
        brain, lambda state: state.update({k: v.float() for k, v in state.items() if v.is_floating_point()})
    )
    assert _changed(brain, widened) == set()
    without_counters = _with_state(
        bundle, lambda state: [state.pop(k) for k in list(state) if k.endswith("num_batches_tracked")]
    )
    assert _changed(bundle, without_counters) == set()


def test_label_map_affects_classes_labels_and_what_follows_them(bundle):
    def changed(**tables) -> set[str]:
        mapped = MappedClasses.of(bundle.config, LabelMap(**tables))
        before, after = layers_of(bundle), layers_of(bundle, mapped)
        return {name for name in type(before).model_fields if getattr(before, name) != getattr(after, name)}

    first, second = bundle.config.labels[:2]
    split = LabelSplit(default=first, rules=(SplitRule(to="x", column="c", values=("1",)),))
    assert changed() == set()
    assert changed(rename={first: "x"}) == {"labels"}
    assert changed(split={first: split}) == {"labels"}
    assert changed(merge={"x": (first, second)}) == changed(retire={first: ""}) == {"labels", "classes"}


def test_all_weights_are_the_trunk_of_a_bundle_that_does_not_record_its_classifier(bundle):
    older = _with_config(bundle, head_tensors=None)
    assert "head_tensors" not in older.config.as_json()
    assert (ClassifierHead.of(older), layers_of(older).head) == (None, "")
    assert _changed(older, _with_config(older, labels=("a", "b", "c"))) == {"labels"}
    weight = bundle.config.head_tensors[0]
    assert _changed(older, _with_state(older, lambda state: state[weight].add_(1))) == {"trunk"}


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:levit_128s"])
def test_classifiers_that_are_not_one_linear_layer_are_recorded_as_such(tmp_path, name):
    size = {"timm:levit_128s": 224}.get(name, 64)
    labels = tmp_path / "labels.txt"
    labels.write_text("mug\nplate\nvase\n")
    choices = ModelChoices(
        labels=str(labels), overrides=PreprocessingOverrides(input_size=size), allow_random=True
    )
    bundle = with_golden(resolve_model(name, choices, Storage()))
    assert bundle.config.head_tensors == ()
    assert layers_of(bundle).head == ""


def test_recorded_classifier_must_be_in_the_weights(bundle):
    with pytest.raises(InputError, match=r"names the classifier head\.weight"):
        layers_of(_with_config(bundle, head_tensors=("head.weight",)))


def test_damaged_stored_classifier_is_rejected(bundle):
    data = ClassifierHead.of(bundle).to_safetensors()
    with pytest.raises(InputError, match="damaged"):
        ClassifierHead.from_safetensors(data[:-1])
