"""Records of the requested engine and of the measurements from which an engine is selected, stored as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from batchcls.config.engine_config import EngineSettings
from batchcls.errors import InputError
from batchcls.inference.agreement import AccuracyTolerance
from batchcls.models.engines.engine import Device, EngineChoice, EngineName, Precision
from batchcls.models.engines.factory import missing_package

_PACKAGES = ("torch", "openvino", "nncf")


class _Record(BaseModel):
    """What all records here have in common: frozen, and no field that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineRequest(_Record):
    """What a job was asked for, as far as it decides which engine is chosen."""

    engine: EngineName | Literal["auto"] = Field(default="auto", description="As in --engine.")
    precision: Precision | Literal["auto"] = Field(default="auto", description="As in --precision.")
    device: Device | Literal["auto"] = Field(default="auto", description="As in --device.")
    batch_size: int | None = Field(
        default=None, gt=0, description="Images of a forward pass; None: the fastest that is found."
    )
    contract: AccuracyTolerance = Field(
        default=AccuracyTolerance(), description="How much of fp32's answers has to be kept."
    )
    reduced_scale: bool = Field(
        default=False, description="Whether to find out how far JPEGs may be reduced in decoding."
    )

    @classmethod
    def of(cls, settings: EngineSettings, batch_size: int | None, reduced_scale: bool = False) -> Self:
        """What the settings of a job ask for."""
        return cls(
            engine=settings.engine,
            precision=settings.precision,
            device=settings.device,
            batch_size=batch_size,
            contract=AccuracyTolerance(
                min_top1_agreement=settings.min_top1_agreement,
                min_embedding_cosine=settings.min_embedding_cosine,
                int8_min_agreement=settings.int8_min_agreement,
            ),
            reduced_scale=reduced_scale,
        )


class CandidateResult(_Record):
    """What was found out about one candidate; what was not measured is None."""

    engine: EngineName = Field(description="What ran the network.")
    precision: Precision = Field(description="In which arithmetic.")
    start_seconds: float | None = Field(
        default=None, ge=0, description="From the bundle to a tested engine, conversion included."
    )
    rates: dict[int, float] = Field(
        default_factory=dict, description="Images per second by batch size, the median of several windows."
    )
    batch_size: int | None = Field(default=None, gt=0, description="The best of them.")
    images_per_second: float | None = Field(default=None, gt=0, description="At the best batch size.")
    images: int | None = Field(
        default=None, gt=0, description="Images whose answers were compared with fp32's."
    )
    top1_agreement: float | None = Field(
        default=None, ge=0, le=1, description="Share of them with fp32's best class."
    )
    mean_cosine: float | None = Field(
        default=None, description="Mean cosine between embeddings and those of fp32."
    )
    least_cosine: float | None = Field(default=None, description="That of the image furthest off.")
    rejected: str | None = Field(default=None, description="Why it was not taken; None for the one that was.")

    @property
    def choice(self) -> EngineChoice:
        """The candidate."""
        return EngineChoice(self.engine, self.precision)

    def __str__(self) -> str:
        words = [str(self.choice)]
        if self.images_per_second is not None:
            words.append(f"{self.images_per_second:.1f} images/s in batches of {self.batch_size}")
        if self.top1_agreement is not None:
            words.append(f"best class of fp32 on {self.top1_agreement:.2%} of {self.images} images")
        if self.mean_cosine is not None:
            words.append(f"cosine {self.mean_cosine:.5f}")
        return ", ".join(words)


class MarginResult(_Record):
    """How a network answers JPEGs that are decoded at a reduced scale."""

    margin: float = Field(
        ge=1, description="Times as high and wide as the resize needs it an image still is, at least."
    )
    images: int = Field(gt=0, description="Images that this margin has reduced, whose answers were compared.")
    top1_agreement: float = Field(
        ge=0, le=1, description="Share of them with the best class of fp32 on the whole image."
    )
    mean_cosine: float = Field(description="Mean cosine between embeddings and those of fp32 on whole ones.")
    rejected: str | None = Field(description="What of the contract it misses; None for the one that is used.")


class ReducedScale(_Record):
    """How far JPEGs may be reduced in decoding."""

    margin: float | None = Field(description="What was chosen; None: images are decoded whole.")
    tried: tuple[MarginResult, ...] = Field(description="All margins that were measured.")
    note: str | None = Field(description="Why images are decoded whole; None where they are not.")

    def __str__(self) -> str:
        if self.margin is None:
            return self.note or "decoded whole"
        held = self.tried[-1]
        return (
            f"JPEGs at least {2 * self.margin:g} times as large as the resize needs are decoded at a reduced "
            f"scale: {held.top1_agreement:.2%} of {held.images} keep their best class, cosine {held.mean_cosine:.5f}"
        )


class EngineSelectionRecord(_Record):
    """An engine that was chosen by measurement, and all that the choice depends on."""

    format: Literal["batchcls-engines-1"] = Field(
        default="batchcls-engines-1", description="Version of this record."
    )
    created: datetime = Field(description="When it was measured, UTC.")
    wanted: EngineRequest = Field(description="What was asked for.")
    bundle_fingerprint: str = Field(description="Of the model.")
    hardware_key: str = Field(description="`Hardware.key` of the node.")
    hardware: str = Field(description="The node in words.")
    versions: dict[str, str] = Field(description="Of the packages that run networks, as far as installed.")
    device: Device = Field(description="Where the network runs.")
    threads: int = Field(gt=0, description="CPU threads of the engines when they were measured.")
    manifest: str = Field(description="Fingerprint of the manifest that the images are from.")
    images: int = Field(gt=0, description="Images that were at hand.")
    seconds: float = Field(ge=0, description="That choosing took, conversions included.")
    reference: str = Field(description="What answered in fp32, which the candidates are compared with.")
    engine: EngineName = Field(description="What was chosen to run the network.")
    precision: Precision = Field(description="In which arithmetic.")
    batch_size: int = Field(gt=0, description="Images of a forward pass.")
    images_per_second: float = Field(gt=0, description="The network alone, no decoding beside it.")
    candidates: tuple[CandidateResult, ...] = Field(
        description="All that were tried, with the reason if not taken."
    )
    notes: tuple[str, ...] = Field(description="What a person should know of how it was chosen.")
    reduced_scale: ReducedScale | None = Field(
        default=None, description="How far JPEGs may be reduced; None: that was not asked for."
    )

    @property
    def choice(self) -> EngineChoice:
        """The engine that was chosen."""
        return EngineChoice(self.engine, self.precision)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that run networks; one that is not installed is not there."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# Those worth trying on their own, the one that is likely to win first: then the slow ones end early.
_WORTH_TRYING: Mapping[Device, tuple[EngineChoice, ...]] = {
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


NO_BF16 = (
    "bf16 is left out: this processor has no instructions for it and would emulate it, far slower than fp32"
)


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is to be measured, the likely winner first, and why others are not."""

    choices: tuple[EngineChoice, ...]
    notes: tuple[str, ...]


def candidates(wanted: EngineRequest, device: Device, *, has_bf16: bool = True) -> Candidates:
    """The engines and precisions that come into question on a device.

    On a CPU without instructions for bf16 (`has_bf16`) it is left out unless it was asked for.

    What was asked for by name of both is tried whatever it is: the engine itself refuses what it
    cannot do.

    Raises:
        InputError: the engine that was asked for is not installed, or none has the precision.
    """
    if wanted.engine != "auto" and wanted.precision != "auto":
        found = [EngineChoice(wanted.engine, wanted.precision)]
    else:
        found = [
            choice
            for choice in _WORTH_TRYING[device]
            if wanted.engine in ("auto", choice.engine) and wanted.precision in ("auto", choice.precision)
        ]
    notes = []
    if wanted.precision == "auto" and wanted.contract.int8_min_agreement is None:
        found = [choice for choice in found if choice.precision != "int8"]
    if wanted.precision == "auto" and device == "cpu" and not has_bf16:
        found = [choice for choice in found if choice.precision != "bf16"]
        notes.append(NO_BF16)
    for engine in dict.fromkeys(choice.engine for choice in found):
        lacking = missing_package(engine)
        if lacking is None:
            continue
        if engine == wanted.engine:
            raise InputError(f"--engine {engine}: {lacking}")
        notes.append(lacking)
        found = [choice for choice in found if choice.engine != engine]
    engines = {choice.engine for choice in found}
    if device == "cpu" and wanted.engine == "auto" and {"openvino", "compile"} <= engines:
        found = [choice for choice in found if choice.engine != "compile"]
        notes.append(
            "compile was left out: it converts a network for a minute or more, and openvino is here; try it "
            "with --engine compile"
        )
    if not found:
        reasons = "".join(f"; {note}" for note in notes)
        raise InputError(
            f"--engine {wanted.engine} --precision {wanted.precision}: there is no such engine for a "
            f"{'GPU' if device == 'cuda' else 'CPU'}{reasons}; choose another precision, or auto"
        )
    return Candidates(tuple(found), tuple(notes))
