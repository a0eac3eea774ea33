"""Recommends one of the measured candidates and explains the choice with the measured values.

Candidates that violate a requirement are rejected: latency, runtime support, labeled images for fine-tuning, and
ease of debugging. Of the remaining candidates, those within the sampling error of the most accurate one are
considered equally accurate; of these, the one with the highest throughput is selected, which on one hardware
configuration is also the cheapest. The number of parameters is never a criterion.

Two accuracies differ if their difference exceeds its standard error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from pydantic import Field

from batchcls.comparison.measurement import Measurement, Record
from batchcls.models.model_spec import ModelSpec, SourceName
from batchcls.models.registry import ZooRecord, record_for_spec

_VALIDATION_IMAGES = 50_000  # of ImageNet-1k, on which published accuracies are measured


def accuracy(entry: Measurement) -> float:
    """Measured or published top-1 accuracy in 0..1; 0 if unknown."""
    return 0.0 if entry.accuracy is None else entry.accuracy[0]


def standard_error(entry: Measurement, other: Measurement) -> float:
    """Standard error (0..1) of the difference of two accuracies from the same source."""
    pairs = _discordant_pairs(entry.agreement.correct, other.agreement.correct)
    if pairs is not None:
        return _paired_error(*pairs)
    return math.sqrt(_variance(entry) + _variance(other))


def is_equally_accurate(best: Measurement, entry: Measurement) -> bool:
    """Whether the accuracy of `entry` is within one standard error of that of `best`."""
    return accuracy(best) - accuracy(entry) <= standard_error(best, entry)


def _discordant_pairs(correct: str | None, other: str | None) -> tuple[int, int, int] | None:
    """Number of images that only the first predicts correctly, only the other, and that both have a label for."""
    if correct is None or other is None or len(correct) != len(other):
        return None
    pairs = [pair for pair in zip(correct, other, strict=True) if "-" not in pair]
    return pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs)


def _paired_error(only_first: int, only_other: int, images: int) -> float:
    first, second, total = only_first + 0.5, only_other + 0.5, images + 2.0
    return math.sqrt((first + second) - (first - second) ** 2 / total) / total


def _variance(entry: Measurement) -> float:
    published = entry.accuracy is not None and entry.accuracy[1] == "published"
    images = _VALIDATION_IMAGES if published else entry.agreement.labeled
    proportion = (accuracy(entry) * images + 1) / (images + 2)
    return proportion * (1 - proportion) / (images + 2)


MIN_AGREEMENT = 0.99
"""Minimum fraction of top-1 labels on which an engine must agree with fp32."""

MAX_OTHER_LOAD = 0.2
"""Load of other programs, in cores, above which a measurement should be repeated."""

_RUNTIMES = {"onnx": "ONNX runtimes", "phone": "phones and small devices"}
_SUPPORT = {"onnx": ("everywhere", "most runtimes"), "phone": ("everywhere",)}
_SUPPORT_TEXT = {
    "everywhere": "everywhere",
    "most runtimes": "on most runtimes",
    "servers": "on servers only",
}


class Requirements(Record):
    """Requirements for a backbone; None if not specified."""

    target_ms: float | None = Field(None, gt=0, description="Maximum p95 latency at batch size 1, in ms.")
    price_per_hour: float | None = Field(None, gt=0, description="Price of a node per hour, in any currency.")
    export_target: Literal["batchcls", "onnx", "phone"] = Field(
        "batchcls", description="Runtime that must support the backbone in addition to batchcls."
    )
    labeled_images_per_category: int | None = Field(
        None, ge=0, description="Number of labeled images per category available for fine-tuning."
    )
    debugging: Literal["any", "plain"] = Field(
        "any", description="plain: prefer backbones with a simple construction."
    )


class Rejection(Record):
    """A candidate that is not recommended."""

    model: str = Field(description="Model of the measurement.")
    engine: str = Field(description="Engine of the measurement.")
    reason: str = Field(description="Reason with the relevant values, in one or two sentences.")


class Recommendation(Record):
    """The recommended candidate for one hardware configuration."""

    model: str | None = Field(description="Recommended model; null if no candidate meets the requirements.")
    engine: str | None = Field(description="Recommended engine; null if no candidate meets the requirements.")
    sentences: tuple[str, ...] = Field(description="The recommendation, then its reasons.")
    rejected: tuple[Rejection, ...] = Field(description="All other candidates, in their original order.")


RecordLookup = Callable[[str], ZooRecord | None]
"""Returns the zoo record of SOURCE:ARCHITECTURE[.TAG], or None."""

_Records = Mapping[Measurement, ZooRecord | None]
_Reasons = dict[Measurement, str]
_Check = Callable[[Requirements, ZooRecord | None, Measurement], str | None]


def zoo_record(architecture: str) -> ZooRecord | None:
    """The zoo record of SOURCE:ARCHITECTURE[.TAG], or None."""
    source, _, name = architecture.partition(":")
    return next(
        (record_for_spec(ModelSpec(known, name)) for known in get_args(SourceName) if known == source), None
    )


def recommend(
    measurements: Sequence[Measurement], requirements: Requirements, record_for: RecordLookup = zoo_record
) -> Recommendation:
    """Select one of several candidates that were measured on the same sample and the same hardware.

    Args:
        measurements: At least one measurement.
        requirements: Requirements for the backbone.
        record_for: Looks up the properties of an architecture. Candidates without a record are not rejected for
            unknown properties.

    Raises:
        ValueError: There is no measurement, or the measurements are of different hardware or samples.
    """
    _require_comparable(measurements)
    records = {entry: record_for(entry.architecture) for entry in measurements}
    reasons = _failed_checks(requirements, records, _violates_requirement)
    for preference in (_needs_more_labeled_images, _is_hard_to_debug):
        remaining = {entry: record for entry, record in records.items() if entry not in reasons}
        failed = _failed_checks(requirements, remaining, preference)
        # A preference applies only if a remaining candidate is known to meet it.
        if any(record is not None and entry not in failed for entry, record in remaining.items()):
            reasons |= failed
    eligible = [entry for entry in measurements if entry not in reasons]
    if not eligible:
        return _recommendation(None, _no_candidate(requirements, records), measurements, reasons)
    ranked, unranked = _split_by_source(eligible)
    best, selected = _select(ranked)
    reasons |= unranked | {
        entry: _reason_outranked(entry, best, selected) for entry in ranked if entry != selected
    }
    sentences = (
        _summary(requirements, selected),
        _about_latency(requirements, selected, measurements),
        _about_accuracy(ranked, best, selected),
        *_about_properties(requirements, records[selected], selected),
        *_remarks(ranked, selected),
    )
    return _recommendation(selected, sentences, measurements, reasons)


def name_of(entry: Measurement) -> str:
    """Model and engine of a candidate, and the device if the hardware has a GPU."""
    return f"{entry.model} ({entry.engine}{f' on {entry.device}' if entry.hardware.gpu else ''})"


def format_number(value: float) -> str:
    """A positive number with three significant digits, or all digits of its integer part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def percent(fraction: float) -> str:
    """A fraction (0..1) as a percentage, such as `82.3%`."""
    return f"{fraction * 100:.1f}%"


def _require_comparable(measurements: Sequence[Measurement]) -> None:
    hardware = len({entry.hardware.key for entry in measurements})
    if hardware != 1:
        raise ValueError(f"measurements of one hardware configuration are required, got {hardware}")
    counts = [entry.agreement.images for entry in measurements]
    # Failed images make up less than a tenth of a sample.
    if min(counts) < 0.9 * max(counts):
        raise ValueError(f"measurements of {min(counts)} and {max(counts)} images are from different samples")


def _recommendation(
    selected: Measurement | None,
    sentences: tuple[str, ...],
    measurements: Sequence[Measurement],
    reasons: _Reasons,
) -> Recommendation:
    rejected = tuple(
        Rejection(model=entry.model, engine=entry.engine, reason=reasons[entry])
        for entry in measurements
        if entry in reasons
    )
    model, engine = (None, None) if selected is None else (selected.model, selected.engine)
    return Recommendation(model=model, engine=engine, sentences=sentences, rejected=rejected)


def _failed_checks(requirements: Requirements, records: _Records, check: _Check) -> _Reasons:
    reasons = {entry: check(requirements, record, entry) for entry, record in records.items()}
    return {entry: reason for entry, reason in reasons.items() if reason is not None}


def _violates_requirement(
    requirements: Requirements, record: ZooRecord | None, entry: Measurement
) -> str | None:
    """The requirement that a candidate violates regardless of the other candidates, or None."""
    agreement, p95, target = entry.agreement, entry.latency.p95_ms, requirements.export_target
    # The top-1 labels of random weights change under the smallest perturbation, so they do not assess an engine.
    if agreement.top1_with_fp32 < MIN_AGREEMENT and not entry.weights.startswith("random"):
        return (
            f"It agrees with fp32 on {percent(agreement.top1_with_fp32)} of the top-1 labels of "
            f"{agreement.images} images; the minimum is {percent(MIN_AGREEMENT)}."
        )
    if record and target in _RUNTIMES and record.runtime_support not in _SUPPORT[target]:
        support = _SUPPORT_TEXT[record.runtime_support]
        return f"{record.family} runs {support}, not on {_RUNTIMES[target]}. {_trade_off(entry)}"
    if requirements.target_ms is not None and p95 > requirements.target_ms:
        excess = format_number(p95 - requirements.target_ms)
        return (
            f"p95 at batch size 1 is {format_number(p95)} ms, {excess} ms above the target of "
            f"{requirements.target_ms:g} ms."
        )
    return None


def _needs_more_labeled_images(
    requirements: Requirements, record: ZooRecord | None, entry: Measurement
) -> str | None:
    available = requirements.labeled_images_per_category
    if record is None or available is None or available >= record.labeled_images_per_category:
        return None
    return f"{_fine_tuning(record)}; {available} are available. {_trade_off(entry)}"


def _is_hard_to_debug(requirements: Requirements, record: ZooRecord | None, entry: Measurement) -> str | None:
    if record is None or requirements.debugging == "any" or record.construction == "plain":
        return None
    return f"Its construction is {record.construction}; other candidates are plain. {_trade_off(entry)}"


def _fine_tuning(record: ZooRecord) -> str:
    images = record.labeled_images_per_category
    return f"Full fine-tuning needs about {images} labeled images per category (rule of thumb)"


def _trade_off(entry: Measurement) -> str:
    return f"Trade-off: top-1 {_accuracy_text(entry)}, p50 {format_number(entry.latency.p50_ms)} ms."


def _accuracy_text(entry: Measurement) -> str:
    if entry.accuracy is None:
        return "unknown"
    value, source = entry.accuracy
    basis = f"measured on {entry.agreement.labeled} images" if source == "measured" else "as published"
    return f"{percent(value)} {basis}"


def _accuracy_gap(higher: Measurement, lower: Measurement) -> str:
    return f"{(accuracy(higher) - accuracy(lower)) * 100:.1f} pp"


def _rate(entry: Measurement) -> float:
    return entry.best.images_per_second


def _split_by_source(eligible: Sequence[Measurement]) -> tuple[list[Measurement], _Reasons]:
    """Candidates whose accuracies have the same source, measured if possible, and reasons to reject the others."""
    sources = {entry: entry.accuracy and entry.accuracy[1] for entry in eligible}
    source = next((known for known in ("measured", "published") if known in sources.values()), None)
    ranked = [entry for entry in eligible if sources[entry] == source]
    return ranked, {
        entry: f"Its top-1 accuracy is {_accuracy_text(entry)}, which cannot be compared with {source} accuracies."
        for entry in eligible
        if entry not in ranked
    }


def _select(ranked: Sequence[Measurement]) -> tuple[Measurement, Measurement]:
    """The most accurate candidate and the recommended one."""
    best = max(ranked, key=lambda entry: (accuracy(entry), _rate(entry)))
    equal = [entry for entry in ranked if is_equally_accurate(best, entry)]
    return best, max(equal, key=lambda entry: (_rate(entry), -entry.latency.p50_ms))


def _reason_outranked(entry: Measurement, best: Measurement, selected: Measurement) -> str:
    slower = f"reaches {format_number(_rate(entry))} images/s against {format_number(_rate(selected))}"
    if entry.accuracy is None:
        return f"Its accuracy is unknown, and it {slower}."
    other = selected if entry == best else best
    text, error = _accuracy_text(entry), f"{standard_error(entry, other) * 100:.1f} pp"
    if is_equally_accurate(best, entry):
        return (
            f"Its top-1 accuracy, {text}, does not differ significantly from the {percent(accuracy(other))} of "
            f"{name_of(other)} (standard error {error}), and it {slower}."
        )
    return (
        f"Its top-1 accuracy, {text}, is {_accuracy_gap(other, entry)} below that of {name_of(other)}, more than "
        f"the standard error of {error}."
    )


def _no_candidate(requirements: Requirements, records: _Records) -> tuple[str, ...]:
    sentence = f"None of the {len(records)} candidates meets the requirements."
    without_target = requirements.model_copy(update={"target_ms": None})
    rejected_anyway = _failed_checks(without_target, records, _violates_requirement)
    too_slow = [entry for entry in records if entry not in rejected_anyway]
    if not too_slow or requirements.target_ms is None:
        return (sentence,)
    closest = min(too_slow, key=lambda entry: entry.latency.p95_ms)
    return (
        sentence,
        f"The closest is {name_of(closest)}: p95 at batch size 1 is {format_number(closest.latency.p95_ms)} ms, the "
        f"target is {requirements.target_ms:g} ms.",
    )


def _summary(requirements: Requirements, selected: Measurement) -> str:
    price = requirements.price_per_hour
    cost = f"take {format_number(1e6 / _rate(selected))} node-seconds"
    if price is not None:
        cost = f"cost {format_number(selected.cost_per_million(price))} at {price:g} per hour"
    return (
        f"Use {name_of(selected)}: top-1 {_accuracy_text(selected)}; p50 "
        f"{format_number(selected.latency.p50_ms)} ms and p95 {format_number(selected.latency.p95_ms)} ms at batch "
        f"size 1; {format_number(_rate(selected))} images/s at batch size {selected.best.batch_size}; a million "
        f"images {cost}."
    )


def _about_latency(
    requirements: Requirements, selected: Measurement, measurements: Sequence[Measurement]
) -> str:
    target = requirements.target_ms
    if target is None:
        return "Latency: no target is set, so candidates are ranked by accuracy first, then by throughput."
    over = sum(entry.latency.p95_ms > target for entry in measurements)
    margin = format_number(target - selected.latency.p95_ms)
    return (
        f"Latency: p95 is {margin} ms below the target of {target:g} ms; {over} of {len(measurements)} candidates "
        "exceed it."
    )


def _about_accuracy(ranked: Sequence[Measurement], best: Measurement, selected: Measurement) -> str:
    if selected.accuracy is None:
        return (
            "Accuracy: unknown for all remaining candidates, so throughput alone decides; measure the accuracy "
            "before you rely on it."
        )
    if len(ranked) == 1:
        return "Accuracy: no other candidate remains for comparison."
    highest = (
        "the highest"
        if best == selected
        else f"{_accuracy_gap(best, selected)} below the highest, {name_of(best)}"
    )
    equal = sum(is_equally_accurate(best, entry) for entry in ranked)
    basis = "published accuracies refer to ImageNet-1k, not to your images"
    if selected.accuracy[1] == "measured":
        basis = "standard error of the images on which two candidates differ"
    return (
        f"Accuracy: {highest}; {equal} of {len(ranked)} candidates are within the sampling error of the highest, and "
        f"of these, the one with the highest throughput is recommended ({basis})."
    )


def _about_properties(
    requirements: Requirements, record: ZooRecord | None, selected: Measurement
) -> tuple[str, ...]:
    if record is None:
        return (
            f"The zoo has no record of {selected.architecture}: its runtime support, its need for labeled images and "
            "its construction are unknown and were not considered.",
        )
    available = requirements.labeled_images_per_category
    runtime = _RUNTIMES.get(requirements.export_target, "batchcls only")
    images = "the number is not specified" if available is None else f"{available} per category are available"
    if available is not None and available < record.labeled_images_per_category:
        images += ", fewer than every remaining candidate needs: train only the head"
    matters = "matters" if requirements.debugging == "plain" else "does not matter"
    return (
        f"Runtime: {runtime} required; {record.family} runs {_SUPPORT_TEXT[record.runtime_support]}.",
        f"Labeled images: {images}. {_fine_tuning(record)}.",
        f"Debugging: {matters}; the construction is {record.construction}.",
    )


def _remarks(ranked: Sequence[Measurement], selected: Measurement) -> tuple[str, ...]:
    remarks = []
    faster = [
        entry for entry in ranked if _rate(entry) > _rate(selected) and accuracy(entry) < accuracy(selected)
    ]
    if faster:
        other = max(faster, key=lambda entry: (accuracy(entry), _rate(entry)))
        speedup = format_number(_rate(other) / _rate(selected))
        remarks.append(
            f"If throughput matters more: {name_of(other)} has {speedup} times the throughput at "
            f"{_accuracy_gap(selected, other)} lower accuracy."
        )
    if selected.weights.startswith("random"):
        remarks.append("Its weights are random: speed and memory are valid, the accuracy is not.")
    if selected.agreement.top1 is not None and len({entry.agreement.labeled for entry in ranked}) > 1:
        remarks.append(
            "The candidates have different classes, so their accuracies are measured on different images."
        )
    if selected.other_load > MAX_OTHER_LOAD:
        remarks.append(
            f"Other programs used {selected.other_load:.1f} cores during its measurement: repeat the measurement."
        )
    return tuple(remarks)
