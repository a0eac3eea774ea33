"""All that loading images needs beside their rows. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from batchcls.images.fetch import FetchPolicy
from batchcls.images.limits import DecodeLimits
from batchcls.preprocessing import Preprocessing
from batchcls.views import Views


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """All that a load task needs beside its rows.

    `normalize` says whether pixels leave as uint8 ("engine") or as normalised float32 ("worker").
    `decode_margin` lets a JPEG be decoded at a reduced scale that leaves it at least so many times as
    high and wide as the resize needs it; None: every picture is decoded whole.
    `run_id` tells the settings of one run from those of another in a process that serves both.
    """

    run_id: str
    base: str
    kept: tuple[pa.Field, ...]
    fetch: FetchPolicy
    limits: DecodeLimits
    preprocessing: Preprocessing
    views: Views
    normalize: Literal["engine", "worker"]
    fetch_threads: int
    decode_threads: int
    block_rows: int
    decode_margin: float | None = None
