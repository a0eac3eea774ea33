"""Recommends one of the measured candidates and explains the choice with the measured values.

Four questions decide: latency on this hardware, what else has to load the backbone, how many labeled
images there are to fine-tune it, how much debugging matters. Of what they leave, the most accurate is
taken; of those that cannot be told from it, the one with the most images a second, which on one kind of
hardware is the cheapest, too. How many parameters a network has never decides.

Two accuracies differ if they are further apart than one standard error of their difference
(`sampling_error`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from pydantic import Field

from batchcls.comparison.measurement import Measurement, Record
from batchcls.models.model_spec import ModelSpec, SourceName
from batchcls.models.registry import ZooRecord, record_for_spec

_VALIDATION_IMAGES = 50_000  # of ImageNet-1k, behind every published figure


def accuracy(entry: Measurement) -> float:
    """Top-1 in 0..1, measured or published; 0 where none is known."""
    return 0.0 if entry.accuracy is None else entry.accuracy[0]


def standard_error(one: Measurement, other: Measurement) -> float:
    """Standard error of the difference of two accuracies of one source, in 0..1."""
    pairs = _pairs(one.agreement.right, other.agreement.right)
    if pairs is not None:
        return _paired_error(*pairs)
    return math.sqrt(_variance(one) + _variance(other))


def is_level(best: Measurement, entry: Measurement) -> bool:
    """Whether `entry` is within one standard error of `best`."""
    return accuracy(best) - accuracy(entry) <= standard_error(best, entry)


def _pairs(one: str | None, other: str | None) -> tuple[int, int, int] | None:
    """Images that only one, only the other gets right, and all that both know the label of."""
    if one is None or other is None or len(one) != len(other):
        return None
    both = [pair for pair in zip(one, other, strict=True) if "-" not in pair]
    return both.count(("1", "0")), both.count(("0", "1")), len(both)


def _paired_error(only_one: int, only_other: int, images: int) -> float:
    first, second, total = only_one + 0.5, only_other + 0.5, images + 2.0
    return math.sqrt((first + second) - (first - second) ** 2 / total) / total


def _variance(entry: Measurement) -> float:
    published = entry.accuracy is not None and entry.accuracy[1] == "published"
    images = _VALIDATION_IMAGES if published else entry.agreement.labeled
    share = (accuracy(entry) * images + 1) / (images + 2)
    return share * (1 - share) / (images + 2)


LEAST_AGREEMENT = 0.99
"""Share of best labels that an engine has to have in common with fp32."""

BUSY_CORES = 0.2
"""Above so many cores kept busy by other programs, a measurement should be repeated."""

_LOADERS = {"onnx": "ONNX runtimes", "phone": "phones and small devices"}
_LOADED_BY = {"onnx": ("everywhere", "most runtimes"), "phone": ("everywhere",)}
_WHERE = {"everywhere": "everywhere", "most runtimes": "on most runtimes", "servers": "on servers only"}


class Requirements(Record):
    """What a backbone is wanted for: the four questions, answered as far as they can be."""

    target_ms: float | None = Field(None, gt=0, description="Most that p95 at batch 1 may be, in ms.")
    price_per_hour: float | None = Field(None, gt=0, description="Of a node, in any currency.")
    export_target: Literal["batchcls", "onnx", "phone"] = Field(
        "batchcls", description="What else has to load it."
    )
    labeled_images_per_category: int | None = Field(None, ge=0, description="There are for fine-tuning.")
    debugging: Literal["any", "plain"] = Field("any", description="plain: it matters how it is debugged.")


class Rejection(Record):
    """A candidate that is not taken."""

    model: str = Field(description="As in the measurement.")
    engine: str = Field(description="As in the measurement.")
    reason: str = Field(description="Why, in one sentence with figures.")


class Recommendation(Record):
    """Which candidate to take on one kind of hardware."""

    model: str | None = Field(description="As in the measurement; None: no candidate will do.")
    engine: str | None = Field(description="As in the measurement; None: no candidate will do.")
    sentences: tuple[str, ...] = Field(description="What to take, then why.")
    rejected: tuple[Rejection, ...] = Field(description="All other candidates, in the order given.")


RecordLookup = Callable[[str], ZooRecord | None]
"""SOURCE:ARCHITECTURE[.TAG] -> what the zoo knows of it."""

_Records = Mapping[Measurement, ZooRecord | None]
_Reasons = dict[Measurement, str]
_Objection = Callable[[Requirements, ZooRecord | None, Measurement], str | None]


def zoo_record(architecture: str) -> ZooRecord | None:
    """The zoo's record of SOURCE:ARCHITECTURE[.TAG]; None if it has none."""
    source, _, name = architecture.partition(":")
    return next(
        (record_for_spec(ModelSpec(known, name)) for known in get_args(SourceName) if known == source), None
    )


def recommend(
    measurements: Sequence[Measurement], needs: Requirements, record_for: RecordLookup = zoo_record
) -> Recommendation:
    """Choose between candidates that were measured on the same images and the same hardware.

    Args:
        measurements: at least one.
        needs: what the backbone is wanted for.
        record_for: what is known of an architecture; where that is nothing, its traits rule nothing out.

    Raises:
        ValueError: no measurement, or some of another kind of hardware or another sample.
    """
    _require_comparable(measurements)
    records = {entry: record_for(entry.architecture) for entry in measurements}
    against = _objections(needs, records, _unfit)
    for wish in (_wants_more_images, _is_not_plain):
        left = {entry: record for entry, record in records.items() if entry not in against}
        found = _objections(needs, left, wish)
        # A wish rules nothing out unless something is left that is known to fulfil it.
        if any(record is not None and entry not in found for entry, record in left.items()):
            against |= found
    fit = [entry for entry in measurements if entry not in against]
    if not fit:
        return _answer(None, _nothing(needs, records), measurements, against)
    ranked, unranked = _rankable(fit)
    best, taken = _choose(ranked)
    against |= unranked | {entry: _beaten(entry, best, taken) for entry in ranked if entry != taken}
    sentences = (
        _summary(needs, taken),
        _about_latency(needs, taken, measurements),
        _about_accuracy(ranked, best, taken),
        *_about_traits(needs, records[taken], taken),
        *_remarks(ranked, taken),
    )
    return _answer(taken, sentences, measurements, against)


def name_of(entry: Measurement) -> str:
    """What a candidate is called: model and engine, and the device where a machine has two."""
    return f"{entry.model} ({entry.engine}{f' on {entry.device}' if entry.hardware.gpu else ''})"


def figure(value: float) -> str:
    """A positive number with three digits, or all digits of its whole part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def percent(share: float) -> str:
    """A share of 0..1, as in `82.3%`."""
    return f"{share * 100:.1f}%"


def _require_comparable(measurements: Sequence[Measurement]) -> None:
    kinds = len({entry.hardware.key for entry in measurements})
    if kinds != 1:
        raise ValueError(f"measurements of one kind of hardware are needed, got {kinds} kinds")
    counts = [entry.agreement.images for entry in measurements]
    # Failures cost a sample a few of its images, never a tenth.
    if min(counts) < 0.9 * max(counts):
        raise ValueError(f"measurements of {min(counts)} and of {max(counts)} images are not of one sample")


def _answer(
    taken: Measurement | None, sentences: tuple[str, ...], all_: Sequence[Measurement], against: _Reasons
) -> Recommendation:
    rejected = tuple(
        Rejection(model=entry.model, engine=entry.engine, reason=against[entry])
        for entry in all_
        if entry in against
    )
    model, engine = (None, None) if taken is None else (taken.model, taken.engine)
    return Recommendation(model=model, engine=engine, sentences=sentences, rejected=rejected)


def _objections(needs: Requirements, records: _Records, objection: _Objection) -> _Reasons:
    found = {entry: objection(needs, record, entry) for entry, record in records.items()}
    return {entry: reason for entry, reason in found.items() if reason is not None}


def _unfit(needs: Requirements, record: ZooRecord | None, entry: Measurement) -> str | None:
    """Why a candidate cannot be taken, whatever the others are like."""
    agreement, p95, loader = entry.agreement, entry.latency.p95_ms, needs.export_target
    # Best labels of random weights turn at a breath: they say nothing about an engine.
    if agreement.top1_with_fp32 < LEAST_AGREEMENT and not entry.weights.startswith("random"):
        return (
            f"{percent(agreement.top1_with_fp32)} of {agreement.images} best labels are those of fp32, where "
            f"{percent(LEAST_AGREEMENT)} are asked for."
        )
    if record and loader in _LOADERS and record.runtime_support not in _LOADED_BY[loader]:
        where = _WHERE[record.runtime_support]
        return f"It has to run on {_LOADERS[loader]}; {record.family} runs {where}. {_given_up(entry)}"
    if needs.target_ms is not None and p95 > needs.target_ms:
        over = figure(p95 - needs.target_ms)
        return f"p95 at batch 1 is {figure(p95)} ms, {over} ms above the target of {needs.target_ms:g} ms."
    return None


def _wants_more_images(needs: Requirements, record: ZooRecord | None, entry: Measurement) -> str | None:
    there = needs.labeled_images_per_category
    if record is None or there is None or there >= record.labeled_images_per_category:
        return None
    return f"{_fine_tuning(record)}, and there are {there}. {_given_up(entry)}"


def _is_not_plain(needs: Requirements, record: ZooRecord | None, entry: Measurement) -> str | None:
    if record is None or needs.debugging == "any" or record.construction == "plain":
        return None
    return f"Its construction is {record.construction}, that of others is plain. {_given_up(entry)}"


def _fine_tuning(record: ZooRecord) -> str:
    wanted = record.labeled_images_per_category
    return f"Fine-tuning all of it pays from about {wanted} labeled images a category (a rule of thumb)"


def _given_up(entry: Measurement) -> str:
    return f"Given up: top-1 {_accuracy_words(entry)}, p50 {figure(entry.latency.p50_ms)} ms."


def _accuracy_words(entry: Measurement) -> str:
    if entry.accuracy is None:
        return "unknown"
    value, source = entry.accuracy
    basis = f"measured on {entry.agreement.labeled} images" if source == "measured" else "as published"
    return f"{percent(value)} {basis}"


def _points(higher: Measurement, lower: Measurement) -> str:
    return f"{(accuracy(higher) - accuracy(lower)) * 100:.1f} points"


def _rate(entry: Measurement) -> float:
    return entry.best.images_per_second


def _rankable(fit: Sequence[Measurement]) -> tuple[list[Measurement], _Reasons]:
    """Those whose accuracy is of one source, measured before published, and what rules out the rest."""
    sources = {entry: entry.accuracy and entry.accuracy[1] for entry in fit}
    source = next((known for known in ("measured", "published") if known in sources.values()), None)
    ranked = [entry for entry in fit if sources[entry] == source]
    return ranked, {
        entry: f"Its top-1 is {_accuracy_words(entry)}, which cannot be compared with a {source} one."
        for entry in fit
        if entry not in ranked
    }


def _choose(ranked: Sequence[Measurement]) -> tuple[Measurement, Measurement]:
    """The most accurate candidate, and the one to take."""
    best = max(ranked, key=lambda entry: (accuracy(entry), _rate(entry)))
    level = [entry for entry in ranked if is_level(best, entry)]
    return best, max(level, key=lambda entry: (_rate(entry), -entry.latency.p50_ms))


def _beaten(entry: Measurement, best: Measurement, taken: Measurement) -> str:
    slower = f"it answers {figure(_rate(entry))} images/s against {figure(_rate(taken))}"
    if entry.accuracy is None:
        return f"No accuracy is known, and {slower}."
    other = taken if entry == best else best
    words, error = _accuracy_words(entry), f"{standard_error(entry, other) * 100:.1f} points"
    if is_level(best, entry):
        alike = f"cannot be told from the {percent(accuracy(other))} of {name_of(other)} (error {error})"
        return f"Its top-1, {words}, {alike}, and {slower}."
    return (
        f"Its top-1, {words}, is {_points(other, entry)} below {name_of(other)}, beyond the error of {error}."
    )


def _nothing(needs: Requirements, records: _Records) -> tuple[str, ...]:
    none = f"None of the {len(records)} candidates will do."
    unfit_anyway = _objections(needs.model_copy(update={"target_ms": None}), records, _unfit)
    slow = [entry for entry in records if entry not in unfit_anyway]
    if not slow or needs.target_ms is None:
        return (none,)
    near = min(slow, key=lambda entry: entry.latency.p95_ms)
    p95 = f"p95 at batch 1 of {figure(near.latency.p95_ms)} ms, where the target is {needs.target_ms:g} ms"
    return none, f"The nearest is {name_of(near)}: {p95}."


def _summary(needs: Requirements, taken: Measurement) -> str:
    price = needs.price_per_hour
    cost = f"take {figure(1e6 / _rate(taken))} node-seconds"
    if price is not None:
        cost = f"cost {figure(taken.cost_per_million(price))} at {price:g} an hour"
    return (
        f"Take {name_of(taken)}: top-1 {_accuracy_words(taken)}; p50 {figure(taken.latency.p50_ms)} ms and p95 "
        f"{figure(taken.latency.p95_ms)} ms at batch 1; {figure(_rate(taken))} images/s at batch "
        f"{taken.best.batch_size}; a million images {cost}."
    )


def _about_latency(needs: Requirements, taken: Measurement, measurements: Sequence[Measurement]) -> str:
    target = needs.target_ms
    if target is None:
        return "Latency: no target is set, so accuracy decides before speed."
    over = sum(entry.latency.p95_ms > target for entry in measurements)
    room = f"it leaves {figure(target - taken.latency.p95_ms)} ms of that"
    return f"Latency: p95 may be {target:g} ms; {room}, and {over} of {len(measurements)} exceed it."


def _about_accuracy(ranked: Sequence[Measurement], best: Measurement, taken: Measurement) -> str:
    if taken.accuracy is None:
        return "Accuracy: unknown for all that are left, so speed alone decides; measure it before relying on it."
    if len(ranked) == 1:
        return "Accuracy: no other candidate is left to compare it with."
    higher = "it is the highest" if best == taken else f"{name_of(best)} has {_points(best, taken)} more"
    level = sum(is_level(best, entry) for entry in ranked)
    basis = "published figures are of ImageNet-1k, not of these images"
    if taken.accuracy[1] == "measured":
        basis = "the error is that of the images on which two candidates differ"
    return (
        f"Accuracy: {higher}; {level} of {len(ranked)} are within the sampling error of the highest, and of "
        f"these the one with the most images a second is taken ({basis})."
    )


def _about_traits(needs: Requirements, record: ZooRecord | None, taken: Measurement) -> tuple[str, ...]:
    if record is None:
        unknown = "what else loads it, how many labeled images it wants and how plain it is are unknown"
        return (f"The zoo has no record of {taken.architecture}: {unknown}, and ruled nothing out.",)
    there, loader = (
        needs.labeled_images_per_category,
        _LOADERS.get(needs.export_target, "nothing but batchcls"),
    )
    images = "how many there are is not said" if there is None else f"there are {there}"
    if there is not None and there < record.labeled_images_per_category:
        images += ", fewer than any that is left wants: train its head alone"
    matters = "matters" if needs.debugging == "plain" else "does not matter"
    return (
        f"Loading: asked for is {loader}; {record.family} runs {_WHERE[record.runtime_support]}.",
        f"Labeled images: {images}. {_fine_tuning(record)}.",
        f"Debugging: {matters}; the construction is {record.construction}.",
    )


def _remarks(ranked: Sequence[Measurement], taken: Measurement) -> tuple[str, ...]:
    found = []
    faster = [one for one in ranked if _rate(one) > _rate(taken) and accuracy(one) < accuracy(taken)]
    if faster:
        other = max(faster, key=lambda entry: (accuracy(entry), _rate(entry)))
        gain, loss = f"{figure(_rate(other) / _rate(taken))} times as many images/s", _points(taken, other)
        found.append(f"If speed matters more: {name_of(other)} gives {gain} for {loss} less.")
    if taken.weights.startswith("random"):
        found.append("Its weights are random: the speed is its own, the accuracy is not.")
    if taken.agreement.top1 is not None and len({entry.agreement.labeled for entry in ranked}) > 1:
        found.append("The candidates know different labels, so their accuracies are of different images.")
    if taken.other_load > BUSY_CORES:
        found.append(f"Others kept {taken.other_load:.1f} cores busy while it was measured: repeat it.")
    return tuple(found)
