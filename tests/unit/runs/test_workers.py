"""Which node and engine processed the rows, and which precisions a later run may reuse."""

from batchcls.runs.plan import with_used_precisions
from batchcls.runs.records import WorkerRows, add_workers


def worker(node: str, rows: int, engine: str = "openvino", precision: str = "bf16") -> WorkerRows:
    return WorkerRows(node=node, host="h", engine=engine, precision=precision, device="cpu", rows=rows)


def test_rows_are_added_up_by_node_and_engine():
    parts = [worker("b", 3), worker("a", 5), worker("b", 4), worker("b", 1, "torch", "fp32")]
    assert add_workers(parts) == (worker("a", 5), worker("b", 7), worker("b", 1, "torch", "fp32"))


def test_precisions_of_a_node_that_joined_are_added_to_the_settings():
    settings = {"model": "m", "precisions": ["bf16"], "decode_margin": None}
    assert with_used_precisions(settings, [worker("a", 5)]) == settings
    found = with_used_precisions(settings, [worker("a", 5), worker("b", 1, "torch", "fp32")])
    assert found == settings | {"precisions": ["bf16", "fp32"]}
    assert settings["precisions"] == ["bf16"]


def test_a_planned_precision_that_no_row_has_is_kept():
    settings = {"precisions": ["bf16", "fp16"]}
    assert with_used_precisions(settings, [worker("a", 5)]) == settings
    assert with_used_precisions({}, [worker("a", 5)]) == {}
