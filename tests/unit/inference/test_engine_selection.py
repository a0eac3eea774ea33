"""The choice of an engine: the real torch engines on a tiny network, and engines of a known pace over them."""

import time

import numpy as np
import pytest

from batchcls.errors import GoldenMismatch, InputError
from batchcls.inference import engine_selection
from batchcls.inference.agreement import AccuracyTolerance
from batchcls.inference.engine_record import CandidateResult, EngineRequest, EngineSelectionRecord
from batchcls.inference.engine_selection import CalibrationImages, choose, pick
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


@pytest.fixture(scope="module")
def bundle():
    choices = ModelChoices(allow_random=True, overrides=PreprocessingOverrides(input_size=32))
    return with_golden(resolve_model("timm:test_resnet", choices, Storage()))


@pytest.fixture(scope="module")
def sample():
    # Smooth images, far from each other, so that rounding changes no best class.
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, 2, 2, 3), np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    return CalibrationImages(pixels, "manifest fingerprint")


@pytest.fixture
def place(tmp_path):
    return EngineConfig("cpu", 1, 8, CompileCache(tmp_path))


def _figures(engine, precision, rate, rejected=None):
    values = {"batch_size": 8, "images_per_second": rate, "rejected": rejected}
    return CandidateResult(engine=engine, precision=precision, **values)


def test_of_equally_fast_ones_the_most_exact_is_taken():
    found = [
        _figures("openvino", "int8", 400.0, "too few"),
        _figures("openvino", "bf16", 100.0),
        _figures("openvino", "fp32", 97.5),
        _figures("torch", "fp32", 98.5),
        _figures("torch", "bf16", 50.0),
    ]
    taken, judged = pick(found)
    assert str(taken.choice) == "torch fp32"
    assert [entry.rejected for entry in judged] == [
        "too few",
        "hardly faster than torch fp32",
        "slower than torch fp32",
        None,
        "slower than torch fp32",
    ]
    assert pick([_figures("torch", "fp32", 1.0, "broken")])[0] is None


def test_the_real_torch_engines_are_measured_and_one_is_taken(bundle, sample, place):
    found = choose(bundle, sample, EngineRequest(engine="torch"), place, 3)
    assert [str(entry.choice) for entry in found.candidates] == ["torch bf16", "torch fp32"]
    assert found.choice in (entry.choice for entry in found.candidates)
    assert [entry.rejected for entry in found.candidates].count(None) == 1
    assert (found.bundle_fingerprint, found.manifest, found.images) == (
        bundle.fingerprint,
        "manifest fingerprint",
        IMAGES,
    )
    taken = next(entry for entry in found.candidates if entry.rejected is None)
    assert set(taken.rates) <= {4, 8, 16, 32}
    assert taken.batch_size == found.batch_size
    assert taken.rates[found.batch_size] == found.images_per_second > 0
    assert taken.images >= 100
    assert found.reference == "torch fp32"
    assert found.hardware
    assert "torch" in found.versions
    assert EngineSelectionRecord.model_validate_json(found.model_dump_json()) == found


def test_a_contract_that_bf16_misses_leaves_fp32(bundle, sample, place):
    wanted = EngineRequest(engine="torch", contract=AccuracyTolerance(min_embedding_cosine=1))
    found = choose(bundle, sample, wanted, place, 2)
    bf16, fp32 = found.candidates
    assert (
        bf16.rejected == f"the cosine of its embeddings with fp32's is {bf16.mean_cosine:.5f}, 1 is asked for"
    )
    assert fp32.top1_agreement == 1
    assert found.choice == REFERENCE


def test_what_is_asked_for_by_name_is_taken_although_it_misses_and_said_so(bundle, sample, place):
    wanted = EngineRequest(
        engine="torch", precision="bf16", contract=AccuracyTolerance(min_embedding_cosine=1), batch_size=5
    )
    found = choose(bundle, sample, wanted, place, 2)
    assert (str(found.choice), found.batch_size) == ("torch bf16", 5)
    (note,) = found.notes
    assert note.startswith("torch bf16 was asked for by name and is used although the cosine")


def test_what_is_asked_for_by_name_and_cannot_run_is_refused(bundle, sample, place):
    with pytest.raises(InputError):
        choose(bundle, sample, EngineRequest(engine="torch", precision="int8"), place, 2)
    with pytest.raises(InputError, match="fp16"):
        choose(bundle, sample, EngineRequest(engine="torch", precision="fp16"), place, 2)


def test_a_network_that_is_not_the_bundles_is_never_measured(bundle, sample, place):
    from dataclasses import replace

    turned = bundle.config.preprocessing.model_copy(update={"mean": (0.1, 0.9, 0.5)})
    wrong = replace(bundle, config=bundle.config.model_copy(update={"preprocessing": turned}))
    with pytest.raises(GoldenMismatch):
        choose(wrong, sample, EngineRequest(engine="torch"), place, 2)


def test_few_images_are_noted(bundle, sample, place):
    few = CalibrationImages(sample.pixels[:20], sample.manifest)
    found = choose(bundle, few, EngineRequest(engine="torch", precision="fp32"), place, 1)
    assert found.notes[0].startswith("only 20 images were at hand")
    assert found.candidates[0].images == 20


class Paced:
    """A real engine that takes its time: so many seconds for a batch and for each image in it."""

    in_flight = 1

    def __init__(self, inner, choice, batch_seconds, image_seconds, change):
        self.name, self.precision, self.device = choice.engine, choice.precision, "cpu"
        self._inner, self._batch, self._image = inner, batch_seconds, image_seconds
        self._change = change

    def predict(self, pixels):
        time.sleep(self._batch + self._image * len(pixels))
        return self._change(self._inner.predict(pixels))

    def submit(self, pixels):
        answer = self.predict(pixels)

        class Ready:
            def result(self):
                return answer

        return Ready()


def _paced(monkeypatch, **paces):
    """Engines by name and precision: (seconds a batch, seconds an image, what becomes of the answer)."""
    only_installed(monkeypatch, "torch", "openvino")
    started = []

    def start(bundle, choice, place):
        started.append(str(choice))
        inner, deviation = start_tested_engine(bundle, REFERENCE, place)
        pace = paces[f"{choice.engine}_{choice.precision}"]
        if isinstance(pace, Exception):
            raise pace
        return Paced(inner, choice, *pace), deviation

    monkeypatch.setattr(engine_selection, "start_tested_engine", start)
    return started


def _same(answer):
    return answer


def _other_classes(answer):
    return EngineOutput(np.roll(answer.logits, 1, axis=1), answer.embedding)


def test_the_fastest_that_answers_right_is_taken_and_every_other_has_its_reason(
    bundle, sample, place, monkeypatch
):
    _paced(
        monkeypatch,
        openvino_int8=GoldenMismatch("the network does not answer"),
        openvino_bf16=(0, 1e-4, _other_classes),
        openvino_fp32=(0.004, 5e-4, _same),
        torch_bf16=(0, 4e-3, _same),
        torch_fp32=(0, 5e-3, _same),
    )
    found = choose(
        bundle, sample, EngineRequest(contract=AccuracyTolerance(int8_min_agreement=0.5)), place, 10
    )
    assert {str(entry.choice): entry.rejected for entry in found.candidates} == {
        "openvino int8": "the network does not answer",
        "openvino bf16": "0.00% of the images keep the best class of fp32, 99.00% are asked for",
        "openvino fp32": None,
        "torch bf16": "slower than openvino fp32",
        "torch fp32": "slower than openvino fp32",
    }
    taken = found.candidates[2]
    # 4 ms a batch and 0.5 ms an image: batches of 32 are 1.2 times as fast as those of 16.
    assert found.batch_size == 32
    assert list(taken.rates) == [4, 8, 16, 32]
    # The slow ones were given up after a look at their pace.
    assert all(entry.images is None and len(entry.rates) == 1 for entry in found.candidates[3:])


def test_a_slow_reference_is_replaced_by_a_faster_engine_that_says_the_same(
    bundle, sample, place, monkeypatch
):
    paces = {
        "openvino_bf16": (0, 1e-4, _same),
        "torch_bf16": (0, 4e-3, _same),
        "torch_fp32": (0, 0.01, _same),
    }
    started = _paced(monkeypatch, openvino_fp32=(0, 1e-3, _same), **paces)
    found = choose(bundle, sample, EngineRequest(), place, 3)
    assert found.reference == "openvino fp32"
    assert started.count("openvino fp32") == 1
    assert str(found.choice) == "openvino bf16"
    _paced(monkeypatch, openvino_fp32=(0, 1e-3, _other_classes), **paces)
    found = choose(bundle, sample, EngineRequest(), place, 3)
    assert found.reference == "torch fp32"
    assert "openvino fp32 does not answer as torch fp32 does on the first images" in found.notes
    assert found.candidates[1].rejected is not None


def test_when_the_time_is_over_the_first_that_holds_is_taken(bundle, sample, place, monkeypatch):
    paces = {"openvino_bf16": (0, 5e-4, _other_classes), "torch_bf16": (0, 1e-4, _same)}
    started = _paced(monkeypatch, openvino_fp32=(0, 5e-4, _same), torch_fp32=(0, 2e-3, _same), **paces)
    found = choose(bundle, sample, EngineRequest(), place, 0.01)
    assert [(str(entry.choice), entry.rejected) for entry in found.candidates[1:]] == [
        ("openvino fp32", None),
        ("torch bf16", "not measured, since the time was over (--calibration-seconds)"),
        ("torch fp32", "not measured, since the time was over (--calibration-seconds)"),
    ]
    assert found.candidates[0].images == 100
    assert "torch bf16" not in started


def test_an_engine_that_breaks_while_it_runs_is_rejected_or_refused(bundle, sample, place, monkeypatch):
    def broken(answer):
        raise RuntimeError("\"some_kernel\" not implemented for 'BFloat16'\nand more")

    _paced(monkeypatch, torch_bf16=(0, 0, broken), torch_fp32=(0, 0, _same))
    found = choose(bundle, sample, EngineRequest(engine="torch"), place, 1)
    reason = "\"some_kernel\" not implemented for 'BFloat16'"
    assert found.candidates[0].rejected == f"it cannot run this network here: {reason}"
    with pytest.raises(InputError, match="torch bf16 cannot run this network here"):
        choose(bundle, sample, EngineRequest(engine="torch", precision="bf16"), place, 1)


def test_int8_is_refused_below_its_bound_and_answers_images_it_was_not_made_with(
    bundle, sample, place, monkeypatch
):
    exact = {
        "torch_fp32": (0, 0, _same),
        "openvino_fp32": (0, 0, _same),
    }  # on a slow machine the second stands in
    _paced(monkeypatch, openvino_int8=(0, 0, _other_classes), **exact)
    asked = {"engine": "openvino", "precision": "int8"}
    with pytest.raises(
        InputError, match=r"--precision int8: 0.00% of the images keep .*, 90.00% are asked for"
    ):
        choose(
            bundle,
            sample,
            EngineRequest(**asked, contract=AccuracyTolerance(int8_min_agreement=0.9)),
            place,
            1,
        )
    found = choose(bundle, sample, EngineRequest(**asked), place, 1)
    assert found.candidates[0].top1_agreement == 0
    assert found.candidates[0].images == IMAGES // 2
    assert np.array_equal(sample.calibration, sample.pixels[::2])


@pytest.mark.skipif(missing_package("openvino") is not None, reason="needs OpenVINO")
def test_the_real_engines_of_this_machine_are_measured(bundle, sample, place):
    found = choose(bundle, sample, EngineRequest(), place, 5)
    assert {entry.engine for entry in found.candidates} == {"openvino", "torch"}
    exact = [entry for entry in found.candidates if entry.precision == "fp32" and entry.images]
    assert all(entry.top1_agreement >= 0.99 for entry in exact)
    assert found.images_per_second > 0
