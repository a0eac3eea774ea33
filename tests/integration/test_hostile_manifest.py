"""A malicious manifest: URIs that must not be fetched, and ids that must not be changed."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.drawing import draw, encode
from tests.integration.conftest import Outcome

FORBIDDEN = (
    "/etc/passwd",
    "file:///etc/passwd",
    "../../../../../../../../etc/passwd",
    "images/../../secret.jpg",
    "images/link.jpg",
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://metadata.google.internal@169.254.169.254/",
    "http://2852039166/latest/meta-data/",
    "http://localhost/image.jpg",
    "simplecache::file:///etc/passwd",
    "sftp://10.0.0.1/image.jpg",
)
IDS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "two\nlines\r\n\x1b[31mred",
    "x" * 2**20,
    "../../etc/cron.d/item",
    "'; DROP TABLE items; --",
    "\u202egnp.exe",
)


@pytest.mark.long
def test_forbidden_uris_are_quarantined_and_ids_are_unchanged(
    job: Callable[..., Outcome], tiny_bundle: str, tmp_path: Path
):
    catalog = tmp_path / "catalog"
    (catalog / "images").mkdir(parents=True)
    (catalog / "images" / "good.jpg").write_bytes(encode(draw(1, 90, 70), "JPEG"))
    (tmp_path / "secret.jpg").write_bytes(encode(draw(2, 90, 70), "JPEG"))
    (catalog / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    ids = [*IDS, *(f"address-{n}" for n in range(len(FORBIDDEN))), "no-utf8"]
    raw = pa.array([*("images/good.jpg" for _ in IDS), *FORBIDDEN, b"images/\xff.jpg"], pa.binary())
    uris = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    kept = pa.array([f"shop {item[:9]!r}" for item in ids], pa.string_view())
    table = pa.table({"item_id": ids, "uri": uris, "shop": kept, "until": [2**63 - 1] * len(ids)})
    pq.write_table(
        table.set_column(3, "until", table["until"].cast("timestamp[us]")), catalog / "manifest.parquet"
    )
    outcome = job(
        *("--manifest", str(catalog / "manifest.parquet"), "--model", tiny_bundle),
        *(
            "--allowed-root",
            str(catalog),
            "--max-failed-fraction",
            "1",
            "--fetch-attempts",
            "1",
            "--keep",
            "shop",
        ),
    )
    assert outcome.exit_code == 0, outcome.log
    assert outcome.predictions.column("item_id").to_pylist() == list(IDS)
    reasons = dict(
        zip(
            *(outcome.quarantine.column(name).to_pylist() for name in ("uri", "reason")),
            strict=True,
        )
    )
    assert reasons.keys() == {*FORBIDDEN, None}
    assert reasons[None] == "forbidden_uri"
    assert outcome.predictions.column("shop").to_pylist() == [f"shop {item[:9]!r}" for item in IDS]
    assert set(reasons.values()) <= {"forbidden_uri", "unsupported_scheme"}, reasons
    assert outcome.quarantine.column("content_hash").null_count == len(FORBIDDEN) + 1
    assert "root:" not in outcome.log
    assert "\x1b[31m" not in outcome.log
    # No file was written to a path that an id or a URI names.
    assert {path.name for path in tmp_path.iterdir()} == {"catalog", "output", "secret.jpg"}
