"""What to change about a run, in one line with its numbers. Every flag named here is one of the job's."""

import math
from collections.abc import Sequence

from batchcls.runs.busy import Measured, Resource, Stage

_MUCH_START = 0.3  # of the run: from here on start-up is what to talk about
_POOR_EFFICIENCY = 0.75  # below this the time lies in waiting, not in any stage
_FEW_FRAGMENTS = 4  # for each loader: with fewer, the last ones are waited for
_FAR_OFF = 64.0  # no figure of one run is worth so large a step at once
_SPARE = 1.25  # a resource with a quarter to spare does not limit when rates vary


def advise(measured: Measured, resources: Sequence[Resource]) -> str:
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
    if scarcest.utilisation < _POOR_EFFICIENCY:
        return _on_waiting(measured, scarcest)
    return _on_scarce(measured, resources)


def _on_scarce(measured: Measured, resources: Sequence[Resource]) -> str:
    """One resource is busy nearly all the time: what would relieve it."""
    scarcest = resources[0]
    match scarcest.name:
        case "CPUs":
            return _on_cpus_and_gpus(resources) if measured.capacity.gpus else _on_cpus(measured, scarcest)
        case "GPUs":
            busy = f"GPUs are busy {scarcest.utilisation:.0%} of the time"
            return f"the network limits, {busy}: {_faster(measured, 'GPUs')}"
        case "driver":
            return (
                f"the driver limits, {scarcest.milliseconds:.3f} ms an image: larger fragments (--fragment-rows "
                f"{2 * measured.fragment_rows}) and batches (--batch-size)"
            )
        case _:
            return _on_too_few(measured, scarcest, resources[1].images_per_second)


def _on_waiting(measured: Measured, scarcest: Resource) -> str:
    """Nothing was busy enough: too few pieces to share out, or pieces too small to be worth their handling."""
    idle = f"{scarcest.name}, the scarcest resource, stood idle {1 - scarcest.utilisation:.0%} of the time"
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


def _on_cpus(measured: Measured, cpus: Resource) -> str:
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
    limits = f"{_NAMES[cpus.limits]} limits, GPUs are busy {gpus.utilisation:.0%} of the time"
    now = cpus.capacity / gpus.capacity
    needed = now * gpus.images_per_second / cpus.images_per_second
    if needed > now * _FAR_OFF:
        return f"{limits}: more CPUs"
    more = max(1, math.ceil(needed - now))
    return f"{limits}: {more} more CPUs per GPU than the {now:g} there are would keep them busy"


def _on_too_few(measured: Measured, scarcest: Resource, next_rate: float) -> str:
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


def _faster(measured: Measured, machines: str) -> str:
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
