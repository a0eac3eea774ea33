"""Which engines and precisions come into question for a job on a device. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from batchcls.errors import InputError
from batchcls.inference.measured import Wanted
from batchcls.models.engines import Device, EngineChoice
from batchcls.models.engines.start import missing

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


def candidates(wanted: Wanted, device: Device, *, has_bf16: bool = True) -> Candidates:
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
        lacking = missing(engine)
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
