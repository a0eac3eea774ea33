"""A label map on the way and on a published run: no image is read, gates compare after it, and rollback undoes it."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from batchcls.cli.app import run
from batchcls.inference.golden_record import with_golden
from batchcls.jobs import runs
from batchcls.models.model_bundle import Bundle
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.storage.filesystem import Storage
from tests.helpers.started import write_catalog
from tests.integration.conftest import Cluster, Outcome, run_here

Job = Callable[..., Outcome]
ROWS = 60


def published(output: Path) -> tuple[dict, pa.Table]:
    folder = output / json.loads((output / "current.json").read_text())["path"]
    record = json.loads((folder / "run.json").read_text())
    return record, pq.read_table(folder / "predictions").sort_by("row")


def write_map(path: Path, table: pa.Table) -> dict[str, str]:
    """A map with all four tables; the labels that the rows have most often are renamed, split, retired and merged."""
    found = [label for label, _ in Counter(table.column("label").to_pylist()).most_common()]
    found += [f"label {number}" for number in range(10) if f"label {number}" not in found]
    renamed, split, retired, one, two = found[:5]
    path.write_text(
        f"""
        [rename]
        "{renamed}" = "renamed"

        [merge]
        merged = ["{one}", "{two}"]

        [retire]
        "{retired}" = ""

        [split."{split}"]
        default = "other shops"
        rules = [{{to = "first shop", column = "shop", values = ["0"]}}]
        """
    )
    return {"renamed": renamed, "split": split, "retired": retired, "one": one, "two": two}


def full_probabilities(table: pa.Table) -> np.ndarray:
    """Rows by class index, from a top-k of all classes."""
    found = np.zeros((table.num_rows, 10))
    for row, top_k in enumerate(table.column("top_k").to_pylist()):
        for entry in top_k:
            found[row, entry["class_index"]] = entry["probability"]
    return found


def with_varied_classes(folder: str, embeddings: np.ndarray, to: Path) -> str:
    """A bundle of the same network whose classifier distinguishes the images: a class for each of ten of them."""
    bundle = Bundle.load(folder, Storage())
    state = from_safetensors(bundle.weights, folder)
    weight, bias = bundle.config.head_tensors or ()
    mean = embeddings.mean(axis=0)
    rows = (embeddings[:10] - mean) / np.linalg.norm(embeddings[:10] - mean, axis=1, keepdims=True)
    rows *= 3 / ((embeddings - mean) @ rows.T).std()
    state[weight] = torch.from_numpy(rows).reshape(state[weight].shape).to(state[weight].dtype)
    state[bias] = torch.from_numpy(-rows @ mean).to(state[bias].dtype)
    with_golden(bundle.with_weights(to_safetensors(state))).save(str(to), Storage())
    return str(to)


@pytest.mark.long
@pytest.mark.timeout(900)  # five jobs, each of which takes 15 s on two idle cores
def test_map_is_applied_without_reading_an_image_and_undone_by_a_rollback(
    cluster: Cluster, job: Job, tiny_bundle: str, tmp_path: Path
):
    manifest = write_catalog(tmp_path / "catalog", ROWS)
    arguments = ["--manifest", manifest, "--keep", "shop", "--top-k", "10", "--gate-min-rows", "1"]
    arguments += ["--gate-max-changed-labels-fraction", "0.5", "--gate-max-category-shift", "1"]
    arguments += ["--gate-max-mean-confidence-shift", "1"]
    first = job(*arguments, "--model", tiny_bundle, "--no-publish", "--run-id", "n0")
    assert first.exit_code == 0, first.log
    embeddings = np.stack(first.predictions.column("embedding").to_pylist()).astype(np.float32)
    arguments += ["--model", with_varied_classes(tiny_bundle, embeddings, tmp_path / "model")]

    # The bytes of every image are replaced by zeros; size and time, which identify its version, stay the same.
    for image in (tmp_path / "catalog").glob("*.jpg"):
        stat = image.stat()
        image.write_bytes(bytes(stat.st_size))
        os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    varied = job(*arguments, "--run-id", "n1")
    assert varied.exit_code == 0, varied.log
    _, before = published(first.output)
    names = write_map(tmp_path / "map.toml", before)
    mapped = job(*arguments, "--label-map", str(tmp_path / "map.toml"), "--run-id", "n2")
    assert mapped.exit_code == 0, mapped.log
    record, after = published(first.output)
    assert (record["counts"]["reheaded"], record["counts"]["predicted"]) == (ROWS, 0)
    assert (record["image_bytes"], record["run_id"]) == (0, "n2")
    assert record["model"]["label_map"]["rename"] == {names["renamed"]: "renamed"}

    # Every row is as the map says: sums before the best is chosen, nothing of the retired label, split by shop.
    single = full_probabilities(before)
    index = {name: int(label.removeprefix("label ")) for name, label in names.items()}
    sums = single.copy()
    sums[:, min(index["one"], index["two"])] = single[:, index["one"]] + single[:, index["two"]]
    sums[:, [max(index["one"], index["two"]), index["retired"]]] = -1
    labels = {number: f"label {number}" for number in range(10)}
    labels |= {index["renamed"]: "renamed", min(index["one"], index["two"]): "merged"}
    best = sums.argmax(axis=1)
    expected = [
        ("first shop" if shop == 0 else "other shops") if number == index["split"] else labels[number]
        for number, shop in zip(best.tolist(), after.column("shop").to_pylist(), strict=True)
    ]
    assert after.column("label").to_pylist() == expected
    np.testing.assert_allclose(after.column("probability"), sums.max(axis=1), atol=2e-3)
    assert {"renamed", "first shop", "other shops"} <= set(expected)
    assert after.column("embedding").equals(before.column("embedding"))

    # The gates counted only items that changed besides the map, and the report shows it.
    changed = next(gate for gate in record["gates"] if gate["gate"] == "changed_labels_fraction")
    allowed = {
        **{f"label {number}": {f"label {number}"} for number in range(10)},
        names["renamed"]: {"renamed"},
        names["one"]: {"merged"},
        names["two"]: {"merged"},
        names["retired"]: set(expected),
        names["split"]: {"first shop", "other shops"},
    }
    pairs = list(zip(before.column("label").to_pylist(), expected, strict=True))
    is_other = [now not in allowed[label] for label, now in pairs]
    assert changed["value"] == pytest.approx(np.mean(is_other))
    assert np.mean([label != now for label, now in pairs]) > changed["value"] + 0.3
    page = (first.output / "runs" / "n2" / "report.html").read_text()
    assert "<h2>Label map</h2>" in page
    assert "mapped label" in page

    # A column by which a label is split has changed, and no image: the stored predictions are split again.
    table = pq.read_table(manifest)
    table = table.set_column(table.column_names.index("shop"), "shop", pa.array([0] * ROWS))
    pq.write_table(table, manifest, row_group_size=ROWS)
    again = job(*arguments, "--label-map", str(tmp_path / "map.toml"), "--run-id", "n3")
    assert again.exit_code == 0, again.log
    record, split = published(first.output)
    assert (record["counts"]["reused"], record["image_bytes"]) == (ROWS, 0)
    assert split.column("label").to_pylist() == [
        "first shop" if label == "other shops" else label for label in expected
    ]

    # Another map for the published run, which names the labels of the bundle again.
    (tmp_path / "map.toml").write_text(f'rename = {{"{names["renamed"]}" = "renamed again"}}')
    relabeled = (
        "relabel",
        "published",
        "--label-map",
        str(tmp_path / "map.toml"),
        "--output",
        str(first.output),
    )
    exit_code, printed = run_here(cluster, runs, *relabeled)
    assert exit_code == 0, printed
    exit_code, printed = run_here(cluster, runs, "relabel", "n2", *relabeled[2:])
    assert (exit_code, "has changed since run n2" in printed) == (2, True)
    record, last = published(first.output)
    assert (record["counts"]["reheaded"], record["image_bytes"]) == (ROWS, 0)
    assert last.column("label").to_pylist() == [
        "renamed again" if label == names["renamed"] else label
        for label in before.column("label").to_pylist()
    ]
    np.testing.assert_allclose(last.column("probability"), before.column("probability"), atol=2e-3)

    # The map is undone.
    assert run("runs", runs.COMMANDS, ["rollback", "--output", str(first.output)]) == 0
    assert published(first.output)[0]["run_id"] == "n3"


def test_map_of_other_labels_is_rejected_before_anything_starts(job: Job, tiny_bundle: str, tmp_path: Path):
    manifest = write_catalog(tmp_path / "catalog", 3)
    arguments = ("--manifest", manifest, "--model", tiny_bundle, "--label-map", str(tmp_path / "map.toml"))
    (tmp_path / "map.toml").write_text('rename = {"lable 1" = "x"}')
    found = job(*arguments)
    assert (found.exit_code, "did you mean label 1?" in found.log) == (2, True)
    (tmp_path / "map.toml").write_text(
        '[split."label 1"]\ndefault = "x"\nrules = [{to = "y", column = "shop", values = ["1"]}]'
    )
    found = job(*arguments)
    assert (found.exit_code, "add it with --keep shop" in found.log) == (2, True)
    assert not (tmp_path / "output").exists()
