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

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = pytest.mark.parametrize("record", zoo_records(), ids=lambda record: record.name)
OF_TORCHVISION = [record for record in zoo_records() if record.source == "torchvision"]
NAMES = """
    alexnet vgg16 googlenet inception_v3 resnet18 resnet34 resnet50 resnet101 resnet152 densenet121 densenet201
    mobilenet_v1 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_b1
    efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7
    efficientnet_lite0 efficientnet_lite1 efficientnet_lite2 efficientnet_lite3 efficientnet_lite4
    efficientnet_v2_s regnet_y_400mf regnet_y_3_2gf regnet_y_16gf convnext_tiny convnext_small convnext_base
    convnext_large convnextv2_tiny vit_b_16 swin_t
"""
# Millions of parameters that the project's request names, with the last digit that it gives.
REQUESTED = {
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
# From the rule of thumb in the module's docstring: up to so many parameters, so many images a category.
IMAGES_PER_CATEGORY = {6e6: 50, 15e6: 100, 35e6: 200, 70e6: 400, float("inf"): 800}


def _spec(record: ZooRecord, tag: str = "") -> ModelSpec:
    return find_model(f"{record.source}:{record.architecture}{tag and '.'}{tag}", {})


def _torchvision_meta(record: ZooRecord, tag: str) -> dict:
    return torchvision_models.get_model_weights(record.architecture)[tag].meta


def _build(record: ZooRecord) -> nn.Module:
    spec = _spec(record)
    if record.family == "RegNetY":  # torchvision works out its widths with tensors, which must hold values
        return get_library(spec).build(spec, None).to("meta").eval()
    with torch.device("meta"):
        return get_library(spec).build(spec, None).eval()


@cache
def _cost(record: ZooRecord) -> ModelCost:
    return count_cost(_build(record), (record.input_size, record.input_size))


def test_every_name_is_there_once():
    names = [record.name for record in zoo_records()]
    assert sorted(names) == sorted(NAMES.split())
    architectures = [(record.source, record.architecture) for record in zoo_records()]
    assert len(set(architectures)) == len(names)


def test_the_order_is_by_year_then_family_then_size():
    keys = [(record.year, record.family.lower(), record.parameters) for record in zoo_records()]
    assert keys == sorted(keys)


@EVERY
def test_parameters_are_those_of_the_network(record):
    assert _cost(record).parameters == record.parameters
    if record.name in REQUESTED:
        least, most = REQUESTED[record.name]
        assert least <= record.parameters / 1e6 <= most


@EVERY
def test_multiply_adds_are_those_of_the_network(record):
    assert _cost(record).multiply_adds == pytest.approx(record.multiply_adds, rel=0.01)
    if record.source == "torchvision":
        operations = _torchvision_meta(record, "DEFAULT")["_ops"]
        assert record.multiply_adds / 1e9 == pytest.approx(operations, rel=0.03)


def test_no_head_that_only_training_uses_is_counted():
    published_parameters = _torchvision_meta(find_record("inception_v3"), "DEFAULT")["num_params"]
    assert published_parameters - _cost(find_record("inception_v3")).parameters > 3e6
    names = [name for name, _ in _build(find_record("googlenet")).named_parameters()]
    assert names
    assert not [name for name in names if name.startswith("aux")]


@EVERY
def test_the_size_is_the_one_that_the_preprocessing_asks_for(record):
    spec = _spec(record)
    preprocessing = get_library(spec).preprocessing(spec, PreprocessingOverrides())
    assert preprocessing.input_height == preprocessing.input_width == record.input_size
    assert record.weights[0].input_size == record.input_size


@EVERY
def test_every_tag_exists_and_asks_for_the_size_of_its_figure(record):
    tags = [entry.tag for entry in record.weights]
    assert len(set(tags)) == len(tags)
    for entry in record.weights:
        spec = _spec(record, entry.tag)
        size = get_library(spec).preprocessing(spec, PreprocessingOverrides()).input_height
        assert size == entry.input_size


@EVERY
def test_the_default_is_the_librarys_and_the_best_of_its_licence_and_size(record):
    default, *others = record.weights
    if record.source == "torchvision":
        weights = torchvision_models.get_model_weights(record.architecture)
        assert default.tag == weights.DEFAULT.name
    else:
        assert default.tag == timm.models.get_pretrained_cfg(record.architecture).tag
    alike = [o for o in others if (o.license, o.input_size) == (default.license, default.input_size)]
    assert all(other.top1 <= default.top1 for other in alike)


@pytest.mark.parametrize("record", OF_TORCHVISION, ids=lambda record: record.name)
def test_torchvisions_weights_are_all_there_with_its_own_figures(record):
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
def test_timms_weights_have_the_licence_that_timm_states(record):
    for entry in record.weights:
        license = timm.models.get_pretrained_cfg(f"{record.architecture}.{entry.tag}").license
        assert (license == "apache-2.0") == (entry.license is None)
        assert (license == "cc-by-nc-4.0") == (entry.license or "").startswith("CC-BY-NC 4.0")


@EVERY
def test_the_rule_of_thumb_is_the_one_that_is_described(record):
    images = next(n for limit, n in IMAGES_PER_CATEGORY.items() if record.parameters <= limit)
    assert record.labeled_images_per_category == images * (2 if record.family == "ViT" else 1)


@EVERY
def test_what_is_said_is_said_in_sentences(record):
    for text in filter(None, (record.key_idea, record.use_case, record.warning)):
        assert text.endswith(".")
        assert "\n" not in text


@pytest.mark.parametrize(
    "name", ["alexnet", "vgg16", "googlenet", "inception_v3", "vit_b_16", "efficientnet_b7"]
)
def test_a_warning_is_there_where_one_is_due(name):
    assert find_record(name).warning


def test_most_of_vggs_parameters_are_in_the_head_as_its_warning_says():
    head = sum(parameter.numel() for parameter in _build(find_record("vgg16")).classifier.parameters())
    assert head > 0.85 * find_record("vgg16").parameters


def test_resnet50_has_two_figures():
    figures = {entry.tag: entry.top1 for entry in find_record("resnet50").weights}
    assert figures == {"IMAGENET1K_V2": 80.858, "IMAGENET1K_V1": 76.130}


def test_a_name_that_is_not_there_is_none():
    assert find_record("resnet51") is None
    assert find_record("ResNet50") is None


def test_a_record_is_found_by_source_and_architecture_whatever_the_tag():
    assert record_for_spec(ModelSpec("torchvision", "resnet50.IMAGENET1K_V1")) is find_record("resnet50")
    assert record_for_spec(ModelSpec("timm", "tf_efficientnet_lite4.in1k")) is find_record(
        "efficientnet_lite4"
    )
    assert record_for_spec(ModelSpec("timm", "resnet50")) is None


def test_published_weights_are_those_of_the_tag_or_the_default():
    assert published_weights(ModelSpec("torchvision", "resnet50")).top1 == 80.858
    assert published_weights(ModelSpec("torchvision", "resnet50.DEFAULT")).tag == "IMAGENET1K_V2"
    assert published_weights(ModelSpec("torchvision", "resnet50.IMAGENET1K_V1")).top1 == 76.130
    assert published_weights(ModelSpec("torchvision", "wide_resnet50_2")).top1 == 81.602
    assert published_weights(ModelSpec("torchvision", "vgg16.IMAGENET1K_FEATURES")) is None
    assert published_weights(ModelSpec("timm", "resnet50")) is None


def test_an_unknown_field_or_a_missing_one_is_refused():
    record = find_record("resnet50").model_dump()
    family = {"family": record.pop("family")}
    assert make_record(family, record) == find_record("resnet50")
    with pytest.raises(ValidationError, match="color"):
        make_record({**family, "color": "red"}, record)
    with pytest.raises(ValidationError, match="family"):
        make_record({}, record)
    with pytest.raises(ValidationError, match="top1"):
        PublishedWeights(tag="a", top1=101, input_size=224, recipe="r")


def test_the_best_tag_is_named_with_its_recipe_and_without_a_warning():
    notes = describe_weights(find_model("resnet50", {}))
    assert notes.summary.startswith(
        "IMAGENET1K_V2, the most accurate: top-1 80.858 at 224 pixels; recipe: torchvision's new"
    )
    assert notes.warning is None
    assert describe_weights(find_model("resnet50.IMAGENET1K_V2", {})) == notes
    assert describe_weights(find_model("resnet50.DEFAULT", {})) == notes


def test_an_older_tag_is_a_warning_with_the_difference():
    notes = describe_weights(find_model("resnet50.IMAGENET1K_V1", {}))
    assert notes.summary.startswith("IMAGENET1K_V1: top-1 76.130 at 224 pixels; recipe: ")
    assert notes.warning.startswith(
        "IMAGENET1K_V1: top-1 76.130, 4.728 pp below IMAGENET1K_V2 (80.858 at 224 pixels)"
    )


def test_weights_that_may_not_be_sold_are_a_warning_and_never_a_silent_default():
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


def test_torchvisions_architectures_outside_the_zoo_are_compared_by_its_meta():
    notes = describe_weights(find_model("torchvision:wide_resnet50_2.IMAGENET1K_V1", {}))
    assert notes.summary.startswith("IMAGENET1K_V1: top-1 78.468 at 224 pixels; recipe: https://")
    assert "3.134 pp below IMAGENET1K_V2" in notes.warning
    assert "the most accurate" in describe_weights(find_model("torchvision:wide_resnet50_2", {})).summary


def test_weights_without_a_classifier_have_no_figure():
    notes = describe_weights(find_model("vgg16.IMAGENET1K_FEATURES", {}))
    assert notes.summary.startswith("IMAGENET1K_FEATURES: torchvision publishes no top-1")
    assert "IMAGENET1K_V1" in notes.warning


def test_timms_architectures_outside_the_zoo_say_what_timm_says():
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
def test_a_tag_that_does_not_exist_gets_those_that_do(source, there):
    with pytest.raises(InputError, match=rf"{source}:resnet50 has no weights tagged 'nope'; it has {there}"):
        describe_weights(ModelSpec(source, "resnet50.nope"))


def test_a_basic_block_keeps_the_shape():
    block = torchvision_models.resnet18().layer1[0]
    assert block.downsample is None
    assert block(torch.randn(4, 64, 56, 56)).shape == (4, 64, 56, 56)


def test_a_basic_block_with_stride_two_halves_the_map_through_a_projection():
    block = torchvision_models.resnet18().layer2[0]
    projection = block.downsample[0]
    assert (projection.kernel_size, projection.stride, projection.out_channels) == ((1, 1), (2, 2), 128)
    assert block(torch.randn(4, 64, 56, 56)).shape == (4, 128, 28, 28)


def test_a_bottleneck_of_256_channels_has_36864_weights_in_its_3_x_3():
    block = torchvision_models.resnet50().layer1[1]
    assert block.conv2.kernel_size == (3, 3)
    assert block.conv2.weight.numel() == 36_864
    assert block(torch.randn(1, 256, 56, 56)).shape == (1, 256, 56, 56)
