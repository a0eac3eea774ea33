"""The Python API without a cluster: settings are validated, and runs are opened and read."""

from pathlib import Path

import duckdb
import pytest

import batchcls
from batchcls.errors import ExitCode
from batchcls.runs.publish import publish
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import Item, RunDetails, items, write_run


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    failed = Item("broken", reason="not_an_image")
    for name in ("first", "second", "third"):
        write_run(str(folder), RunDetails(name), [*items(3, label=name), failed])
    for name in ("first", "second"):
        publish(str(folder), name, Storage())
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 3}, "unknown setting topk; did you mean top_k?"),
        ({"top_k": 0}, "top_k: should be greater than or equal to 1"),
        ({"manifest": ""}, "manifest: "),
        ({"manifest": None}, "manifest: a path or URI is required, not NoneType"),
        ({"manifest": "nowhere.parquet"}, "nowhere.parquet"),
    ],
)
def test_invalid_settings_are_named_as_python_names_them(tmp_path: Path, settings: dict, message: str):
    arguments = {"manifest": "catalog.parquet", "model": "resnet50", "output": tmp_path / "output"} | settings
    with pytest.raises(batchcls.InputError) as caught:
        batchcls.classify(**arguments)
    assert message in str(caught.value)
    assert "--top" not in str(caught.value)
    assert not (tmp_path / "output").exists()


def test_the_published_run_is_opened_by_default(output: Path):
    run = batchcls.open_run(output)
    assert (run.run_id, run.published, run.error, run.report) == ("second", True, None, None)
    assert (run.counts.rows, run.counts.predicted, run.counts.quarantined) == (4, 3, 1)
    assert run.folder == str(output / "runs" / "second")
    for uri in (*run.prediction_files, *run.quarantine_files):
        assert Path(uri).is_file()
    (output / "runs" / "second" / "report.html").write_text("")
    assert batchcls.open_run(output).report == str(output / "runs" / "second" / "report.html")
    assert run.prediction_files
    assert run.quarantine_files


@pytest.mark.parametrize(("name", "run_id"), [("previous", "first"), ("third", "third"), ("th", "third")])
def test_another_run_is_opened_by_its_name(output: Path, name: str, run_id: str):
    run = batchcls.open_run(str(output), name)
    assert (run.run_id, run.published) == (run_id, False)
    assert set(run.predictions().to_table()["label"].to_pylist()) == {run_id}


def test_the_readers_return_every_row_of_a_run(output: Path):
    run = batchcls.open_run(output)
    predictions = run.predictions().to_table(columns=["item_id", "label"]).sort_by("item_id")
    assert predictions.to_pydict() == {
        "item_id": ["item-0", "item-1", "item-2"],
        "label": ["second", "second", "second"],
    }
    quarantine = run.quarantine().to_table(columns=["item_id", "reason", "detail"])
    assert quarantine.select(["item_id", "reason"]).to_pylist() == [
        {"item_id": "broken", "reason": "not_an_image"}
    ]
    rows = duckdb.read_parquet(list(run.prediction_files)).count("*").fetchall()
    assert rows == [(3,)]
    assert len(repr(run)) < 1000


def test_a_missing_run_is_an_input_error(tmp_path: Path, output: Path):
    with pytest.raises(batchcls.InputError, match="no published run"):
        batchcls.open_run(tmp_path / "elsewhere")
    with pytest.raises(batchcls.InputError, match="there is no such run"):
        batchcls.open_run(output, "fourth")
    assert batchcls.InputError.exit_code == ExitCode.BAD_INPUT


def test_every_public_name_exists_and_no_other():
    for name in batchcls.__all__:
        assert getattr(batchcls, name) is not None
    assert set(batchcls.__all__) == set(dir(batchcls))
    with pytest.raises(AttributeError, match="no attribute 'classfy'"):
        batchcls.classfy  # noqa: B018
