"""`classify` is killed at each of its writes, loses unsynced data, or is suspended while another job runs.

Afterwards, the same command publishes the same rows, and the published run is never replaced by an older one.
"""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from batchcls.inference.golden_record import with_golden
from batchcls.models.model_bundle import Bundle
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.storage.filesystem import Storage
from tests.helpers.crash_night import Spec, night
from tests.helpers.drawing import draw, encode
from tests.helpers.manifests import write_manifest
from tests.helpers.night import LENIENT

ROWS = 10
BEFORE = 5
"""Rows of the run of the previous night, whose predictions are copied."""
BROKEN = 7
SAME_AS_BEFORE = 9
"""Row whose image is that of the row before it, whose predictions are copied within the run."""

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]


@dataclass(frozen=True)
class Catalog:
    """Manifests and models of two nights, and a folder for outputs."""

    yesterday: Path
    tonight: Path
    model: str
    model_tonight: str
    folder: Path

    def arguments(self, manifest: Path, output: str) -> tuple[str, ...]:
        """Return the arguments of `classify` for a manifest and an output folder."""
        model = self.model_tonight if manifest == self.tonight else self.model
        return (
            *("--manifest", str(manifest), "--model", model, "--output", output, "--engine", "torch"),
            *("--precision", "fp32", "--device", "cpu", "--max-failed-fraction", "0.5", *LENIENT),
        )


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: str) -> Catalog:
    folder = tmp_path_factory.mktemp("catalog")
    for number in range(ROWS):
        data = encode(draw(number - (number == SAME_AS_BEFORE), 60, 50), "JPEG")
        (folder / f"{number}.jpg").write_bytes(data[:200] if number == BROKEN else data)
    ids = [f"item-{number}" for number in range(ROWS)]
    return Catalog(
        write_manifest(folder / "yesterday.parquet", ids[:BEFORE]),
        write_manifest(folder / "tonight.parquet", ids),
        tiny_bundle,
        tiny_bundle,
        tmp_path_factory.mktemp("outputs"),
    )


@pytest.fixture(scope="module")
def reheaded_catalog(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """The catalog with another classifier on the same trunk for the second night."""
    folder, storage = tmp_path_factory.mktemp("reheaded"), Storage()
    bundle = Bundle.load(catalog.model, storage)
    state = from_safetensors(bundle.weights, "weights")
    for name in bundle.config.head_tensors or ():
        state[name] = state[name].flip(0).contiguous()
    with_golden(bundle.with_weights(to_safetensors(state))).save(str(folder / "bundle"), storage)
    return replace(catalog, model_tonight=str(folder / "bundle"), folder=folder)


@pytest.fixture(scope="module")
def server() -> Iterator[multiprocessing.context.ForkServerContext]:
    """A fork server that has already imported the modules of a run."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.crash_night"])
    try:
        yield context
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@dataclass(frozen=True)
class Store:
    """The storage of the outputs, read without the code under test; local if `filesystem` is None."""

    filesystem: s3fs.S3FileSystem | None
    root: str
    environment: Mapping[str, str]

    def read(self, path: str) -> bytes | None:
        """Return the content of a file, None if it does not exist."""
        if self.filesystem is None:
            return Path(path).read_bytes() if Path(path).exists() else None
        self.filesystem.invalidate_cache()
        return self.filesystem.cat_file(path) if self.filesystem.exists(path) else None

    def copy(self, source: str, target: str) -> None:
        """Copy a folder."""
        if self.filesystem is None:
            shutil.copytree(source, target)
            return
        for path in self.filesystem.find(source):
            self.filesystem.pipe_file(
                target + path.removeprefix(source.removeprefix("s3://")), self.read(path)
            )

    def names(self, folder: str) -> list[str]:
        """Return the names of the entries of a folder."""
        if self.filesystem is None:
            return sorted(path.name for path in Path(folder).glob("*"))
        self.filesystem.invalidate_cache()
        if not self.filesystem.exists(folder):
            return []
        return sorted(name.rpartition("/")[2] for name in self.filesystem.ls(folder, detail=False))


class Nights:
    """Starts nightly runs on one kind of store, and reads what they published."""

    def __init__(
        self, catalog: Catalog, context: multiprocessing.context.ForkServerContext, store: Store
    ) -> None:
        self.catalog = catalog
        self.context = context
        self.store = store
        self._count = 0
        self.base = self.new_output()
        yesterday = self.spec(self.base, catalog.yesterday)
        assert self.run(yesterday)[0] == 0
        self.yesterday = self.published(self.base)[0]
        reference = self.output_with_yesterday()
        code, self.writes = self.run(self.spec(reference))
        assert code == 0
        self.rows = self.published(reference)[1]
        assert self.rows.column("row").to_pylist() == [row for row in range(ROWS) if row != BROKEN]
        copied = "reused" if catalog.model == catalog.model_tonight else "reheaded"
        assert set(self.rows.column("origin").to_pylist()) == {"computed", copied, "shared"}

    def new_output(self) -> str:
        """Return the path of a new output folder."""
        self._count += 1
        return f"{self.store.root}/{self._count:04d}"

    def output_with_yesterday(self) -> str:
        """Create an output folder in which yesterday's run is published."""
        output = self.new_output()
        self.store.copy(self.base, output)
        return output

    def spec(self, output: str, manifest: Path | None = None) -> Spec:
        """Return the specification of tonight's run, or of a run of another manifest."""
        arguments = self.catalog.arguments(manifest or self.catalog.tonight, output)
        kind = "local" if self.store.filesystem is None else "s3"
        log = str(self.catalog.folder / f"{kind}-{self._count:04d}.log")
        return Spec(arguments, output, log, environment=self.store.environment)

    def start(self, spec: Spec) -> tuple[ForkServerProcess, Connection]:
        """Start a run; return its process and the connection to it."""
        here, there = self.context.Pipe()
        process = self.context.Process(target=night, args=(spec, there))
        process.start()
        there.close()
        return process, here

    def run(self, spec: Spec) -> tuple[int, list[str]]:
        """Run to the end; return the exit code, negative for a signal, and the descriptions of all writes."""
        process, connection = self.start(spec)
        try:
            writes = connection.recv()
        except EOFError:
            writes = []
        return exit_code_of(process), writes

    def published(self, output: str) -> tuple[str, pa.Table]:
        """Return the id and the predictions of the published run, as a reader finds them."""
        pointer = json.loads(self.store.read(f"{output}/current.json") or b"null")
        folder = f"{output}/{pointer['path']}"
        record = json.loads(self.store.read(f"{folder}/run.json") or b"null")
        assert record["run_id"] == pointer["run_id"]
        tables = []
        for file in record["files"]:
            data = self.store.read(f"{folder}/{file['path']}")
            assert data is not None, file
            assert len(data) == file["bytes"]
            if file["kind"] == "predictions":
                tables.append(pq.read_table(pa.BufferReader(data), columns=COLUMNS))
        return pointer["run_id"], pa.concat_tables(tables).sort_by("row")

    def is_tonight_published(self, output: str) -> bool:
        """Return whether tonight's run is published, with all its rows; otherwise yesterday's still is."""
        run_id, rows = self.published(output)
        if run_id == self.yesterday:
            return False
        assert rows.drop_columns(["origin"]).equals(self.rows.drop_columns(["origin"])), rows
        return True

    def log(self, spec: Spec) -> str:
        """Return the log of all starts of a run."""
        return Path(spec.log).read_text()


COLUMNS = ["row", "item_id", "label", "probability", "content_hash", "origin"]


def exit_code_of(process: ForkServerProcess, seconds: float = 120) -> int:
    """Wait for the end of a process and return its exit code."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the run does not end")
    return process.exitcode


@pytest.fixture(scope="module")
def local(catalog: Catalog, server: multiprocessing.context.ForkServerContext) -> Nights:
    return Nights(catalog, server, Store(None, str(catalog.folder), {}))


@pytest.fixture(scope="module")
def remote(
    catalog: Catalog, server: multiprocessing.context.ForkServerContext, _s3_process: dict[str, str]
) -> Nights:
    filesystem = s3fs.S3FileSystem(
        endpoint_url=_s3_process["S3_ENDPOINT_URL"],
        key=_s3_process["AWS_ACCESS_KEY_ID"],
        secret=_s3_process["AWS_SECRET_ACCESS_KEY"],
        skip_instance_cache=True,
    )
    filesystem.mkdir("crash-points")
    return Nights(catalog, server, Store(filesystem, "s3://crash-points", dict(_s3_process)))


@pytest.fixture(params=["local", "s3"])
def nights(request: pytest.FixtureRequest) -> Nights:
    found: Nights = request.getfixturevalue("local" if request.param == "local" else "remote")
    return found


def finish(nights: Nights, spec: Spec, what: str) -> None:
    """Run the same command again; check that it succeeds and that tonight's run is published."""
    undisturbed = replace(spec, act="none", at=0, other_host=False)
    code, _ = nights.run(undisturbed)
    assert code == 0, f"{what}: exit {code}\n{nights.log(spec)}"
    assert nights.is_tonight_published(spec.output), what
    assert "beginning" not in nights.store.names(spec.output), what
    assert "Traceback" not in nights.log(spec), nights.log(spec)


def test_same_command_finishes_run_after_crash_or_power_loss_at_any_write(local: Nights):
    kept = local.catalog.folder / "kept"
    kept.mkdir()
    code, writes = local.run(replace(local.spec(local.output_with_yesterday()), act="keep", kept=str(kept)))
    assert code == 0
    states = sorted(path for path in kept.iterdir() if path.is_dir())
    assert len(states) > len(writes) > 15
    for state in states:
        what = f"{state.name}: {state.with_suffix('.txt').read_text()}"
        spec = local.spec(local.new_output())
        shutil.copytree(state, spec.output)
        local.is_tonight_published(spec.output)
        finish(local, spec, what)
        shutil.rmtree(spec.output)


def test_same_command_finishes_run_with_another_classifier_killed_at_any_write(
    reheaded_catalog: Catalog, server: multiprocessing.context.ForkServerContext
):
    nights = Nights(reheaded_catalog, server, Store(None, str(reheaded_catalog.folder), {}))
    assert len(nights.writes) > 15
    for number, what in enumerate(nights.writes, 1):
        spec = replace(nights.spec(nights.output_with_yesterday()), act="kill", at=number)
        code, _ = nights.run(spec)
        assert code == -signal.SIGKILL, f"{number}: {what}\n{nights.log(spec)}"
        nights.is_tonight_published(spec.output)
        finish(nights, spec, f"killed at {number}: {what}")


def test_same_command_finishes_run_killed_at_any_request(remote: Nights):
    assert len(remote.writes) > 15
    for number, what in enumerate(remote.writes, 1):
        spec = replace(remote.spec(remote.output_with_yesterday()), act="kill", at=number)
        code, _ = remote.run(spec)
        assert code == -signal.SIGKILL, f"{number}: {what}\n{remote.log(spec)}"
        remote.is_tonight_published(spec.output)
        finish(remote, spec, f"killed at {number}: {what}")


def test_second_driver_runs_while_first_is_suspended_at_any_write(nights: Nights):
    for number, what in enumerate(nights.writes, 1):
        run_while_suspended(nights, number, what)


def run_while_suspended(nights: Nights, number: int, what: str) -> None:
    """Suspend a driver at a write, run the same command on another host, and let the first driver continue."""
    spec = replace(nights.spec(nights.output_with_yesterday()), act="stop", at=number)
    first, connection = nights.start(spec)
    pid = connection.recv()
    if isinstance(pid, list):  # the run had fewer writes this time, and is finished
        assert exit_code_of(first) == 0
        return
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    try:
        second, _ = nights.run(replace(spec, act="none", at=0, other_host=True))
        was_published = nights.is_tonight_published(spec.output)
    finally:
        os.kill(pid, signal.SIGCONT)
    code = exit_code_of(first)
    exits = f"suspended at {number}: {what}: exits {code} and {second}\n{nights.log(spec)}"
    assert second in (0, 2, 4), exits
    assert code in (0, 3, 4), exits
    assert "Traceback" not in exits
    assert nights.is_tonight_published(spec.output) >= was_published, exits
    if not nights.is_tonight_published(spec.output):
        finish(nights, spec, exits)
