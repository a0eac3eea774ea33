"""The compiled engine on a CPU: compiled once, found again without PyTorch, the answers of the plain one."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from batchcls.errors import InputError
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.golden_record import with_golden
from batchcls.models.build import build_backbone
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.cuda_graphs import padded_batch_size
from batchcls.models.engines.engine import REFERENCE, EngineChoice, EngineConfig
from batchcls.models.engines.factory import start_engine
from batchcls.models.engines.torch_compile import TorchCompiled
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = EngineChoice("compile", "bf16")
FP32 = EngineChoice("compile", "fp32")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    overrides = PreprocessingOverrides(input_size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    # A tap keeps something of the pass under way: two passes at a time must not mix it up.
    choices = ModelChoices(allow_random=True, overrides=overrides, tap="stage2")
    return with_golden(resolve_model("timm:test_resnet", choices, Storage()))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> EngineConfig:
    return EngineConfig("cpu", 2, 8, CompileCache(tmp_path_factory.mktemp("conversions")))


@pytest.fixture(scope="module")
def engine(bundle, place) -> TorchCompiled:
    return start_tested_engine(bundle, FP32, place)[0]


@pytest.fixture(scope="module")
def plain(bundle, place):
    return start_engine(bundle, REFERENCE, place)


def pixels(count: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


def assert_close(answer, expected, tolerance: float) -> None:
    for found, wanted in ((answer.logits, expected.logits), (answer.embedding, expected.embedding)):
        assert (found.shape, found.dtype) == (wanted.shape, np.float32)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * abs(wanted).max())


@pytest.mark.parametrize("count", [0, 1, 2, 7, 33])
def test_batches_of_any_size_get_the_answers_of_the_plain_engine(engine, plain, count):
    batch = pixels(count)
    assert engine.predict(batch).embedding.shape == (count, plain.predict(pixels(1)).embedding.shape[1])
    if count:
        assert_close(engine.predict(batch), plain.predict(batch), 1e-4)


def test_an_image_gets_the_same_answer_whatever_stands_beside_it(engine):
    alone = engine.predict(pixels(1))
    beside = engine.predict(np.concatenate([pixels(1), pixels(6, seed=9)]))
    np.testing.assert_allclose(beside.logits[:1], alone.logits, rtol=0, atol=1e-5 * abs(alone.logits).max())


def test_answers_of_batches_under_way_at_once_are_not_mixed_up(engine, plain):
    batches = [pixels(1 + seed % 5, seed) for seed in range(40)]
    with ThreadPoolExecutor(3) as threads:
        pending = list(threads.map(engine.submit, batches))
    for batch, answer in zip(batches, pending, strict=True):
        assert_close(answer.result(), plain.predict(batch), 1e-4)


def test_mirrored_and_unwriteable_pixels_are_read_as_they_are(engine):
    batch = pixels(3)
    batch.flags.writeable = False
    mirrored = batch[:, :, ::-1]
    np.testing.assert_array_equal(
        engine.predict(mirrored).logits, engine.predict(np.ascontiguousarray(mirrored)).logits
    )


def test_pixels_of_another_form_are_refused(engine):
    with pytest.raises(ValueError, match=r"expected N x \(64, 64, 3\) of uint8 or float32"):
        engine.predict(np.zeros((1, 3, 64, 64), np.uint8))


def test_other_threads_run_while_a_batch_is_answered(engine):
    """PyTorch's own loader holds Python's lock for the whole pass, and decoding would stand still."""
    counted, ended = [0], threading.Event()

    def count() -> None:
        while not ended.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    engine.predict(pixels(400))
    counter.start()
    try:
        before = counted[0]
        pending = engine.submit(pixels(400))
        seen = {counted[0]}
        while not pending.done():
            seen.add(counted[0])
        pending.result()
    finally:
        ended.set()
        counter.join()
    assert len(seen - {before}) > 3


def test_a_second_start_finds_the_program_and_needs_neither_the_network_nor_pytorch(
    bundle, place, engine, tmp_path
):
    def never() -> None:
        raise AssertionError("the network was built again")

    again = start_engine(bundle, FP32, place, never)
    np.testing.assert_array_equal(again.predict(pixels(3)).logits, engine.predict(pixels(3)).logits)

    bundle.save(str(tmp_path / "bundle"), Storage())
    np.save(tmp_path / "pixels.npy", pixels(3))
    code = f"""
import sys, numpy as np
from pathlib import Path
from batchcls.models.model_bundle import Bundle
from batchcls.models.engines.engine import EngineChoice, EngineConfig
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.factory import start_engine
from batchcls.storage.filesystem import Storage
bundle = Bundle.load({str(tmp_path / "bundle")!r}, Storage())
place = EngineConfig("cpu", 2, 8, CompileCache(Path({str(place.compile_cache.folder)!r})))
engine = start_engine(bundle, EngineChoice("compile", "fp32"), place)
answer = engine.predict(np.load({str(tmp_path / "pixels.npy")!r}))
assert "torch" not in sys.modules
np.save({str(tmp_path / "logits.npy")!r}, answer.logits)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), engine.predict(pixels(3)).logits)


@pytest.mark.long
def test_bfloat16_holds_the_golden_answers_and_is_not_float32(bundle, place, engine):
    rough, deviation = start_tested_engine(bundle, BF16, place)
    assert rough.precision == "bf16"
    assert deviation.distance > 1e-4
    assert_close(rough.predict(pixels(3)), engine.predict(pixels(3)), 0.05)


@pytest.mark.long
def test_pixels_that_are_normalized_already_get_the_same_answer(bundle, engine):
    mean, std = (np.float32(getattr(bundle.config.preprocessing, name)) for name in ("mean", "std"))
    normalized = (pixels(3).astype(np.float32) / 255 - mean) / std
    assert_close(engine.predict(normalized), engine.predict(pixels(3)), 1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_precisions_that_a_cpu_does_not_have_are_refused(bundle, place, precision):
    with pytest.raises(InputError, match="on a CPU; choose from fp32, bf16"):
        start_engine(bundle, EngineChoice("compile", precision), place)


def test_without_a_compiler_the_message_names_it(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    elsewhere = EngineConfig("cpu", 1, 8, CompileCache(tmp_path))
    with pytest.raises(InputError, match="no-such-compiler is not installed; install one, set CXX"):
        start_engine(bundle, FP32, elsewhere, lambda: build_backbone(bundle))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_file_that_is_no_program_is_refused(tmp_path):
    from batchcls.models.engines.aot_program import AotProgram

    broken = Path(tmp_path) / "program.so"
    broken.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        AotProgram(broken, 1)


@pytest.mark.parametrize(
    ("count", "batch_size", "computed"),
    [(512, 512, 512), (500, 512, 512), (256, 512, 512), (128, 512, 128), (4, 512, 8), (1, 512, 1), (3, 3, 3),
     (9, 8, 9), (6, 100, 7)],
)  # fmt: skip
def test_graphs_have_one_of_a_few_sizes(count, batch_size, computed):
    assert padded_batch_size(count, batch_size) == computed
