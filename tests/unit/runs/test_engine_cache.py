import json
from datetime import UTC, datetime

import pytest

from batchcls.errors import InputError
from batchcls.inference.agreement import AccuracyTolerance
from batchcls.inference.engine_record import (
    CandidateResult,
    EngineRequest,
    EngineSelectionRecord,
    installed_versions,
)
from batchcls.models.classifier_head import ModelLayers
from batchcls.models.engines.engine import EngineChoice
from batchcls.runs.engine_cache import load, save, uri_of
from batchcls.storage.filesystem import Storage
from tests.helpers.measurements import LAPTOP, SERVER

FINGERPRINT = "0123456789abcdef" * 4
LAYERS = ModelLayers(
    preprocessing="p", trunk="t", head="h", labels="l", category_paths="c", temperature=1.0, thresholds=""
)


def _measured(**changes):
    values = {
        "created": datetime.now(UTC),
        "request": EngineRequest(),
        "bundle_fingerprint": FINGERPRINT,
        "layers": LAYERS,
        "hardware_key": SERVER.key,
        "hardware": str(SERVER),
        "versions": installed_versions(),
        "device": "cpu",
        "threads": 2,
        "manifest": "manifest fingerprint",
        "images": 512,
        "seconds": 31.5,
        "reference": "torch fp32",
        "engine": "openvino",
        "precision": "bf16",
        "batch_size": 8,
        "images_per_second": 50.5,
        "candidates": (
            CandidateResult(engine="openvino", precision="bf16", rates={4: 48.0, 8: 50.5}, batch_size=8),
            CandidateResult(engine="torch", precision="bf16", rejected="slower than openvino bf16"),
        ),
        "notes": ("compile was left out",),
    }
    return EngineSelectionRecord(**values | changes)


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out")


def _load(output, layers=LAYERS, hardware=SERVER, request=EngineRequest()):  # noqa: B008 - frozen
    return load(output, layers, hardware, request, Storage())


def test_selection_is_read_back(output):
    assert _load(output) is None
    measured = _measured()
    uri = save(output, measured, Storage())
    assert uri.endswith(f"/engines/{LAYERS.network[:12]}-{SERVER.key}.json")
    assert _load(output) == measured
    assert _load(output).choice == EngineChoice("openvino", "bf16")


def test_selection_is_only_used_for_its_model_and_kind_of_node(output):
    save(output, _measured(), Storage())
    assert _load(output, hardware=LAPTOP) is None
    assert _load(output, LAYERS.model_copy(update={"trunk": "other"})) is None
    assert _load(output, LAYERS.model_copy(update={"preprocessing": "other"})) is None


def test_selection_holds_for_other_labels_and_classifiers_of_a_network(output):
    save(output, _measured(), Storage())
    relabeled = LAYERS.model_copy(update={"labels": "other", "temperature": 2.0})
    reheaded = LAYERS.model_copy(update={"head": "other"})
    assert _load(output, relabeled) == _load(output, reheaded) == _load(output) is not None
    save(output, _measured(precision="int8"), Storage())
    assert _load(output, relabeled) == _load(output)
    assert _load(output, reheaded) is None


@pytest.mark.parametrize(
    "other_request",
    [
        EngineRequest(engine="openvino"),
        EngineRequest(precision="fp32"),
        EngineRequest(device="cpu"),
        EngineRequest(batch_size=8),
        EngineRequest(tolerance=AccuracyTolerance(min_top1_agreement=0.98)),
        EngineRequest(tolerance=AccuracyTolerance(min_embedding_cosine=0.99)),
        EngineRequest(tolerance=AccuracyTolerance(int8_min_agreement=0.97)),
    ],
)
def test_engines_are_measured_again_for_another_request(output, other_request):
    save(output, _measured(), Storage())
    assert _load(output, request=other_request) is None
    save(output, _measured(request=other_request), Storage())
    assert _load(output, request=other_request).request == other_request
    assert _load(output) is None


@pytest.mark.parametrize("versions", [{"openvino": "2020.1"}, {"torch": "0.1"}, {}])
def test_engines_are_measured_again_for_other_package_versions(output, versions):
    save(output, _measured(versions={**installed_versions(), **versions} if versions else {}), Storage())
    assert _load(output) is None


@pytest.mark.parametrize("damage", ["cut", "field", "format", "text"])
def test_damaged_file_is_logged_and_engines_are_measured_again(output, log, damage):
    uri = save(output, _measured(), Storage())
    text = Storage().read_bytes(uri).decode()
    record = json.loads(text)
    changed = {
        "cut": text[: len(text) // 2],
        "field": json.dumps(record | {"batch_size": 0}),
        "format": json.dumps(record | {"format": "batchcls-engines-0"}),
        "text": "\x00\xff not JSON",
    }[damage]
    Storage().write_atomic(uri, changed.encode("latin-1"))
    assert _load(output) is None
    assert f"{uri_of(output, LAYERS, SERVER.key)} is damaged or of another version" in log.text


def test_error_names_a_store_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        save(str(tmp_path / "file"), _measured(), Storage())


def test_module_does_not_import_torch(tmp_path):
    import subprocess
    import sys

    code = "import sys, batchcls.runs.engine_cache, batchcls.config.engine_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
