"""Tests for the run report on runs written by the production writer."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from batchcls.errors import InputError
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits
from batchcls.images.url_policy import AddressPolicy
from batchcls.report.run_page import run_page
from batchcls.report.run_page_data import RunFacts
from batchcls.report.run_report import read_run, report_after_run, write_run_report
from batchcls.report.thumbnails import Source, make_thumbnails
from batchcls.runs.catalog import read_record
from batchcls.runs.publish import publish, read_published
from batchcls.storage.filesystem import Storage
from tests.helpers.drawing import draw, encode
from tests.helpers.runs import Item, RunDetails, write_run
from tests.unit.report.test_compare_page import Reader

STORAGE = Storage()


def night(run_id: str, **more: object) -> RunDetails:
    return RunDetails(run_id, more=more)


def images(folder: Path, count: int) -> list[str]:
    """Drawn images 0.jpg, 1.jpg, ... and their hashes."""
    hashes = []
    for number in range(count):
        data = encode(draw(number, 300, 200), "JPEG")
        (folder / f"{number}.jpg").write_bytes(data)
        hashes.append(hashlib.sha256(data).hexdigest())
    return hashes


def items(labels: Sequence[str | None], hashes: Sequence[str]) -> list[Item]:
    """One row per label; None is a truncated image."""
    return [
        Item(f"SKU-{i}", reason="truncated", content_hash=hashes[i])
        if label is None
        else Item(f"SKU-{i}", label=label, probability=0.05 + 0.9 * i / len(labels), content_hash=hashes[i])
        for i, label in enumerate(labels)
    ]


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs over ten images: three labels change, row 9 fails, item 10 is removed."""
    monkeypatch.chdir(tmp_path)  # URIs in tests/helpers/runs.py are relative to a manifest in this folder
    hashes = images(tmp_path, 11)
    first = ["mug", "mug", "mug", "shoe", "shoe", "lamp", "lamp", "lamp", "lamp", None, "lamp"]
    second = ["cup", "cup", "mug", "shoe", "boot", "lamp", "lamp", "lamp", "lamp", None]
    write_run(str(tmp_path), night("one"), items(first, hashes))
    write_run(str(tmp_path), night("two", baseline="one"), items(second, hashes))
    return tmp_path


def facts_of(output: Path, run_id: str = "two", before: str | None = "one") -> RunFacts:
    earlier = None if before is None else read_record(str(output), before, STORAGE)
    return read_run(read_record(str(output), run_id, STORAGE), earlier, STORAGE)


def test_statistics_match_the_rows(output: Path):
    facts = facts_of(output)
    changes, categories, confidence = facts.changes, facts.categories, facts.confidence
    assert changes is not None
    assert categories is not None
    assert confidence is not None
    assert (changes.same, changes.changed, changes.new, changes.removed, changes.flow_count) == (
        6,
        3,
        0,
        1,
        2,
    )
    assert [(flow.before, flow.after, flow.rows) for flow in changes.flows] == [
        ("mug", "cup", 2),
        ("shoe", "boot", 1),
    ]
    assert [item.row for item in changes.flows[0].items] == [1, 0]
    assert {(entry.label, entry.rows, entry.rows_before) for entry in categories.largest} == {
        *(("lamp", 4, 5), ("cup", 2, 0), ("mug", 1, 3), ("shoe", 1, 2), ("boot", 1, 0)),
    }
    assert (categories.count, categories.predictions, categories.predictions_before) == (5, 9, 10)
    assert categories.moved[0].label in ("cup", "mug")
    assert sum(confidence.bins) == 9
    assert confidence.bins[1] == 1
    assert confidence.bins_before is not None
    assert sum(confidence.bins_before) == 10
    assert confidence.mean == pytest.approx(0.05 + 0.09 * 4, abs=1e-6)
    assert [item.row for item in confidence.least_confident] == list(range(9))
    assert [item.row for item in confidence.most_confident] == list(range(8, -1, -1))
    assert [(group.reason, group.rows, group.first[0].row) for group in facts.quarantine_groups] == [
        ("truncated", 1, 9)
    ]
    lamps = next(shown for entry, shown in categories.examples if entry.label == "lamp")
    assert [item.row for item in lamps] == [8, 7, 6, 5]


def test_abstained_rows_show_the_top_1_class_as_runner_up(output: Path):
    hashes = images(output, 3)
    sure = [Item(f"SKU-{i}", "mug", 0.9, content_hash=hashes[i]) for i in range(3)]
    unsure = [replace(sure[0], probability=0.4, abstained=True), *sure[1:]]
    write_run(str(output), night("sure"), sure)
    write_run(str(output), night("unsure", baseline="sure"), unsure)
    facts = facts_of(output, "unsure", "sure")
    assert facts.changes is not None
    assert (facts.changes.same, facts.changes.changed, facts.changes.removed) == (2, 1, 0)
    (flow,) = facts.changes.flows
    assert (flow.before, flow.after, flow.rows) == ("mug", None, 1)
    (item,) = flow.items
    assert item.label is None
    assert item.runner_up == ("mug", pytest.approx(0.4))
    assert report_after_run(str(output), "unsure", STORAGE, ()) is not None
    assert "(no label)" in (output / "runs" / "unsure" / "report.html").read_text(encoding="utf-8")


def test_publish_status_reflects_published_run_and_gates(output: Path):
    assert facts_of(output).publish_status.headline == "Not published; no run is published"
    publish(str(output), "two", STORAGE, read_published(str(output), STORAGE))
    assert facts_of(output).publish_status.published
    assert facts_of(output, "one", None).publish_status.headline == "Not published; run two is published"
    gate = {
        "gate": "failed_fraction",
        "value": 0.1,
        "limit": 0.01,
        "passed": False,
        "message": "1 of 10 failed",
    }
    write_run(str(output), night("three", gates=[gate]), items(["mug"], ["0" * 64]))
    facts = facts_of(output, "three", "one")
    assert (facts.publish_status.published, facts.publish_status.explanation) == (False, "1 of 10 failed.")
    text = Reader(run_page(facts, {}, "0.1.0")).text
    assert "failed fraction" in text
    assert "10.00%" in text
    assert "1.00%" in text


def test_writes_report_with_thumbnails_into_the_run_folder(output: Path):
    uri = write_run_report(str(output), "two", STORAGE)
    assert uri == str(output / "runs" / "two" / "report.html")
    page = Path(uri).read_text()
    sources = Reader(page).values("src")
    assert len(sources) >= 9
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "compared with run one" in Reader(page).text.lower()


def test_writes_report_when_the_baseline_run_was_deleted(output: Path, log: pytest.LogCaptureFixture):
    write_run(str(output), night("three", baseline="pruned"), items(["mug"], ["0" * 64]))
    page = Path(write_run_report(str(output), "three", STORAGE)).read_text()
    assert "There is no baseline run" in page
    assert "has no baseline" in log.text
    with pytest.raises(InputError, match="pruned"):
        write_run_report(str(output), "three", STORAGE, before="pruned")


def test_writes_report_when_every_row_failed(output: Path):
    write_run(str(output), night("none"), items([None, None], ["0" * 64] * 2))
    text = Reader(Path(write_run_report(str(output), "none", STORAGE)).read_text()).text
    assert "the image is truncated" in text


def test_logs_error_when_the_report_cannot_be_written(output: Path, log: pytest.LogCaptureFixture):
    for part in (output / "runs" / "two" / "predictions").iterdir():
        part.unlink()
    assert report_after_run(str(output), "two", STORAGE, ()) is None
    assert "no report was written for run two" in log.text
    assert not (output / "runs" / "two" / "report.html").exists()
    assert json.loads((output / "runs" / "two" / "run.json").read_text())["run_id"] == "two"


def source(path: Path) -> Source:
    return Source(str(path), hashlib.sha256(path.read_bytes()).hexdigest())


def test_thumbnails_are_small_or_state_why_they_are_missing(tmp_path: Path):
    images(tmp_path, 3)
    changed = source(tmp_path / "1.jpg")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "2.jpg").read_bytes())
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:2000])
    wide = encode(draw(5, 3000, 40), "PNG")
    (tmp_path / "wide.png").write_bytes(wide)
    sources = {
        0: source(tmp_path / "0.jpg"),
        1: changed,
        2: Source(str(tmp_path / "gone.jpg"), "0" * 64),
        3: source(tmp_path / "cut.jpg"),
        4: source(tmp_path / "wide.png"),
    }
    found = make_thumbnails(sources, FetchPolicy(), DecodeLimits(), 30)
    assert [found[row].reason for row in range(5)] == [
        "",
        "image changed since the run",
        "not found",
        "truncated",
        "",
    ]
    for row in (0, 4):
        assert found[row].source.startswith("data:image/jpeg;base64,")
        assert len(found[row].source) < 8_000


def test_skips_thumbnails_after_the_time_limit(tmp_path: Path):
    images(tmp_path, 1)
    found = make_thumbnails(
        dict.fromkeys(range(50), source(tmp_path / "0.jpg")), FetchPolicy(), DecodeLimits(), 0
    )
    assert len(found) == 50
    assert {entry.reason for entry in found.values()} <= {"", "not fetched in time"}
    assert "not fetched in time" in {entry.reason for entry in found.values()}


def test_thumbnails_follow_the_url_policy_of_the_job(tmp_path: Path):
    (tmp_path / "inside").mkdir()
    images(tmp_path, 1)
    policy = FetchPolicy(addresses=AddressPolicy((str(tmp_path / "inside"),)))
    found = make_thumbnails({0: source(tmp_path / "0.jpg")}, policy, DecodeLimits(), 30)
    assert (found[0].source, found[0].reason) == ("", "forbidden uri")
