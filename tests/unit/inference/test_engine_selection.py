"""Engine selection with the torch engines on a tiny network, and with engines of known speed."""

import time

import numpy as np
import pytest

from batchcls.errors import GoldenMismatch, InputError
from batchcls.hardware import Hardware
from batchcls.inference import engine_selection
from batchcls.inference.agreement import AccuracyTolerance
from batchcls.inference.engine_record import NO_BF16, CandidateResult, EngineRequest, EngineSelectionRecord
from batchcls.inference.engine_selection import CalibrationImages, select_candidate, select_engine
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.golden_record import with_golden
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import REFERENCE, EngineConfig, EngineOutput
from batchcls.models.engines.factory import missing_package
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage
from tests.helpers.engines import only_installed

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 150


def _set_features(monkeypatch, *features):
    """Give this machine's hardware record other instruction sets, on which the candidates depend."""
    hardware = Hardware.detect().model_copy(update={"features": features})
    monkeypatch.setattr(engine_selection.Hardware, "detect", lambda: hardware)


@pytest.fixture(autouse=True)
def processor_with_bf16(monkeypatch):
    _set_features(monkeypatch, "avx2", "avx512f", "avx512_bf16")


@pytest.fixture(scope="module")
def bundle():
    choices = ModelChoices(allow_random=True, overrides=PreprocessingOverrides(input_size=32))
    return with_golden(resolve_model("timm:test_resnet", choices, Storage()))


@pytest.fixture(scope="module")
def sample():
    # Smooth and very different images, so that rounding changes no best class.
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, 2, 2, 3), np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    return CalibrationImages(pixels, "manifest fingerprint")


@pytest.fixture
def engine_config(tmp_path):
    return EngineConfig("cpu", 1, 8, CompileCache(tmp_path))


def _result(engine, precision, rate, rejected=None):
    values = {"batch_size": 8, "images_per_second": rate, "rejected": rejected}
    return CandidateResult(engine=engine, precision=precision, **values)


def test_most_accurate_of_equally_fast_candidates_is_selected():
    results = [
        _result("openvino", "int8", 400.0, "inaccurate"),
        _result("openvino", "bf16", 100.0),
        _result("openvino", "fp32", 97.5),
        _result("torch", "fp32", 98.5),
        _result("torch", "bf16", 50.0),
    ]
    selected, with_reasons = select_candidate(results)
    assert str(selected.choice) == "torch fp32"
    assert [entry.rejected for entry in with_reasons] == [
        "inaccurate",
        "not significantly faster than torch fp32",
        "slower than torch fp32",
        None,
        "slower than torch fp32",
    ]
    assert select_candidate([_result("torch", "fp32", 1.0, "broken")])[0] is None


def test_torch_engines_are_measured_and_one_is_selected(bundle, sample, engine_config):
    found = select_engine(bundle, sample, EngineRequest(engine="torch"), engine_config, 3)
    assert [str(entry.choice) for entry in found.candidates] == ["torch bf16", "torch fp32"]
    assert found.choice in (entry.choice for entry in found.candidates)
    assert [entry.rejected for entry in found.candidates].count(None) == 1
    assert (found.bundle_fingerprint, found.manifest, found.images) == (
        bundle.fingerprint,
        "manifest fingerprint",
        IMAGES,
    )
    selected = next(entry for entry in found.candidates if entry.rejected is None)
    assert set(selected.rates) <= {4, 8, 16, 32}
    assert selected.batch_size == found.batch_size
    assert selected.rates[found.batch_size] == found.images_per_second > 0
    assert selected.images >= 100
    assert found.reference == "torch fp32"
    assert found.hardware
    assert "torch" in found.versions
    assert EngineSelectionRecord.model_validate_json(found.model_dump_json()) == found


def test_bf16_is_not_measured_on_a_processor_without_bf16(bundle, sample, engine_config, monkeypatch):
    _set_features(monkeypatch, "avx2", "avx512f", "avx512_vnni")
    found = select_engine(bundle, sample, EngineRequest(engine="torch"), engine_config, 1)
    assert [str(entry.choice) for entry in found.candidates] == ["torch fp32"]
    assert NO_BF16 in found.notes


def test_fp32_is_selected_if_bf16_violates_the_tolerance(bundle, sample, engine_config):
    request = EngineRequest(engine="torch", tolerance=AccuracyTolerance(min_embedding_cosine=1))
    found = select_engine(bundle, sample, request, engine_config, 2)
    bf16, fp32 = found.candidates
    assert bf16.rejected == (
        f"mean embedding cosine with fp32 is {bf16.mean_cosine:.5f}, below the required 1"
    )
    assert fp32.top1_agreement == 1
    assert found.choice == REFERENCE


def test_explicit_request_that_violates_the_tolerance_is_selected_with_a_note(bundle, sample, engine_config):
    request = EngineRequest(
        engine="torch", precision="bf16", tolerance=AccuracyTolerance(min_embedding_cosine=1), batch_size=5
    )
    found = select_engine(bundle, sample, request, engine_config, 2)
    assert (str(found.choice), found.batch_size) == ("torch bf16", 5)
    (note,) = found.notes
    assert note.startswith("torch bf16 was requested explicitly and is used although mean embedding cosine")


def test_explicit_request_that_cannot_run_is_rejected(bundle, sample, engine_config):
    with pytest.raises(InputError):
        select_engine(bundle, sample, EngineRequest(engine="torch", precision="int8"), engine_config, 2)
    with pytest.raises(InputError, match="fp16"):
        select_engine(bundle, sample, EngineRequest(engine="torch", precision="fp16"), engine_config, 2)


def test_network_that_fails_the_golden_test_is_not_measured(bundle, sample, engine_config):
    from dataclasses import replace

    changed = bundle.config.preprocessing.model_copy(update={"mean": (0.1, 0.9, 0.5)})
    wrong = replace(bundle, config=bundle.config.model_copy(update={"preprocessing": changed}))
    with pytest.raises(GoldenMismatch):
        select_engine(wrong, sample, EngineRequest(engine="torch"), engine_config, 2)


def test_small_sample_is_noted(bundle, sample, engine_config):
    few = CalibrationImages(sample.pixels[:20], sample.manifest)
    found = select_engine(bundle, few, EngineRequest(engine="torch", precision="fp32"), engine_config, 1)
    assert found.notes[0].startswith("only 20 images were available")
    assert found.candidates[0].images == 20


class DelayedEngine:
    """A torch engine that sleeps a given time for each batch and for each image, and may change the output."""

    in_flight = 1

    def __init__(self, inner, choice, batch_seconds, image_seconds, change):
        self.name, self.precision, self.device = choice.engine, choice.precision, "cpu"
        self._inner, self._batch, self._image = inner, batch_seconds, image_seconds
        self._change = change

    def predict(self, pixels):
        time.sleep(self._batch + self._image * len(pixels))
        return self._change(self._inner.predict(pixels))

    def submit(self, pixels):
        output = self.predict(pixels)

        class Ready:
            def result(self):
                return output

        return Ready()


def _delay_engines(monkeypatch, **delays):
    """Replace the engines; return the list of the started ones.

    `delays` are (seconds per batch, seconds per image, function that changes the output) by engine and precision; or
    the exception that the start of the engine raises.
    """
    only_installed(monkeypatch, "torch", "openvino")
    started = []

    def start(bundle, choice, engine_config):
        started.append(str(choice))
        inner, deviation = start_tested_engine(bundle, REFERENCE, engine_config)
        delay = delays[f"{choice.engine}_{choice.precision}"]
        if isinstance(delay, Exception):
            raise delay
        return DelayedEngine(inner, choice, *delay), deviation

    monkeypatch.setattr(engine_selection, "start_tested_engine", start)
    return started


def _same(output):
    return output


def _other_classes(output):
    return EngineOutput(np.roll(output.logits, 1, axis=1), output.embedding)


def test_fastest_accurate_candidate_is_selected_and_others_have_reasons(
    bundle, sample, engine_config, monkeypatch
):
    _delay_engines(
        monkeypatch,
        openvino_int8=GoldenMismatch("the network differs from its golden outputs"),
        openvino_bf16=(0, 1e-4, _other_classes),
        openvino_fp32=(0.004, 5e-4, _same),
        torch_bf16=(0, 4e-3, _same),
        torch_fp32=(0, 5e-3, _same),
    )
    found = select_engine(
        bundle, sample, EngineRequest(tolerance=AccuracyTolerance(int8_min_agreement=0.5)), engine_config, 10
    )
    assert {str(entry.choice): entry.rejected for entry in found.candidates} == {
        "openvino int8": "the network differs from its golden outputs",
        "openvino bf16": "top-1 agreement with fp32 is 0.00%, below the required 99.00%",
        "openvino fp32": None,
        "torch bf16": "slower than openvino fp32",
        "torch fp32": "slower than openvino fp32",
    }
    selected = found.candidates[2]
    # With 4 ms per batch and 0.5 ms per image, the rate with batches of 32 is 1.2 times that with batches of 16.
    assert found.batch_size == 32
    assert list(selected.rates) == [4, 8, 16, 32]
    # Slow candidates were rejected after the first measurement of their rate.
    assert all(entry.images is None and len(entry.rates) == 1 for entry in found.candidates[3:])


def test_slow_reference_is_replaced_by_faster_engine_with_equal_outputs(
    bundle, sample, engine_config, monkeypatch
):
    delays = {
        "openvino_bf16": (0, 1e-4, _same),
        "torch_bf16": (0, 4e-3, _same),
        "torch_fp32": (0, 0.01, _same),
    }
    started = _delay_engines(monkeypatch, openvino_fp32=(0, 1e-3, _same), **delays)
    found = select_engine(bundle, sample, EngineRequest(), engine_config, 3)
    assert found.reference == "openvino fp32"
    assert started.count("openvino fp32") == 1
    assert str(found.choice) == "openvino bf16"
    _delay_engines(monkeypatch, openvino_fp32=(0, 1e-3, _other_classes), **delays)
    found = select_engine(bundle, sample, EngineRequest(), engine_config, 3)
    assert found.reference == "torch fp32"
    assert (
        "openvino fp32 cannot replace torch fp32 as reference: its outputs for the first images differ"
        in found.notes
    )
    assert found.candidates[1].rejected is not None


def test_first_accurate_candidate_is_selected_at_the_time_limit(bundle, sample, engine_config, monkeypatch):
    delays = {"openvino_bf16": (0, 5e-4, _other_classes), "torch_bf16": (0, 1e-4, _same)}
    started = _delay_engines(
        monkeypatch, openvino_fp32=(0, 5e-4, _same), torch_fp32=(0, 2e-3, _same), **delays
    )
    found = select_engine(bundle, sample, EngineRequest(), engine_config, 0.01)
    assert [(str(entry.choice), entry.rejected) for entry in found.candidates[1:]] == [
        ("openvino fp32", None),
        ("torch bf16", "not measured, because the time limit was reached (--calibration-seconds)"),
        ("torch fp32", "not measured, because the time limit was reached (--calibration-seconds)"),
    ]
    assert found.candidates[0].images == 100
    assert "torch bf16" not in started


def test_engine_that_fails_while_running_is_rejected(bundle, sample, engine_config, monkeypatch):
    def broken(output):
        raise RuntimeError("\"some_kernel\" not implemented for 'BFloat16'\nand more")

    _delay_engines(monkeypatch, torch_bf16=(0, 0, broken), torch_fp32=(0, 0, _same))
    found = select_engine(bundle, sample, EngineRequest(engine="torch"), engine_config, 1)
    reason = "\"some_kernel\" not implemented for 'BFloat16'"
    assert found.candidates[0].rejected == f"cannot run this network here: {reason}"
    with pytest.raises(InputError, match="torch bf16 cannot run this network here"):
        select_engine(bundle, sample, EngineRequest(engine="torch", precision="bf16"), engine_config, 1)


def test_int8_is_rejected_below_its_limit_and_measured_on_held_out_images(
    bundle, sample, engine_config, monkeypatch
):
    exact = {
        "torch_fp32": (0, 0, _same),
        "openvino_fp32": (0, 0, _same),
    }  # on a slow machine openvino becomes the reference
    _delay_engines(monkeypatch, openvino_int8=(0, 0, _other_classes), **exact)
    explicit = {"engine": "openvino", "precision": "int8"}
    with pytest.raises(
        InputError, match=r"--precision int8: top-1 agreement with fp32 is 0.00%, below the required 90.00%"
    ):
        select_engine(
            bundle,
            sample,
            EngineRequest(**explicit, tolerance=AccuracyTolerance(int8_min_agreement=0.9)),
            engine_config,
            1,
        )
    found = select_engine(bundle, sample, EngineRequest(**explicit), engine_config, 1)
    assert found.candidates[0].top1_agreement == 0
    assert found.candidates[0].images == IMAGES // 2
    assert np.array_equal(sample.calibration, sample.pixels[::2])


@pytest.mark.skipif(missing_package("openvino") is not None, reason="needs OpenVINO")
def test_installed_engines_are_measured(bundle, sample, engine_config):
    found = select_engine(bundle, sample, EngineRequest(), engine_config, 5)
    assert {entry.engine for entry in found.candidates} == {"openvino", "torch"}
    exact = [entry for entry in found.candidates if entry.precision == "fp32" and entry.images]
    assert all(entry.top1_agreement >= 0.99 for entry in exact)
    assert found.images_per_second > 0
