"""The fragment worker without Ray: concurrent fragments, failures and written parts."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.config.classify_config import ClassifyConfig
from batchcls.images.load_config import LoadSettings, decode_limits, fetch_policy
from batchcls.images.repeated_images import RepeatedImages
from batchcls.inference.golden_record import with_golden
from batchcls.inference.predictor_config import PredictSettings
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.snapshot import Fragment, Manifest, open_manifest
from batchcls.models.engines.engine import REFERENCE
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import resolve_model
from batchcls.pipeline.fragment_worker import FragmentWorker
from batchcls.pipeline.pipeline_spec import Engines, LoadSpec, NodeEngine, WorkerSpec
from batchcls.pipeline.repeated_predictions import KnownPredictions, RepeatedPredictions
from batchcls.preprocessing import Views
from batchcls.resources import NodeResources, plan_resources
from batchcls.runs.commit import reconcile
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.schema import Failure, Reason
from batchcls.storage.filesystem import Storage
from tests.helpers.drawing import draw, encode

STORAGE = Storage({})
ROWS = 90
BROKEN = (3, 64, 89)


def ignore(block: pa.Table) -> None:
    """Ignore a block."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("catalog")
    for number in range(ROWS):
        data = encode(draw(number, 90, 70), "JPEG")
        (folder / f"{number}.jpg").write_bytes(data[: len(data) // 2] if number in BROKEN else data)
    table = pa.table({"item_id": [f"i{n}" for n in range(ROWS)], "uri": [f"{n}.jpg" for n in range(ROWS)]})
    pq.write_table(table, folder / "manifest.parquet")
    return open_manifest(str(folder / "manifest.parquet"), STORAGE)


@pytest.fixture
def worker(manifest: Manifest, tmp_path: Path, one_thread: None) -> FragmentWorker:
    return start(manifest, tmp_path, share_predictions=True)


def start(manifest: Manifest, tmp_path: Path, *, share_predictions: bool) -> FragmentWorker:
    config = ClassifyConfig(manifest="m", output=str(tmp_path), model="m", batch_size=4)
    random = ModelChoices(allow_random=True)
    bundle = with_golden(resolve_model("timm:test_resnet", random, STORAGE))
    resources = plan_resources(config, [NodeResources(1, 0)], ROWS, remote_images=False)
    load = LoadSettings(
        run_id="r",
        base=manifest.base,
        kept=(),
        fetch=fetch_policy(config),
        limits=decode_limits(config),
        preprocessing=bundle.config.preprocessing,
        views=Views(),
        normalize="engine",
        fetch_threads=4,
        decode_threads=2,
        block_rows=8,
        share_predictions=share_predictions,
    )
    dimension = bundle.config.embedding_dimension
    labels = tuple(bundle.config.labels)
    size = bundle.config.preprocessing.shape
    predict = PredictSettings(labels, 3, pa.float16(), dimension, False, Views(), size, "engine", 99, ())
    engines = Engines({}, NodeEngine(REFERENCE, 4), str(tmp_path / "cache"), None)
    return FragmentWorker(
        WorkerSpec(
            bundle,
            bundle.fingerprint,
            engines,
            LoadSpec(manifest.columns, STORAGE, load),
            predict,
            PartWriter(str(tmp_path), STORAGE, (), pa.float16(), dimension),
            resources,
        )
    )


def test_concurrent_fragments_write_each_row_once_with_stage_seconds(
    worker: FragmentWorker, manifest: Manifest, tmp_path: Path
):
    rejected = {5: Failure(Reason.DUPLICATE_ID, "row 2 has the same item id")}
    fragments = list(manifest.fragments(itertools.repeat(30)))
    reported: list[pa.Table] = []
    with ThreadPoolExecutor(2) as pool:
        receipts = list(
            pool.map(lambda fragment: worker.process(fragment, rejected, reported.append), fragments)
        )
    good = pa.concat_tables(
        pq.read_table(tmp_path / file.path)
        for receipt in receipts
        for file in receipt.files
        if file.kind == "predictions"
    ).sort_by("row")
    failed = {3: "truncated", 5: "duplicate_id", 64: "truncated", 89: "truncated"}
    assert good.column("row").to_pylist() == [row for row in range(ROWS) if row not in failed]
    assert good.column("item_id").to_pylist() == [f"i{row}" for row in range(ROWS) if row not in failed]
    assert dict(pair for receipt in receipts for pair in receipt.first_failed) == failed
    for receipt in receipts:
        assert len(receipt.ranges) == 30
        assert set(receipt.seconds) == {"fetch", "decode", "predict", "write", "other"}
        assert all(seconds >= 0 for seconds in receipt.seconds.values())
        assert receipt.seconds["decode"] > 0
    assert sorted(pa.concat_tables(reported).column("row").to_pylist()) == list(range(ROWS))
    assert worker.describe() == "torch fp32 on cpu"


def test_labels_do_not_depend_on_fragment_sizes(worker: FragmentWorker, manifest: Manifest, tmp_path: Path):
    def labels(fragment_rows: int) -> list[str]:
        fragments = manifest.fragments(itertools.repeat(fragment_rows))
        receipts = [worker.process(fragment, {}, ignore) for fragment in fragments]
        files = [file.path for receipt in receipts for file in receipt.files if file.kind == "predictions"]
        return pa.concat_tables(pq.read_table(tmp_path / path) for path in files).column("label").to_pylist()

    assert labels(90) == labels(7)


def test_worker_processes_fragments_after_a_failed_one(worker: FragmentWorker, manifest: Manifest):
    missing = Fragment(manifest.files[0].uri + ".gone", 0, 0, 10, 0)
    with pytest.raises(Exception, match="gone"):
        worker.process(missing, {}, ignore)
    for fragment in manifest.fragments(itertools.repeat(45)):
        assert len(worker.process(fragment, {}, ignore).ranges) == 45


SHARED_ROWS = 120


@pytest.fixture
def shared(tmp_path: Path) -> Manifest:
    """A catalog in which six of ten rows share three images, one of which is damaged."""
    folder = tmp_path / "shared"
    folder.mkdir()
    images = [encode(draw(number, 90, 70), "JPEG") for number in range(SHARED_ROWS)]
    common = [images[0], images[1], images[2][:300]]
    for number, image in enumerate(images):
        (folder / f"{number}.jpg").write_bytes(common[number % 3] if number % 10 < 6 else image)
    table = pa.table(
        {"item_id": [f"i{n}" for n in range(SHARED_ROWS)], "uri": [f"{n}.jpg" for n in range(SHARED_ROWS)]}
    )
    pq.write_table(table, folder / "manifest.parquet")
    return open_manifest(str(folder / "manifest.parquet"), STORAGE)


def written(folder: Path, receipts: list[Receipt], kind: str) -> pa.Table:
    files = [file.path for receipt in receipts for file in receipt.files if file.kind == kind]
    return pa.concat_tables(pq.read_table(folder / path) for path in files).sort_by("row")


def test_repeated_images_are_predicted_once_and_all_rows_are_as_without_sharing(
    shared: Manifest, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
):
    tables: dict[bool, tuple[pa.Table, pa.Table]] = {}
    images: dict[bool, list[int]] = {}
    reported: list[pa.Table] = []
    for is_shared in (False, True):
        folder = tmp_path / str(is_shared)
        worker = start(shared, folder, share_predictions=is_shared)
        sizes: list[int] = []
        submit = worker._networks.engine.submit
        monkeypatch.setattr(
            worker._networks.engine,
            "submit",
            lambda pixels, s=sizes, f=submit: (s.append(len(pixels)), f(pixels))[1],
        )
        receipts = [
            worker.process(fragment, {}, reported.append if is_shared else ignore)
            for fragment in shared.fragments(itertools.repeat(40))
        ]
        totals = reconcile(receipts, SHARED_ROWS).counts
        tables[is_shared] = written(folder, receipts, "predictions"), written(folder, receipts, "quarantine")
        images[is_shared] = sizes
        # Of 72 rows with a common image, a third has the damaged one.
        assert (totals.predicted, totals.shared) == ((50, 46) if is_shared else (96, 0))
        assert totals.quarantined_by_reason == {"truncated": 24}
    assert (sum(images[False]), sum(images[True])) == (96, 50)
    # Blocks are filled with decoded images, so that only the last batch of a fragment is smaller than 4.
    assert sum(size < 4 for size in images[True]) <= 3

    (plain, plain_failed), (copied, copied_failed) = tables[False], tables[True]
    origins = copied.column("origin").to_pylist()
    assert origins.count("shared") == 46
    first = {}
    for row, content, origin in zip(
        copied["row"].to_pylist(), copied["content_hash"].to_pylist(), origins, strict=True
    ):
        assert (origin == "computed") == (first.setdefault(content, row) == row)
    exact = ["row", "item_id", "uri", "label", "width", "height", "content_hash", "source_version"]
    assert copied.select(exact).equals(plain.select(exact))
    assert copied_failed.equals(plain_failed)
    for name in ("probability", "embedding"):
        values = [table.column(name).combine_chunks() for table in (copied, plain)]
        ours, theirs = (np.asarray(v.flatten() if name == "embedding" else v, np.float32) for v in values)
        np.testing.assert_allclose(ours, theirs, atol=2e-3 if name == "embedding" else 1e-5)
    names = ("label", "probability", "top_k", "embedding")
    by_content = {}
    for row in copied.select(["content_hash", *names]).to_pylist():
        assert by_content.setdefault(row["content_hash"], row) == row
    assert sorted(pa.concat_tables(reported).column("row").to_pylist()) == list(range(SHARED_ROWS))


def test_concurrent_fragments_share_predictions(shared: Manifest, tmp_path: Path, one_thread: None):
    worker = start(shared, tmp_path, share_predictions=True)
    with ThreadPoolExecutor(2) as pool:
        fragments = list(shared.fragments(itertools.repeat(15)))
        receipts = list(pool.map(lambda fragment: worker.process(fragment, {}, ignore), fragments))
    totals = reconcile(receipts, SHARED_ROWS).counts
    # Two fragments that are decoded at the same time may both predict an image.
    assert totals.predicted + totals.shared == 96
    assert 50 <= totals.predicted <= 56
    assert written(tmp_path, receipts, "predictions").num_rows == 96


@pytest.mark.parametrize("rows", [5, 13, 40])
def test_blocks_with_shared_pixels_are_predicted_once_whatever_their_boundaries(
    shared: Manifest, tmp_path: Path, one_thread: None, rows: int
):
    """As in the staged graph, in which Ray Data may cut the blocks between load tasks and actors again."""
    worker = start(shared, tmp_path, share_predictions=True)
    known = KnownPredictions(worker._networks.settings.columns_of_an_image)
    predictor = worker._networks.predictor(time.process_time)
    receipts = []
    for fragment in shared.fragments(itertools.repeat(40)):
        tables = FragmentReader(shared.columns, STORAGE).read(fragment, 8)
        loaded = pa.concat_tables(worker._loader.load(tables, {}, RepeatedImages(shares_pixels=True)))
        predicted = []
        for first in range(0, loaded.num_rows, rows):
            repeated = RepeatedPredictions(known)
            block = repeated.drop_pixels(loaded.slice(first, rows).combine_chunks())
            predicted.append(repeated.complete(predictor(block)))
        receipts.append(worker._writer.write(predicted))
    totals = reconcile(receipts, SHARED_ROWS).counts
    assert (totals.predicted, totals.shared, totals.quarantined) == (50, 46, 24)
    copied = written(tmp_path, receipts, "predictions")
    by_content: dict[str, dict] = {}
    for row in copied.select(["content_hash", "label", "probability", "top_k", "embedding"]).to_pylist():
        assert by_content.setdefault(row["content_hash"], row) == row
