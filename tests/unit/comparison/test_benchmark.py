from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from batchcls.comparison.benchmark import measure
from batchcls.comparison.candidates import BenchmarkEnvironment, Candidate, check_engines, parse_engines
from batchcls.comparison.sample_pixels import SamplePixels
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
    """A tiny network with three classes and weights from a file, which count as trained."""
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
def sample():
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    return SamplePixels(pixels, np.full((IMAGES, 2), 32, np.int32), ("mug",) * IMAGES, 1.5, Counter())


def _candidate(bundle, engine="torch:fp32", **settings):
    values = {"batch_sizes": (1, 4, 16), "stop_early": False, "seconds": 0.05, "threads": 1}
    environment = BenchmarkEnvironment(hardware=Hardware.detect(), device="cpu", **values | settings)
    return Candidate("tiny", bundle.fingerprint, EngineChoice.parse(engine), environment)


def test_measures_a_candidate_end_to_end(bundle, sample):
    result = measure(bundle, _candidate(bundle), sample, None)
    found = result.measurement
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
    assert len(result.predictions) == IMAGES
    assert result.notes == ()


def _shapes_of_parameters(name, classes):
    from timm import create_model

    return [parameter.shape for parameter in create_model(name, num_classes=classes).parameters()]


def test_reference_agrees_with_itself(bundle, sample):
    reference = measure(bundle, _candidate(bundle), sample, None)
    accuracy = reference.measurement.agreement
    assert (accuracy.images, accuracy.labeled, accuracy.top1_with_fp32, accuracy.top5) == (
        IMAGES,
        IMAGES,
        1,
        1,
    )
    assert accuracy.top1 == sum(prediction == 0 for prediction in reference.predictions) / IMAGES


def test_computes_the_reference_if_none_is_given(bundle, sample):
    reference = measure(bundle, _candidate(bundle), sample, None).predictions
    candidate = _candidate(bundle, "torch:bf16")
    given = measure(bundle, candidate, sample, reference)
    assert given.measurement.engine == "torch bf16"
    computed = measure(bundle, candidate, sample, None)
    assert computed.measurement.agreement == given.measurement.agreement
    others = [(prediction + 1) % 3 for prediction in given.predictions]
    assert measure(bundle, candidate, sample, others).measurement.agreement.top1_with_fp32 == 0


def test_random_weights_have_only_a_published_accuracy():
    bundle = resolve_model("torchvision:squeezenet1_1", ModelChoices(allow_random=True), Storage())
    pixels = np.zeros((2, 224, 224, 3), np.uint8)
    sample = SamplePixels(
        pixels, np.full((2, 2), 32, np.int32), (bundle.config.labels[0],) * 2, 1.0, Counter()
    )
    candidate = _candidate(bundle, batch_sizes=(1,), seconds=0.01)
    found = measure(bundle, candidate, sample, None).measurement
    assert found.weights == "random"
    assert (found.agreement.labeled, found.agreement.top1) == (0, None)
    assert found.accuracy == (pytest.approx(0.58178), "published")


def test_custom_weights_have_no_published_accuracy(bundle, sample):
    unlabeled = replace(sample, labels=(None,) * IMAGES)
    assert measure(bundle, _candidate(bundle), unlabeled, None).measurement.accuracy is None


def test_rejects_an_unavailable_engine(bundle, sample):
    with pytest.raises(InputError, match="fp16 requires a GPU"):
        measure(bundle, _candidate(bundle, "torch:fp16"), sample, None)


def test_error_of_an_unsupported_network_is_one_line(bundle, sample, monkeypatch):
    from batchcls.models.engines.torch_eager import TorchEager

    def predict(self, pixels):
        raise NotImplementedError("\"some_kernel\" not implemented for 'BFloat16'\nand more")

    monkeypatch.setattr(TorchEager, "predict", predict)
    with pytest.raises(
        InputError, match=r"^tiny, torch bf16 on cpu: .*not implemented for 'BFloat16'\); remove"
    ):
        measure(bundle, _candidate(bundle, "torch:bf16"), sample, None)


def test_rejects_a_different_bundle(bundle, sample):
    candidate = replace(_candidate(bundle), bundle_fingerprint="0" * 64)
    with pytest.raises(InputError, match="this is another model"):
        measure(bundle, candidate, sample, None)


def test_rejects_a_bundle_that_fails_its_golden_test(bundle, sample):
    golden = with_golden(bundle)
    assert measure(golden, _candidate(golden), sample, None).measurement.model == "tiny"
    preprocessing = golden.config.preprocessing.model_copy(update={"mean": (0.1, 0.9, 0.5)})
    modified = replace(golden, config=golden.config.model_copy(update={"preprocessing": preprocessing}))
    assert sha256_hex(modified.weights) == modified.config.weights.sha256
    with pytest.raises(GoldenMismatch):
        measure(modified, _candidate(modified), sample, None)


def test_parses_engines_with_the_reference_first():
    assert [str(c) for c in parse_engines(["torch:bf16", "torch:fp32"], "cpu")] == [
        "torch fp32",
        "torch bf16",
    ]
    assert [str(c) for c in parse_engines(["openvino:int8"], "cpu")] == ["openvino int8"]
    check_engines(["auto", "compile:fp16", "openvino:int8"])
    for text in ("torch", "torch:int4", "onnx:fp32", "fp32"):
        with pytest.raises(InputError, match=f"--engines {text}: unknown; choose auto, torch:fp32"):
            check_engines([text])


def test_auto_selects_the_engines_of_the_device_without_int8(monkeypatch):
    monkeypatch.setattr(engine_record, "missing_package", lambda engine: None)
    found = [str(choice) for choice in parse_engines(["auto"], "cpu")]
    assert found == ["torch fp32", "openvino bf16", "openvino fp32", "torch bf16"]
    assert parse_engines(["auto", "torch:bf16"], "cpu") == parse_engines(["auto"], "cpu")
    monkeypatch.setattr(
        engine_record, "missing_package", lambda engine: "is not installed" if engine == "openvino" else None
    )
    found = [str(choice) for choice in parse_engines(["auto"], "cpu")]
    assert found == ["torch fp32", "compile bf16", "compile fp32", "torch bf16"]
    on_gpu = parse_engines(["auto"], "cuda")
    assert on_gpu[0] == REFERENCE
    assert {choice.engine for choice in on_gpu} == {"torch", "compile"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measures_the_memory_of_a_gpu(bundle, sample):
    reference = measure(bundle, _candidate(bundle), sample, None)
    on_gpu = _candidate(bundle)
    on_gpu = replace(on_gpu, environment=replace(on_gpu.environment, device="cuda"))
    found = measure(bundle, on_gpu, sample, None)
    assert found.measurement.device == "cuda"
    assert found.predictions == reference.predictions
    assert 0 < found.measurement.throughput[-1].peak_memory_mib < 1000
