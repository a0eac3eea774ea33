"""The recommendation: what rules a candidate out, what decides between the rest, and the figures it quotes."""

import math
from typing import Any

import pytest

from batchcls.comparison.measurement import Measurement
from batchcls.comparison.recommend import (
    Recommendation,
    Requirements,
    figure,
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
    *measurements: Measurement, traits: dict[str, ZooRecord] | None = None, **needs: Any
) -> Recommendation:
    """A decision in which the zoo knows the architectures in `traits` only."""
    known = {f"torchvision:{model}": entry for model, entry in (traits or {}).items()}
    return recommend(measurements, Requirements(**needs), known.get)


def reason(recommendation: Recommendation, model: str, engine: str = "torch fp32") -> str:
    [found] = [
        entry.reason for entry in recommendation.rejected if (entry.model, entry.engine) == (model, engine)
    ]
    return found


def about(recommendation: Recommendation, subject: str) -> str:
    [found] = [sentence for sentence in recommendation.sentences if sentence.startswith(subject)]
    return found


def test_the_first_sentence_quotes_the_measured_row():
    found = decide(measurement("a", p50=20, p95=24, right=247, rates=(50, 61.2)), price_per_hour=2)
    assert (found.model, found.engine, found.rejected) == ("a", "torch fp32", ())
    first = found.sentences[0]
    for quoted in (
        "a (torch fp32)", "82.3% measured on 300 images", "p50 20.0 ms", "p95 24.0 ms",
        "61.2 images/s at batch 8", "cost 9.08 at 2 an hour",
    ):  # fmt: skip
        assert quoted in first


def test_without_a_price_the_cost_is_time():
    assert "16,340 node-seconds" in decide(measurement(rates=(50, 61.2))).sentences[0]


@pytest.mark.parametrize("target", [110.0, 200.0])
def test_a_target_holds_p95_and_not_the_median(target: float):
    slow = measurement("slow", p50=100, p95=110, right=280)
    quick = measurement("quick", p50=40, p95=60, right=200)
    assert decide(slow, quick, target_ms=target).model == "slow"
    found = decide(slow, quick, target_ms=105)
    assert found.model == "quick"
    assert "110 ms, 5.00 ms above the target of 105 ms" in reason(found, "slow")
    assert "leaves 45.0 ms" in about(found, "Latency")
    assert "1 of 2 exceed" in about(found, "Latency")


def test_when_nothing_meets_the_target_the_nearest_that_could_be_taken_is_named():
    lossy = measurement("lossy", p50=5, p95=6, agrees=0.9)
    found = decide(measurement("a", p95=150), measurement("b", p95=90), lossy, target_ms=50)
    assert (found.model, found.engine) == (None, None)
    assert "None of the 3" in found.sentences[0]
    assert "b (torch fp32): p95 at batch 1 of 90.0 ms" in found.sentences[1]
    assert len(found.rejected) == 3


def test_an_engine_has_to_answer_like_fp32():
    exact = measurement("a", right=240)
    limit = measurement("a", engine="torch bf16", p50=40, agrees=0.99)
    lossy = measurement("a", engine="torch fp16", p50=20, agrees=0.9899)
    found = decide(exact, limit, lossy)
    assert found.engine == "torch bf16"
    assert "99.0% of 300 best labels" in reason(found, "a", "torch fp16")
    # Best labels of random weights turn at a breath; nobody is refused for that.
    random = measurement("b", weights="random", right=None)
    turned = measurement("b", weights="random", right=None, engine="torch bf16", p50=30, agrees=0.5)
    assert decide(random, turned).engine == "torch bf16"


def with_answers(entry, right: str):
    """A candidate that is right on these images of the sample: a character each, 1 or 0."""
    agreement = entry.agreement.model_copy(update={"right": right, "top1": right.count("1") / len(right)})
    return entry.model_copy(update={"agreement": agreement})


def test_candidates_that_differ_on_few_images_are_told_apart_by_these():
    """Eight points of 300 images, all of them one-sided: no chance, though the shares alone would allow it."""
    best = with_answers(measurement("best", p50=100), "1" * 246 + "0" * 54)
    nested = with_answers(measurement("other", p50=20), "1" * 238 + "0" * 62)
    assert decide(best, nested).model == "best"
    swapped = with_answers(measurement("other", p50=20), "0" * 54 + "1" * 240 + "0" * 6)
    assert decide(best, swapped).model == "other"


def test_an_image_whose_label_one_of_them_lacks_is_left_out_of_the_pairs():
    one = with_answers(measurement("one"), "11-0" * 75)
    other = with_answers(measurement("other"), "1-10" * 75)
    assert standard_error(one, other) == pytest.approx(math.sqrt(1.0) / 152)


def test_parameters_never_decide():
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


def test_accuracies_differ_beyond_the_sampling_error_only():
    best = measurement("best", p50=100, right=240)
    allowed = max(right for right in range(240) if (240 - right) / 300 > expected_error(240, right, 300))
    told_apart = measurement("other", p50=20, right=allowed)
    alike = measurement("other", p50=20, right=allowed + 1)
    assert decide(best, told_apart).model == "best"
    assert f"beyond the error of {100 * expected_error(240, allowed, 300):.1f} points" in reason(
        decide(best, told_apart), "other"
    )
    found = decide(best, alike)
    assert found.model == "other"
    assert "cannot be told from" in reason(found, "best")
    assert "10.0 images/s" not in reason(found, "best")
    assert "20.0 images/s against 100" in reason(found, "best")


def test_more_images_tell_more():
    def pair(images: int) -> tuple[Measurement, ...]:
        few = {"images": images, "labeled": images}
        return (
            measurement("best", right=images * 80 // 100, **few),
            measurement("quick", p50=10, right=images * 78 // 100, **few),
        )

    assert decide(*pair(300)).model == "quick"
    assert decide(*pair(3000)).model == "best"


def test_all_right_on_a_small_sample_is_not_certain():
    small = {"images": 20, "labeled": 20}
    assert decide(
        measurement("best", right=20, **small), measurement("quick", p50=10, right=19, **small)
    ).model == ("quick")


def test_published_accuracies_have_the_error_of_fifty_thousand_images():
    best = measurement("best", right=None, published_top1=0.800)
    apart = measurement("quick", p50=10, right=None, published_top1=0.797)
    alike = measurement("quick", p50=10, right=None, published_top1=0.798)
    assert decide(best, apart).model == "best"
    found = decide(best, alike)
    assert found.model == "quick"
    assert "not of these images" in about(found, "Accuracy")


def test_measured_and_published_are_never_compared():
    measured = measurement("measured", p50=100, right=150)
    published = measurement("published", p50=10, right=None, published_top1=0.99)
    unknown = measurement("unknown", p50=1, right=None)
    found = decide(published, unknown, measured)
    assert found.model == "measured"
    assert "99.0% as published" in reason(found, "published")
    assert "cannot be compared with a measured one" in reason(found, "published")
    assert "unknown" in reason(found, "unknown")


def test_random_weights_without_a_published_figure_are_judged_on_speed_alone():
    found = decide(
        measurement("slow", p50=100, right=None, weights="random"),
        measurement("quick", p50=10, right=None, weights="random"),
    )
    assert found.model == "quick"
    assert "speed alone" in about(found, "Accuracy")
    assert "20.0 images/s against 200" in reason(found, "slow")
    assert about(found, "Its weights are random")


@pytest.mark.parametrize(
    ("export_target", "taken"), [("batchcls", "servers"), ("onnx", "most runtimes"), ("phone", "everywhere")]
)
def test_what_else_loads_it(export_target: str, taken: str):
    places = {"servers": 280, "most runtimes": 250, "everywhere": 220}
    found = decide(
        *(measurement(place, right=right) for place, right in places.items()),
        traits={place: record(runtime_support=place) for place in places},
        export_target=export_target,
    )
    assert found.model == taken
    if export_target != "batchcls":
        assert "Given up: top-1 93.3% measured on 300 images, p50 100 ms." in reason(found, "servers")


def test_labeled_images_rule_out_what_wants_more_of_them():
    traits = {
        "large": record(labeled_images_per_category=800),
        "small": record(labeled_images_per_category=50),
    }
    both = (measurement("large", right=280), measurement("small", right=200))
    assert decide(*both, traits=traits).model == "large"
    assert decide(*both, traits=traits, labeled_images_per_category=800).model == "large"
    found = decide(*both, traits=traits, labeled_images_per_category=799)
    assert found.model == "small"
    assert "about 800 labeled images a category" in reason(found, "large")


def test_a_wish_that_nothing_fulfils_rules_nothing_out():
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
    assert "train its head alone" in about(found, "Labeled images")
    assert "intricate" in about(found, "Debugging")


def test_debugging_prefers_what_is_plain():
    traits = {"a": record(construction="intricate"), "b": record(construction="plain")}
    both = (measurement("a", right=280), measurement("b", right=240))
    assert decide(*both, traits=traits).model == "a"
    found = decide(*both, traits=traits, debugging="plain")
    assert found.model == "b"
    assert "intricate" in reason(found, "a")


def test_an_unknown_architecture_is_not_held_against_a_candidate():
    found = decide(
        measurement("known", right=200), measurement("unknown", right=280),
        traits={"known": record()}, export_target="phone", labeled_images_per_category=500, debugging="plain",
    )  # fmt: skip
    assert found.model == "unknown"
    assert "torchvision:unknown" in about(found, "The zoo has no record")


def test_the_faster_one_is_named_with_its_price_in_points():
    found = decide(measurement("best", right=270, p50=100), measurement("quick", right=210, p50=20))
    sentence = about(found, "If speed matters more")
    assert "quick (torch fp32) gives 5.00 times as many images/s for 20.0 points less" in sentence


def test_what_makes_a_figure_doubtful_is_said():
    busy = measurement("a", other_load=0.7)
    assert "0.7 cores" in about(decide(busy), "Others kept")
    labels = decide(busy, measurement("b", labeled=250))
    assert about(labels, "The candidates know different labels")


def test_two_devices_of_one_machine_are_told_apart():
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
    ids=["none", "two kinds of hardware", "two samples"],
)
def test_what_is_not_comparable_is_refused(measurements: list[Measurement]):
    with pytest.raises(ValueError, match="measurements of"):
        recommend(measurements, Requirements())


def test_a_few_failed_images_do_not_make_another_sample():
    assert decide(measurement(images=300), measurement(images=298)).model == "resnet50"


@pytest.mark.parametrize(
    "needs",
    [
        {},
        {"target_ms": 50, "price_per_hour": 0.4, "export_target": "onnx", "debugging": "plain"},
        {"export_target": "phone", "labeled_images_per_category": 60},
        {"target_ms": 1},
    ],
)
def test_every_candidate_is_taken_or_rejected_with_a_figure_whatever_the_order(needs: dict[str, Any]):
    measurements = six_backbones()
    found = recommend(measurements, Requirements(**needs))
    turned = recommend(measurements[::-1], Requirements(**needs))
    assert (turned.model, turned.sentences) == (found.model, found.sentences)
    assert len(found.rejected) == len(measurements) - (found.model is not None)
    for entry in found.rejected:
        assert any(character.isdigit() for character in entry.reason)
        assert entry.reason.endswith(".")
        assert "\n" not in entry.reason
    assert Recommendation.model_validate_json(found.model_dump_json()) == found


def test_the_zoo_is_asked_by_source_and_architecture():
    found = zoo_record("torchvision:resnet50.IMAGENET1K_V1")
    assert found is not None
    assert found.name == "resnet50"
    assert zoo_record("timm:resnet50.a1_in1k") is None
    assert zoo_record("elsewhere:resnet50") is None


def test_figures_have_three_digits():
    assert [figure(value) for value in (0.0123, 1, 12.34, 99.97, 100, 1234.5)] == [
        "0.0123", "1.00", "12.3", "100", "100", "1,234",
    ]  # fmt: skip
