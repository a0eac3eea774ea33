from functools import cache

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn
from torchvision import models as torchvision_models

from batchcls.errors import InputError
from batchcls.models.flops import ModelCost, count_cost
from batchcls.models.model_spec import ModelSpec, PreprocessingOverrides
from batchcls.models.registry import (
    PublishedWeights,
    ZooRecord,
    describe_weights,
    find_record,
    make_record,
    published_weights,
    record_for_spec,
    zoo_records,
)
from batchcls.models.sources import find_model, get_library
from tests.helpers.tiers import zoo

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = pytest.mark.parametrize("record", zoo(), ids=lambda record: record.name)
OF_TORCHVISION = [record for record in zoo_records() if record.source == "torchvision"]
NAMES = """
    alexnet vgg16 googlenet inception_v3 resnet18 resnet34 resnet50 resnet101 resnet152 densenet121 densenet201
    mobilenet_v1 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_b1
    efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7
    efficientnet_lite0 efficientnet_lite1 efficientnet_lite2 efficientnet_lite3 efficientnet_lite4
    efficientnet_v2_s regnet_y_400mf regnet_y_3_2gf regnet_y_16gf convnext_tiny convnext_small convnext_base
    convnext_large convnextv2_tiny vit_b_16 swin_t
"""
# Published sizes in millions of parameters, as ranges that allow for rounding.
PUBLISHED_SIZES = {
    "alexnet": (61, 62),
    "vgg16": (137.5, 138.5),
    "googlenet": (6.6, 6.8),
    "resnet18": (11.65, 11.75),
    "resnet34": (21.75, 21.85),
    "resnet50": (25.55, 25.65),
    "resnet101": (44.45, 44.55),
    "resnet152": (60.15, 60.25),
    "densenet201": (19.5, 20.5),
    "efficientnet_b0": (5.25, 5.35),
    "efficientnet_b1": (7.75, 7.85),
    "efficientnet_b4": (19.25, 19.35),
    "efficientnet_b7": (66.3, 66.4),
    "convnext_tiny": (28.55, 28.65),
    "convnext_base": (88.55, 88.65),
    "convnext_large": (197.75, 197.85),
}
# The rule of thumb in the module's docstring: largest number of parameters -> images per category.
IMAGES_PER_CATEGORY = {6e6: 50, 15e6: 100, 35e6: 200, 70e6: 400, float("inf"): 800}


def _spec(record: ZooRecord, tag: str = "") -> ModelSpec:
    return find_model(f"{record.source}:{record.architecture}{tag and '.'}{tag}", {})


def _torchvision_meta(record: ZooRecord, tag: str) -> dict:
    return torchvision_models.get_model_weights(record.architecture)[tag].meta


def _build(record: ZooRecord) -> nn.Module:
    spec = _spec(record)
    if record.family == "RegNetY":  # computes its widths with tensors, which must not be on the meta device
        return get_library(spec).build(spec, None).to("meta").eval()
    with torch.device("meta"):
        return get_library(spec).build(spec, None).eval()


@cache
def _cost(record: ZooRecord) -> ModelCost:
    return count_cost(_build(record), (record.input_size, record.input_size))


def test_every_name_occurs_once():
    names = [record.name for record in zoo_records()]
    assert sorted(names) == sorted(NAMES.split())
    architectures = [(record.source, record.architecture) for record in zoo_records()]
    assert len(set(architectures)) == len(names)


def test_records_are_sorted_by_year_family_and_size():
    keys = [(record.year, record.family.lower(), record.parameters) for record in zoo_records()]
    assert keys == sorted(keys)


@EVERY
def test_parameters_match_the_network(record):
    assert _cost(record).parameters == record.parameters
    if record.name in PUBLISHED_SIZES:
        low, high = PUBLISHED_SIZES[record.name]
        assert low <= record.parameters / 1e6 <= high


@EVERY
def test_multiply_adds_match_the_network(record):
    assert _cost(record).multiply_adds == pytest.approx(record.multiply_adds, rel=0.01)
    if record.source == "torchvision":
        operations = _torchvision_meta(record, "DEFAULT")["_ops"]
        assert record.multiply_adds / 1e9 == pytest.approx(operations, rel=0.03)


def test_auxiliary_heads_are_not_counted():
    published_parameters = _torchvision_meta(find_record("inception_v3"), "DEFAULT")["num_params"]
    assert published_parameters - _cost(find_record("inception_v3")).parameters > 3e6
    names = [name for name, _ in _build(find_record("googlenet")).named_parameters()]
    assert names
    assert not [name for name in names if name.startswith("aux")]


@EVERY
def test_input_size_matches_the_preprocessing(record):
    spec = _spec(record)
    preprocessing = get_library(spec).preprocessing(spec, PreprocessingOverrides())
    assert preprocessing.input_height == preprocessing.input_width == record.input_size
    assert record.weights[0].input_size == record.input_size


@EVERY
def test_every_tag_exists_with_its_input_size(record):
    tags = [entry.tag for entry in record.weights]
    assert len(set(tags)) == len(tags)
    for entry in record.weights:
        spec = _spec(record, entry.tag)
        size = get_library(spec).preprocessing(spec, PreprocessingOverrides()).input_height
        assert size == entry.input_size


@EVERY
def test_default_is_the_librarys_and_the_most_accurate_of_its_license_and_size(record):
    default, *others = record.weights
    if record.source == "torchvision":
        weights = torchvision_models.get_model_weights(record.architecture)
        assert default.tag == weights.DEFAULT.name
    else:
        assert default.tag == timm.models.get_pretrained_cfg(record.architecture).tag
    alike = [o for o in others if (o.license, o.input_size) == (default.license, default.input_size)]
    assert all(other.top1 <= default.top1 for other in alike)


@pytest.mark.parametrize("record", OF_TORCHVISION, ids=lambda record: record.name)
def test_torchvision_weights_are_complete_with_published_accuracy(record):
    weights = torchvision_models.get_model_weights(record.architecture)
    classifiers = {member.name for member in weights} - {"IMAGENET1K_FEATURES"}
    assert {entry.tag for entry in record.weights} == classifiers
    for entry in record.weights:
        meta = weights[entry.tag].meta
        assert entry.top1 == meta["_metrics"]["ImageNet-1K"]["acc@1"]
        assert meta["recipe"] in entry.recipe
        assert (meta.get("license") or "") in (entry.license or "")
        assert bool(meta.get("license")) == bool(entry.license)


@pytest.mark.parametrize(
    "record", [r for r in zoo_records() if r.source == "timm"], ids=lambda record: record.name
)
def test_licenses_of_timm_weights(record):
    for entry in record.weights:
        license = timm.models.get_pretrained_cfg(f"{record.architecture}.{entry.tag}").license
        assert (license == "apache-2.0") == (entry.license is None)
        assert (license == "cc-by-nc-4.0") == (entry.license or "").startswith("CC-BY-NC 4.0")


@EVERY
def test_labeled_images_follow_the_documented_rule(record):
    images = next(n for limit, n in IMAGES_PER_CATEGORY.items() if record.parameters <= limit)
    assert record.labeled_images_per_category == images * (2 if record.family == "ViT" else 1)


@EVERY
def test_notes_are_sentences(record):
    for text in filter(None, (record.key_idea, record.use_case, record.warning)):
        assert text.endswith(".")
        assert "\n" not in text


@pytest.mark.parametrize(
    "name", ["alexnet", "vgg16", "googlenet", "inception_v3", "vit_b_16", "efficientnet_b7"]
)
def test_backbones_with_limitations_have_a_warning(name):
    assert find_record(name).warning


def test_most_parameters_of_vgg_are_in_the_head():
    head = sum(parameter.numel() for parameter in _build(find_record("vgg16")).classifier.parameters())
    assert head > 0.85 * find_record("vgg16").parameters


def test_resnet50_has_two_sets_of_weights():
    figures = {entry.tag: entry.top1 for entry in find_record("resnet50").weights}
    assert figures == {"IMAGENET1K_V2": 80.858, "IMAGENET1K_V1": 76.130}


def test_unknown_name_has_no_record():
    assert find_record("resnet51") is None
    assert find_record("ResNet50") is None


def test_record_is_found_for_any_tag():
    assert record_for_spec(ModelSpec("torchvision", "resnet50.IMAGENET1K_V1")) is find_record("resnet50")
    assert record_for_spec(ModelSpec("timm", "tf_efficientnet_lite4.in1k")) is find_record(
        "efficientnet_lite4"
    )
    assert record_for_spec(ModelSpec("timm", "resnet50")) is None


def test_published_weights_of_tag_or_default():
    assert published_weights(ModelSpec("torchvision", "resnet50")).top1 == 80.858
    assert published_weights(ModelSpec("torchvision", "resnet50.DEFAULT")).tag == "IMAGENET1K_V2"
    assert published_weights(ModelSpec("torchvision", "resnet50.IMAGENET1K_V1")).top1 == 76.130
    assert published_weights(ModelSpec("torchvision", "wide_resnet50_2")).top1 == 81.602
    assert published_weights(ModelSpec("torchvision", "vgg16.IMAGENET1K_FEATURES")) is None
    assert published_weights(ModelSpec("timm", "resnet50")) is None


def test_unknown_or_missing_field_is_rejected():
    record = find_record("resnet50").model_dump()
    family = {"family": record.pop("family")}
    assert make_record(family, record) == find_record("resnet50")
    with pytest.raises(ValidationError, match="color"):
        make_record({**family, "color": "red"}, record)
    with pytest.raises(ValidationError, match="family"):
        make_record({}, record)
    with pytest.raises(ValidationError, match="top1"):
        PublishedWeights(tag="a", top1=101, input_size=224, recipe="r")


def test_most_accurate_weights_have_no_warning():
    notes = describe_weights(find_model("resnet50", {}))
    assert notes.summary.startswith(
        "IMAGENET1K_V2, the most accurate: top-1 80.858 at 224 pixels; recipe: torchvision's new"
    )
    assert notes.warning is None
    assert describe_weights(find_model("resnet50.IMAGENET1K_V2", {})) == notes
    assert describe_weights(find_model("resnet50.DEFAULT", {})) == notes


def test_less_accurate_weights_have_a_warning_with_the_difference():
    notes = describe_weights(find_model("resnet50.IMAGENET1K_V1", {}))
    assert notes.summary.startswith("IMAGENET1K_V1: top-1 76.130 at 224 pixels; recipe: ")
    assert notes.warning.startswith(
        "IMAGENET1K_V1: top-1 76.130, 4.728 pp below IMAGENET1K_V2 (80.858 at 224 pixels)"
    )


def test_non_commercial_weights_have_a_warning():
    default = describe_weights(find_model("vit_b_16", {}))
    assert default.summary.startswith("IMAGENET1K_V1, the default: ")
    assert (
        "more accurate, with another license or size: IMAGENET1K_SWAG_E2E_V1 (85.304 at 384 pixels)"
        in default.summary
    )
    assert default.warning is None
    chosen = describe_weights(find_model("vit_b_16.IMAGENET1K_SWAG_E2E_V1", {}))
    assert "CC-BY-NC 4.0" in chosen.warning
    assert "below" not in chosen.warning
    assert "CC-BY-NC 4.0" in describe_weights(find_model("convnextv2_tiny", {})).warning


def test_torchvision_architectures_outside_the_zoo_use_its_meta():
    notes = describe_weights(find_model("torchvision:wide_resnet50_2.IMAGENET1K_V1", {}))
    assert notes.summary.startswith("IMAGENET1K_V1: top-1 78.468 at 224 pixels; recipe: https://")
    assert "3.134 pp below IMAGENET1K_V2" in notes.warning
    assert "the most accurate" in describe_weights(find_model("torchvision:wide_resnet50_2", {})).summary


def test_weights_without_a_classifier_have_no_accuracy():
    notes = describe_weights(find_model("vgg16.IMAGENET1K_FEATURES", {}))
    assert notes.summary.startswith("IMAGENET1K_FEATURES: torchvision publishes no top-1")
    assert "IMAGENET1K_V1" in notes.warning


def test_timm_architectures_outside_the_zoo_use_its_configuration():
    notes = describe_weights(find_model("timm:resnet50.gluon_in1k", {}))
    assert notes.summary.startswith(
        "gluon_in1k: for 224 pixels; the timm package contains no top-1; from https://cv.gluon"
    )
    assert notes.summary.endswith("license apache-2.0")
    assert notes.warning == "gluon_in1k is not timm's default, which is a1_in1k"
    assert describe_weights(find_model("timm:resnet50", {})).warning is None
    assert (
        describe_weights(find_model("timm:botnet50ts_256", {})).summary
        == "timm:botnet50ts_256 has no pretrained weights"
    )


@pytest.mark.parametrize(
    ("source", "there"), [("torchvision", "DEFAULT, IMAGENET1K_V1, IMAGENET1K_V2"), ("timm", "a1_in1k, ")]
)
def test_unknown_tag_is_rejected_with_available_tags(source, there):
    with pytest.raises(InputError, match=rf"{source}:resnet50 has no weights tagged 'nope'; it has {there}"):
        describe_weights(ModelSpec(source, "resnet50.nope"))


def test_basic_block_keeps_the_shape():
    block = torchvision_models.resnet18().layer1[0]
    assert block.downsample is None
    assert block(torch.randn(4, 64, 56, 56)).shape == (4, 64, 56, 56)


def test_strided_basic_block_halves_the_feature_map():
    block = torchvision_models.resnet18().layer2[0]
    projection = block.downsample[0]
    assert (projection.kernel_size, projection.stride, projection.out_channels) == ((1, 1), (2, 2), 128)
    assert block(torch.randn(4, 64, 56, 56)).shape == (4, 128, 28, 28)


def test_bottleneck_has_36864_weights_in_its_3x3_convolution():
    block = torchvision_models.resnet50().layer1[1]
    assert block.conv2.kernel_size == (3, 3)
    assert block.conv2.weight.numel() == 36_864
    assert block(torch.randn(1, 256, 56, 56)).shape == (1, 256, 56, 56)
