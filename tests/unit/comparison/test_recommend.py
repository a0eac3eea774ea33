"""Tests for the recommendation: requirements, ranking, and the values in its sentences."""

import math
from typing import Any

import pytest

from batchcls.comparison.measurement import Measurement
from batchcls.comparison.recommend import (
    Recommendation,
    Requirements,
    format_number,
    recommend,
    standard_error,
    zoo_record,
)
from batchcls.models.registry import ZooRecord, find_record
from tests.helpers.measurements import LAPTOP, SERVER, measurement, six_backbones


def record(**traits: Any) -> ZooRecord:
    found = find_record("resnet50")
    assert found is not None
    return found.model_copy(update=traits)


def decide(
    *measurements: Measurement, traits: dict[str, ZooRecord] | None = None, **requirements: Any
) -> Recommendation:
    """The recommendation if the zoo has records only of the architectures in `traits`."""
    known = {f"torchvision:{model}": entry for model, entry in (traits or {}).items()}
    return recommend(measurements, Requirements(**requirements), known.get)


def reason(recommendation: Recommendation, model: str, engine: str = "torch fp32") -> str:
    [found] = [
        entry.reason for entry in recommendation.rejected if (entry.model, entry.engine) == (model, engine)
    ]
    return found


def about(recommendation: Recommendation, subject: str) -> str:
    [found] = [sentence for sentence in recommendation.sentences if sentence.startswith(subject)]
    return found


def test_summary_contains_the_measured_values():
    found = decide(measurement("a", p50=20, p95=24, right=247, rates=(50, 61.2)), price_per_hour=2)
    assert (found.model, found.engine, found.rejected) == ("a", "torch fp32", ())
    summary = found.sentences[0]
    for value in (
        "a (torch fp32)", "82.3% measured on 300 images", "p50 20.0 ms", "p95 24.0 ms",
        "61.2 images/s at batch size 8", "cost 9.08 at 2 per hour",
    ):  # fmt: skip
        assert value in summary


def test_cost_is_node_seconds_without_a_price():
    assert "16,340 node-seconds" in decide(measurement(rates=(50, 61.2))).sentences[0]


@pytest.mark.parametrize("target", [110.0, 200.0])
def test_latency_target_applies_to_p95(target: float):
    slow = measurement("slow", p50=100, p95=110, right=280)
    quick = measurement("quick", p50=40, p95=60, right=200)
    assert decide(slow, quick, target_ms=target).model == "slow"
    found = decide(slow, quick, target_ms=105)
    assert found.model == "quick"
    assert "110 ms, 5.00 ms above the target of 105 ms" in reason(found, "slow")
    assert "45.0 ms below the target" in about(found, "Latency")
    assert "1 of 2 candidates exceed" in about(found, "Latency")


def test_names_the_closest_candidate_if_none_meets_the_target():
    lossy = measurement("lossy", p50=5, p95=6, agrees=0.9)
    found = decide(measurement("a", p95=150), measurement("b", p95=90), lossy, target_ms=50)
    assert (found.model, found.engine) == (None, None)
    assert "None of the 3" in found.sentences[0]
    assert "b (torch fp32): p95 at batch size 1 is 90.0 ms" in found.sentences[1]
    assert len(found.rejected) == 3


def test_engine_must_agree_with_fp32():
    exact = measurement("a", right=240)
    limit = measurement("a", engine="torch bf16", p50=40, agrees=0.99)
    lossy = measurement("a", engine="torch fp16", p50=20, agrees=0.9899)
    found = decide(exact, limit, lossy)
    assert found.engine == "torch bf16"
    assert "99.0% of the top-1 labels of 300 images" in reason(found, "a", "torch fp16")
    # Top-1 labels of random weights change under the smallest perturbation, so agreement is not required.
    random = measurement("b", weights="random", right=None)
    unstable = measurement("b", weights="random", right=None, engine="torch bf16", p50=30, agrees=0.5)
    assert decide(random, unstable).engine == "torch bf16"


def with_correct(entry, correct: str):
    """Set which images the candidate predicts correctly, one character per image: 1 or 0."""
    agreement = entry.agreement.model_copy(
        update={"correct": correct, "top1": correct.count("1") / len(correct)}
    )
    return entry.model_copy(update={"agreement": agreement})


def test_compares_candidates_image_by_image():
    """A one-sided difference on 8 of 300 images is significant; the same difference of independent samples is not."""
    best = with_correct(measurement("best", p50=100), "1" * 246 + "0" * 54)
    nested = with_correct(measurement("other", p50=20), "1" * 238 + "0" * 62)
    assert decide(best, nested).model == "best"
    swapped = with_correct(measurement("other", p50=20), "0" * 54 + "1" * 240 + "0" * 6)
    assert decide(best, swapped).model == "other"


def test_ignores_images_without_a_label_known_to_both():
    first = with_correct(measurement("first"), "11-0" * 75)
    other = with_correct(measurement("other"), "1-10" * 75)
    assert standard_error(first, other) == pytest.approx(math.sqrt(1.0) / 152)


def test_number_of_parameters_is_not_a_criterion():
    light = measurement("light", p50=100, right=240, parameters=1_000_000, multiply_adds=10**9)
    heavy = measurement("heavy", p50=50, right=240, parameters=900_000_000, multiply_adds=10**11)
    found = decide(light, heavy)
    assert found.model == "heavy"
    for swapped in (
        [light.model_copy(update={"parameters": 10**9}), heavy.model_copy(update={"parameters": 1})],
        [light.model_copy(update={"multiply_adds": 1}), heavy],
    ):
        again = decide(*swapped)
        assert (again.sentences, again.rejected) == (found.sentences, found.rejected)


def expected_error(one: int, other: int, images: int) -> float:
    shares = [(right + 1) / (images + 2) for right in (one, other)]
    return math.sqrt(sum(share * (1 - share) / (images + 2) for share in shares))


def test_accuracies_differ_only_beyond_the_sampling_error():
    best = measurement("best", p50=100, right=240)
    allowed = max(right for right in range(240) if (240 - right) / 300 > expected_error(240, right, 300))
    different = measurement("other", p50=20, right=allowed)
    similar = measurement("other", p50=20, right=allowed + 1)
    assert decide(best, different).model == "best"
    assert f"more than the standard error of {100 * expected_error(240, allowed, 300):.1f} pp" in reason(
        decide(best, different), "other"
    )
    found = decide(best, similar)
    assert found.model == "other"
    assert "does not differ significantly from" in reason(found, "best")
    assert "10.0 images/s" not in reason(found, "best")
    assert "20.0 images/s against 100" in reason(found, "best")


def test_larger_samples_distinguish_smaller_differences():
    def pair(images: int) -> tuple[Measurement, ...]:
        few = {"images": images, "labeled": images}
        return (
            measurement("best", right=images * 80 // 100, **few),
            measurement("quick", p50=10, right=images * 78 // 100, **few),
        )

    assert decide(*pair(300)).model == "quick"
    assert decide(*pair(3000)).model == "best"


def test_perfect_accuracy_on_a_small_sample_is_uncertain():
    small = {"images": 20, "labeled": 20}
    assert decide(
        measurement("best", right=20, **small), measurement("quick", p50=10, right=19, **small)
    ).model == ("quick")


def test_published_accuracies_have_the_error_of_50000_images():
    best = measurement("best", right=None, published_top1=0.800)
    apart = measurement("quick", p50=10, right=None, published_top1=0.797)
    similar = measurement("quick", p50=10, right=None, published_top1=0.798)
    assert decide(best, apart).model == "best"
    found = decide(best, similar)
    assert found.model == "quick"
    assert "not to your images" in about(found, "Accuracy")


def test_never_compares_measured_and_published_accuracies():
    measured = measurement("measured", p50=100, right=150)
    published = measurement("published", p50=10, right=None, published_top1=0.99)
    unknown = measurement("unknown", p50=1, right=None)
    found = decide(published, unknown, measured)
    assert found.model == "measured"
    assert "99.0% as published" in reason(found, "published")
    assert "cannot be compared with measured accuracies" in reason(found, "published")
    assert "unknown" in reason(found, "unknown")


def test_ranks_random_weights_without_published_accuracy_by_throughput():
    found = decide(
        measurement("slow", p50=100, right=None, weights="random"),
        measurement("quick", p50=10, right=None, weights="random"),
    )
    assert found.model == "quick"
    assert "throughput alone" in about(found, "Accuracy")
    assert "20.0 images/s against 200" in reason(found, "slow")
    assert about(found, "Its weights are random")


@pytest.mark.parametrize(
    ("export_target", "selected"),
    [("batchcls", "servers"), ("onnx", "most runtimes"), ("phone", "everywhere")],
)
def test_export_target_limits_the_candidates(export_target: str, selected: str):
    correct = {"servers": 280, "most runtimes": 250, "everywhere": 220}
    found = decide(
        *(measurement(support, right=count) for support, count in correct.items()),
        traits={support: record(runtime_support=support) for support in correct},
        export_target=export_target,
    )
    assert found.model == selected
    if export_target != "batchcls":
        assert "Trade-off: top-1 93.3% measured on 300 images, p50 100 ms." in reason(found, "servers")


def test_rejects_candidates_that_need_more_labeled_images():
    traits = {
        "large": record(labeled_images_per_category=800),
        "small": record(labeled_images_per_category=50),
    }
    both = (measurement("large", right=280), measurement("small", right=200))
    assert decide(*both, traits=traits).model == "large"
    assert decide(*both, traits=traits, labeled_images_per_category=800).model == "large"
    found = decide(*both, traits=traits, labeled_images_per_category=799)
    assert found.model == "small"
    assert "about 800 labeled images per category" in reason(found, "large")


def test_preference_that_no_candidate_meets_rejects_none():
    traits = {"a": record(labeled_images_per_category=800, construction="intricate")}
    unknown = measurement("unknown", right=200)
    found = decide(
        measurement("a", right=280),
        unknown,
        traits=traits,
        labeled_images_per_category=10,
        debugging="plain",
    )
    assert found.model == "a"
    assert "train only the head" in about(found, "Labeled images")
    assert "intricate" in about(found, "Debugging")


def test_debugging_prefers_plain_construction():
    traits = {"a": record(construction="intricate"), "b": record(construction="plain")}
    both = (measurement("a", right=280), measurement("b", right=240))
    assert decide(*both, traits=traits).model == "a"
    found = decide(*both, traits=traits, debugging="plain")
    assert found.model == "b"
    assert "intricate" in reason(found, "a")


def test_does_not_reject_unknown_architectures():
    found = decide(
        measurement("known", right=200), measurement("unknown", right=280),
        traits={"known": record()}, export_target="phone", labeled_images_per_category=500, debugging="plain",
    )  # fmt: skip
    assert found.model == "unknown"
    assert "torchvision:unknown" in about(found, "The zoo has no record")


def test_names_a_faster_alternative_with_its_accuracy_loss():
    found = decide(measurement("best", right=270, p50=100), measurement("quick", right=210, p50=20))
    sentence = about(found, "If throughput matters more")
    assert "quick (torch fp32) has 5.00 times the throughput at 20.0 pp lower accuracy" in sentence


def test_remarks_on_unreliable_measurements():
    busy = measurement("a", other_load=0.7)
    assert "0.7 cores" in about(decide(busy), "Other programs used")
    labels = decide(busy, measurement("b", labeled=250))
    assert about(labels, "The candidates have different classes")


def test_distinguishes_two_devices_of_one_machine():
    server = SERVER.model_copy(update={"gpu": "NVIDIA L4"})
    found = decide(measurement(hardware=server), measurement(hardware=server, device="cuda", p50=5))
    assert "resnet50 (torch fp32 on cuda)" in found.sentences[0]


@pytest.mark.parametrize(
    "measurements",
    [
        [],
        [measurement(), measurement(hardware=LAPTOP)],
        [measurement(images=300), measurement(images=200, labeled=200, right=100)],
    ],
    ids=["none", "different hardware", "different samples"],
)
def test_rejects_measurements_that_are_not_comparable(measurements: list[Measurement]):
    with pytest.raises(ValueError, match="measurements of"):
        recommend(measurements, Requirements())


def test_allows_a_few_failed_images():
    assert decide(measurement(images=300), measurement(images=298)).model == "resnet50"


@pytest.mark.parametrize(
    "requirements",
    [
        {},
        {"target_ms": 50, "price_per_hour": 0.4, "export_target": "onnx", "debugging": "plain"},
        {"export_target": "phone", "labeled_images_per_category": 60},
        {"target_ms": 1},
    ],
)
def test_every_candidate_is_recommended_or_rejected_with_a_value_in_any_order(requirements: dict[str, Any]):
    measurements = six_backbones()
    found = recommend(measurements, Requirements(**requirements))
    reversed_order = recommend(measurements[::-1], Requirements(**requirements))
    assert (reversed_order.model, reversed_order.sentences) == (found.model, found.sentences)
    assert len(found.rejected) == len(measurements) - (found.model is not None)
    for entry in found.rejected:
        assert any(character.isdigit() for character in entry.reason)
        assert entry.reason.endswith(".")
        assert "\n" not in entry.reason
    assert Recommendation.model_validate_json(found.model_dump_json()) == found


def test_finds_zoo_records_by_source_and_architecture():
    found = zoo_record("torchvision:resnet50.IMAGENET1K_V1")
    assert found is not None
    assert found.name == "resnet50"
    assert zoo_record("timm:resnet50.a1_in1k") is None
    assert zoo_record("elsewhere:resnet50") is None


def test_numbers_have_three_significant_digits():
    assert [format_number(value) for value in (0.0123, 1, 12.34, 99.97, 100, 1234.5)] == [
        "0.0123", "1.00", "12.3", "100", "100", "1,234",
    ]  # fmt: skip
