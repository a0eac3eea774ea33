"""The zoo: backbones with a short name, with notes about each backbone and its pretrained weights.

The records are in zoo.toml. Counts are for 1000 classes, without auxiliary training heads. Accuracies are those that
the libraries publish for the validation images of ImageNet-1k: the `meta` of torchvision's weights, and timm's tables
of results.

`labeled_images_per_category` is a rule of thumb, not a measurement. With fewer images, training only the head or using
a smaller backbone is usually as accurate as fine-tuning all parameters. The steps are our choice: 50 images up to
6 million parameters, 100 up to 15, 200 up to 35, 400 up to 70, and 800 above; twice as many for global attention from
the first layer on. The trend follows Kornblith et al., "Do Better ImageNet Models Transfer Better?" (arXiv:1805.08974),
and Steiner et al., "How to train your ViT?" (arXiv:2106.10270).
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from batchcls.errors import InputError
from batchcls.models.model_spec import ModelSpec, SourceName

Construction = Literal["plain", "branched", "intricate"]
RuntimeSupport = Literal["everywhere", "most runtimes", "servers"]


class PublishedWeights(BaseModel):
    """Weights that a library publishes, with their accuracy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tag: str = Field(min_length=1, description="The library's name for these weights.")
    top1: float = Field(
        gt=0, lt=100, description="Top-1 accuracy on the validation images of ImageNet-1k, in percent."
    )
    input_size: int = Field(gt=0, description="Side in pixels of the input at which top1 was measured.")
    recipe: str = Field(min_length=1, description="Training data and training recipe.")
    license: str | None = Field(
        default=None, description="License of the weights; None: that of the library."
    )


class ZooRecord(BaseModel):
    """A backbone with a short name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="The short name, which never changes.")
    source: SourceName = Field(description="Library of the architecture.")
    architecture: str = Field(pattern=r"^[a-z0-9_]+$", description="Name in the library, without a tag.")
    family: str = Field(description="Name of the family, as in its paper.")
    year: int = Field(ge=2012, description="Year of the paper.")
    key_idea: str = Field(description="The key idea of the paper, in one sentence.")
    use_case: str = Field(description="Recommended use.")
    warning: str | None = Field(default=None, description="Known limitations.")
    parameters: int = Field(
        gt=0, description="Number of parameters for 1000 classes, without auxiliary heads."
    )
    multiply_adds: int = Field(gt=0, description="MACs for one image at `input_size`.")
    input_size: int = Field(gt=0, description="Side in pixels of the input of the default weights.")
    construction: Construction = Field(
        description="plain: a sequence of blocks of one kind; branched: parallel paths or gates; intricate: several "
        "such mechanisms."
    )
    runtime_support: RuntimeSupport = Field(
        description="Runtimes that support its operators, regardless of its size. everywhere: also phones and small "
        "accelerators, in int8; most runtimes: ONNX Runtime, TensorRT, OpenVINO, Core ML; servers: PyTorch and "
        "runtimes for transformers."
    )
    labeled_images_per_category: int = Field(
        gt=0,
        description="Approximate number from which fine-tuning all parameters pays off; a rule of thumb.",
    )
    weights: tuple[PublishedWeights, ...] = Field(
        min_length=1, description="Pretrained weights, the default first."
    )


@dataclass(frozen=True, slots=True)
class WeightsDescription:
    """Description of pretrained weights for the log.

    Attributes:
        summary: tag, accuracy and recipe of the weights, in one line.
        warning: reason against these weights; None if there is none.
    """

    summary: str
    warning: str | None = None


@cache
def zoo_records() -> tuple[ZooRecord, ...]:
    """Return all records, sorted by year, family and size."""
    text = resources.files(__package__).joinpath("zoo.toml").read_text(encoding="utf-8")
    return tuple(
        make_record(family, backbone)
        for family in tomllib.loads(text)["families"]
        for backbone in family["backbones"]
    )


def make_record(family: Mapping[str, Any], backbone: Mapping[str, Any]) -> ZooRecord:
    """Create the record of a backbone from the fields of its family and its own fields, which take precedence.

    Raises:
        pydantic.ValidationError: a field is missing, unknown or out of range.
    """
    common = {name: value for name, value in family.items() if name != "backbones"}
    return ZooRecord.model_validate({**common, **backbone})


def find_record(name: str) -> ZooRecord | None:
    """Return the record with this short name; None if there is none."""
    return next((record for record in zoo_records() if record.name == name), None)


def record_for_spec(spec: ModelSpec) -> ZooRecord | None:
    """Return the record of an architecture, regardless of its tag; None if it is not in the zoo."""
    key = (spec.source, _split_tag(spec)[0])
    return next((r for r in zoo_records() if (r.source, r.architecture) == key), None)


def published_weights(spec: ModelSpec) -> PublishedWeights | None:
    """Return the weights of the spec's tag, or the default weights if the spec has no tag.

    None if their accuracy is not known, for example for architectures of timm outside the zoo, and for weights without
    a classifier.
    """
    _, tag = _split_tag(spec)
    entries = _weights_with_accuracy(spec)
    return next((entry for entry in entries if tag in (None, entry.tag)), None)


def describe_weights(spec: ModelSpec) -> WeightsDescription:
    """Describe the pretrained weights of a spec. Makes no network request.

    Args:
        spec: an architecture that its library has.

    Raises:
        InputError: the library has no weights with this tag.
    """
    chosen = published_weights(spec)
    if chosen is not None:
        return _describe_with_accuracy(chosen, _weights_with_accuracy(spec))
    if spec.source == "torchvision":
        return _describe_torchvision_weights(spec)
    return _describe_timm_weights(spec)


def _split_tag(spec: ModelSpec) -> tuple[str, str | None]:
    """Split an architecture and its tag; None for the default tag, for which torchvision has the alias DEFAULT."""
    base, _, tag = spec.architecture.partition(".")
    named = tag and not (spec.source == "torchvision" and tag == "DEFAULT")
    return base, tag if named else None


def _weights_with_accuracy(spec: ModelSpec) -> tuple[PublishedWeights, ...]:
    """Return all weights of an architecture whose accuracy is known, the default first."""
    record = record_for_spec(spec)
    if record is not None:
        return record.weights
    if spec.source == "timm":
        return ()
    # Imported here, because torch takes seconds to import and names and records do not need it.
    from torchvision import models as torchvision_models  # noqa: PLC0415

    weights = torchvision_models.get_model_weights(_split_tag(spec)[0])
    members = sorted(weights, key=lambda member: member is not weights.DEFAULT)
    return tuple(entry for entry in map(_torchvision_entry, members) if entry is not None)


def _torchvision_entry(member: Any) -> PublishedWeights | None:
    top1 = member.meta["_metrics"].get("ImageNet-1K", {}).get("acc@1", math.nan)
    if not math.isfinite(top1):
        return None
    return PublishedWeights(
        tag=member.name,
        top1=top1,
        input_size=member.transforms().crop_size[0],
        recipe=member.meta.get("recipe", "recipe not stated"),
        license=member.meta.get("license"),
    )


def _describe_with_accuracy(
    chosen: PublishedWeights, entries: tuple[PublishedWeights, ...]
) -> WeightsDescription:
    default = entries[0]
    higher = [entry for entry in entries if entry.top1 > chosen.top1]
    rank = ", the most accurate" if not higher else ", the default" if chosen == default else ""
    summary = (
        f"{chosen.tag}{rank}: top-1 {chosen.top1:.3f} at {chosen.input_size} pixels; recipe: {chosen.recipe}"
    )
    if higher and chosen == default:
        summary += (
            f"; more accurate, with another license or size: {', '.join(map(_tag_and_accuracy, higher))}"
        )
    warnings = []
    if chosen.top1 < default.top1:
        warnings.append(
            f"top-1 {chosen.top1:.3f}, {default.top1 - chosen.top1:.3f} pp below {_tag_and_accuracy(default)}; "
            "omit the tag to use the latter"
        )
    if chosen.license is not None:
        warnings.append(f"these weights have a separate license: {chosen.license}")
    return WeightsDescription(summary, f"{chosen.tag}: {'; '.join(warnings)}" if warnings else None)


def _tag_and_accuracy(entry: PublishedWeights) -> str:
    return f"{entry.tag} ({entry.top1:.3f} at {entry.input_size} pixels)"


def _describe_torchvision_weights(spec: ModelSpec) -> WeightsDescription:
    """Describe weights for which torchvision publishes no accuracy."""
    from torchvision import models as torchvision_models  # noqa: PLC0415

    base, tag = _split_tag(spec)
    weights = torchvision_models.get_model_weights(base)
    if tag is not None and tag not in weights.__members__:
        raise _no_such_tag(spec, tag, list(weights.__members__))
    member = weights[tag or "DEFAULT"]
    summary = (
        f"{member.name}: torchvision publishes no top-1; {member.meta.get('recipe', 'recipe not stated')}"
    )
    if member is weights.DEFAULT:
        return WeightsDescription(summary)
    return WeightsDescription(
        summary, f"{member.name} is not torchvision's default, which is {weights.DEFAULT.name}"
    )


def _describe_timm_weights(spec: ModelSpec) -> WeightsDescription:
    """Describe weights that are not in the zoo; the timm package contains no accuracies."""
    import timm  # noqa: PLC0415

    base, tag = _split_tag(spec)
    default = timm.models.get_pretrained_cfg(base)
    try:
        chosen = timm.models.get_pretrained_cfg(spec.architecture)
    except RuntimeError as error:
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
        raise _no_such_tag(spec, tag, tags) from error
    if default is None or chosen is None or not chosen.has_weights:
        return WeightsDescription(f"{spec} has no pretrained weights")
    summary = (
        f"{chosen.tag}: for {chosen.input_size[1]} pixels; the timm package contains no top-1; from "
        f"{chosen.origin_url or chosen.hf_hub_id or chosen.url}, license {chosen.license or 'not stated'}"
    )
    if chosen.tag == default.tag:
        return WeightsDescription(summary)
    return WeightsDescription(summary, f"{chosen.tag} is not timm's default, which is {default.tag}")


def _no_such_tag(spec: ModelSpec, tag: str | None, tags: list[str]) -> InputError:
    available = ", ".join(sorted(tags)) or "none"
    return InputError(
        f"{spec.source}:{_split_tag(spec)[0]} has no weights tagged {tag!r}; it has {available}"
    )
