import subprocess
import sys
import time

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torchvision import models as torchvision_models

from batchcls.errors import InputError
from batchcls.models.model_names import is_known_architecture, is_model_name, library_names, qualified_name
from batchcls.models.model_spec import ModelSpec, PreprocessingOverrides
from batchcls.models.registry import zoo_records
from batchcls.models.sources import LIBRARIES, find_model, get_library
from batchcls.models.weights import load_strictly

pytestmark = pytest.mark.usefixtures("one_thread")

NO_OVERRIDES = PreprocessingOverrides()


def _preprocessing(name: str, arguments=None, **overrides):
    spec = find_model(name, arguments or {})
    return get_library(spec).preprocessing(spec, PreprocessingOverrides(**overrides))


def _build(name: str, arguments=None, classes: int | None = None):
    spec = find_model(name, arguments or {})
    return get_library(spec).build(spec, classes)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("resnet50", "torchvision:resnet50"),
        ("resnet50.IMAGENET1K_V1", "torchvision:resnet50.IMAGENET1K_V1"),
        ("mobilenet_v1", "timm:mobilenetv1_100"),  # only in the zoo
        ("mobilenetv1_100", "timm:mobilenetv1_100"),
        ("convnext_base", "torchvision:convnext_base"),
        ("vgg11", "torchvision:vgg11"),  # in both libraries, not in the zoo
    ],
)
def test_bare_name_is_resolved_in_zoo_then_libraries(text, found):
    assert is_model_name(text)
    assert qualified_name(text) == found
    assert str(find_model(text, {})) == found


def test_every_zoo_name_resolves():
    for record in zoo_records():
        spec = find_model(record.name, {})
        assert (spec.source, spec.architecture) == (record.source, record.architecture)


@pytest.mark.parametrize("text", ["timm:resnet18", "torchvision:resnet18", "timm:no_such"])
def test_model_names_are_distinguished_from_folders(text):
    assert is_model_name(text)
    assert not any(
        map(is_model_name, ["s3://bucket/bundle", "bundles/resnet18", "./resnet18", "file:///b", ""])
    )


def test_unknown_name_suggests_similar_names():
    with pytest.raises(InputError, match=r"no model timm:resnt18; did you mean resnet18, .*timm:"):
        find_model("timm:resnt18", {})


def test_dissimilar_name_refers_to_the_zoo():
    with pytest.raises(InputError, match=r"bundle zoo"):
        find_model("torchvision:qqqqqqqqqq", {})


@pytest.mark.parametrize("source", sorted(LIBRARIES))
def test_names_of_other_sources_are_rejected(source):
    for name in ("hf-hub:someone/else", "local-dir:/tmp", ""):
        with pytest.raises(InputError, match="there is no model"):
            find_model(f"{source}:{name}", {})


@pytest.mark.parametrize(
    ("name", "tag"), [("timm:resnet18.nope", "a1_in1k"), ("torchvision:resnet50.NOPE", "IMAGENET1K_V2")]
)
def test_unknown_tag_lists_available_tags(name, tag):
    with pytest.raises(InputError, match=rf"no weights tagged.*{tag}"):
        find_model(name, {})


@pytest.mark.parametrize(
    "name", ["mobilenetv2_100", "efficientnet_lite0", "vit_tiny_patch16_224", "tf_efficientnetv2_b0.in1k"]
)
def test_timm_preprocessing_matches_timm_evaluation(name):
    ours = _preprocessing(f"timm:{name}")
    theirs = resolve_model_data_config(timm.create_model(name))
    transform = timm.data.create_transform(**theirs)
    resize = transform.transforms[0].size
    assert (3, ours.input_height, ours.input_width) == theirs["input_size"]
    assert ours.resize_height == ours.resize_width == resize
    assert (ours.interpolation, ours.crop_mode) == (theirs["interpolation"], theirs["crop_mode"])
    assert (ours.mean, ours.std) == (theirs["mean"], theirs["std"])


def test_timm_squash_crop_mode():
    assert _preprocessing("timm:dm_nfnet_f0").crop_mode == "squash"


@pytest.mark.parametrize(
    ("name", "resize"), [("resnet50", 232), ("resnet50.IMAGENET1K_V1", 256), ("inception_v3", 342)]
)
def test_torchvision_preprocessing_matches_the_preset(name, resize):
    ours = _preprocessing(f"torchvision:{name}")
    base, _, tag = name.partition(".")
    preset = torchvision_models.get_model_weights(base)[tag or "DEFAULT"].transforms()
    assert ours.resize_height == ours.resize_width == resize == preset.resize_size[0]
    assert ours.input_height == ours.input_width == preset.crop_size[0]
    assert (list(ours.mean), list(ours.std)) == (preset.mean, preset.std)
    assert ours.interpolation == preset.interpolation.value


@pytest.mark.parametrize("source", sorted(LIBRARIES))
def test_every_architecture_has_preprocessing(source):
    library = LIBRARIES[source]
    rejected = set()
    for name in sorted(library_names(source)):
        try:
            library.preprocessing(library.complete(ModelSpec(source, name)), NO_OVERRIDES)
        except InputError:
            rejected.add(name)
    # Their crop is larger than the resized image, so the image would be padded with black.
    assert rejected <= {"volo_d4_448", "volo_d5_448", "volo_d5_512"}


def test_names_from_source_files_match_the_libraries():
    assert library_names("timm") == set(timm.list_models())
    assert library_names("torchvision") == set(torchvision_models.list_models(module=torchvision_models))
    assert is_known_architecture("timm", "vit_tiny_r_s16_p8_224_in21k")  # deprecated, but still available
    assert timm.is_model("vit_tiny_r_s16_p8_224_in21k")
    assert not is_known_architecture("timm", "resnet51")


def test_names_are_resolved_without_importing_torch():
    code = (
        "import sys; from batchcls.models.model_names import qualified_name, suggest_names; "
        "print(qualified_name('resnet50'), qualified_name('resnet51'), 'resnet50' in suggest_names('resnet51')); "
        "assert not {'torch', 'timm', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["torchvision:resnet50", "None", "True"]), (
        done.stderr
    )


@pytest.mark.parametrize("name", ["timm:mobilenetv2_100", "torchvision:squeezenet1_1"])
def test_overrides_take_precedence(name):
    ours = _preprocessing(
        name,
        mean=(0.5, 0.5, 0.5),
        std=(0.4, 0.5, 0.6),
        input_size=192,
        crop_pct=0.75,
        interpolation="bicubic",
    )
    assert (ours.mean, ours.std, ours.interpolation) == ((0.5, 0.5, 0.5), (0.4, 0.5, 0.6), "bicubic")
    assert (ours.input_height, ours.input_width, ours.resize_height, ours.resize_width) == (
        192,
        192,
        256,
        256,
    )


@pytest.mark.parametrize("name", ["timm:mobilenetv2_100", "torchvision:squeezenet1_1"])
def test_input_may_be_a_rectangle(name):
    ours = _preprocessing(name, input_size="256x192", crop_pct=1.0, crop_mode="border")
    assert (ours.input_height, ours.input_width) == (ours.resize_height, ours.resize_width) == (256, 192)
    assert ours.crop_mode == "border"


@pytest.mark.parametrize(
    ("name", "resize"), [("timm:mobilenetv2_100", 219), ("torchvision:squeezenet1_1", 219)]
)
def test_other_input_size_keeps_the_crop_ratio(name, resize):
    ours = _preprocessing(name, input_size=192)
    assert (ours.input_height, ours.resize_height) == (192, resize)


def test_image_size_argument_sets_the_input_size():
    assert _preprocessing("timm:vit_tiny_patch16_224", {"img_size": 96}).input_height == 96
    assert _preprocessing("torchvision:vit_b_16", {"image_size": 96}).input_height == 96
    assert find_model("torchvision:vit_h_14", {}).arguments == {"image_size": 518}


def test_invalid_overrides_are_rejected():
    with pytest.raises(InputError, match=r"timm:resnet18: .*std must be above 0.*--std"):
        _preprocessing("timm:resnet18", std=(0.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("timm:resnet18", {"num_classes": 5}, "number of classes follows"),
        ("timm:resnet18", {"checkpoint_path": "x.pth"}, "use --weights"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "name the tag"),
        ("timm:resnet18", {"color": 1}, r"cannot be built .*color.*--model-args"),
        ("torchvision:resnet18", {"color": 1}, r"cannot be built .*color.*--model-args"),
    ],
)
def test_reserved_and_unknown_arguments_are_rejected(name, arguments, message):
    with pytest.raises(InputError, match=message):
        _build(name, arguments)


@pytest.mark.parametrize("name", ["timm:mobilenetv2_100", "torchvision:squeezenet1_1"])
def test_initialization_is_deterministic_and_keeps_random_state(name):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, second = _build(name, classes=3), _build(name, classes=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_arguments_are_passed_to_the_architecture():
    plain, same = _build("timm:mobilenetv2_100"), _build("timm:mobilenetv2_100", {"pad_type": "same"})
    assert type(plain.conv_stem) is not type(same.conv_stem)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_not_built_and_removed_from_weights(name):
    spec = find_model(f"torchvision:{name}", {})
    library = get_library(spec)
    published = torchvision_models.get_model(
        name, weights=None, init_weights=False, aux_logits=True
    ).state_dict()
    adapted = library.adapt(spec, dict(published))
    assert len(adapted) < len(published)
    load_strictly(library.build(spec, None), adapted, name)
    assert spec.arguments == {"transform_input": True}


def test_old_densenet_names_are_translated():
    spec = find_model("torchvision:densenet121", {})
    library = get_library(spec)
    model = library.build(spec, 2)
    old = {
        key.replace(".norm1.", ".norm.1.")
        .replace(".norm2.", ".norm.2.")
        .replace(".conv1.", ".conv.1.")
        .replace(".conv2.", ".conv.2."): value
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    load_strictly(model, library.adapt(spec, old), "densenet")


def test_mnasnet_loads_without_version_metadata():
    spec = find_model("torchvision:mnasnet0_5", {})
    model = get_library(spec).build(spec, 2)
    load_strictly(model, dict(model.state_dict()), "mnasnet")


@pytest.fixture
def unreachable_network(monkeypatch, tmp_path):
    """Empty caches, and a proxy that does not exist."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", ["timm:mobilenetv2_100", "torchvision:squeezenet1_1"])
def test_download_without_network_fails_fast_with_a_remedy(unreachable_network, name):
    spec = find_model(name, {})
    started = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be downloaded .*--weights FILE\.safetensors, .*bundle"):
        get_library(spec).pretrained(spec)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_small_patch14_dinov2", "contain no classifier; choose another tag"),
        ("timm:coatnet_0_224", "has no pretrained weights; pass --weights"),
    ],
)
def test_missing_or_headless_weights_are_rejected_before_download(name, message):
    spec = find_model(name, {})
    with pytest.raises(InputError, match=message):
        get_library(spec).pretrained(spec)
