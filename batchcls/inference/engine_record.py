"""Records of the requested engine and of the measurements from which an engine is selected, stored as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, Self

from pydantic import Field

from batchcls.config.engine_config import EngineSettings
from batchcls.errors import InputError
from batchcls.inference.agreement import AccuracyTolerance
from batchcls.models.classifier_head import ModelLayers
from batchcls.models.engines.engine import Device, EngineChoice, EngineName, Precision
from batchcls.models.engines.factory import missing_package
from batchcls.storage.documents import Document, StoredRecord, UtcTime

_PACKAGES = ("torch", "openvino", "nncf")


class EngineRequest(StoredRecord):
    """The settings of a job that determine which engine is selected."""

    engine: EngineName | Literal["auto"] = Field(default="auto", description="As --engine.")
    precision: Precision | Literal["auto"] = Field(default="auto", description="As --precision.")
    device: Device | Literal["auto"] = Field(default="auto", description="As --device.")
    batch_size: int | None = Field(
        default=None, gt=0, description="Images per forward pass; None: the fastest of several sizes."
    )
    tolerance: AccuracyTolerance = Field(
        default=AccuracyTolerance(), description="Allowed differences from the outputs of fp32."
    )
    scaled_decode: bool = Field(
        default=False, description="Whether to measure at which scale JPEGs may be decoded."
    )

    @classmethod
    def from_settings(
        cls, settings: EngineSettings, batch_size: int | None, scaled_decode: bool = False
    ) -> Self:
        """Create the request of a job's settings."""
        return cls(
            engine=settings.engine,
            precision=settings.precision,
            device=settings.device,
            batch_size=batch_size,
            tolerance=AccuracyTolerance(
                min_top1_agreement=settings.min_top1_agreement,
                min_embedding_cosine=settings.min_embedding_cosine,
                int8_min_agreement=settings.int8_min_agreement,
            ),
            scaled_decode=scaled_decode,
        )


class CandidateResult(StoredRecord):
    """Measurements of one candidate; a value that was not measured is None."""

    engine: EngineName = Field(description="Engine of the candidate.")
    precision: Precision = Field(description="Precision of the candidate.")
    start_seconds: float | None = Field(
        default=None, ge=0, description="Seconds to start and test the engine, compilation included."
    )
    rates: dict[int, float] = Field(
        default_factory=dict,
        description="Images per second by batch size, each the median of several windows.",
    )
    batch_size: int | None = Field(default=None, gt=0, description="The best of these batch sizes.")
    images_per_second: float | None = Field(default=None, gt=0, description="Rate at the best batch size.")
    images: int | None = Field(
        default=None, gt=0, description="Images whose outputs were compared with those of fp32."
    )
    top1_agreement: float | None = Field(
        default=None, ge=0, le=1, description="Share of these images with the best class of fp32."
    )
    mean_cosine: float | None = Field(
        default=None, description="Mean cosine between embeddings and those of fp32."
    )
    min_cosine: float | None = Field(default=None, description="Smallest of these cosines.")
    rejected: str | None = Field(
        default=None, description="Why the candidate was rejected; None for the selected one."
    )

    @property
    def choice(self) -> EngineChoice:
        """Engine and precision of the candidate."""
        return EngineChoice(self.engine, self.precision)

    def __str__(self) -> str:
        parts = [str(self.choice)]
        if self.images_per_second is not None:
            parts.append(f"{self.images_per_second:.1f} images/s in batches of {self.batch_size}")
        if self.top1_agreement is not None:
            parts.append(f"top-1 agreement {self.top1_agreement:.2%} on {self.images} images")
        if self.mean_cosine is not None:
            parts.append(f"cosine {self.mean_cosine:.5f}")
        return ", ".join(parts)


class MarginResult(StoredRecord):
    """Accuracy of an engine on JPEGs that are decoded at a reduced scale with one margin."""

    margin: float = Field(
        ge=1, description="Minimum ratio of the height and width of a decoded image to what the resize needs."
    )
    images: int = Field(
        gt=0, description="Compared images: those that this margin decodes at a reduced scale."
    )
    top1_agreement: float = Field(
        ge=0, le=1, description="Share of these images with the best class of fp32 at full scale."
    )
    mean_cosine: float = Field(description="Mean cosine between embeddings and those of fp32 at full scale.")
    rejected: str | None = Field(
        description="Which limit of the tolerance is violated; None for the selected margin."
    )


class ScaledDecode(StoredRecord):
    """At which scale JPEGs may be decoded."""

    margin: float | None = Field(description="The selected margin; None: JPEGs are decoded at full scale.")
    results: tuple[MarginResult, ...] = Field(description="Results of all margins that were measured.")
    note: str | None = Field(description="Why JPEGs are decoded at full scale; None if they are not.")

    def __str__(self) -> str:
        if self.margin is None:
            return self.note or "JPEGs are decoded at full scale"
        selected = self.results[-1]
        return (
            f"JPEGs at least {2 * self.margin:g} times as large as the resize needs are decoded at a reduced scale: "
            f"top-1 agreement {selected.top1_agreement:.2%} on {selected.images} images, cosine "
            f"{selected.mean_cosine:.5f}"
        )


class EngineSelectionRecord(Document):
    """An engine that was selected by measurement, and everything on which the selection depends."""

    format: Literal["batchcls-engines"] = Field(
        default="batchcls-engines", description="Kind of this document."
    )
    created: UtcTime = Field(description="Time of the measurement, UTC.")
    request: EngineRequest = Field(description="The settings for which the engine was selected.")
    bundle_fingerprint: str = Field(description="Fingerprint of the model.")
    layers: ModelLayers | None = Field(default=None, description="Fingerprints of the parts of the model.")
    hardware_key: str = Field(description="`Hardware.key` of the node.")
    hardware: str = Field(description="Human-readable description of the node.")
    versions: dict[str, str] = Field(description="Versions of the installed packages that run networks.")
    device: Device = Field(description="Device of the network.")
    threads: int = Field(gt=0, description="CPU threads of the engines during the measurement.")
    manifest: str = Field(description="Fingerprint of the manifest from which the images were sampled.")
    images: int = Field(gt=0, description="Number of sampled images.")
    seconds: float = Field(ge=0, description="Duration of the selection, compilation included.")
    reference: str = Field(description="The fp32 engine with which the candidates were compared.")
    engine: EngineName = Field(description="The selected engine.")
    precision: Precision = Field(description="The selected precision.")
    batch_size: int = Field(gt=0, description="Images per forward pass.")
    images_per_second: float = Field(gt=0, description="Rate of the network alone, without decoding.")
    candidates: tuple[CandidateResult, ...] = Field(
        description="All candidates, with the reason of each rejection."
    )
    notes: tuple[str, ...] = Field(description="Human-readable remarks on the selection.")
    scaled_decode: ScaledDecode | None = Field(
        default=None, description="At which scale JPEGs may be decoded; None: this was not requested."
    )

    @property
    def choice(self) -> EngineChoice:
        """The selected engine and precision."""
        return EngineChoice(self.engine, self.precision)


def installed_versions() -> dict[str, str]:
    """Return the versions of the installed packages that run networks."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# Candidates of `auto`, the likely winner first, so that the measurement of a slower one ends early.
_AUTO_CANDIDATES: Mapping[Device, tuple[EngineChoice, ...]] = {
    "cpu": (
        EngineChoice("openvino", "int8"),
        EngineChoice("openvino", "bf16"),
        EngineChoice("openvino", "fp32"),
        EngineChoice("compile", "bf16"),
        EngineChoice("compile", "fp32"),
        EngineChoice("torch", "bf16"),
        EngineChoice("torch", "fp32"),
    ),
    "cuda": (
        EngineChoice("compile", "fp16"),
        EngineChoice("compile", "bf16"),
        EngineChoice("torch", "fp16"),
        EngineChoice("torch", "bf16"),
        EngineChoice("compile", "fp32"),
        EngineChoice("torch", "fp32"),
    ),
}


NO_BF16 = "bf16 is skipped, because this processor has no bf16 instructions and would emulate it far slower than fp32"


@dataclass(frozen=True, slots=True)
class Candidates:
    """Engines and precisions to measure, the likely winner first, and notes on why others are skipped."""

    choices: tuple[EngineChoice, ...]
    notes: tuple[str, ...]


def candidates(request: EngineRequest, device: Device, *, has_bf16: bool = True) -> Candidates:
    """Return the engines and precisions to measure on a device.

    If both are requested explicitly, the pair is the only candidate; the engine itself rejects an unsupported
    precision.

    Args:
        request: the requested engine and precision.
        device: device of the network.
        has_bf16: whether the CPU has bf16 instructions; without them bf16 is a candidate only if requested.

    Raises:
        InputError: the requested engine is not installed, or no engine supports the requested precision.
    """
    if request.engine != "auto" and request.precision != "auto":
        choices = [EngineChoice(request.engine, request.precision)]
    else:
        choices = [
            choice
            for choice in _AUTO_CANDIDATES[device]
            if request.engine in ("auto", choice.engine) and request.precision in ("auto", choice.precision)
        ]
    notes = []
    if request.precision == "auto" and request.tolerance.int8_min_agreement is None:
        choices = [choice for choice in choices if choice.precision != "int8"]
    if request.precision == "auto" and device == "cpu" and not has_bf16:
        choices = [choice for choice in choices if choice.precision != "bf16"]
        notes.append(NO_BF16)
    for engine in dict.fromkeys(choice.engine for choice in choices):
        problem = missing_package(engine)
        if problem is None:
            continue
        if engine == request.engine:
            raise InputError(f"--engine {engine}: {problem}")
        notes.append(problem)
        choices = [choice for choice in choices if choice.engine != engine]
    engines = {choice.engine for choice in choices}
    if device == "cpu" and request.engine == "auto" and {"openvino", "compile"} <= engines:
        choices = [choice for choice in choices if choice.engine != "compile"]
        notes.append(
            "compile is skipped, because it takes a minute or more to compile a network and openvino is available; "
            "request it with --engine compile"
        )
    if not choices:
        reasons = "".join(f"; {note}" for note in notes)
        raise InputError(
            f"--engine {request.engine} --precision {request.precision}: no engine supports this on a "
            f"{'GPU' if device == 'cuda' else 'CPU'}{reasons}; choose another precision, or auto"
        )
    return Candidates(tuple(choices), tuple(notes))
