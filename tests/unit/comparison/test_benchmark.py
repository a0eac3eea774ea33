from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from batchcls.comparison.benchmark import measure
from batchcls.comparison.candidates import BenchmarkEnvironment, Candidate, check_engines, parse_engines
from batchcls.comparison.sample_pixels import Prepared
from batchcls.errors import GoldenMismatch, InputError
from batchcls.hardware import Hardware
from batchcls.inference import engine_record
from batchcls.inference.golden_record import with_golden
from batchcls.models.engines.engine import REFERENCE, EngineChoice
from batchcls.models.model_bundle import sha256_hex
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.models.weights import to_safetensors
from batchcls.storage.filesystem import Storage

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 9


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A tiny network with weights from a file, which count as real, and three labels."""
    from timm import create_model

    folder = tmp_path_factory.mktemp("bundle")
    torch.manual_seed(0)
    state = create_model("test_resnet", num_classes=3).state_dict()
    (folder / "w.safetensors").write_bytes(to_safetensors(state))
    (folder / "labels.txt").write_text("mug\nplate\nvase\n")
    choices = ModelChoices(
        weights=str(folder / "w.safetensors"),
        labels=str(folder / "labels.txt"),
        overrides=PreprocessingOverrides(input_size=32),
    )
    return resolve_model("timm:test_resnet", choices, Storage())


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BATCHCLS_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def prepared():
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    return Prepared(pixels, np.full((IMAGES, 2), 32, np.int32), ("mug",) * IMAGES, 1.5, Counter())


def _candidate(bundle, engine="torch:fp32", **place):
    values = {"batch_sizes": (1, 4, 16), "worthwhile_only": False, "seconds": 0.05, "threads": 1}
    place = BenchmarkEnvironment(hardware=Hardware.detect(), device="cpu", **values | place)
    return Candidate("tiny", bundle.fingerprint, EngineChoice.parse(engine), place)


def test_a_candidate_is_measured_from_end_to_end(bundle, prepared):
    measured = measure(bundle, _candidate(bundle), prepared, None)
    found = measured.measurement
    assert (found.model, found.architecture, found.weights) == (
        "tiny",
        "timm:test_resnet",
        "file w.safetensors",
    )
    assert (found.engine, found.device, found.threads) == ("torch fp32", "cpu", 1)
    assert (found.input_size, found.classes, found.prepare_ms) == ((32, 32), 3, 1.5)
    assert found.load_seconds > 0
    assert found.latency.p50_ms <= found.latency.p95_ms <= found.latency.p99_ms
    assert [entry.batch_size for entry in found.throughput] == [1, 4, 16]
    assert found.throughput[-1].peak_memory_mib > 50
    assert found.parameters == sum(
        int(np.prod(shape)) for shape in _shapes_of_parameters("test_resnet", classes=3)
    )
    assert found.multiply_adds > 1e5
    assert found.family is None
    assert len(measured.answers) == IMAGES
    assert measured.notes == ()


def _shapes_of_parameters(name, classes):
    from timm import create_model

    return [parameter.shape for parameter in create_model(name, num_classes=classes).parameters()]


def test_the_reference_agrees_with_itself_and_accuracy_is_a_count_of_labels(bundle, prepared):
    reference = measure(bundle, _candidate(bundle), prepared, None)
    agreed = reference.measurement.agreement
    assert (agreed.images, agreed.labeled, agreed.top1_with_fp32, agreed.top5) == (IMAGES, IMAGES, 1, 1)
    assert agreed.top1 == sum(answer == 0 for answer in reference.answers) / IMAGES


def test_a_lower_precision_is_compared_with_a_reference_given_or_found_out(bundle, prepared):
    reference = measure(bundle, _candidate(bundle), prepared, None).answers
    candidate = _candidate(bundle, "torch:bf16")
    given = measure(bundle, candidate, prepared, reference)
    assert given.measurement.engine == "torch bf16"
    found_out = measure(bundle, candidate, prepared, None)
    assert found_out.measurement.agreement == given.measurement.agreement
    others = [(answer + 1) % 3 for answer in given.answers]
    assert measure(bundle, candidate, prepared, others).measurement.agreement.top1_with_fp32 == 0


def test_random_weights_have_no_accuracy_of_their_own_and_the_published_one():
    bundle = resolve_model("torchvision:squeezenet1_1", ModelChoices(allow_random=True), Storage())
    pixels = np.zeros((2, 224, 224, 3), np.uint8)
    prepared = Prepared(pixels, np.full((2, 2), 32, np.int32), (bundle.config.labels[0],) * 2, 1.0, Counter())
    candidate = _candidate(bundle, batch_sizes=(1,), seconds=0.01)
    found = measure(bundle, candidate, prepared, None).measurement
    assert found.weights == "random"
    assert (found.agreement.labeled, found.agreement.top1) == (0, None)
    assert found.accuracy == (pytest.approx(0.58178), "published")


def test_weights_of_ones_own_have_no_published_accuracy(bundle, prepared):
    unlabeled = replace(prepared, labels=(None,) * IMAGES)
    assert measure(bundle, _candidate(bundle), unlabeled, None).measurement.accuracy is None


def test_an_engine_that_is_not_there_is_refused(bundle, prepared):
    with pytest.raises(InputError, match="fp16 is for GPUs"):
        measure(bundle, _candidate(bundle, "torch:fp16"), prepared, None)


def test_a_network_that_the_engine_cannot_run_is_refused_in_one_line(bundle, prepared, monkeypatch):
    from batchcls.models.engines.torch_eager import TorchEager

    def predict(self, pixels):
        raise NotImplementedError("\"some_kernel\" not implemented for 'BFloat16'\nand more")

    monkeypatch.setattr(TorchEager, "predict", predict)
    with pytest.raises(
        InputError, match=r"^tiny, torch bf16 on cpu: .*not implemented for 'BFloat16'\); leave"
    ):
        measure(bundle, _candidate(bundle, "torch:bf16"), prepared, None)


def test_another_bundle_than_the_one_that_was_meant_is_refused(bundle, prepared):
    candidate = replace(_candidate(bundle), bundle_fingerprint="0" * 64)
    with pytest.raises(InputError, match="this is another model"):
        measure(bundle, candidate, prepared, None)


def test_a_bundle_that_does_not_give_its_golden_answers_is_not_measured(bundle, prepared):
    golden = with_golden(bundle)
    assert measure(golden, _candidate(golden), prepared, None).measurement.model == "tiny"
    turned = golden.config.preprocessing.model_copy(update={"mean": (0.1, 0.9, 0.5)})
    wrong = replace(golden, config=golden.config.model_copy(update={"preprocessing": turned}))
    assert sha256_hex(wrong.weights) == wrong.config.weights.sha256
    with pytest.raises(GoldenMismatch):
        measure(wrong, _candidate(wrong), prepared, None)


def test_engines_are_parsed_the_reference_first():
    assert [str(c) for c in parse_engines(["torch:bf16", "torch:fp32"], "cpu")] == [
        "torch fp32",
        "torch bf16",
    ]
    assert [str(c) for c in parse_engines(["openvino:int8"], "cpu")] == ["openvino int8"]
    check_engines(["auto", "compile:fp16", "openvino:int8"])
    for text in ("torch", "torch:int4", "onnx:fp32", "fp32"):
        with pytest.raises(InputError, match=f"--engines {text}: unknown; choose auto, torch:fp32"):
            check_engines([text])


def test_auto_is_what_is_worth_trying_on_the_device_and_never_int8(monkeypatch):
    monkeypatch.setattr(engine_record, "missing_package", lambda engine: None)
    found = [str(choice) for choice in parse_engines(["auto"], "cpu")]
    assert found == ["torch fp32", "openvino bf16", "openvino fp32", "torch bf16"]
    assert parse_engines(["auto", "torch:bf16"], "cpu") == parse_engines(["auto"], "cpu")
    monkeypatch.setattr(
        engine_record, "missing_package", lambda engine: "is not here" if engine == "openvino" else None
    )
    found = [str(choice) for choice in parse_engines(["auto"], "cpu")]
    assert found == ["torch fp32", "compile bf16", "compile fp32", "torch bf16"]
    on_gpu = parse_engines(["auto"], "cuda")
    assert on_gpu[0] == REFERENCE
    assert {choice.engine for choice in on_gpu} == {"torch", "compile"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_with_its_own_memory(bundle, prepared):
    reference = measure(bundle, _candidate(bundle), prepared, None)
    on_gpu = _candidate(bundle)
    on_gpu = replace(on_gpu, place=replace(on_gpu.place, device="cuda"))
    found = measure(bundle, on_gpu, prepared, None)
    assert found.measurement.device == "cuda"
    assert found.answers == reference.answers
    assert 0 < found.measurement.throughput[-1].peak_memory_mib < 1000
