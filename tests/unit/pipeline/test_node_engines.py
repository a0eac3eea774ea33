"""The engine of a kind of node whose engine was not measured, without Ray."""

import pytest

from batchcls.hardware import Hardware
from batchcls.inference.engine_record import EngineRequest
from batchcls.models.engines.engine import REFERENCE, EngineChoice
from batchcls.pipeline.node_engines import default_choice
from batchcls.pipeline.pipeline_spec import Engines, NodeEngine

DEFAULT, MEASURED = NodeEngine(REFERENCE, 8), NodeEngine(EngineChoice("openvino", "bf16"), 16)


@pytest.mark.parametrize(
    ("request_of", "expected"),
    [
        ({}, REFERENCE),
        ({"engine": "openvino"}, EngineChoice("openvino", "fp32")),
        ({"precision": "bf16"}, EngineChoice("torch", "bf16")),
        # torch has no int8, so that an actor with it could not start.
        ({"precision": "int8"}, EngineChoice("openvino", "int8")),
    ],
)
def test_default_engine(request_of: dict[str, str], expected: EngineChoice):
    assert default_choice(EngineRequest.model_validate(request_of)) == expected


def test_only_a_kind_of_node_among_measured_ones_is_unmeasured():
    here = Hardware.detect()
    unmeasured = Engines({"other": MEASURED}, DEFAULT, None, None)
    assert (unmeasured.for_this_node(), unmeasured.unmeasured_hardware()) == (DEFAULT, str(here))
    measured = Engines({here.key: MEASURED}, DEFAULT, None, None)
    assert (measured.for_this_node(), measured.unmeasured_hardware()) == (MEASURED, "")
    requested = Engines({}, DEFAULT, None, None)
    assert (requested.for_this_node(), requested.unmeasured_hardware()) == (DEFAULT, "")
