"""Which engines and precisions come into question, before any is measured."""

import pytest

from batchcls.config.engine_config import EngineSettings
from batchcls.errors import InputError
from batchcls.inference.agreement import AccuracyTolerance
from batchcls.inference.engine_record import NO_BF16, EngineRequest, candidates
from batchcls.models.engines.engine import REFERENCE
from tests.helpers.engines import only_installed


def _names(found):
    return [str(choice) for choice in found.choices]


def test_auto_on_a_cpu_tries_openvino_and_torch_and_leaves_compile_out(monkeypatch):
    only_installed(monkeypatch, "torch", "compile", "openvino")
    found = candidates(EngineRequest(), "cpu")
    assert _names(found) == ["openvino bf16", "openvino fp32", "torch bf16", "torch fp32"]
    (note,) = found.notes
    assert note.startswith("compile was left out")


def test_without_openvino_compile_is_tried_and_what_is_missing_is_noted(monkeypatch):
    only_installed(monkeypatch, "torch", "compile")
    found = candidates(EngineRequest(), "cpu")
    assert _names(found) == ["compile bf16", "compile fp32", "torch bf16", "torch fp32"]
    assert found.notes == ("openvino is not here",)


def test_auto_on_a_gpu_tries_both_short_precisions(monkeypatch):
    only_installed(monkeypatch, "torch", "compile", "openvino")
    found = candidates(EngineRequest(), "cuda")
    assert {str(choice) for choice in found.choices} == {
        f"{engine} {precision}" for engine in ("torch", "compile") for precision in ("fp32", "bf16", "fp16")
    }
    assert found.choices[-1] == REFERENCE


def test_int8_comes_into_question_only_with_a_bound_or_by_name(monkeypatch):
    only_installed(monkeypatch, "torch", "compile", "openvino")
    bound = AccuracyTolerance(int8_min_agreement=0.97)
    assert _names(candidates(EngineRequest(contract=bound), "cpu"))[0] == "openvino int8"
    assert _names(candidates(EngineRequest(precision="int8"), "cpu")) == ["openvino int8"]


def test_an_engine_asked_for_by_name_has_its_own_candidates(monkeypatch):
    only_installed(monkeypatch, "torch", "compile", "openvino")
    assert _names(candidates(EngineRequest(engine="compile"), "cpu")) == ["compile bf16", "compile fp32"]
    assert _names(candidates(EngineRequest(engine="torch", precision="int8"), "cpu")) == ["torch int8"]
    assert _names(candidates(EngineRequest(precision="bf16"), "cpu")) == ["openvino bf16", "torch bf16"]


def test_bf16_that_would_be_emulated_is_left_out_with_a_note_unless_asked_for(monkeypatch):
    only_installed(monkeypatch, "torch", "compile", "openvino")
    found = candidates(EngineRequest(), "cpu", has_bf16=False)
    assert _names(found) == ["openvino fp32", "torch fp32"]
    assert [note for note in found.notes if "no instructions" in note] == [NO_BF16]
    asked = candidates(EngineRequest(precision="bf16"), "cpu", has_bf16=False)
    assert _names(asked) == ["openvino bf16", "torch bf16"]
    assert _names(candidates(EngineRequest(), "cuda", has_bf16=False)) == _names(
        candidates(EngineRequest(), "cuda")
    )


def test_what_is_asked_for_and_not_there_is_refused(monkeypatch):
    only_installed(monkeypatch, "torch", "compile")
    with pytest.raises(InputError, match="--engine openvino: openvino is not here"):
        candidates(EngineRequest(engine="openvino"), "cpu")
    with pytest.raises(InputError, match="no such engine for a CPU; openvino is not here; choose another"):
        candidates(EngineRequest(precision="int8"), "cpu")
    with pytest.raises(InputError, match="no such engine for a GPU"):
        candidates(EngineRequest(engine="openvino"), "cuda")


def test_settings_of_a_job_become_a_request():
    settings = EngineSettings(engine="torch", min_top1_agreement=0.98, int8_min_agreement=0.9)
    wanted = EngineRequest.of(settings, batch_size=16)
    assert (wanted.engine, wanted.precision, wanted.device, wanted.batch_size) == (
        "torch",
        "auto",
        "auto",
        16,
    )
    assert wanted.contract == AccuracyTolerance(0.98, 0.999, 0.9)
    assert EngineRequest.model_validate_json(wanted.model_dump_json()) == wanted
