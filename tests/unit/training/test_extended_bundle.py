"""`batchcls bundle extend`: new categories from a few images, as a user types it."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from batchcls.cli.app import parser_of, run
from batchcls.cli.arguments import read_settings
from batchcls.config.bundle_config import BundleExtendConfig
from batchcls.config.common_config import FetchSettings
from batchcls.errors import ExitCode, InputError
from batchcls.images.load_config import DecodeLimits, fetch_policy
from batchcls.inference.golden_record import with_golden
from batchcls.jobs import bundle as bundle_job
from batchcls.manifest.labeled_manifest import open_labeled_manifest
from batchcls.models.build import build_backbone
from batchcls.models.engines.engine import REFERENCE
from batchcls.models.mapped_classes import ClassGroups
from batchcls.models.model_bundle import WEIGHTS_FILE, Bundle, BundleConfig, Calibration, HeldOut
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.schema import TOP_K_TYPE
from batchcls.storage.filesystem import Storage
from batchcls.training.linear_probe.embeddings import EmbeddingSettings, embed_images
from batchcls.training.linear_probe.extended_bundle import images_of_folders, linear_head
from batchcls.training.linear_probe.fit import LinearSettings
from batchcls.training.linear_probe.probe_job import ProbeSettings, linear_probe_bundle, with_pooled_embedding
from batchcls.training.linear_probe.run_embeddings import read_run_embeddings
from tests.helpers.color_images import PIXELS, color_manifest, draw_color
from tests.helpers.runs import Item, RunDetails, write_run

pytestmark = pytest.mark.usefixtures("one_thread")

KNOWN = ("blue", "green")
PATHS = (("cold", "blue"), ("cold", "green"))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHCLS_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Bundle:
    """A linear probe for blue and green images, calibrated and with category paths."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "labels.txt").write_text("mug\nplate\n")
    choices = ModelChoices(
        labels=str(folder / "labels.txt"),
        tap="stage2",
        overrides=PreprocessingOverrides(input_size=PIXELS),
        allow_random=True,
    )
    network = with_golden(resolve_model("timm:test_resnet", choices, Storage()))
    manifest = open_labeled_manifest(color_manifest(folder, "train", 40, 0, KNOWN), Storage(), "label")
    embedding = EmbeddingSettings(
        fetch_policy(FetchSettings()), DecodeLimits(), choice=REFERENCE, cache_dir=str(folder / "cache")
    )
    settings = ProbeSettings(embedding, LinearSettings(folds=2), name="run-1")
    probe = linear_probe_bundle(network, manifest, None, settings, Storage()).bundle
    calibration = Calibration(
        temperature=1.5,
        ece_before=0.1,
        ece_after=0.05,
        target_precision=0.95,
        thresholds=(0.6, 0.7),
        depth_thresholds=(0.4, 0.6),
        held_out=HeldOut(rows=10, precision=0.95, coverage=0.5),
        rows=10,
        manifest_fingerprint="m",
    )
    record = probe.config.model_dump() | {"calibration": calibration, "category_paths": PATHS}
    return Bundle(BundleConfig.model_validate(record), probe.weights)


@pytest.fixture
def saved(trained, tmp_path) -> str:
    trained.save(str(tmp_path / "v1"), Storage())
    return str(tmp_path / "v1")


@pytest.fixture
def red(tmp_path) -> str:
    folder = tmp_path / "new" / "red"
    folder.mkdir(parents=True)
    for number in range(6):
        draw_color(folder, f"{number}.png", "red", 500 + number)
    return str(folder)


def extend(*arguments: str) -> int:
    return run("bundle", bundle_job.COMMANDS, ["extend", *arguments])


def predict(bundle: Bundle, colors: Sequence[str], folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and pooled embeddings of new images of these colors."""
    folder.mkdir(parents=True)
    for number, color in enumerate(colors):
        draw_color(folder, f"{number:03}.png", color, 900 + number)
    network = with_pooled_embedding(bundle)
    images = images_of_folders({"": str(folder)}, Storage())
    settings = EmbeddingSettings(fetch_policy(FetchSettings()), DecodeLimits())
    embeddings = torch.from_numpy(embed_images(network, images.rows, images.base, settings).values)
    return build_backbone(network).head(embeddings), embeddings


def write_night(trained: Bundle, folder: Path, colors: list[str], hashes: Sequence[str] = ()) -> str:
    """Write a run of the bundle over images of these colors, the last ones with these hashes; returns its folder."""
    logits, embeddings = predict(trained, colors, folder / "night")
    best = logits.argmax(1).tolist()
    contents = [*(f"hash {n}" for n in range(len(colors) - len(hashes))), *hashes]
    rows = [
        Item(
            f"item-{n}",
            label=KNOWN[best[n]],
            class_index=best[n],
            content_hash=contents[n],
            embedding=tuple(vector.tolist()),
        )
        for n, vector in enumerate(embeddings)
    ]
    return write_run(str(folder / "out"), RunDetails("night-1"), rows)


def test_embeddings_of_a_run_with_merged_labels_are_recognized(trained, tmp_path):
    """The run has stored indices of classes after its label map, in which both categories are one."""
    folder = Path(write_night(trained, tmp_path, ["blue", "green"] * 20))
    head = linear_head(with_pooled_embedding(trained))
    record = json.loads((folder / "run.json").read_text())
    groups = ClassGroups(classes=2, merged=((0, 1),))
    record["model"]["groups"] = groups.model_dump(mode="json")
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="reproduces 50% of the run's predictions"):
        read_run_embeddings(str(folder), head, 100, Storage())
    for part in (folder / "predictions").glob("*.parquet"):
        table = pq.read_table(part)
        position = table.column_names.index("top_k")
        rows = [[entry | {"class_index": 0} for entry in row] for row in table.column("top_k").to_pylist()]
        pq.write_table(table.set_column(position, "top_k", pa.array(rows, TOP_K_TYPE)), part)
    assert len(read_run_embeddings(str(folder), head, 100, Storage()).values) == 40


def check_extended(trained: Bundle, found: Bundle, folder: Path) -> None:
    """The new category is predicted, and nothing else has changed."""
    before, after = (from_safetensors(item.weights, WEIGHTS_FILE) for item in (trained, found))
    assert after.keys() == before.keys()
    for name, value in before.items():
        kept = after[name][: len(KNOWN)] if name.startswith("fc.") else after[name]
        assert kept.dtype == value.dtype
        assert torch.equal(kept, value), name
    assert found.config.labels == (*KNOWN, "red")
    assert found.publishable
    assert (found.config.embedding_tap, found.config.preprocessing) == (
        "stage2",
        trained.config.preprocessing,
    )
    colors = ["red", "blue", "green"] * 10
    logits, _ = predict(found, colors, folder / "later")
    assert [found.config.labels[index] for index in logits.argmax(1).tolist()] == colors


def test_category_from_a_folder_and_a_run(trained, saved, red, tmp_path, capsys):
    night = write_night(trained, tmp_path, ["blue", "green"] * 20 + ["red"] * 8)
    (Path(red) / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no image")
    given = ("--category", "red", "--images", red, "--category-path", "warm/bright/red", "--run", night)
    assert extend(saved, *given, "--output", str(tmp_path / "v2")) == 0
    found = Bundle.load(str(tmp_path / "v2"), Storage())
    check_extended(trained, found, tmp_path)
    assert found.config.category_paths == (*PATHS, ("warm", "bright", "red"))
    calibration = found.config.calibration
    assert calibration.temperature == 1.5
    assert calibration.thresholds == (0.6, 0.7, None)
    assert calibration.depth_thresholds == (0.4, 0.6, None)
    (category,) = found.config.lineage["extended"]
    assert (category["label"], category["images"], category["failures"]) == ("red", 6, {"truncated": 1})
    # The 8 red images of the run are the ones that are assigned to the new category, and no example of another one.
    assert category["moved"] == pytest.approx(8 / 48)
    assert found.config.lineage["existing_images"] <= 40
    assert found.config.lineage["start"]["fingerprint"] == trained.fingerprint
    shown = capsys.readouterr()
    assert "broken.png (truncated)" in shown.err
    assert "no prediction of red is accepted until" in shown.out


def test_categories_from_a_labeled_manifest(trained, saved, tmp_path):
    manifest = color_manifest(tmp_path, "labeled", 45, 300)
    assert extend(saved, "--manifest", manifest, "--output", str(tmp_path / "v2")) == 0
    found = Bundle.load(str(tmp_path / "v2"), Storage())
    check_extended(trained, found, tmp_path)
    assert found.config.category_paths == (*PATHS, ("red",))
    assert found.config.lineage["existing_images"] == 30


def test_images_of_the_category_in_the_run_are_left_out(trained, saved, red, tmp_path, capsys):
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(red).iterdir())[:2]]
    night = write_night(trained, tmp_path, ["blue", "green"] * 20 + ["red"] * 2, hashes)
    given = ("--category", "red", "--images", red, "--run", night, "--output", str(tmp_path / "v2"))
    assert extend(saved, *given) == 0
    assert (
        "run night-1 has 2 of the images of the new categories; they are left out" in capsys.readouterr().err
    )
    (category,) = Bundle.load(str(tmp_path / "v2"), Storage()).config.lineage["extended"]
    assert category["moved"] == 0


def test_names_and_folders_may_contain_commas():
    command = next(item for item in bundle_job.COMMANDS if item.name == "extend")
    parser = parser_of("bundle", [command])
    given = [
        "v1",
        "--category",
        "hats, caps",
        "--images",
        "a,b",
        "--category",
        "mug",
        "--images",
        "c",
        "--output",
        "o",
    ]
    settings = read_settings(BundleExtendConfig, parser.parse_args(given))
    assert settings.category == ["hats, caps", "mug"]
    assert [uri.rpartition("/")[2] for uri in settings.images] == ["a,b", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--category", "red", "--images", "{red}"), "there are no images of the existing categories"),
        (("--category", "blue", "--images", "{red}"), "the bundle already has blue"),
        (("--category", "red", "--images", "{red}-lost"), "red-lost"),
        (("--category", "red", "--images", "{empty}"), "no images"),
        (("--category", "red", "--images", "{broken}"), "none of the 1 images of red can be read"),
        (("--category", "red"), "either --category NAME --images FOLDER for each category"),
        (("--category", "red", "--category", "pink", "--images", "{red}"), "--category is given 2 times"),
        (
            ("--category", "red", "--category", "red", "--images", "{red}", "--images", "{red}"),
            "more than once",
        ),
        (
            ("--category", "red", "--images", "{red}", "--category-path", "warm//red"),
            "a part of the path is empty",
        ),
        (("--category", "red", "--images", "{red}", "--run", "{red}"), "contains neither run.json"),
        (("--category", "pink", "--manifest", "{manifest}"), "has no images of pink"),
    ],
)
def test_impossible_extensions_are_rejected_with_the_reason(saved, red, tmp_path, capsys, arguments, message):
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "half.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    manifest = color_manifest(tmp_path, "labeled", 6, 300)
    names = {"red": red, "manifest": manifest, "empty": tmp_path / "empty", "broken": tmp_path / "broken"}
    filled = [argument.format(**names) for argument in arguments]
    assert extend(saved, *filled, "--output", str(tmp_path / "v2")) == ExitCode.BAD_INPUT
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "v2").exists()


def test_runs_of_other_models_are_rejected(trained, saved, red, tmp_path, capsys):
    given = ("--category", "red", "--images", red, "--output", str(tmp_path / "v2"))
    write_run(str(tmp_path / "small"), RunDetails("night-1"), [Item("a"), Item("b")])
    assert extend(saved, *given, "--run", str(tmp_path / "small" / "runs" / "night-1")) == ExitCode.BAD_INPUT
    assert "reproduces 0% of the run's predictions" in " ".join(capsys.readouterr().err.split())
    night = write_night(trained, tmp_path, ["blue", "green"] * 4)
    shutil.rmtree(saved)
    swapped = trained.config.model_copy(update={"labels": KNOWN[::-1]})
    weights = from_safetensors(trained.weights, WEIGHTS_FILE)
    weights |= {name: weights[name].flip(0) for name in ("fc.weight", "fc.bias")}
    other = Bundle(trained.config, trained.weights).with_weights(
        to_safetensors(weights), labels=swapped.labels
    )
    with_golden(other).save(saved, Storage())
    assert extend(saved, *given, "--run", night) == ExitCode.BAD_INPUT
    assert "reproduces 0% of the run's predictions" in " ".join(capsys.readouterr().err.split())


def test_a_classifier_that_is_not_linear_is_rejected(red, tmp_path, capsys):
    choices = ModelChoices(allow_random=True, overrides=PreprocessingOverrides(input_size=64))
    made = with_golden(resolve_model("torchvision:squeezenet1_1", choices, Storage()))
    made.save(str(tmp_path / "v1"), Storage())
    given = ("--category", "red", "--images", red, "--output", str(tmp_path / "v2"))
    assert extend(str(tmp_path / "v1"), *given) == ExitCode.BAD_INPUT
    assert "is not one linear layer on its embedding" in " ".join(capsys.readouterr().err.split())
