"""Candidates for the selection of an engine, before any is measured."""

import pytest

from batchcls.config.engine_config import EngineSettings
from batchcls.errors import InputError
from batchcls.inference.agreement import AccuracyTolerance
from batchcls.inference.engine_record import NO_BF16, EngineRequest, candidates
from batchcls.models.engines.engine import REFERENCE
from tests.helpers.engines import only_installed


def _names(found):
    return [str(choice) for choice in found.choices]


def test_auto_on_cpu_skips_compile_if_openvino_is_installed(monkeypatch):
    only_installed(monkeypatch, "torch", "compile", "openvino")
    found = candidates(EngineRequest(), "cpu")
    assert _names(found) == ["openvino bf16", "openvino fp32", "torch bf16", "torch fp32"]
    (note,) = found.notes
    assert note.startswith("compile is skipped")


def test_auto_on_cpu_includes_compile_without_openvino(monkeypatch):
    only_installed(monkeypatch, "torch", "compile")
    found = candidates(EngineRequest(), "cpu")
    assert _names(found) == ["compile bf16", "compile fp32", "torch bf16", "torch fp32"]
    assert found.notes == ("openvino is not installed",)


def test_auto_on_gpu_includes_all_floating_point_precisions(monkeypatch):
    only_installed(monkeypatch, "torch", "compile", "openvino")
    found = candidates(EngineRequest(), "cuda")
    assert {str(choice) for choice in found.choices} == {
        f"{engine} {precision}" for engine in ("torch", "compile") for precision in ("fp32", "bf16", "fp16")
    }
    assert found.choices[-1] == REFERENCE


def test_int8_is_a_candidate_only_with_limit_or_explicit_request(monkeypatch):
    only_installed(monkeypatch, "torch", "compile", "openvino")
    tolerance = AccuracyTolerance(int8_min_agreement=0.97)
    assert _names(candidates(EngineRequest(tolerance=tolerance), "cpu"))[0] == "openvino int8"
    assert _names(candidates(EngineRequest(precision="int8"), "cpu")) == ["openvino int8"]


def test_explicit_engine_or_precision_restricts_candidates(monkeypatch):
    only_installed(monkeypatch, "torch", "compile", "openvino")
    assert _names(candidates(EngineRequest(engine="compile"), "cpu")) == ["compile bf16", "compile fp32"]
    assert _names(candidates(EngineRequest(engine="torch", precision="int8"), "cpu")) == ["torch int8"]
    assert _names(candidates(EngineRequest(precision="bf16"), "cpu")) == ["openvino bf16", "torch bf16"]


def test_emulated_bf16_is_skipped_unless_requested(monkeypatch):
    only_installed(monkeypatch, "torch", "compile", "openvino")
    found = candidates(EngineRequest(), "cpu", has_bf16=False)
    assert _names(found) == ["openvino fp32", "torch fp32"]
    assert [note for note in found.notes if "bf16" in note] == [NO_BF16]
    explicit = candidates(EngineRequest(precision="bf16"), "cpu", has_bf16=False)
    assert _names(explicit) == ["openvino bf16", "torch bf16"]
    assert _names(candidates(EngineRequest(), "cuda", has_bf16=False)) == _names(
        candidates(EngineRequest(), "cuda")
    )


def test_unavailable_request_is_rejected(monkeypatch):
    only_installed(monkeypatch, "torch", "compile")
    with pytest.raises(InputError, match="--engine openvino: openvino is not installed"):
        candidates(EngineRequest(engine="openvino"), "cpu")
    with pytest.raises(
        InputError, match="no engine supports this on a CPU; openvino is not installed; choose another"
    ):
        candidates(EngineRequest(precision="int8"), "cpu")
    with pytest.raises(InputError, match="no engine supports this on a GPU"):
        candidates(EngineRequest(engine="openvino"), "cuda")


def test_request_from_settings():
    settings = EngineSettings(engine="torch", min_top1_agreement=0.98, int8_min_agreement=0.9)
    request = EngineRequest.from_settings(settings, batch_size=16)
    assert (request.engine, request.precision, request.device, request.batch_size) == (
        "torch",
        "auto",
        "auto",
        16,
    )
    assert request.tolerance == AccuracyTolerance(0.98, 0.999, 0.9)
    assert EngineRequest.model_validate_json(request.model_dump_json()) == request
