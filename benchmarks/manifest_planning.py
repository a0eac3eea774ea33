"""Measures the time and driver memory for planning a large manifest, by number of rows and width.

    python -m benchmarks.manifest_planning --rows 1000000

Each measurement runs in a separate process: reading footers, validating IDs and planning fragments.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_PLAN = """
import sys, time
from batchcls.manifest.ids import find_invalid_ids
from batchcls.manifest.snapshot import open_manifest
from batchcls.storage.filesystem import Storage
def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak_kib()
started = time.perf_counter()
manifest = open_manifest(sys.argv[1], Storage())
opened = time.perf_counter()
bad = find_invalid_ids(manifest, Storage())
validated = time.perf_counter()
fragments = sum(1 for _ in manifest.fragments(repeat(1024)))
after = peak_kib()
print(f"{manifest.rows} rows: footers {opened - started:.2f} s, ids {validated - opened:.2f} s, "
      f"{fragments} fragments, {len(bad.duplicate)} repeated, peak memory +{(after - before) / 1024:.0f} MiB")
"""


def write(path: Path, rows: int, width_bytes: int) -> None:
    """Write a manifest with one duplicate ID and a column of `width_bytes` random bytes per row."""
    random = np.random.default_rng(0)
    with pq.ParquetWriter(
        path, pa.schema([("item_id", pa.string()), ("uri", pa.string()), ("blob", pa.binary())])
    ) as out:
        for start in range(0, rows, 100_000):
            count = min(100_000, rows - start)
            ids = [f"sku-{start + n:012d}" for n in range(count)]
            if start + count == rows:
                ids[-1] = "sku-000000000000"
            blob = random.bytes(width_bytes * count)
            blobs = [blob[n * width_bytes : (n + 1) * width_bytes] for n in range(count)]
            uris = [f"s3://shop/photos/{item}.jpg" for item in ids]
            out.write_table(pa.table({"item_id": ids, "uri": uris, "blob": pa.array(blobs, pa.binary())}))


def main() -> None:
    """Plan a narrow manifest, a wide one, and one with more rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    for factor, width in ((1, 0), (1, 1000), (4, 0)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "manifest.parquet"
            write(path, rows * factor, width)
            done = subprocess.run(
                [sys.executable, "-c", _PLAN, str(path)], capture_output=True, text=True, check=True
            )
            print(f"{width} additional bytes per row: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
