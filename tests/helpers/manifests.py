"""Writes manifests for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_manifest(
    path: Path,
    item_ids: Sequence[str | None],
    *,
    uris: Sequence[str | None] | None = None,
    row_group_size: int | None = None,
    **columns: Any,
) -> Path:
    """Write a manifest with the given IDs and, by default, generated URIs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "item_id": pa.array(item_ids, pa.string()),
        "uri": pa.array(uris or [f"{i}.jpg" for i in range(len(item_ids))], pa.string()),
        **columns,
    }
    pq.write_table(pa.table(data), path, row_group_size=row_group_size)
    return path
