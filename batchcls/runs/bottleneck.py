"""Find the stage that limits a run, its ideal throughput, and how close the run came to it.

The smallest rate that a resource allows is the ideal rate of the run, and what the run reached of it
is its efficiency, which is therefore the share of the time in which the scarcest resource worked.
Start-up is told apart: it is paid once and says nothing of the next million images.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from batchcls.runs.utilization import STAGES, Resource, Stage, StageUsage, resources_of

_MUCH_START = 0.3  # of the run: from here on start-up is what to talk about
_POOR_EFFICIENCY = 0.75  # below this the time lies in waiting, not in any stage
_FEW_FRAGMENTS = 4  # for each loader: with fewer, the last ones are waited for
_FAR_OFF = 64.0  # no figure of one run is worth so large a step at once
_SPARE = 1.25  # a resource with a quarter to spare does not limit when rates vary


def advise(measured: StageUsage, resources: Sequence[Resource]) -> str:
    """The first rule that applies, as one line.

    Args:
        measured: the run.
        resources: what it used, the scarcest first.
    """
    scarcest = resources[0]
    if math.isinf(scarcest.images_per_second):
        return "no stage took any time: there is nothing to make faster"
    if measured.start_share >= _MUCH_START:
        return (
            f"start-up took {measured.start_share:.0%} of this run ({measured.start_seconds:.1f} of "
            f"{measured.wall_seconds:.1f} s): more rows a run, or a cluster that is kept running "
            "(--ray-address)"
        )
    if scarcest.utilization < _POOR_EFFICIENCY:
        return _on_waiting(measured, scarcest)
    return _on_scarce(measured, resources)


def _on_scarce(measured: StageUsage, resources: Sequence[Resource]) -> str:
    """One resource is busy nearly all the time: what would relieve it."""
    scarcest = resources[0]
    match scarcest.name:
        case "CPUs":
            return _on_cpus_and_gpus(resources) if measured.capacity.gpus else _on_cpus(measured, scarcest)
        case "GPUs":
            busy = f"GPUs are busy {scarcest.utilization:.0%} of the time"
            return f"the network limits, {busy}: {_faster(measured, 'GPUs')}"
        case "driver":
            return (
                f"the driver limits, {scarcest.milliseconds:.3f} ms an image: larger fragments (--fragment-rows "
                f"{2 * measured.fragment_rows}) and batches (--batch-size)"
            )
        case _:
            return _on_too_few(measured, scarcest, resources[1].images_per_second)


def _on_waiting(measured: StageUsage, scarcest: Resource) -> str:
    """Nothing was busy enough: too few pieces to share out, or pieces too small to be worth their handling."""
    idle = f"{scarcest.name}, the scarcest resource, stood idle {1 - scarcest.utilization:.0%} of the time"
    loaders = measured.capacity.loaders
    fragments = math.ceil(measured.rows / measured.fragment_rows) / loaders
    if fragments < _FEW_FRAGMENTS and measured.fragment_rows > 1:
        smaller = max(1, measured.rows // (2 * _FEW_FRAGMENTS * loaders))
        return (
            f"{idle}: with {fragments:.1f} fragments a loader the last ones are waited for; smaller "
            f"fragments (--fragment-rows {smaller}) or more rows a run"
        )
    return (
        f"{idle}: larger fragments (--fragment-rows {2 * measured.fragment_rows}), and no other programs on "
        "these nodes"
    )


def _on_cpus(measured: StageUsage, cpus: Resource) -> str:
    """The network and all else share CPUs that are busy."""
    milliseconds = measured.milliseconds(cpus.limits)
    taken = f"{_NAMES[cpus.limits]} takes {milliseconds / cpus.milliseconds:.0%} of the CPU time"
    match cpus.limits:
        case "predict":
            return f"{taken}: {_faster(measured, 'nodes')}"
        case "decode":
            return f"{taken}, {milliseconds:.1f} ms an image: smaller stored images or more nodes"
        case "write":
            return f"{taken}: larger files (--rows-per-file) or a smaller embedding (--embedding-dtype)"
        case _:
            return (
                f"{taken}: larger fragments (--fragment-rows {2 * measured.fragment_rows}) and batches "
                "(--batch-size)"
            )


def _on_cpus_and_gpus(resources: Sequence[Resource]) -> str:
    """CPUs cannot feed the GPUs: how many more would."""
    cpus = resources[0]
    gpus = next(resource for resource in resources if resource.name == "GPUs")
    limits = f"{_NAMES[cpus.limits]} limits, GPUs are busy {gpus.utilization:.0%} of the time"
    now = cpus.capacity / gpus.capacity
    needed = now * gpus.images_per_second / cpus.images_per_second
    if needed > now * _FAR_OFF:
        return f"{limits}: more CPUs"
    more = max(1, math.ceil(needed - now))
    return f"{limits}: {more} more CPUs per GPU than the {now:g} there are would keep them busy"


def _on_too_few(measured: StageUsage, scarcest: Resource, next_rate: float) -> str:
    """A bound of our own is the scarcest while the hardware has time: raise it past the next rate."""
    loaders, threads = measured.capacity.loaders, measured.capacity.fetch_threads
    factor = min(_FAR_OFF, _SPARE * next_rate / scarcest.images_per_second)
    if scarcest.name == "images in flight":
        return (
            f"waiting for storage limits, {measured.milliseconds('fetch'):.1f} ms an image with "
            f"{scarcest.capacity:g} in flight: raise --fetch-threads from {threads} to "
            f"{max(threads + 1, math.ceil(threads * factor))}"
        )
    if scarcest.name == "network threads":
        return (
            f"the network limits with {scarcest.capacity:g} threads while CPUs are free: raise --num-actors "
            "or --cpus-per-actor"
        )
    flag = "--load-tasks" if measured.shape == "staged" else "--num-actors"
    return (
        f"decoding limits with {scarcest.capacity:g} threads while CPUs are free: raise {flag} from {loaders} "
        f"to {max(loaders + 1, math.ceil(loaders * factor))}"
    )


def _faster(measured: StageUsage, machines: str) -> str:
    if measured.engine_was_measured:
        return (
            f"{measured.engine} is the fastest that was measured here; a smaller backbone or input, or more "
            f"{machines}"
        )
    return (
        f"another engine or precision than {measured.engine} (--engine auto --precision auto), a smaller "
        f"backbone or input, or more {machines}"
    )


_NAMES: dict[Stage, str] = {
    "fetch": "waiting for storage",
    "decode": "decoding",
    "predict": "the network",
    "write": "writing",
    "other": "the work of Ray and Python between the stages",
    "driver": "the driver",
}


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

    measured: StageUsage
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
                    "utilization": round(resource.utilization, 3),
                }
                for resource in self.resources
            ],
            "advice": self.advice,
        }


def find_bottleneck(measured: StageUsage) -> Bottleneck:
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
