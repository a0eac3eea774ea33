"""How far batch sizes go up: as long as there is memory for them, and they are worth trying."""

from collections.abc import Sequence

from batchcls.comparison.measurement import Throughput

_MEMORY_SHARE = 0.8  # of what is left, for the next batch size


def no_room(
    found: Sequence[Throughput], batch_size: int, before_mib: float, available_mib: float
) -> str | None:
    """Why a batch size would not fit, by what the last one took; None if it should.

    Args:
        found: measured so far, ascending.
        batch_size: the next one.
        before_mib: peak memory before the first of them.
        available_mib: memory that can still be had.
    """
    if not found:
        return None
    growth = max(0.0, found[-1].peak_memory_mib - before_mib) * (batch_size / found[-1].batch_size - 1)
    if growth > _MEMORY_SHARE * available_mib:
        return f"a batch of {batch_size} would need about {growth:.0f} MiB more, which there are not"
    return None


def not_worth_it(found: Sequence[Throughput], batch_size: int, seconds: float) -> str | None:
    """Why a batch size need not be tried after those in `found`; None if it should.

    Two sizes in a row below the best: it does not get faster any more. A single batch that takes
    all of the time for a measurement: nobody waits that long for an answer.
    """
    rates = [entry.images_per_second for entry in found]
    if len(rates) > 2 and max(rates[-2:]) < max(rates):
        return f"batches of {found[-2].batch_size} and {found[-1].batch_size} were slower than smaller ones"
    if rates and batch_size / rates[-1] > seconds:
        return f"a batch of {batch_size} would take longer than {seconds:g} s"
    return None
