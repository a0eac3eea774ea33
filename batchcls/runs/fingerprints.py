"""What a run is about: which manifest, which model, and the settings that decide what is written.

A later command goes on with a run only where all of this is the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from batchcls.config.classify import ClassifyConfig
from batchcls.errors import InputError

_ANSWERS = (
    *("top_k", "abstain", "embedding_dtype", "l2_normalize", "tta", "normalize", "reduced_decode"),
    *("engine", "precision", "device", "min_top1_agreement", "min_embedding_cosine", "int8_min_agreement"),
    *("max_image_bytes", "max_image_pixels", "min_image_side_pixels"),
    *("allow_root", "allow_private_addresses"),
)
_ROWS = ("id_column", "keep", "limit")


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """Identity of a run.

    Attributes:
        manifest: fingerprint of the manifest's files.
        model: fingerprint of the bundle: weights, preprocessing, labels, tap.
        settings: those that decide which rows and columns are written and what stands in them.
    """

    manifest: str
    model: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, config: ClassifyConfig, manifest: str, model: str) -> "Fingerprints":
        """The identity of what a command asks for."""
        values = config.model_dump(mode="json")
        return cls(manifest, model, {name: values[name] for name in (*_ROWS, *_ANSWERS)})

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Fingerprints":
        """From plan.json. Raises InputError if it is from before there were any."""
        try:
            return cls(str(record["manifest"]), str(record["model"]), dict(record["settings"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"plan.json has no fingerprints that this program can read ({error})") from None

    def as_json(self) -> dict[str, Any]:
        """For plan.json."""
        return {"manifest": self.manifest, "model": self.model, "settings": dict(self.settings)}

    def differences(self, other: "Fingerprints") -> list[str]:
        """What differs in `other`, for people; empty where nothing does."""
        found = []
        if self.manifest != other.manifest:
            found.append(f"the manifest (it was {self.manifest[:12]} and is {other.manifest[:12]})")
        if self.model != other.model:
            found.append(f"the model (it was {self.model[:12]} and is {other.model[:12]})")
        for name in sorted({*self.settings, *other.settings}):
            before, now = self.settings.get(name), other.settings.get(name)
            if before != now:
                found.append(f"--{name.replace('_', '-')} (it was {before} and is {now})")
        return found


def answers_of(
    fingerprints: Fingerprints, precisions: Iterable[str], decode_margin: float | None
) -> dict[str, Any]:
    """All that the answer to an image follows from beside the image itself.

    Answers of a run may stand for those of another one only where this is equal. Which engine ran the
    network is not in it, its precision is: engines of one precision are held to the same answers.

    Args:
        fingerprints: of the run.
        precisions: of the engines on all kinds of nodes.
        decode_margin: that of `LoadSettings`.
    """
    settings = (
        *("top_k", "abstain", "embedding_dtype", "l2_normalize", "tta", "normalize"),
        *(
            "max_image_bytes",
            "max_image_pixels",
            "min_image_side_pixels",
            "allow_root",
            "allow_private_addresses",
        ),
    )
    return {
        "model": fingerprints.model,
        "precisions": sorted(set(precisions)),
        "decode_margin": decode_margin,
        **{name: fingerprints.settings[name] for name in settings},
    }
