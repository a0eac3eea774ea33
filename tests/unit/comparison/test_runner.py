import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchcls.comparison.benchmark import BenchmarkResult
from batchcls.comparison.candidates import BenchmarkEnvironment, Candidate, default_threads
from batchcls.comparison.results import Results, StoredMeasurement, newest
from batchcls.comparison.runner import measure_candidates
from batchcls.errors import BatchclsError, InputError
from batchcls.inference.engine_record import NO_BF16
from batchcls.models.engines.engine import REFERENCE, EngineChoice
from batchcls.storage.filesystem import Storage
from tests.helpers.measurements import LAPTOP, SERVER, measurement

BF16 = EngineChoice("torch", "bf16")


def _candidate(model="a", choice=REFERENCE, hardware=SERVER, **settings) -> Candidate:
    values = {"device": "cpu", "threads": 8, "batch_sizes": (1, 8), "stop_early": True, "seconds": 10.0}
    return Candidate(
        model, f"fingerprint of {model}", choice, BenchmarkEnvironment(hardware, **values | settings)
    )


class FakeBenchmark:
    """Returns a synthetic measurement of each candidate and records its arguments."""

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
            device=candidate.environment.device,
            threads=candidate.environment.threads,
            hardware=candidate.environment.hardware,
            **self.changes,
        )
        return BenchmarkResult(
            found, predictions=(len(self.measured),), notes=("larger batches were slower",)
        )


@pytest.fixture
def results(tmp_path):
    return lambda sample="sample 1": Results(str(tmp_path / "out"), sample, Storage())


def _run(candidates, results, bench):
    return measure_candidates(candidates, results, bench, lambda candidate: None)


def test_stores_each_measurement_in_a_file(results, tmp_path, log):
    bench = FakeBenchmark()
    candidates = [_candidate(), _candidate(choice=BF16), _candidate("b")]
    assert _run(candidates, results(), bench) == []
    assert len(list((tmp_path / "out" / "measurements").iterdir())) == 3
    found = results()
    assert [found.find(candidate).predictions for candidate in candidates] == [(1,), (2,), (3,)]
    assert "a, torch fp32 on cpu: p50 100.0 ms, 20.0 images/s at batch size 8 (1 of 3)" in log.text
    assert "larger batches were slower" in log.text


def test_skips_bf16_on_processors_that_emulate_it(results, log):
    bench = FakeBenchmark()
    without_bf16 = SERVER.model_copy(update={"features": ("avx2",)})
    candidates = [_candidate(hardware=without_bf16), _candidate(choice=BF16, hardware=without_bf16)]
    (skipped,) = _run(candidates, results(), bench)
    assert (skipped.candidate, skipped.reason) == (candidates[1], NO_BF16)
    assert [candidate for candidate, _ in bench.measured] == candidates[:1]
    assert log.text.count(NO_BF16) == 1
    with pytest.raises(InputError, match="no bf16 instructions"):
        _run([_candidate("c", choice=BF16, hardware=without_bf16)], results(), bench)
    assert not _run([_candidate("c", choice=BF16, hardware=without_bf16, device="cuda")], results(), bench)


def test_second_run_reuses_stored_measurements(results, log):
    _run([_candidate()], results(), FakeBenchmark())
    bench = FakeBenchmark()
    both = [_candidate(), _candidate("b")]
    _run(both, results(), bench)
    assert [candidate.model for candidate, _ in bench.measured] == ["b"]
    assert "resumed: 1 of 2 measurements reused" in log.text
    _run(both, results(), bench)
    assert len(bench.measured) == 1


def test_keeps_finished_measurements_after_an_interruption(results):
    class Interrupted(FakeBenchmark):
        def __call__(self, candidate, reference):
            if candidate.model == "b":
                raise KeyboardInterrupt
            return super().__call__(candidate, reference)

    both = [_candidate(), _candidate("b")]
    with pytest.raises(KeyboardInterrupt):
        _run(both, results(), Interrupted())
    bench = FakeBenchmark()
    _run(both, results(), bench)
    assert [candidate.model for candidate, _ in bench.measured] == ["b"]


def test_passes_the_predictions_of_the_reference_of_the_same_model(results):
    bench = FakeBenchmark()
    _run([_candidate(), _candidate(choice=BF16), _candidate("b", BF16)], results(), bench)
    assert [reference for _, reference in bench.measured] == [None, (1,), None]
    resumed = FakeBenchmark()
    _run([_candidate(), _candidate(choice=EngineChoice("torch", "fp16"))], results(), resumed)
    assert [reference for _, reference in resumed.measured] == [(1,)]


@pytest.mark.parametrize(
    "change",
    [{"threads": 4}, {"batch_sizes": (1,)}, {"seconds": 5.0}, {"hardware": LAPTOP}, {"device": "cuda"}],
)
def test_changed_settings_require_a_new_measurement(results, change):
    _run([_candidate()], results(), FakeBenchmark())
    bench = FakeBenchmark()
    _run([_candidate(**change)], results(), bench)
    assert len(bench.measured) == 1


def test_retries_a_failed_candidate_in_the_next_run(results, log):
    failing = _candidate("b")
    error = BatchclsError("b, torch fp32 on cpu: does not fit into memory")
    skipped = _run([_candidate(), failing], results(), FakeBenchmark({failing: error}))
    assert [(entry.candidate, entry.reason) for entry in skipped] == [(failing, "does not fit into memory")]
    assert "skipped b, torch fp32 on cpu: does not fit into memory" in log.text
    bench = FakeBenchmark()
    assert _run([_candidate(), failing], results(), bench) == []
    assert [candidate for candidate, _ in bench.measured] == [failing]


def test_error_lists_all_reasons_if_every_candidate_fails(results):
    first, second = _candidate(), _candidate("b")
    errors = {first: InputError("no such precision"), second: InputError("no GPU")}
    with pytest.raises(InputError, match=r"no candidate could be measured: .*no such precision; b, .*no GPU"):
        _run([first, second], results(), FakeBenchmark(errors))
    with pytest.raises(BatchclsError, match="the worker process") as caught:
        _run(
            [first, second],
            results(),
            FakeBenchmark(errors | {second: BatchclsError("the worker process on a crashed")}),
        )
    assert not isinstance(caught.value, InputError)


def test_warns_about_other_load_and_names_the_file_to_delete(results, tmp_path, log):
    _run([_candidate()], results(), FakeBenchmark(other_load=0.1))
    assert "busy" not in log.text
    _run([_candidate("b")], results(), FakeBenchmark(other_load=1.4))
    (warning,) = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert warning.startswith("b, torch fp32 on cpu: other programs used 1.4 cores during the measurement")
    path = next(word for word in warning.split() if word.endswith(".json"))
    assert json.loads(Path(path).read_text())["measurement"]["model"] == "b"


def test_groups_results_by_hardware(results):
    found = results()
    _run([_candidate(), _candidate("b"), _candidate(hardware=LAPTOP)], found, FakeBenchmark())
    by_hardware = results().by_hardware()
    assert set(by_hardware) == {SERVER.key, LAPTOP.key}
    assert [entry.model for entry in by_hardware[SERVER.key]] == ["a", "b"]
    assert all(entry.hardware == LAPTOP for entry in by_hardware[LAPTOP.key])


def test_rejects_results_of_a_different_sample(results):
    _run([_candidate()], results("1" * 64), FakeBenchmark())
    with pytest.raises(
        InputError, match=r"sample 111111111111, .* the sample 222222222222; .* another --output"
    ):
        results("2" * 64)


def test_error_names_a_damaged_file(results, tmp_path):
    (tmp_path / "out" / "measurements").mkdir(parents=True)
    (tmp_path / "out" / "measurements" / "abc.json").write_text('{"format": "batchcls-measurement-1"}')
    with pytest.raises(
        InputError, match=r"abc\.json is damaged or was written by another version .* delete it"
    ):
        results()


def test_uses_the_newest_measurement_of_a_candidate():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    entry = StoredMeasurement(
        created=now, sample="s", predictions=(), notes=(), measurement=measurement("a", p50=10)
    )
    later = entry.model_copy(
        update={"created": now + timedelta(seconds=1), "measurement": measurement("a", p50=20)}
    )
    for order in ([entry, later], [later, entry]):
        (found,) = newest(order)
        assert found.latency.p50_ms == 20


def test_default_threads_equal_those_of_classify():
    assert [default_threads("cpu", cpus) for cpus in (1, 2.5, 16, 96)] == [1, 2, 16, 16]
    assert default_threads("cuda", 16) == 1
