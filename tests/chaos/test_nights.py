"""Three nightly runs on real images: unchanged images are reused, and another model predicts all images."""

import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchcls.cli.app import run
from batchcls.jobs import bundle, classify, manifest, runs
from tests.integration.conftest import Cluster, cluster, run_here

__all__ = ["cluster"]

CHANGED_FRACTION = 0.01
MAX_PREDICT_FRACTION = 0.05

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]


def record(output: Path, run_id: str) -> dict:
    return json.loads((output / "runs" / run_id / "run.json").read_text())


def make_bundle(shared: Path, folder: Path, name: str, *arguments: str) -> str:
    labels = folder / "labels.txt"
    rows = (shared / "data/imagenet/classes.csv").read_text().splitlines()[1:]
    labels.write_text("".join(f"{row.split(',')[1]}\n" for row in rows))
    weights = str(shared / "weights" / f"{name}.safetensors")
    common = ("--weights", weights, "--labels", str(labels), "--input-size", "224", "--crop-pct", "0.875")
    command = ["create", *arguments, *common, "--interpolation", "bilinear", "--output", str(folder / name)]
    assert run("bundle", bundle.COMMANDS, command) == 0
    return str(folder / name)


def test_nightly_runs_reuse_unchanged_images(cluster: Cluster, shared: Path, tmp_path: Path):
    photographs, output = tmp_path / "photographs", tmp_path / "output"
    shutil.copytree(shared / "data" / "catalog", photographs)
    catalog = str(tmp_path / "catalog.parquet")
    first_model = make_bundle(
        *(shared, tmp_path, "squeezenet1_1", "--model", "torchvision:squeezenet1_1"),
        *("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"),
    )

    def night(name: str, model: str) -> tuple[int, str]:
        command = ["from-folder", str(photographs), "--output", catalog]
        assert run("manifest", manifest.COMMANDS, command) == 0
        engine = ("--engine", "openvino", "--precision", "fp32")
        arguments = ("--manifest", catalog, "--model", model, "--output", str(output), "--run-id", name)
        return run_here(cluster, classify, *arguments, *engine)

    code, log = night("night-1", first_model)
    assert code == 0, log
    first = record(output, "night-1")
    rows = first["counts"]["rows"]
    assert rows == 3409

    images = sorted(photographs.rglob("*.jpg"))
    changed = random.Random(0).sample(images, round(CHANGED_FRACTION * rows))
    for image in changed:
        Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image, quality=90)
    code, log = night("night-2", first_model)
    assert code == 0, log
    second = record(output, "night-2")
    assert second["counts"]["predicted"] == len(changed)
    assert second["counts"]["reused"] == rows - len(changed)
    table = pq.read_table(output / "runs/night-2/predictions", columns=["item_id", "origin"])
    computed = {
        item
        for item, origin in zip(*(table.column(n).to_pylist() for n in table.column_names), strict=True)
        if origin == "computed"
    }
    assert computed == {str(image.relative_to(photographs)) for image in changed}
    share = second["stage_seconds"]["predict"] / first["stage_seconds"]["predict"]
    assert share <= MAX_PREDICT_FRACTION
    diff = str(tmp_path / "diff")
    assert (
        run("runs", runs.COMMANDS, ["diff", "night-1", "night-2", "--output", str(output), "--to", diff]) == 0
    )
    items = pq.read_table(f"{diff}/diff-items.parquet").to_pylist()
    assert {item["item_id"] for item in items if item["image_changed"]} == computed

    second_model = make_bundle(
        *(
            shared,
            tmp_path,
            "mobilenetv2_100",
            "--model",
            "timm:mobilenetv2_100",
            "--model-args",
            "pad_type=same",
        ),
        *("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"),
    )
    code, log = night("night-3", second_model)
    third = record(output, "night-3")
    assert (third["counts"]["predicted"], third["counts"]["reused"]) == (rows, 0)
    failed = [gate["gate"] for gate in third["gates"] if not gate["passed"]]
    assert (code, json.loads((output / "current.json").read_text())["run_id"]) == (3, "night-2"), log
    assert "changed_labels_fraction" in failed
    seconds = [run_record["measurements"]["seconds_total"] for run_record in (first, second, third)]
    print(
        f"\nruns: {seconds} s; the second took {share:.2%} of the first run's predict time; the third failed {failed}"
    )
