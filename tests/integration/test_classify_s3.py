"""`classify` with manifest, images, bundle and output on a real S3 server, on a cluster that the job starts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3fs
from ray._private.authentication_test_utils import reset_auth_token_state

from batchcls.cli.app import run
from batchcls.jobs import classify, manifest
from tests.conftest import S3Server
from tests.helpers.drawing import draw, encode
from tests.helpers.tiers import long_except

IMAGES = 60
BROKEN = (7, 31)


@dataclass(frozen=True)
class Store:
    """An S3 server that holds a catalog."""

    server: S3Server
    client: s3fs.S3FileSystem
    manifest: str
    output: str


@pytest.fixture
def store(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Store:
    # The job starts its own cluster here; Ray may still cache the token of the test cluster.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    reset_auth_token_state()
    client = s3fs.S3FileSystem(
        endpoint_url=s3.endpoint_url,
        key=s3.environment["AWS_ACCESS_KEY_ID"],
        secret=s3.environment["AWS_SECRET_ACCESS_KEY"],
        skip_instance_cache=True,
    )
    for number in range(IMAGES):
        data = encode(draw(number, 80, 60), "JPEG")
        client.pipe_file(f"{s3.bucket}/photos/{number:03d}.jpg", data[:200] if number in BROKEN else data)
    uri = f"s3://{s3.bucket}/catalog.parquet"
    assert (
        run("manifest", manifest.COMMANDS, ["from-folder", f"s3://{s3.bucket}/photos", "--output", uri]) == 0
    )
    return Store(s3, client, uri, f"s3://{s3.bucket}/out")


def classify_from_store(store: Store, model: str, *arguments: str) -> int:
    given = [
        "--manifest",
        store.manifest,
        "--output",
        store.output,
        "--model",
        model,
        "--ray-address",
        "local",
    ]
    return run("classify", classify.COMMANDS, [*given, *arguments])


def test_run_on_s3_does_not_reveal_credentials(
    store: Store, tiny_bundle: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Bundle, manifest, images and output are in the store; keys and endpoint only in the storage options."""
    for file in Path(tiny_bundle).iterdir():
        store.client.put_file(str(file), f"{store.server.bucket}/models/v1/{file.name}")
    environment = store.server.environment
    key, secret = environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    options = json.dumps({"key": key, "secret": secret, "endpoint_url": store.server.endpoint_url})
    bucket = store.server.bucket
    code = classify_from_store(
        store, f"s3://{bucket}/models/v1", "--max-failed-fraction", "0.1", "--storage-options", options
    )
    log = "".join(capfd.readouterr())
    assert code == 0, log
    current = json.loads(store.client.cat_file(f"{bucket}/out/current.json"))
    run_json = store.client.cat_file(f"{bucket}/out/{current['path']}/run.json").decode()
    plan_json = store.client.cat_file(f"{bucket}/out/{current['path']}/plan.json").decode()
    assert json.loads(run_json)["counts"]["quarantined_by_reason"] == {"truncated": len(BROKEN)}
    rows = []
    for file in json.loads(run_json)["files"]:
        with store.client.open(f"{bucket}/out/{current['path']}/{file['path']}") as opened:
            rows += pq.read_table(opened).column("row").to_pylist()
    assert sorted(rows) == list(range(IMAGES))
    assert store.server.endpoint_url in plan_json
    for hidden in (key, secret):
        assert hidden not in log + plan_json + run_json


@pytest.mark.parametrize(
    ("case", "words"),
    long_except(
        {"wrong secret", "no server at the endpoint"},
        [
            ("wrong secret", ["SignatureDoesNotMatch"]),
            ("unknown key", ["InvalidAccessKeyId"]),
            ("no bucket for the manifest", ["no-such-bucket"]),
            ("no bucket for the output", ["no-such-bucket"]),
            ("no server at the endpoint", ["does not respond", "endpoint"]),
        ],
    ),
)
def test_unusable_store_exits_2_with_one_line(
    store: Store, tiny_bundle: str, capfd: pytest.CaptureFixture[str], case: str, words: list[str]
):
    environment = store.server.environment
    options = {"key": environment["AWS_ACCESS_KEY_ID"], "secret": environment["AWS_SECRET_ACCESS_KEY"]}
    changes: dict[str, Callable[[], list[str]]] = {
        "wrong secret": lambda: ["--storage-options", json.dumps(options | {"secret": "not-the-secret"})],
        "unknown key": lambda: ["--storage-options", json.dumps(options | {"key": "NOBODYSKEY"})],
        "no bucket for the manifest": lambda: ["--manifest", "s3://no-such-bucket/catalog.parquet"],
        "no bucket for the output": lambda: ["--output", "s3://no-such-bucket/out"],
        "no server at the endpoint": lambda: [
            *("--storage-options", json.dumps({"endpoint_url": "http://127.0.0.1:9"}))
        ],
    }
    capfd.readouterr()
    code = classify_from_store(store, tiny_bundle, *changes[case]())
    log = "".join(capfd.readouterr())
    assert code == 2, log
    (line,) = [line for line in log.splitlines() if " ERROR " in line]
    for word in words:
        assert word in line
    assert "Traceback" not in log
    assert "not-the-secret" not in log
    assert not store.client.exists(store.output)
