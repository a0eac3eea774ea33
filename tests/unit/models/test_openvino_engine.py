"""OpenVINO: the answers of PyTorch, from a conversion that is made once."""

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
ABLE = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif("BF16" not in ABLE, reason="this processor has no bfloat16")


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    overrides = PreprocessingOverrides(input_size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    choices = ModelChoices(allow_random=True, overrides=overrides)
    return with_golden(resolve_model("timm:test_resnet", choices, Storage()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    conversions = CompileCache(tmp_path_factory.mktemp("conversions"))
    return EngineConfig("cpu", 2, 4, conversions, lambda: pixels(20, seed=1))


@pytest.fixture(scope="module")
def engine(bundle: Bundle, place: EngineConfig) -> Engine:
    return start_engine(bundle, FP32, place)


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
    raise AssertionError("converted again")


def require_close(found: EngineOutput, expected: EngineOutput, tolerance: float = 1e-4) -> None:
    for ours, theirs in ((found.logits, expected.logits), (found.embedding, expected.embedding)):
        assert (ours.dtype, ours.shape) == (np.float32, theirs.shape)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * abs(theirs).max())


@pytest.mark.parametrize("count", [1, 4, 3, 9])
def test_batches_of_any_size_get_the_answers_of_pytorch(engine, reference, count):
    require_close(engine.predict(pixels(count)), reference.predict(pixels(count)))


def test_pixels_that_are_normalized_already_get_the_same_answers(bundle, engine, reference):
    require_close(engine.predict(normalized(pixels(3), bundle)), reference.predict(pixels(3)))


def test_no_image_has_an_answer_without_rows(bundle, engine):
    answer = engine.predict(pixels(0))
    assert answer.logits.shape == (0, len(bundle.config.labels))
    assert answer.embedding.shape == (0, bundle.config.embedding_dimension)


@needs_bf16
def test_bfloat16_is_close_to_float32_and_not_the_same(bundle, place, engine):
    exact, rough = engine.predict(pixels(5)), start_engine(bundle, BF16, place).predict(pixels(5))
    require_close(rough, exact, 0.05)
    assert not np.array_equal(rough.logits, exact.logits)


def test_int8_is_close_to_float32_whatever_the_number_of_threads(bundle, place, engine):
    exact = engine.predict(pixels(5))
    two = start_engine(bundle, INT8, place)
    one = start_engine(bundle, INT8, replace(place, threads=1), no_backbone)
    require_close(two.predict(pixels(5)), exact, 0.25)
    require_close(two.predict(pixels(5)), one.predict(pixels(5)), 0.02)
    assert (one.precision, two.in_flight) == ("int8", 2)


@pytest.mark.parametrize("choice", [FP32, pytest.param(BF16, marks=needs_bf16), INT8], ids=str)
def test_it_passes_the_golden_test_of_its_bundle_and_another_bundles_fails(bundle, place, choice):
    engine, found = start_tested_engine(bundle, choice, place)
    assert engine.precision == choice.precision
    assert (found.distance < 1e-4) == (choice == FP32)
    turned = bundle.config.preprocessing.model_copy(update={"mean": (0.9, 0.1, 0.1), "std": (0.05, 0.9, 0.9)})
    other = replace(bundle, config=bundle.config.model_copy(update={"preprocessing": turned}))
    with pytest.raises(GoldenMismatch, match="in fp32"):
        start_tested_engine(other, choice, place)


def test_pixels_in_memory_that_cannot_be_written_are_read_where_they_are(tmp_path, bundle, engine, reference):
    images = pixels(3)
    for number, array in enumerate((images, normalized(images, bundle))):
        (tmp_path / f"{number}").write_bytes(array.tobytes())
        with (tmp_path / f"{number}").open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        locked = np.frombuffer(memory, array.dtype).reshape(array.shape)  # a write would end the process
        require_close(engine.predict(locked), reference.predict(images))


def test_pixels_that_lie_apart_are_answered(engine, reference):
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
def test_pixels_of_another_form_are_refused(engine, wrong):
    with pytest.raises(ValueError, match=r"expected N x \(64, 64, 3\) of uint8 or float32"):
        engine.submit(wrong)


def test_more_batches_than_fit_may_be_submitted_and_asked_for_in_any_order(engine, reference):
    images = [pixels(2, seed) for seed in range(4 * engine.in_flight)]
    pending = [engine.submit(batch) for batch in images]
    for batch, answer in reversed(list(zip(images, pending, strict=True))):
        require_close(answer.result(), reference.predict(batch))
        assert answer.result() is answer.result()


def test_answers_that_nobody_asks_for_do_not_block_the_next(engine, reference):
    for seed in range(3 * engine.in_flight):
        engine.submit(pixels(1, seed))
    require_close(engine.predict(pixels(2)), reference.predict(pixels(2)))


def test_several_threads_get_each_its_own_answers(engine, reference):
    batches = [pixels(1 + seed % 4, seed) for seed in range(40)]
    found: list[EngineOutput | None] = [None] * len(batches)

    def work(first: int) -> None:
        pending = [(number, engine.submit(batches[number])) for number in range(first, len(batches), 4)]
        for number, answer in pending:
            found[number] = answer.result()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, answer in zip(batches, found, strict=True):
        require_close(answer, reference.predict(batch))


def test_what_fails_while_it_runs_is_raised_to_whoever_asks_and_the_next_works():
    """A real program that takes batches of an even size only, which it finds out on the way."""
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


def test_the_next_start_needs_neither_the_network_nor_torch_nor_a_word(
    bundle, place, engine, tmp_path, clean_environment
):
    bundle.save(str(tmp_path / "bundle"), Storage())
    start_engine(bundle, FP32, place, no_backbone)
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
place = EngineConfig("cpu", 1, 4, CompileCache(Path({str(place.compile_cache.folder)!r})))
engine = start_engine(bundle, EngineChoice("openvino", "fp32"), place)
assert len(engine.predict(np.zeros((2, 64, 64, 3), np.uint8)).logits) == 2
loaded = {{"torch", "timm", "torchvision", "nncf"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.long
def test_converting_and_quantizing_says_nothing_and_reports_to_nobody(bundle, tmp_path, clean_environment):
    """OpenVINO's and NNCF's own reports of use begin with a file in the user's home."""
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
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise AssertionError(arguments)
sys.addaudithook(refuse)
bundle = Bundle.load({str(tmp_path / "bundle")!r}, Storage())
pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
place = EngineConfig("cpu", 1, 4, CompileCache(Path({str(tmp_path / "cache")!r})), lambda: pixels)
assert len(start_engine(bundle, EngineChoice("openvino", "int8"), place).predict(pixels).logits) == 8
assert "nncf" in sys.modules
assert logging.getLogger().handlers == []
"""
    environment = {**clean_environment, "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "home" / "intel").exists()


def test_a_damaged_conversion_is_made_again(bundle, place, engine, reference):
    for program in place.compile_cache.folder.rglob("program.blob"):
        program.write_bytes(program.read_bytes()[:1000])
    require_close(start_engine(bundle, FP32, place).predict(pixels(2)), reference.predict(pixels(2)))


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
def test_what_it_cannot_do_is_refused_with_a_remedy(bundle, place, tmp_path, choice, changes, message):
    with pytest.raises(InputError, match=message):
        start_engine(bundle, choice, replace(place, compile_cache=CompileCache(tmp_path), **changes))


@pytest.mark.parametrize(("precision", "name"), [("fp16", "FP16"), ("bf16", "BF16")])
def test_a_precision_that_the_processor_lacks_is_refused(bundle, place, precision, name):
    if name in ABLE:
        pytest.skip(f"this processor has {precision}")
    with pytest.raises(InputError, match=f"--precision {precision}: this processor does not support it"):
        start_engine(bundle, EngineChoice("openvino", precision), place)


def test_without_nncf_int8_says_what_to_install(bundle, place, monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(openvino_convert, "version", missing)
    with pytest.raises(InputError, match=r"requires the package nncf: pip install 'batchcls\[openvino\]'"):
        start_engine(bundle, INT8, place)
