"""`classify` on an S3 store behind a proxy that injects the faults of stores and networks."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import s3fs
from ray._private.authentication_test_utils import reset_auth_token_state

from batchcls.cli.app import run
from batchcls.jobs import manifest
from tests.conftest import REPOSITORY, S3Server
from tests.helpers.drawing import draw, encode
from tests.helpers.faulty_proxy import FaultyProxy

BROKEN = (7, 31)
MAX_STARTS = 12

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]


@pytest.fixture(autouse=True)
def _own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    reset_auth_token_state()


def client(s3: S3Server) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(
        endpoint_url=s3.endpoint_url,
        key=s3.environment["AWS_ACCESS_KEY_ID"],
        secret=s3.environment["AWS_SECRET_ACCESS_KEY"],
        skip_instance_cache=True,
    )


def put_catalog(s3: S3Server, images: int) -> str:
    store = client(s3)
    for number in range(images):
        data = encode(draw(number, 80, 60), "JPEG")
        store.pipe_file(f"{s3.bucket}/photos/{number:04d}.jpg", data[:200] if number in BROKEN else data)
    uri = f"s3://{s3.bucket}/catalog.parquet"
    assert (
        run("manifest", manifest.COMMANDS, ["from-folder", f"s3://{s3.bucket}/photos", "--output", uri]) == 0
    )
    return uri


def start(catalog: str, model: str, output: str, endpoint: str, *more: str) -> int:
    """Run `classify` in a separate process, so that its lease is free after it has ended; return the exit code."""
    options = json.dumps({"endpoint_url": endpoint})
    done = subprocess.run(
        [
            *(sys.executable, "-m", "batchcls.jobs.classify"),
            *("--manifest", catalog, "--model", model, "--output", output, "--storage-options", options),
            *("--fragment-rows", "50", "--rows-per-file", "50", "--fetch-timeout-seconds", "2"),
            *("--ray-address", "local", *more),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    # The exit code is 2 if the manifest or the output could not be opened.
    assert done.returncode in (0, 2, 4), (done.returncode, done.stderr)
    print(f"\nexit {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    return done.returncode


def current_run(store: s3fs.S3FileSystem, output: str) -> tuple[str, dict[str, object]]:
    folder = f"{output}/{json.loads(store.cat_file(f'{output}/current.json'))['path']}"
    record: dict[str, object] = json.loads(store.cat_file(f"{folder}/run.json"))
    return folder, record


@pytest.mark.parametrize("images", [60, 2000])
def test_no_row_is_lost_with_a_faulty_store(s3: S3Server, tiny_bundle: str, images: int):
    catalog, output = put_catalog(s3, images), f"s3://{s3.bucket}/out"
    with FaultyProxy(s3.endpoint_url, share=0.1, seed=images, stall_seconds=5) as proxy:
        starts = 1
        more = ("--fetch-attempts", "20", "--max-failed-fraction", "0.2")
        while start(catalog, tiny_bundle, output, proxy.url, *more) != 0:
            assert starts < MAX_STARTS
            starts += 1
        assert all(proxy.seen[fault] for fault in ("500", "503", "reset", "stall", "cut")), proxy.seen
        print(f"\n{images} images, {starts} start(s), requests: {dict(proxy.seen)}")
    store = client(s3)
    folder, record = current_run(store, output)
    tables = {
        kind: pq.ParquetDataset(
            [
                f"{folder.removeprefix('s3://')}/{file['path']}"
                for file in record["files"]
                if file["kind"] == kind
            ],
            filesystem=store,
        ).read()
        for kind in ("predictions", "quarantine")
    }
    rows = sorted(row for table in tables.values() for row in table.column("row").to_pylist())
    assert rows == list(range(images))
    quarantine = tables["quarantine"].sort_by("row")
    assert quarantine.column("row").to_pylist() == list(BROKEN)
    assert min(quarantine.column("attempts").to_pylist()) >= 1


def test_run_stopped_by_expired_credentials_is_resumed(s3: S3Server, tiny_bundle: str):
    images = 120
    catalog, output = put_catalog(s3, images), f"s3://{s3.bucket}/out"
    with FaultyProxy(s3.endpoint_url) as proxy:
        proxy.expire_after = 90
        assert start(catalog, tiny_bundle, output, proxy.url, "--max-failed-fraction", "0.1") == 4
        assert proxy.seen["expired"]
        store = client(s3)
        assert not store.exists(f"{output}/current.json")
        proxy.expire_after = None
        assert start(catalog, tiny_bundle, output, proxy.url, "--max-failed-fraction", "0.1") == 0
    _, record = current_run(store, output)
    assert record["counts"] == record["counts"] | {"rows": images, "quarantined_by_reason": {"truncated": 2}}
    assert len(store.ls(f"{output}/runs", refresh=True)) == 1
