import pytest
import torch

from batchcls.errors import InputError
from batchcls.models.build import build_backbone
from batchcls.models.imagenet_labels import imagenet_labels
from batchcls.models.model_bundle import sha256_hex
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import parse_model_arguments, resolve_model
from batchcls.models.sources import find_model, get_library
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.storage.filesystem import Storage

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = PreprocessingOverrides(input_size=64)


def _weights(name: str, classes: int, arguments=None) -> dict[str, torch.Tensor]:
    spec = find_model(name, arguments or {})
    return dict(get_library(spec).build(spec, classes).state_dict())


def _resolve(model: str, **choices):
    return resolve_model(model, ModelChoices(overrides=SMALL, **choices), Storage())


@pytest.fixture
def labels(tmp_path) -> str:
    (tmp_path / "labels.txt").write_text("mug\nplate\nvase\n")
    return str(tmp_path / "labels.txt")


@pytest.fixture
def weights(tmp_path) -> str:
    (tmp_path / "w.safetensors").write_bytes(to_safetensors(_weights("timm:mobilenetv3_small_050", 3)))
    return str(tmp_path / "w.safetensors")


def test_number_of_classes_is_read_from_the_weights(weights, labels):
    bundle = _resolve("timm:mobilenetv3_small_050", weights=weights, labels=labels)
    assert bundle.config.labels == ("mug", "plate", "vase")
    assert bundle.config.weights.kind == "file"
    assert bundle.config.weights.name == "w.safetensors"
    assert bundle.config.preprocessing.input_height == 64
    assert build_backbone(bundle).classes == 3
    assert bundle.publishable


def test_weights_file_is_kept_unchanged(weights, labels, tmp_path):
    bundle = _resolve("timm:mobilenetv3_small_050", weights=weights, labels=labels)
    assert bundle.weights == (tmp_path / "w.safetensors").read_bytes()
    assert bundle.config.weights.sha256 == sha256_hex(bundle.weights)


def test_pickled_checkpoint_gives_equal_weights(weights, labels, tmp_path):
    torch.save({"state_dict": _weights("timm:mobilenetv3_small_050", 3)}, tmp_path / "w.pth")
    pickled = _resolve("timm:mobilenetv3_small_050", weights=str(tmp_path / "w.pth"), labels=labels)
    assert pickled.weights == _resolve("timm:mobilenetv3_small_050", weights=weights, labels=labels).weights


def test_auxiliary_heads_in_a_file_are_removed(labels, tmp_path):
    from torchvision.models import googlenet

    torch.manual_seed(0)
    published = googlenet(weights=None, init_weights=False, aux_logits=True, num_classes=3).state_dict()
    (tmp_path / "g.safetensors").write_bytes(to_safetensors(published))
    bundle = _resolve("torchvision:googlenet", weights=str(tmp_path / "g.safetensors"), labels=labels)
    assert bundle.config.arguments == {"transform_input": True}
    assert build_backbone(bundle).dimension == 1024


def test_random_weights_are_deterministic(labels):
    first, second = (
        _resolve("timm:mobilenetv3_small_050", labels=labels, allow_random=True) for _ in range(2)
    )
    assert first.fingerprint == second.fingerprint
    assert first.config.weights.kind == "random"
    assert not first.publishable


def test_labels_of_1000_classes_default_to_imagenet():
    bundle = _resolve("torchvision:squeezenet1_1", allow_random=True)
    assert bundle.config.labels == imagenet_labels()


def test_unknown_classes_require_labels(weights):
    with pytest.raises(InputError, match=r"have 3 classes.*pass --labels FILE"):
        _resolve("timm:mobilenetv3_small_050", weights=weights)


def test_labels_that_do_not_fit_the_weights_are_rejected(weights, tmp_path):
    (tmp_path / "two.txt").write_text("mug\nplate\n")
    with pytest.raises(InputError, match=r"--labels has 2 names, .* have 3 classes"):
        _resolve("timm:mobilenetv3_small_050", weights=weights, labels=str(tmp_path / "two.txt"))


def test_weights_of_another_architecture_are_rejected(weights, labels):
    with pytest.raises(InputError, match=r"w\.safetensors contains no classifier \(fc\)"):
        _resolve("timm:resnet18", weights=weights, labels=labels)
    with pytest.raises(InputError, match=r"w\.safetensors does not fit"):
        _resolve("timm:mobilenetv2_100", weights=weights, labels=labels)


def test_saved_bundle_is_resolved_by_its_folder(weights, labels, tmp_path):
    made = _resolve("timm:mobilenetv3_small_050", weights=weights, labels=labels)
    made.save(str(tmp_path / "b"), Storage())
    assert resolve_model(str(tmp_path / "b"), ModelChoices(), Storage()) == made


@pytest.mark.parametrize(
    ("choices", "flag"),
    [
        (ModelChoices(weights="w.safetensors"), "--weights"),
        (ModelChoices(labels="l.txt"), "--labels"),
        (ModelChoices(arguments={"a": 1}), "--model-args"),
        (ModelChoices(allow_random=True), "--allow-random-weights"),
        (ModelChoices(overrides=SMALL), "--input-size"),
    ],
)
def test_model_settings_are_rejected_for_a_bundle(choices, flag):
    with pytest.raises(InputError, match=rf"{flag}.*: not possible with a bundle as --model"):
        resolve_model("some/folder", choices, Storage())


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", {}),
        ("pad_type=same", {"pad_type": "same"}),
        ("a=1, b=0.5 ,c=true,d=False,e=none", {"a": 1, "b": 0.5, "c": True, "d": False, "e": None}),
        ("a='1',b=\"true\",c=1e-3,d=-2", {"a": "1", "b": "true", "c": 0.001, "d": -2}),
        ("a=x=y,b=", {"a": "x=y", "b": ""}),
    ],
)
def test_model_arguments_are_parsed_with_types(text, arguments):
    parsed = parse_model_arguments(text)
    assert parsed == arguments
    assert [type(value) for value in parsed.values()] == [type(value) for value in arguments.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("same", "'same' is not key=value"),
        ("=1", "not key=value"),
        ("a b=1", "not key=value"),
        ("a=1,a=2", "a is given twice"),
    ],
)
def test_invalid_model_arguments_are_rejected(text, message):
    with pytest.raises(InputError, match=message):
        parse_model_arguments(text)


def test_ambiguous_name_is_rejected(weights, labels, tmp_path, monkeypatch):
    bundle = _resolve("timm:mobilenetv3_small_050", weights=weights, labels=labels)
    monkeypatch.chdir(tmp_path)
    bundle.save("resnet18", Storage())
    with pytest.raises(InputError, match=r"write \./resnet18 for the bundle or torchvision:resnet18 for"):
        resolve_model("resnet18", ModelChoices(), Storage())
    assert resolve_model("./resnet18", ModelChoices(), Storage()) == bundle


def test_embedding_tap_is_rejected_for_a_bundle(weights, labels, tmp_path):
    _resolve("timm:mobilenetv3_small_050", weights=weights, labels=labels).save(
        str(tmp_path / "b"), Storage()
    )
    with pytest.raises(InputError, match="--embedding-tap"):
        resolve_model(str(tmp_path / "b"), ModelChoices(tap="stage2"), Storage())


def test_new_head_keeps_the_body_and_is_untrained(weights, labels, tmp_path):
    (tmp_path / "many.txt").write_text("".join(f"category {i}\n" for i in range(10_000)))
    trained = _resolve("timm:mobilenetv3_small_050", weights=weights, labels=labels)
    made = _resolve(
        "timm:mobilenetv3_small_050",
        weights=weights,
        labels=str(tmp_path / "many.txt"),
        new_head=True,
        dropout=0.4,
    )
    assert (len(made.config.labels), made.config.untrained_head, made.publishable) == (10_000, True, False)
    before, after = (from_safetensors(bundle.weights, "x") for bundle in (trained, made))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert build_backbone(made).classes == 10_000


def test_pretrained_weights_are_described_in_the_log(log, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    with log.at_level("INFO"), pytest.raises(InputError, match="cannot be downloaded"):
        resolve_model("resnet50.IMAGENET1K_V1", ModelChoices(), Storage())
    info, warning = log.records
    assert "recipe" in info.message
    assert "4.728 pp below IMAGENET1K_V2" in warning.message
