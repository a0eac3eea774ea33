"""The OpenVINO engine matches PyTorch, with a network that is converted once."""

import mmap
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from batchcls.errors import GoldenMismatch, InputError
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.golden_record import with_golden
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import Engine, EngineChoice, EngineConfig, EngineOutput
from batchcls.models.engines.factory import start_engine
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage

openvino = pytest.importorskip("openvino")
openvino_convert = pytest.importorskip("batchcls.models.engines.openvino_convert")
pytestmark = pytest.mark.usefixtures("one_thread")

FP32, BF16, INT8 = (EngineChoice("openvino", precision) for precision in ("fp32", "bf16", "int8"))
CAPABILITIES = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif("BF16" not in CAPABILITIES, reason="this processor has no bfloat16")


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    overrides = PreprocessingOverrides(input_size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    choices = ModelChoices(allow_random=True, overrides=overrides)
    return with_golden(resolve_model("timm:test_resnet", choices, Storage()))


@pytest.fixture(scope="module")
def engine_config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    conversions = CompileCache(tmp_path_factory.mktemp("conversions"))
    return EngineConfig("cpu", 2, 4, conversions, lambda: pixels(20, seed=1))


@pytest.fixture(scope="module")
def engine(bundle: Bundle, engine_config: EngineConfig) -> Engine:
    return start_engine(bundle, FP32, engine_config)


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Engine:
    return start_engine(
        bundle, EngineChoice("torch", "fp32"), EngineConfig("cpu", 1, 4, CompileCache(Path()))
    )


def normalized(images: np.ndarray, bundle: Bundle) -> np.ndarray:
    preprocessing = bundle.config.preprocessing
    mean, std = np.float32([preprocessing.mean]), np.float32([preprocessing.std])
    return (images.astype(np.float32) / 255 - mean) / std


def no_backbone():
    raise AssertionError("the network was built again")


def require_close(output: EngineOutput, expected: EngineOutput, tolerance: float = 1e-4) -> None:
    for actual, reference in ((output.logits, expected.logits), (output.embedding, expected.embedding)):
        assert (actual.dtype, actual.shape) == (np.float32, reference.shape)
        np.testing.assert_allclose(actual, reference, rtol=0, atol=tolerance * abs(reference).max())


@pytest.mark.parametrize("count", [1, 4, 3, 9])
def test_outputs_match_pytorch_for_any_batch_size(engine, reference, count):
    require_close(engine.predict(pixels(count)), reference.predict(pixels(count)))


def test_normalized_pixels_have_the_same_outputs(bundle, engine, reference):
    require_close(engine.predict(normalized(pixels(3), bundle)), reference.predict(pixels(3)))


def test_empty_batch_has_empty_output(bundle, engine):
    output = engine.predict(pixels(0))
    assert output.logits.shape == (0, len(bundle.config.labels))
    assert output.embedding.shape == (0, bundle.config.embedding_dimension)


@needs_bf16
def test_bfloat16_is_close_but_not_equal_to_float32(bundle, engine_config, engine):
    exact, rough = engine.predict(pixels(5)), start_engine(bundle, BF16, engine_config).predict(pixels(5))
    require_close(rough, exact, 0.05)
    assert not np.array_equal(rough.logits, exact.logits)


def test_int8_is_close_to_float32_for_any_number_of_threads(bundle, engine_config, engine):
    exact = engine.predict(pixels(5))
    two = start_engine(bundle, INT8, engine_config)
    one = start_engine(bundle, INT8, replace(engine_config, threads=1), no_backbone)
    require_close(two.predict(pixels(5)), exact, 0.25)
    require_close(two.predict(pixels(5)), one.predict(pixels(5)), 0.02)
    assert (one.precision, two.in_flight) == ("int8", 2)


@pytest.mark.parametrize("choice", [FP32, pytest.param(BF16, marks=needs_bf16), INT8], ids=str)
def test_golden_test_passes_for_own_bundle_only(bundle, engine_config, choice):
    engine, found = start_tested_engine(bundle, choice, engine_config)
    assert engine.precision == choice.precision
    assert (found.distance < 1e-4) == (choice == FP32)
    turned = bundle.config.preprocessing.model_copy(update={"mean": (0.9, 0.1, 0.1), "std": (0.05, 0.9, 0.9)})
    other = replace(bundle, config=bundle.config.model_copy(update={"preprocessing": turned}))
    with pytest.raises(GoldenMismatch, match="in fp32"):
        start_tested_engine(other, choice, engine_config)


def test_read_only_memory_is_read_without_a_copy(tmp_path, bundle, engine, reference):
    images = pixels(3)
    for number, array in enumerate((images, normalized(images, bundle))):
        (tmp_path / f"{number}").write_bytes(array.tobytes())
        with (tmp_path / f"{number}").open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        read_only = np.frombuffer(memory, array.dtype).reshape(array.shape)  # a write would raise SIGSEGV
        require_close(engine.predict(read_only), reference.predict(images))


def test_non_contiguous_pixels_are_supported(engine, reference):
    images = pixels(6)
    require_close(engine.predict(images[::2]), reference.predict(np.ascontiguousarray(images[::2])))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 3, 64, 64), np.uint8),
        np.zeros((1, 64, 64, 3), np.float64),
        np.zeros((64, 64, 3), np.uint8),
    ],
    ids=["channels first", "float64", "no batch"],
)
def test_pixels_of_other_shape_or_dtype_are_rejected(engine, wrong):
    with pytest.raises(ValueError, match=r"expected N x \(64, 64, 3\) of uint8 or float32"):
        engine.submit(wrong)


def test_results_can_be_read_in_any_order_after_many_submissions(engine, reference):
    images = [pixels(2, seed) for seed in range(4 * engine.in_flight)]
    pending = [engine.submit(batch) for batch in images]
    for batch, submitted in reversed(list(zip(images, pending, strict=True))):
        require_close(submitted.result(), reference.predict(batch))
        assert submitted.result() is submitted.result()


def test_unread_results_do_not_block_later_batches(engine, reference):
    for seed in range(3 * engine.in_flight):
        engine.submit(pixels(1, seed))
    require_close(engine.predict(pixels(2)), reference.predict(pixels(2)))


def test_each_thread_gets_its_own_outputs(engine, reference):
    batches = [pixels(1 + seed % 4, seed) for seed in range(40)]
    outputs: list[EngineOutput | None] = [None] * len(batches)

    def work(first: int) -> None:
        pending = [(number, engine.submit(batches[number])) for number in range(first, len(batches), 4)]
        for number, submitted in pending:
            outputs[number] = submitted.result()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, output in zip(batches, outputs, strict=True):
        require_close(output, reference.predict(batch))


def test_runtime_failure_is_raised_by_result_only():
    """Use a real program that fails at runtime for batches of an odd size."""
    from openvino import opset13 as operations

    from batchcls.models.engines.openvino_engine import _RequestPool

    images = operations.parameter([-1, 2], np.uint8)
    halves = operations.reshape(images, np.array([2, -1]), special_zero=False)
    network = operations.reshape(operations.convert(halves, "f32"), np.array([-1, 4]), special_zero=False)
    results = [operations.relu(network), operations.abs(network)]
    for result, name in zip(results, ("logits", "embedding"), strict=True):
        result.output(0).get_tensor().set_names({name})
    program = openvino.Core().compile_model(openvino.Model(results, [images]), "CPU")
    pool = _RequestPool([program], 1)
    pending = [pool.submit(np.ones((count, 2), np.uint8)) for count in (2, 3, 4, 2)]
    assert [pending[number].result().logits.size for number in (0, 2, 3)] == [4, 8, 4]
    with pytest.raises(RuntimeError, match="OpenVINO could not process a batch"):
        pending[1].result()


def test_cached_start_does_not_import_torch_or_print(
    bundle, engine_config, engine, tmp_path, clean_environment
):
    bundle.save(str(tmp_path / "bundle"), Storage())
    start_engine(bundle, FP32, engine_config, no_backbone)
    code = f"""
import sys
from pathlib import Path
import numpy as np
from batchcls.models.model_bundle import Bundle
from batchcls.models.engines.engine import EngineChoice, EngineConfig
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.factory import start_engine
from batchcls.storage.filesystem import Storage
bundle = Bundle.load({str(tmp_path / "bundle")!r}, Storage())
engine_config = EngineConfig("cpu", 1, 4, CompileCache(Path({str(engine_config.compile_cache.folder)!r})))
engine = start_engine(bundle, EngineChoice("openvino", "fp32"), engine_config)
assert len(engine.predict(np.zeros((2, 64, 64, 3), np.uint8)).logits) == 2
loaded = {{"torch", "timm", "torchvision", "nncf"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.long
def test_conversion_and_quantization_print_nothing_and_send_no_reports(bundle, tmp_path, clean_environment):
    """The usage reports of OpenVINO and NNCF would create a folder in the user's home."""
    (tmp_path / "home").mkdir()
    bundle.save(str(tmp_path / "bundle"), Storage())
    code = f"""
import logging, socket, sys
from pathlib import Path
import numpy as np
from batchcls.models.model_bundle import Bundle
from batchcls.models.engines.engine import EngineChoice, EngineConfig
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.factory import start_engine
from batchcls.storage.filesystem import Storage
def reject_connections(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise AssertionError(arguments)
sys.addaudithook(reject_connections)
bundle = Bundle.load({str(tmp_path / "bundle")!r}, Storage())
pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
engine_config = EngineConfig("cpu", 1, 4, CompileCache(Path({str(tmp_path / "cache")!r})), lambda: pixels)
assert len(start_engine(bundle, EngineChoice("openvino", "int8"), engine_config).predict(pixels).logits) == 8
assert "nncf" in sys.modules
assert logging.getLogger().handlers == []
"""
    environment = {**clean_environment, "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "home" / "intel").exists()


def test_damaged_entry_is_created_again(bundle, engine_config, engine, reference):
    for program in engine_config.compile_cache.folder.rglob("program.blob"):
        program.write_bytes(program.read_bytes()[:1000])
    require_close(start_engine(bundle, FP32, engine_config).predict(pixels(2)), reference.predict(pixels(2)))


@pytest.mark.parametrize(
    ("choice", "changes", "message"),
    [
        (FP32, {"device": "cuda"}, "runs on CPUs, not on cuda; use --device cpu or --engine torch"),
        (INT8, {"calibration": None}, "there are no calibration images; name a manifest, or use"),
        (
            INT8,
            {"calibration": lambda: pixels(0)},
            "none of the calibration images could be read",
        ),
    ],
    ids=["gpu", "no calibration", "empty calibration"],
)
def test_unsupported_settings_are_rejected_with_a_remedy(
    bundle, engine_config, tmp_path, choice, changes, message
):
    with pytest.raises(InputError, match=message):
        start_engine(bundle, choice, replace(engine_config, compile_cache=CompileCache(tmp_path), **changes))


@pytest.mark.parametrize(("precision", "name"), [("fp16", "FP16"), ("bf16", "BF16")])
def test_precision_that_the_processor_lacks_is_rejected(bundle, engine_config, precision, name):
    if name in CAPABILITIES:
        pytest.skip(f"this processor has {precision}")
    with pytest.raises(InputError, match=f"--precision {precision}: this processor does not support it"):
        start_engine(bundle, EngineChoice("openvino", precision), engine_config)


def test_int8_without_nncf_names_the_package(bundle, engine_config, monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(openvino_convert, "version", missing)
    with pytest.raises(InputError, match=r"requires the package nncf: pip install 'batchcls\[openvino\]'"):
        start_engine(bundle, INT8, engine_config)
