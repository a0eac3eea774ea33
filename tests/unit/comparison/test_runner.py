import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchcls.comparison.benchmark import BenchmarkResult
from batchcls.comparison.candidates import BenchmarkEnvironment, Candidate, default_threads
from batchcls.comparison.results import Finished, Results, newest
from batchcls.comparison.runner import run_campaign
from batchcls.errors import BatchclsError, InputError
from batchcls.inference.engine_record import NO_BF16
from batchcls.models.engines.engine import REFERENCE, EngineChoice
from batchcls.storage.filesystem import Storage
from tests.helpers.measurements import LAPTOP, SERVER, measurement

BF16 = EngineChoice("torch", "bf16")


def _candidate(model="a", choice=REFERENCE, hardware=SERVER, **place) -> Candidate:
    values = {"device": "cpu", "threads": 8, "batch_sizes": (1, 8), "worthwhile_only": True, "seconds": 10.0}
    return Candidate(
        model, f"fingerprint of {model}", choice, BenchmarkEnvironment(hardware, **values | place)
    )


class Bench:
    """Stands for the cluster: invents a measurement of each candidate and remembers what it was given."""

    def __init__(self, fails: dict[Candidate, BatchclsError] | None = None, **changes):
        self.fails, self.changes = fails or {}, changes
        self.measured: list[tuple[Candidate, tuple[int, ...] | None]] = []

    def __call__(self, candidate, reference):
        if candidate in self.fails:
            raise self.fails[candidate]
        self.measured.append((candidate, reference))
        found = measurement(
            candidate.model,
            bundle_fingerprint=candidate.bundle_fingerprint,
            engine=str(candidate.choice),
            device=candidate.place.device,
            threads=candidate.place.threads,
            hardware=candidate.place.hardware,
            **self.changes,
        )
        return BenchmarkResult(found, answers=(len(self.measured),), notes=("larger batches were slower",))


@pytest.fixture
def results(tmp_path):
    return lambda sample="sample 1": Results(str(tmp_path / "out"), sample, Storage())


def _run(candidates, results, bench):
    return run_campaign(candidates, results, bench, lambda candidate: None)


def test_candidates_are_measured_and_kept_one_by_one(results, tmp_path, log):
    bench = Bench()
    candidates = [_candidate(), _candidate(choice=BF16), _candidate("b")]
    assert _run(candidates, results(), bench) == []
    assert len(list((tmp_path / "out" / "measurements").iterdir())) == 3
    found = results()
    assert [found.find(candidate).answers for candidate in candidates] == [(1,), (2,), (3,)]
    assert "a, torch fp32 on cpu: p50 100.0 ms, 20.0 images/s at batch size 8 (1 of 3)" in log.text
    assert "larger batches were slower" in log.text


def test_bf16_is_skipped_with_a_line_where_a_processor_would_emulate_it(results, log):
    bench = Bench()
    plain = SERVER.model_copy(update={"features": ("avx2",)})
    candidates = [_candidate(hardware=plain), _candidate(choice=BF16, hardware=plain)]
    (skipped,) = _run(candidates, results(), bench)
    assert (skipped.candidate, skipped.reason) == (candidates[1], NO_BF16)
    assert [candidate for candidate, _ in bench.measured] == candidates[:1]
    assert log.text.count(NO_BF16) == 1
    with pytest.raises(InputError, match="no instructions"):
        _run([_candidate("c", choice=BF16, hardware=plain)], results(), bench)
    assert not _run([_candidate("c", choice=BF16, hardware=plain, device="cuda")], results(), bench)


def test_a_second_run_measures_nothing_that_is_there(results, log):
    _run([_candidate()], results(), Bench())
    bench = Bench()
    both = [_candidate(), _candidate("b")]
    _run(both, results(), bench)
    assert [candidate.model for candidate, _ in bench.measured] == ["b"]
    assert "resumed: 1 of 2 measurements reused" in log.text
    _run(both, results(), bench)
    assert len(bench.measured) == 1


def test_what_was_finished_before_an_interruption_is_kept(results):
    class Interrupted(Bench):
        def __call__(self, candidate, reference):
            if candidate.model == "b":
                raise KeyboardInterrupt
            return super().__call__(candidate, reference)

    both = [_candidate(), _candidate("b")]
    with pytest.raises(KeyboardInterrupt):
        _run(both, results(), Interrupted())
    bench = Bench()
    _run(both, results(), bench)
    assert [candidate.model for candidate, _ in bench.measured] == ["b"]


def test_others_are_given_the_answers_of_their_own_reference(results):
    bench = Bench()
    _run([_candidate(), _candidate(choice=BF16), _candidate("b", BF16)], results(), bench)
    assert [reference for _, reference in bench.measured] == [None, (1,), None]
    resumed = Bench()
    _run([_candidate(), _candidate(choice=EngineChoice("torch", "fp16"))], results(), resumed)
    assert [reference for _, reference in resumed.measured] == [(1,)]


@pytest.mark.parametrize(
    "change",
    [{"threads": 4}, {"batch_sizes": (1,)}, {"seconds": 5.0}, {"hardware": LAPTOP}, {"device": "cuda"}],
)
def test_another_way_of_measuring_is_another_measurement(results, change):
    _run([_candidate()], results(), Bench())
    bench = Bench()
    _run([_candidate(**change)], results(), bench)
    assert len(bench.measured) == 1


def test_a_candidate_that_fails_is_noted_and_tried_again_next_time(results, log):
    failing = _candidate("b")
    error = BatchclsError("b, torch fp32 on cpu: it does not fit into memory")
    skipped = _run([_candidate(), failing], results(), Bench({failing: error}))
    assert [(entry.candidate, entry.reason) for entry in skipped] == [
        (failing, "it does not fit into memory")
    ]
    assert "skipped b, torch fp32 on cpu: it does not fit into memory" in log.text
    bench = Bench()
    assert _run([_candidate(), failing], results(), bench) == []
    assert [candidate for candidate, _ in bench.measured] == [failing]


def test_when_all_fail_the_error_has_all_reasons_and_the_kind_of_the_worst(results):
    first, second = _candidate(), _candidate("b")
    refused = {first: InputError("no such precision"), second: InputError("no GPU")}
    with pytest.raises(InputError, match=r"no candidate could be measured: .*no such precision; b, .*no GPU"):
        _run([first, second], results(), Bench(refused))
    with pytest.raises(BatchclsError, match="the worker process") as caught:
        _run(
            [first, second],
            results(),
            Bench(refused | {second: BatchclsError("the worker process on a crashed")}),
        )
    assert not isinstance(caught.value, InputError)


def test_a_busy_machine_is_told_with_the_way_to_measure_again(results, tmp_path, log):
    _run([_candidate()], results(), Bench(other_load=0.1))
    assert "busy" not in log.text
    _run([_candidate("b")], results(), Bench(other_load=1.4))
    (warning,) = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert warning.startswith("b, torch fp32 on cpu: other programs used 1.4 cores during the measurement")
    path = next(word for word in warning.split() if word.endswith(".json"))
    assert json.loads(Path(path).read_text())["measurement"]["model"] == "b"


def test_results_of_different_hardware_never_meet(results):
    found = results()
    _run([_candidate(), _candidate("b"), _candidate(hardware=LAPTOP)], found, Bench())
    kinds = results().by_hardware()
    assert set(kinds) == {SERVER.key, LAPTOP.key}
    assert [entry.model for entry in kinds[SERVER.key]] == ["a", "b"]
    assert all(entry.hardware == LAPTOP for entry in kinds[LAPTOP.key])


def test_results_of_different_images_are_refused(results):
    _run([_candidate()], results("1" * 64), Bench())
    with pytest.raises(
        InputError, match=r"sample 111111111111, .* the sample 222222222222; .* another --output"
    ):
        results("2" * 64)


def test_a_damaged_file_is_named(results, tmp_path):
    (tmp_path / "out" / "measurements").mkdir(parents=True)
    (tmp_path / "out" / "measurements" / "abc.json").write_text('{"format": "batchcls-measurement-1"}')
    with pytest.raises(InputError, match=r"abc\.json is damaged or of another version .* delete it"):
        results()


def test_of_several_measurements_of_a_candidate_the_newest_counts():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    entry = Finished(created=now, sample="s", answers=(), notes=(), measurement=measurement("a", p50=10))
    later = entry.model_copy(
        update={"created": now + timedelta(seconds=1), "measurement": measurement("a", p50=20)}
    )
    for order in ([entry, later], [later, entry]):
        (found,) = newest(order)
        assert found.latency.p50_ms == 20


def test_threads_follow_the_node_as_in_the_main_job():
    assert [default_threads("cpu", cpus) for cpus in (1, 2.5, 16, 96)] == [1, 2, 16, 16]
    assert default_threads("cuda", 16) == 1
