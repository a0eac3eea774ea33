"""Decide how much of an earlier run is valid for a new one: its predictions, its class indices or its embeddings.

A prediction depends on layers: pixels -> embedding -> classifier -> labels and calibration. The deepest layer below
which nothing has changed determines the method.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from batchcls.config.common_config import SettingLayer
from batchcls.runs.plan import HeadAgreement, Plan, ReuseMethod
from batchcls.runs.records import ModelInfo, RunRecord

_POOLED = "pooled"
_CASCADE_OBSTACLE = "its embeddings are those of the small network, from which the large one cannot predict"
MIN_TOP1_AGREEMENT = 0.995
"""Smallest share of the stored predictions whose best class the head must reproduce from their embeddings."""
MAX_PROBABILITY_DIFFERENCE = 0.02
"""Largest difference of the probability of the best class that is allowed in any of these predictions."""


@dataclass(frozen=True, slots=True)
class ReuseDecision:
    """How predictions of an earlier run are used.

    Attributes:
        method: None if they are not used.
        reason: what differs between the runs, or why that rules out the use of the predictions; empty for `copy`.
    """

    method: ReuseMethod | None
    reason: str = ""


def decide_reuse(record: RunRecord, plan: Plan, layers: Mapping[str, SettingLayer]) -> ReuseDecision:
    """Compare everything besides the images that determines the predictions of two runs.

    Args:
        record: the earlier run.
        plan: the new run.
        layers: layer of each setting, `JobConfig.setting_layers`.
    """
    before, now = record.model.layers, plan.model.layers
    if before is None or now is None:
        return ReuseDecision(None, f"{record.run_id} does not record what its predictions depend on")
    changed = _changed_settings(record, plan, layers)
    abstains = bool(plan.result_settings.get("abstain"))
    pixels = [*_named(before.preprocessing != now.preprocessing, "preprocessing"), *changed["pixels"]]
    embedding = [*_named(before.trunk != now.trunk, _trunk_name(plan.model)), *changed["embedding"]]
    if pixels or embedding:
        return ReuseDecision(
            None, f"{record.run_id} was made with a different {', '.join([*pixels, *embedding])}"
        )
    cascade = plan.model.cascade_change(record.model)
    if cascade:
        return ReuseDecision(None, f"{record.run_id} was made with a different {cascade}")
    outputs = [
        *_named(before.head != now.head, "classifier"),
        *_named(before.classes != now.classes, "set of merged or retired labels"),
        *_named(before.temperature != now.temperature, "temperature"),
        *_named(abstains and before.thresholds != now.thresholds, "thresholds"),
        *_named(abstains and before.category_paths != now.category_paths, "category_paths"),
        *changed["prediction"],
    ]
    labels = _named(before.labels != now.labels, "labels")
    if not outputs:
        return ReuseDecision("relabel", "different labels") if labels else ReuseDecision("copy")
    differences = f"a different {', '.join([*outputs, *labels])}"
    obstacle = _CASCADE_OBSTACLE if plan.model.cascade is not None else _obstacle(record, plan)
    if obstacle is not None:
        return ReuseDecision(None, f"{record.run_id} was made with {differences}, and {obstacle}")
    return ReuseDecision("rehead", differences)


def violation(agreement: HeadAgreement) -> str | None:
    """Why embeddings must not be used whose head agrees so with the stored predictions; None if they may be."""
    measured = (
        f"{agreement.top1_agreement:.2%} of {agreement.rows} stored predictions and probabilities within "
        f"{agreement.max_probability_difference:.4f}"
    )
    if agreement.top1_agreement >= MIN_TOP1_AGREEMENT and (
        agreement.max_probability_difference <= MAX_PROBABILITY_DIFFERENCE
    ):
        return None
    return (
        f"its classifier reproduces {measured} from the stored embeddings; required are {MIN_TOP1_AGREEMENT:.1%} and "
        f"{MAX_PROBABILITY_DIFFERENCE:g}"
    )


def _changed_settings(
    record: RunRecord, plan: Plan, layers: Mapping[str, SettingLayer]
) -> dict[SettingLayer, list[str]]:
    layer_of = {**layers, "precisions": "embedding", "decode_margin": "pixels"}
    before, now = record.result_settings, plan.result_settings
    changed: dict[SettingLayer, list[str]] = {"pixels": [], "embedding": [], "prediction": []}
    for name in sorted(now):
        if before.get(name) != now[name]:
            changed[layer_of.get(name, "pixels")].append(name)
    return changed


def _obstacle(record: RunRecord, plan: Plan) -> str | None:
    """Why the predictions cannot be computed from the stored embeddings; None if they can."""
    settings = plan.result_settings
    if settings.get("embedding_dtype") == "none":
        return "its embeddings are not stored (--embedding-dtype none)"
    if plan.model.embedding_tap != _POOLED:
        return f"its embeddings ({plan.model.embedding_tap}) are not the input of the classifier"
    if settings.get("l2_normalize"):
        return "its embeddings are normalized (--l2-normalize), so their lengths are lost"
    if settings.get("tta", "none") != "none":
        return f"its predictions are means over the views of --tta {settings['tta']}"
    if not (
        record.model.layers and record.model.layers.head and plan.model.layers and plan.model.layers.head
    ):
        return _no_head(plan.model)
    return None


def _trunk_name(model: ModelInfo) -> str:
    if model.layers is not None and not model.layers.head:
        return f"network ({_no_head(model)})"
    return "trunk"


def _no_head(model: ModelInfo) -> str:
    return (
        f"the classifier of {model.architecture} is not one linear layer on its embedding, or its bundle was created "
        "by a version that did not record it"
    )


def _named(is_changed: bool, name: str) -> list[str]:
    return [name] if is_changed else []
