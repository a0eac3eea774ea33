"""`classify` with images from a seeded fuzzer: all are accounted for, no worker crashes, memory stays bounded."""

import random
import struct
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.jobs import classify
from tests.helpers.drawing import draw, encode
from tests.helpers.night import LENIENT
from tests.integration.conftest import Cluster, Outcome, cluster, run_here

__all__ = ["cluster"]

_KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
_MAX_MIB = 1600  # of which an actor with its network takes 1,000


def flip_bits(data: bytes, chance: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(chance.randrange(1, 20)):
        found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    return bytes(found)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def swap_header(data: bytes, chance: random.Random) -> bytes:
    other = encode(draw(chance.randrange(50), 40, 30), chance.choice(_KINDS))
    length = chance.randrange(2, 64)
    return other[:length] + data[length:]


def bomb(data: bytes, chance: random.Random) -> bytes:
    """Return an image whose header declares 10^9 pixels."""
    side = struct.pack(">II", 31623, 31623)
    if chance.random() < 0.5:
        png = encode(draw(1, 40, 30), "PNG")
        return png[:16] + side + png[24:]
    start = data.find(b"\xff\xc0")
    if start < 0:
        return data
    return data[: start + 5] + struct.pack(">HH", 31623, 31623) + data[start + 9 :]


@pytest.mark.parametrize(
    "images", [200, pytest.param(2000, marks=[pytest.mark.chaos, pytest.mark.timeout(1800)])]
)
def test_mutated_images_are_accounted_for(cluster: Cluster, tiny_bundle: str, tmp_path: Path, images: int):
    chance = random.Random(images)
    mutations = (flip_bits, cut, swap_header, bomb)
    originals = [encode(draw(seed, 90, 70), kind) for seed, kind in enumerate(_KINDS * 3)]
    files = [chance.choice(mutations)(chance.choice(originals), chance) for _ in range(images)]
    files += originals[:4]
    manifest = tmp_path / "manifest.parquet"
    ids = [f"item-{number}" for number in range(len(files))]
    pq.write_table(
        pa.table({"item_id": ids, "image": pa.array(files, pa.binary())}), manifest, row_group_size=100
    )
    code, log = run_here(
        cluster,
        classify,
        *("--manifest", str(manifest), "--model", tiny_bundle, "--output", str(tmp_path / "out")),
        *("--max-failed-fraction", "1", *LENIENT),
    )
    assert code == 0, log
    outcome = Outcome(code, log, tmp_path / "out")
    counts = outcome.record["counts"]
    # A mutated file can be equal to another one, whose prediction it shares.
    assert counts["predicted"] + counts["shared"] + counts["quarantined"] == len(files)
    assert counts["predicted"] >= 4
    assert "decoder_crash" not in counts["quarantined_by_reason"]
    assert {"truncated", "too_many_pixels", "not_an_image"} <= set(counts["quarantined_by_reason"])
    assert "died" not in log
    assert outcome.record["measurements"]["peak_memory_mib_of_an_actor"] < _MAX_MIB
    print(
        f"\n{len(files)} images: {Counter(counts['quarantined_by_reason'])}, {counts['predicted']} predicted"
    )
