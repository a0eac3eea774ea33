"""The zoo: backbones with a short name, and what is known of each and of its published weights.

The records lie in zoo.toml. Counts are of the network as it is built here: 1000 classes, without the
heads that only training uses. Accuracies are the libraries' own, on the validation images of
ImageNet-1k: torchvision's `meta` of the weights, timm's published tables of results.

`labeled_images_per_category` is a rule of thumb and no measurement. Below it, training the head alone
or taking a smaller backbone is usually as good as training everything. The steps are ours: 50 images up
to 6 million parameters, 100 up to 15, 200 up to 35, 400 up to 70, 800 above; twice that where attention
looks at the whole image from the first layer. The direction is that of Kornblith et al., "Do Better
ImageNet Models Transfer Better?" (arXiv:1805.08974), and Steiner et al., "How to train your ViT?"
(arXiv:2106.10270).
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
RunsElsewhere = Literal["everywhere", "most runtimes", "servers"]


class PublishedWeights(BaseModel):
    """Weights that a library publishes, and how good they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tag: str = Field(min_length=1, description="The library's name for these weights.")
    top1: float = Field(
        gt=0, lt=100, description="Percent of ImageNet-1k's validation images with the right first answer."
    )
    input_size: int = Field(gt=0, description="Side in pixels of the input that the figure was measured at.")
    recipe: str = Field(min_length=1, description="What they were trained on and how.")
    license: str | None = Field(default=None, description="Of the weights; None: that of the library.")


class ZooRecord(BaseModel):
    """A backbone with a short name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="The short name; it stays.")
    source: SourceName = Field(description="Library that builds it.")
    architecture: str = Field(pattern=r"^[a-z0-9_]+$", description="Its name in that library, without a tag.")
    family: str = Field(description="Name of the family, as in its paper.")
    year: int = Field(ge=2012, description="Year the paper appeared.")
    key_idea: str = Field(description="What was new, in a sentence.")
    use_case: str = Field(description="When to take it.")
    warning: str | None = Field(default=None, description="What to know before taking it.")
    parameters: int = Field(gt=0, description="Without heads that only training uses, 1000 classes.")
    multiply_adds: int = Field(gt=0, description="For one image at `input_size`.")
    input_size: int = Field(gt=0, description="Side in pixels that the default weights' record asks for.")
    construction: Construction = Field(
        description="plain: one kind of block in a row, to be read layer by layer; branched: parallel paths "
        "or gates that join again; intricate: several such mechanisms at once."
    )
    runtime_support: RunsElsewhere = Field(
        description="What has its operators, whatever its size. everywhere: phones and small accelerators too, "
        "and in 8-bit integers; most runtimes: ONNX Runtime, TensorRT, OpenVINO, Core ML; servers: PyTorch and "
        "what is made for transformers."
    )
    labeled_images_per_category: int = Field(
        gt=0, description="From about how many, fine-tuning all of it pays; a rule of thumb."
    )
    weights: tuple[PublishedWeights, ...] = Field(min_length=1, description="The default first.")


@dataclass(frozen=True, slots=True)
class WeightsDescription:
    """What to print about the weights that a name stands for.

    Attributes:
        line: the tag, how good its weights are and how they were trained; one line.
        warning: why one may not want this tag; None if it is the one to take.
    """

    line: str
    warning: str | None = None


@cache
def zoo_records() -> tuple[ZooRecord, ...]:
    """All records, in order of year, then family, then size."""
    text = resources.files(__package__).joinpath("zoo.toml").read_text(encoding="utf-8")
    return tuple(
        make_record(family, backbone)
        for family in tomllib.loads(text)["families"]
        for backbone in family["backbones"]
    )


def make_record(family: Mapping[str, Any], backbone: Mapping[str, Any]) -> ZooRecord:
    """The record of a backbone: what its family has in common, and its own, which goes first.

    Raises:
        pydantic.ValidationError: a field is missing, unknown or out of range.
    """
    common = {name: value for name, value in family.items() if name != "backbones"}
    return ZooRecord.model_validate({**common, **backbone})


def find_record(name: str) -> ZooRecord | None:
    """The record with this short name; None if the zoo has no such name."""
    return next((record for record in zoo_records() if record.name == name), None)


def record_for_spec(spec: ModelSpec) -> ZooRecord | None:
    """The record of an architecture, whatever its tag; None if it is not of the zoo."""
    wanted = (spec.source, _split(spec)[0])
    return next((r for r in zoo_records() if (r.source, r.architecture) == wanted), None)


def published_weights(spec: ModelSpec) -> PublishedWeights | None:
    """The entry of the spec's tag, or of the default tag if it names none.

    None where no accuracy is known here: timm's architectures outside the zoo, weights without a
    classifier.
    """
    _, tag = _split(spec)
    entries = _entries(spec)
    return next((entry for entry in entries if tag in (None, entry.tag)), None)


def describe_weights(spec: ModelSpec) -> WeightsDescription:
    """What to print about the published weights behind a spec. Asks no network.

    Args:
        spec: an architecture that its library knows.

    Raises:
        InputError: the library has no weights with this tag.
    """
    chosen = published_weights(spec)
    if chosen is not None:
        return _compared(chosen, _entries(spec))
    return _of_torchvision(spec) if spec.source == "torchvision" else _of_timm(spec)


def _split(spec: ModelSpec) -> tuple[str, str | None]:
    """Architecture and tag; None for the default tag, which torchvision also calls DEFAULT."""
    base, _, tag = spec.architecture.partition(".")
    named = tag and not (spec.source == "torchvision" and tag == "DEFAULT")
    return base, tag if named else None


def _entries(spec: ModelSpec) -> tuple[PublishedWeights, ...]:
    """All weights of an architecture whose accuracy is known here, the default first."""
    record = record_for_spec(spec)
    if record is not None:
        return record.weights
    if spec.source == "timm":
        return ()
    # torch takes seconds to import, and names and records need none of it.
    from torchvision import models as torchvision_models  # noqa: PLC0415

    weights = torchvision_models.get_model_weights(_split(spec)[0])
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


def _compared(chosen: PublishedWeights, entries: tuple[PublishedWeights, ...]) -> WeightsDescription:
    default = entries[0]
    higher = [entry for entry in entries if entry.top1 > chosen.top1]
    standing = ", the best known" if not higher else ", the default" if chosen == default else ""
    line = (
        f"{chosen.tag}{standing}: top-1 {chosen.top1:.3f} at {chosen.input_size} pixels; "
        f"recipe: {chosen.recipe}"
    )
    if higher and chosen == default:
        line += f"; higher, but mind license and size: {', '.join(map(_figure, higher))}"
    warnings = []
    if chosen.top1 < default.top1:
        warnings.append(
            f"top-1 {chosen.top1:.3f}, {default.top1 - chosen.top1:.3f} points below {_figure(default)}; "
            "leave the tag out to take that"
        )
    if chosen.license is not None:
        warnings.append(f"these weights have a license of their own: {chosen.license}")
    return WeightsDescription(line, f"{chosen.tag}: {'; '.join(warnings)}" if warnings else None)


def _figure(entry: PublishedWeights) -> str:
    return f"{entry.tag} ({entry.top1:.3f} at {entry.input_size} pixels)"


def _of_torchvision(spec: ModelSpec) -> WeightsDescription:
    """Of weights that torchvision states no accuracy for."""
    from torchvision import models as torchvision_models  # noqa: PLC0415

    base, tag = _split(spec)
    weights = torchvision_models.get_model_weights(base)
    if tag is not None and tag not in weights.__members__:
        raise _no_such_tag(spec, tag, list(weights.__members__))
    member = weights[tag or "DEFAULT"]
    line = f"{member.name}: torchvision states no top-1; {member.meta.get('recipe', 'recipe not stated')}"
    if member is weights.DEFAULT:
        return WeightsDescription(line)
    return WeightsDescription(
        line, f"{member.name} is not torchvision's default, which is {weights.DEFAULT.name}"
    )


def _of_timm(spec: ModelSpec) -> WeightsDescription:
    """Of weights outside the zoo's records: timm's package states no accuracy for any."""
    import timm  # noqa: PLC0415

    base, tag = _split(spec)
    default = timm.models.get_pretrained_cfg(base)
    try:
        chosen = timm.models.get_pretrained_cfg(spec.architecture)
    except RuntimeError as error:
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
        raise _no_such_tag(spec, tag, tags) from error
    if default is None or chosen is None or not chosen.has_weights:
        return WeightsDescription(f"{spec} has no published weights")
    line = (
        f"{chosen.tag}: for {chosen.input_size[1]} pixels; timm's package states no top-1; from "
        f"{chosen.origin_url or chosen.hf_hub_id or chosen.url}, license {chosen.license or 'not stated'}"
    )
    if chosen.tag == default.tag:
        return WeightsDescription(line)
    return WeightsDescription(line, f"{chosen.tag} is not timm's default, which is {default.tag}")


def _no_such_tag(spec: ModelSpec, tag: str | None, tags: list[str]) -> InputError:
    there = ", ".join(sorted(tags)) or "none"
    return InputError(f"{spec.source}:{_split(spec)[0]} has no weights tagged {tag!r}; it has {there}")
