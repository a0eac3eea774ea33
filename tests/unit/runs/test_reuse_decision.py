"""How much of an earlier run is valid for a new one."""

from datetime import UTC, datetime

import pytest

from batchcls.config.classify_config import ClassifyConfig
from batchcls.models.cascade_record import CascadeThresholds
from batchcls.models.classifier_head import ModelLayers
from batchcls.runs.diff import model_change
from batchcls.runs.plan import Fingerprints, HeadAgreement, Plan, prediction_settings
from batchcls.runs.records import CascadeInfo, Counts, ManifestInfo, ModelInfo, RunRecord
from batchcls.runs.reuse_decision import decide_reuse, violation

LAYERS = ModelLayers(
    preprocessing="p", trunk="t", head="h", labels="l", category_paths="c", temperature=1.0, thresholds=""
)


def _config(**settings) -> ClassifyConfig:
    return ClassifyConfig(manifest="catalog.parquet", model="m", output="out", **settings)


def _model(tap="pooled", **layers) -> ModelInfo:
    return ModelInfo(
        fingerprint="f", layers=LAYERS.model_copy(update=layers), architecture="resnet18", embedding_tap=tap
    )


def _decide(before: ModelInfo, now: ModelInfo, settings_before=None, settings_now=None, precisions=("fp32",)):
    config_before, config_now = _config(**settings_before or {}), _config(**settings_now or {})
    record = RunRecord(
        run_id="n1",
        committed=datetime.now(UTC),
        manifest=ManifestInfo(),
        model=before,
        result_settings=prediction_settings(config_before, ["fp32"], None),
        counts=Counts(rows=1, predicted=1, quarantined=0),
        files=(),
    )
    plan = Plan(
        run_id="n2",
        fingerprints=Fingerprints.of(config_now, "f", "m"),
        manifest=ManifestInfo(),
        model=now,
        result_settings=prediction_settings(config_now, precisions, None),
    )
    return decide_reuse(record, plan, config_now.setting_layers())


ABSTAIN = {"abstain": True}


@pytest.mark.parametrize(
    ("layers", "settings", "method"),
    [
        ({}, {}, "copy"),
        ({"category_paths": "x", "thresholds": "x"}, {}, "copy"),  # neither has an effect without --abstain
        ({"labels": "x"}, {}, "relabel"),
        ({"labels": "x"}, ABSTAIN, "relabel"),
        ({"labels": "x", "category_paths": "x"}, ABSTAIN, "rehead"),
        ({"thresholds": "x"}, ABSTAIN, "rehead"),
        ({"temperature": 2.0}, {}, "rehead"),
        ({"head": "x", "labels": "x"}, {}, "rehead"),
        ({"trunk": "x", "head": "x"}, {}, None),
        ({"preprocessing": "x"}, {}, None),
    ],
)
def test_deepest_unchanged_layer_is_used(layers, settings, method):
    assert _decide(_model(), _model(**layers), settings, settings).method == method


@pytest.mark.parametrize(
    ("before", "now", "method"),
    [
        ({}, {"top_k": 3}, "rehead"),
        ({}, ABSTAIN, "rehead"),
        ({"fetch_attempts": 2}, {"keep": ["price"]}, "copy"),
        ({}, {"tta": "hflip"}, None),
        ({}, {"embedding_dtype": "float32"}, None),
    ],
)
def test_settings_belong_to_layers(before, now, method):
    assert _decide(_model(), _model(), before, now).method == method


def test_other_precision_and_missing_record_reuse_nothing():
    decision = _decide(_model(), _model(), precisions=["bf16"])
    assert (decision.method, decision.reason) == (None, "n1 was made with a different precisions")
    unknown = ModelInfo(fingerprint="f")
    assert "does not record" in _decide(unknown, _model()).reason


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        ({}, {"embedding_dtype": "none"}, "not stored"),
        ({"tap": "stage2"}, {}, "not the input of the classifier"),
        ({}, {"l2_normalize": True}, "normalized"),
        ({}, {"tta": "hflip"}, "views of --tta hflip"),
        ({"head": ""}, {}, "the classifier of resnet18 is not one linear layer"),
    ],
)
def test_obstacles_are_named(model, settings, reason):
    decision = _decide(_model(**model), _model(**model, temperature=2.0), settings, settings)
    assert decision.method is None
    assert reason in decision.reason
    assert decision.reason.startswith("n1 was made with a different temperature, and ")
    assert _decide(_model(**model), _model(**model, labels="x"), settings, settings).method == "relabel"


def test_reason_names_the_network_if_its_classifier_is_not_separable():
    reason = _decide(_model(head=""), _model(head="", trunk="x")).reason
    assert "network (the classifier of resnet18" in reason


def test_agreement_has_two_limits():
    good = HeadAgreement(rows=1000, top1_agreement=0.995, max_probability_difference=0.01)
    assert violation(good) is None
    assert "99.40% of 1000" in (violation(good.model_copy(update={"top1_agreement": 0.994})) or "")
    for difference in (0.5, float("inf")):
        assert violation(good.model_copy(update={"max_probability_difference": difference})) is not None


def _cascade(large="x", threshold=0.9) -> CascadeInfo:
    return CascadeInfo(
        small="f",
        large=large,
        layers=LAYERS.model_copy(update={"trunk": large}),
        thresholds=CascadeThresholds(default=threshold),
    )


@pytest.mark.parametrize(
    ("before", "now", "layers", "method", "words"),
    [
        (_cascade(), _cascade(), {}, "copy", ""),
        (_cascade(), _cascade(), {"labels": "x"}, "relabel", "labels"),
        (_cascade(), _cascade("y"), {}, None, "large network of the cascade"),
        (_cascade(), _cascade(threshold=0.8), {}, None, "set of thresholds of the cascade"),
        (_cascade(), None, {}, None, "number of networks"),
        (None, _cascade(), {}, None, "number of networks"),
        (_cascade(), _cascade(), {"head": "x"}, None, "from which the large one cannot predict"),
    ],
)
def test_cascade_is_copied_only_if_it_is_identical(before, now, layers, method, words):
    models = [
        _model().model_copy(update={"cascade": before}),
        _model(**layers).model_copy(update={"cascade": now}),
    ]
    decision = _decide(*models)
    assert decision.method == method
    assert words in decision.reason


def test_change_of_the_cascade_is_the_cause_of_changed_labels():
    run = RunRecord(
        run_id="n1",
        committed=datetime.now(UTC),
        manifest=ManifestInfo(),
        model=_model().model_copy(update={"cascade": _cascade()}),
        counts=Counts(rows=1, predicted=1, quarantined=0),
        files=(),
    )
    other = run.model_copy(update={"model": _model().model_copy(update={"cascade": _cascade("y")})})
    assert model_change(run, run) == "none"
    assert model_change(run, other) == "cascade"
    trunk = _model(trunk="y").model_copy(update={"cascade": _cascade("y")})
    assert model_change(run, run.model_copy(update={"model": trunk})) == "trunk"
