"""The fragment worker without Ray: concurrent fragments, failures and written parts."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.config.classify_config import ClassifyConfig
from batchcls.images.load_config import LoadSettings, decode_limits, fetch_policy
from batchcls.inference.golden_record import with_golden
from batchcls.inference.predictor_config import PredictSettings
from batchcls.manifest.snapshot import Fragment, Manifest, open_manifest
from batchcls.models.engines.engine import REFERENCE
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import resolve_model
from batchcls.pipeline.fragment_worker import FragmentWorker
from batchcls.pipeline.pipeline_spec import Engines, LoadSpec, NodeEngine, WorkerSpec
from batchcls.preprocessing import Views
from batchcls.resources import NodeResources, plan_resources
from batchcls.runs.parts import PartWriter
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
