"""Which stage limits a run, how fast it could have been, and how near it came.

The smallest rate that a resource allows is the ideal rate of the run, and what the run reached of it
is its efficiency, which is therefore the share of the time in which the scarcest resource worked.
Start-up is told apart: it is paid once and says nothing of the next million images.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from batchcls.runs.advice import advise
from batchcls.runs.busy import STAGES, Measured, Resource, Stage, resources_of


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What limits a run.

    Attributes:
        measured: what this follows from.
        milliseconds: busy milliseconds an image, by stage.
        resources: the scarcest first.
        limited_by: the stage that limits; "nothing" where no stage took any time.
        ideal: images per second with the scarcest resource always busy; infinite for "nothing".
        achieved: images per second after start-up.
        efficiency: achieved / ideal; 1 is perfect.
        advice: what to change, in one line.
    """

    measured: Measured
    milliseconds: dict[Stage, float]
    resources: tuple[Resource, ...]
    limited_by: Stage | Literal["nothing"]
    ideal: float
    achieved: float
    efficiency: float
    advice: str

    def resource_of(self, stage: Stage) -> Resource:
        """The resource that a stage works on: the smallest, where several bound it."""
        # Every stage in front of the network holds an image in flight; only fetching works by that.
        carriers = [
            resource
            for resource in self.resources
            if stage in resource.stages and (stage == "fetch" or resource.limits != "fetch")
        ]
        return min(carriers, key=lambda resource: resource.capacity)

    def line(self) -> str:
        """What limits and how near the run came to the ideal, in one line."""
        if math.isinf(self.ideal):
            return f"{self.achieved:.1f} images/s after start-up; no stage took any time"
        return (
            f"{self.achieved:.1f} images/s after start-up of {self.measured.start_seconds:.1f} s, "
            f"{self.efficiency:.0%} of the ideal {self.ideal:.1f}, limited by {self.limited_by}"
        )

    def as_json(self) -> dict[str, Any]:
        """For run.json: rounded, and null for a rate without a limit."""
        return {
            "shape": self.measured.shape,
            "device": self.measured.device,
            "limited_by": self.limited_by,
            "ideal_images_per_second": _rate(self.ideal),
            "images_per_second_after_start": _rate(self.achieved),
            "efficiency": round(self.efficiency, 3),
            "start_seconds": round(self.measured.start_seconds, 2),
            "busy_milliseconds_per_image": {stage: round(ms, 4) for stage, ms in self.milliseconds.items()},
            "resources": [
                asdict(resource)
                | {
                    "stages": list(resource.stages),
                    "milliseconds": round(resource.milliseconds, 4),
                    "images_per_second": _rate(resource.images_per_second),
                    "utilisation": round(resource.utilisation, 3),
                }
                for resource in self.resources
            ],
            "advice": self.advice,
        }


def find_bottleneck(measured: Measured) -> Bottleneck:
    """Name the stage that limits, the ideal rate, and what to change."""
    resources = resources_of(measured)
    ideal, achieved = resources[0].images_per_second, measured.images_per_second
    return Bottleneck(
        measured=measured,
        milliseconds={stage: measured.milliseconds(stage) for stage in STAGES},
        resources=tuple(resources),
        limited_by="nothing" if math.isinf(ideal) else resources[0].limits,
        ideal=ideal,
        achieved=achieved,
        efficiency=achieved / ideal,
        advice=advise(measured, resources),
    )


def _rate(images_per_second: float) -> float | None:
    """Rounded to what a measurement can say; None for infinite."""
    if math.isinf(images_per_second):
        return None
    return round(images_per_second, 1 if images_per_second >= 100 else 3)
