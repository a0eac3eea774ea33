"""The commands of the bundle job, as a user types them."""

import json
from pathlib import Path

import pytest
import torch

from batchcls.cli.app import run
from batchcls.jobs import bundle
from batchcls.models.build import build_model
from batchcls.models.engines.factory import missing_package
from batchcls.models.model_bundle import Bundle
from batchcls.models.registry import zoo_records
from batchcls.models.sources import find_model, get_library
from batchcls.models.weights import to_safetensors
from batchcls.storage.filesystem import Storage

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--input-size", "64", "--crop-pct", "0.9")


def bundle_command(*arguments: str) -> int:
    return run("bundle", bundle.COMMANDS, list(arguments))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHCLS_CACHE_DIR", str(tmp_path / "default-cache"))


@pytest.fixture
def weights(tmp_path) -> Path:
    spec = find_model("timm:test_resnet", {})
    path = tmp_path / "w.safetensors"
    path.write_bytes(to_safetensors(get_library(spec).build(spec, 3).state_dict()))
    (tmp_path / "labels.txt").write_text("mug\nplate\nvase\n")
    return path


@pytest.fixture
def create(weights, tmp_path):
    def create(*arguments: str) -> Path:
        labels = () if "--labels" in arguments else ("--labels", str(tmp_path / "labels.txt"))
        made = tmp_path / "made"
        given = ["create", "--model", "test_resnet", "--weights", str(weights), "--output", str(made)]
        assert bundle_command(*given, *labels, *SMALL, *arguments) == 0
        return made

    return create


def test_create_test_inspect(create, capsys):
    made = create()
    assert bundle_command("test", str(made)) == 0
    assert "passed on torch fp32 on cpu" in capsys.readouterr().out
    assert bundle_command("inspect", str(made)) == 0
    shown = capsys.readouterr().out
    assert "3 labels" in shown
    assert "parameters are trainable" in shown
    assert "outputs for 4 golden images" in shown


def test_any_engine_and_precision_can_be_tested(create, capsys):
    made = str(create())
    assert bundle_command("test", made, "--precision", "bf16", "--device", "cpu") == 0
    assert "passed on torch bf16 on cpu" in capsys.readouterr().out
    assert bundle_command("test", made, "--precision", "fp16", "--device", "cpu") == 2
    assert "fp16" in capsys.readouterr().err


@pytest.mark.skipif(missing_package("openvino") is not None, reason="needs OpenVINO")
def test_openvino_is_tested_with_a_separate_cache(create, tmp_path, capsys):
    made = str(create())
    given = ("--engine", "openvino", "--cache-dir", str(tmp_path / "cache"))
    assert bundle_command("test", made, *given) == 0
    assert "passed on openvino fp32 on cpu" in capsys.readouterr().out
    assert any((tmp_path / "cache").iterdir())
    # There are no images of a catalog to take scales from.
    assert bundle_command("test", made, *given, "--precision", "int8") == 2


def test_bundle_with_edited_preprocessing_fails_its_test(create, capsys):
    made = create()
    record = json.loads((made / "bundle.json").read_text())
    record["preprocessing"]["mean"] = [0.1, 0.2, 0.3]
    (made / "bundle.json").write_text(json.dumps(record))
    assert bundle_command("test", str(made)) == 1
    assert (
        "the outputs for the golden images differ from those recorded in the bundle"
        in capsys.readouterr().err
    )


def test_category_paths_trainable_parts_tap_and_dropout_are_kept(create, tmp_path):
    (tmp_path / "paths.txt").write_text("home/kitchen/mug\nhome/kitchen/plate\nhome/decor/vase\n")
    made = Bundle.load(
        str(
            create(
                *("--category-paths", str(tmp_path / "paths.txt"), "--trainable", "fc.*,layer4.*"),
                *("--embedding-tap", "stage2", "--dropout", "0.3"),
            )
        ),
        Storage(),
    )
    assert made.config.category_paths[2] == ("home", "decor", "vase")
    assert (made.config.embedding_tap, made.config.dropout) == ("stage2", 0.3)
    trainable = {name for name, parameter in build_model(made).named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(name.startswith(("fc.", "layer4.")) for name in trainable)


def test_a_new_head_is_for_other_labels_and_never_published(create, tmp_path):
    (tmp_path / "many.txt").write_text("".join(f"category {i}\n" for i in range(500)))
    made = Bundle.load(str(create("--new-head", "--labels", str(tmp_path / "many.txt"))), Storage())
    assert len(made.config.labels) == 500
    assert made.config.untrained_head
    assert not made.publishable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--embedding-tap", "stage9"], "stage1 to stage"),
        (["--embedding-tap", "middle"], "--embedding-tap"),
        (["--trainable", "nothing.*"], "nothing.*"),
        (["--new-head"], "--new-head needs --labels"),
        (["--category-paths", "paths.txt"], "2 lines for 3 labels"),
        (["--category-paths", "holes.txt"], "line 2"),
    ],
)
def test_invalid_arguments_are_rejected_with_the_reason(
    weights, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paths.txt").write_text("a/b\nc/d\n")
    (tmp_path / "holes.txt").write_text("a/b\nc//d\ne\n")
    labels = [] if arguments == ["--new-head"] else ["--labels", "labels.txt"]
    given = [
        "create",
        "--model",
        "test_resnet",
        "--weights",
        str(weights),
        "--output",
        "made",
        *labels,
        *SMALL,
    ]
    assert bundle_command(*given, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_pickle_that_executes_code_is_rejected(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "w.pth")
    given = ["create", "--model", "test_resnet", "--weights", str(tmp_path / "w.pth"), "--output", "made"]
    assert bundle_command(*given) == 2
    assert "could execute arbitrary code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_the_zoo_is_printed_with_every_name(capsys):
    assert bundle_command("zoo") == 0
    shown = capsys.readouterr().out
    assert all(record.name in shown for record in zoo_records())
    assert bundle_command("zoo", "resnet50") == 0
    shown = capsys.readouterr().out
    assert "76.130" in shown
    assert "80.858" in shown


def test_a_name_that_the_zoo_lacks_gets_the_closest(capsys):
    assert bundle_command("zoo", "resnet5O") == 2
    assert "resnet50" in capsys.readouterr().err
