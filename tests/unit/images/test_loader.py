"""The loader returns all rows in order, in blocks, with failures; tested on files on disk."""

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from batchcls.images.decode import decode
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, LoadSettings
from batchcls.images.loader import Loader
from batchcls.images.repeated_images import RepeatedImages
from batchcls.images.transform import Transform
from batchcls.images.url_policy import AddressPolicy
from batchcls.preprocessing import Preprocessing, Views
from batchcls.schema import Failure, Reason, loaded_schema
from tests.helpers.drawing import draw, encode

SMALL = Preprocessing(
    input_height=8,
    input_width=8,
    resize_height=8,
    resize_width=8,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)


def settings(base: Path, **changes: object) -> LoadSettings:
    values: dict[str, object] = {
        "run_id": "test",
        "base": str(base),
        "kept": (pa.field("shop", pa.string()),),
        "fetch": FetchPolicy(addresses=AddressPolicy(allow_private_addresses=True)),
        "limits": DecodeLimits(),
        "preprocessing": SMALL,
        "views": Views(),
        "normalize": "engine",
        "fetch_threads": 4,
        "decode_threads": 2,
        "block_rows": 4,
    }
    return LoadSettings(**(values | changes))  # type: ignore[arg-type]


def tables(
    uris: list[str | None], rows_per_table: int = 4, images: list[bytes | None] | None = None
) -> Iterator[pa.Table]:
    table = pa.table(
        {
            "row": pa.array(range(100, 100 + len(uris)), pa.int64()),
            "item_id": [f"id{n}" for n in range(len(uris))],
            "uri": pa.array(uris, pa.string()),
            "image": pa.array(images or [None] * len(uris), pa.binary()),
            "shop": pa.array([f"s{n}" for n in range(len(uris))]),
        }
    )
    return (table.slice(start, rows_per_table) for start in range(0, len(uris), rows_per_table))


def gray(value: int) -> bytes:
    from PIL import Image

    return encode(Image.new("RGB", (20, 10), (value, value, value)), "PNG")


def pixels(block: pa.Table) -> list[np.ndarray | None]:
    found = block.column("pixels").to_pylist()
    return [None if data is None else np.frombuffer(data, np.uint8).reshape(8, 8, 3) for data in found]


def test_blocks_contain_their_rows_in_order_with_matching_pixels(tmp_path: Path):
    for value in range(10):
        (tmp_path / f"{value}.png").write_bytes(gray(value * 20))
    blocks = list(Loader(settings(tmp_path)).load(tables([f"{v}.png" for v in range(10)]), {}))
    assert [block.num_rows for block in blocks] == [4, 4, 2]
    joined = pa.concat_tables(blocks)
    assert joined.schema.equals(loaded_schema((pa.field("shop", pa.string()),)))
    assert joined.column("row").to_pylist() == list(range(100, 110))
    assert joined.column("shop").to_pylist() == [f"s{n}" for n in range(10)]
    for value, image in enumerate(p for block in blocks for p in pixels(block)):
        assert image is not None
        assert (image == value * 20).all()


def test_failed_row_keeps_its_position_and_known_values(tmp_path: Path):
    data = gray(50)
    (tmp_path / "good.png").write_bytes(data)
    (tmp_path / "cut.png").write_bytes(data[:40])
    (tmp_path / "empty.png").write_bytes(b"")
    uris = ["good.png", "cut.png", "missing.png", "empty.png", None, "good.png"]
    rejected = {105: Failure(Reason.DUPLICATE_ID, "an earlier row has this id")}
    (block,) = Loader(settings(tmp_path)).load(tables(uris, 10), rejected)
    expected = [None, "truncated", "not_found", "empty", "no_image", "duplicate_id"]
    assert block.column("reason").to_pylist() == expected
    assert [image is None for image in pixels(block)] == [False, True, True, True, True, True]
    assert block.column("content_hash").to_pylist()[:3] == [
        hashlib.sha256(data).hexdigest(),
        hashlib.sha256(data[:40]).hexdigest(),
        None,
    ]
    assert block.column("attempts").to_pylist() == [1, 1, 1, 1, 0, 0]
    assert block.column("width").to_pylist()[0] == 20


def test_inline_bytes_take_precedence_over_the_uri(tmp_path: Path):
    (block,) = Loader(settings(tmp_path)).load(tables(["missing.png", None], images=[gray(9), gray(7)]), {})
    assert [int(image[0, 0, 0]) for image in pixels(block) if image is not None] == [9, 7]


def test_normalized_pixels_are_float32(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(gray(255))
    (block,) = Loader(settings(tmp_path, normalize="worker")).load(tables(["a.png"]), {})
    values = np.frombuffer(block.column("pixels")[0].as_py(), np.float32)
    assert values.shape == (8 * 8 * 3,)
    assert np.allclose(values, (1 - 0.5) / 0.25)


def test_requests_are_concurrent(tmp_path: Path):
    """The server does not respond before eight requests have arrived, so sequential requests would never end."""
    together = threading.Barrier(8)
    body = gray(30)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            together.wait(timeout=30)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        uris: list[str | None] = [f"http://127.0.0.1:{server.server_port}/{n}.png" for n in range(16)]
        blocks = list(Loader(settings(tmp_path, fetch_threads=8)).load(tables(uris, 4), {}))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert [reason for block in blocks for reason in block.column("reason").to_pylist()] == [None] * 16


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_blocks_do_not_depend_on_the_number_of_threads(tmp_path: Path, threads: int):
    for n in range(23):
        data = encode(draw(n, 30, 30), "JPEG")
        (tmp_path / f"{n}.jpg").write_bytes(data if n % 5 else data[:100])
    uris: list[str | None] = [f"{n}.jpg" for n in range(23)]
    blocks = list(Loader(settings(tmp_path, fetch_threads=threads)).load(tables(uris, 4), {}))
    one = list(Loader(settings(tmp_path, fetch_threads=1, decode_threads=1)).load(tables(uris, 4), {}))
    timings = ["fetch_seconds", "decode_seconds"]
    for block, expected in zip(blocks, one, strict=True):
        assert block.drop_columns(timings).equals(expected.drop_columns(timings))


def test_concurrent_loads_return_their_own_rows(tmp_path: Path):
    for value in range(12):
        (tmp_path / f"{value}.png").write_bytes(gray(value * 20))
    loader = Loader(settings(tmp_path))
    forth = [f"{value}.png" for value in range(12)]
    start = threading.Barrier(2)

    def load(uris: list[str | None]) -> list[int]:
        start.wait()
        blocks = [block for _ in range(20) for block in loader.load(tables(uris), {})]
        return [int(image[0, 0, 0]) for block in blocks for image in pixels(block) if image is not None]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, [[*forth], [*reversed(forth)]])
    assert first == [value * 20 for value in range(12)] * 20
    assert second == [value * 20 for value in reversed(range(12))] * 20


def test_cpu_seconds_exclude_waiting(tmp_path: Path):
    """With one decoding slot and eight threads, seven threads wait, which must not count."""
    data = encode(draw(1, 1200, 900), "JPEG", quality=95)
    (tmp_path / "a.jpg").write_bytes(data)
    loader = Loader(settings(tmp_path, fetch_threads=8, decode_threads=1))
    assert loader.cpu_seconds == 0
    started = time.process_time()
    blocks = list(loader.load(tables(["a.jpg"] * 24), {}))
    spent = time.process_time() - started
    decoding = sum(sum(block.column("decode_seconds").to_pylist()) for block in blocks)
    assert 0 < decoding <= loader.cpu_seconds * 1.001 <= spent * 1.01
    before = loader.cpu_seconds
    list(loader.load(tables(["missing.jpg"]), {}))
    assert loader.cpu_seconds > before


@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_decoding_can_be_turned_off_and_reports_the_stored_size(tmp_path: Path, orientation: int):
    (tmp_path / "large.jpg").write_bytes(encode(draw(1, 640, 480), "JPEG", orientation=orientation))
    transform = Transform(SMALL)
    whole = transform(decode((tmp_path / "large.jpg").read_bytes(), DecodeLimits()).pixels)
    found = {}
    for reduced, margin in ((False, None), (True, 4.0)):
        changed = settings(tmp_path, decode_margin=margin)
        (block,) = Loader(changed).load(tables(["large.jpg"]), {})
        assert (block.column("width")[0].as_py(), block.column("height")[0].as_py()) == (640, 480)
        (found[reduced],) = pixels(block)
    assert np.array_equal(found[False], whole)
    assert not np.array_equal(found[True], whole)
    assert np.abs(found[True].astype(int) - whole).max() <= 12


def shared_catalog(folder: Path) -> list[str | None]:
    """Twelve rows with five contents, of which x is damaged; most occur in several blocks of four rows."""
    contents = {"a": gray(10), "b": gray(90), "c": gray(170), "d": gray(250), "x": gray(30)[:40]}
    names = [*"abxb", *"babx", *"cbdd"]
    for number, name in enumerate(names):
        (folder / f"{number}.png").write_bytes(contents[name])
    return [f"{number}.png" for number in range(len(names))]


def test_repeated_images_are_decoded_once_and_assigned_to_the_first_row(tmp_path: Path):
    uris = shared_catalog(tmp_path)
    decoded: list[str] = []

    class Counted(RepeatedImages):
        def must_decode(self, content_hash: str, block: int) -> bool:
            is_first = super().must_decode(content_hash, block)
            decoded.extend([content_hash] if is_first else [])
            return is_first

    for _ in range(20):  # the threads fetch the rows in another order each time
        decoded.clear()
        loader = Loader(settings(tmp_path, fetch_threads=12))
        whole = pa.concat_tables(loader.load(tables(uris), {}))
        loaded = pa.concat_tables(loader.load(tables(uris), {}, Counted()))
        shown = pixels(loaded)
        assert [n for n, image in enumerate(shown) if image is not None] == [0, 1, 8, 10]
        assert [n for n, reason in enumerate(loaded["reason"].to_pylist()) if reason] == [2]
        for number in (0, 1, 8, 10):
            np.testing.assert_array_equal(shown[number], pixels(whole)[number])
        for name in (
            "row",
            "item_id",
            "uri",
            "content_hash",
            "n_bytes",
            "attempts",
            "source_version",
            "shop",
        ):
            assert loaded[name].equals(whole[name]), name
        # A row of a later block that is fetched first is decoded in addition; no other content is decoded twice.
        assert len(set(decoded)) == 5
        assert len(decoded) <= 5 + 3


def test_known_images_are_not_decoded(tmp_path: Path):
    uris = shared_catalog(tmp_path)
    known = {hashlib.sha256((tmp_path / f"{number}.png").read_bytes()).hexdigest() for number in (0, 2)}
    loaded = pa.concat_tables(
        Loader(settings(tmp_path)).load(tables(uris), {}, RepeatedImages(known.__contains__))
    )
    assert [n for n, image in enumerate(pixels(loaded)) if image is not None] == [1, 8, 10]
    assert loaded["reason"].null_count == len(uris)
    assert loaded["content_hash"].null_count == 0


def test_blocks_can_share_the_pixels_of_repeated_images(tmp_path: Path):
    uris = shared_catalog(tmp_path)
    loader = Loader(settings(tmp_path, fetch_threads=12))
    whole = pa.concat_tables(loader.load(tables(uris), {}))
    for _ in range(5):
        shared = pa.concat_tables(loader.load(tables(uris), {}, RepeatedImages(shares_pixels=True)))
        timings = ["fetch_seconds", "decode_seconds"]
        assert shared.drop_columns(timings).equals(whole.drop_columns(timings))


def test_large_network_of_a_cascade_gets_its_size_from_the_same_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "one.jpg").write_bytes(encode(draw(1, 900, 700), "JPEG"))
    (tmp_path / "cut.jpg").write_bytes(encode(draw(2, 90, 70), "JPEG")[:500])
    large = SMALL.model_copy(
        update={"input_height": 32, "input_width": 32, "resize_height": 32, "resize_width": 32}
    )
    decoded = []

    def recorded(*given: object) -> object:
        decoded.append(decode(*given))  # type: ignore[arg-type]
        return decoded[-1]

    monkeypatch.setattr("batchcls.images.loader.decode", recorded)
    loader = Loader(settings(tmp_path, large_preprocessing=large, decode_margin=2.0))
    (block,) = loader.load(tables(["one.jpg", "cut.jpg", "one.jpg"], 10), {}, RepeatedImages())
    assert block.schema.equals(loaded_schema((pa.field("shop", pa.string()),), large_pixels=True))
    (one,) = decoded
    assert (
        64 <= min(one.pixels.shape[:2]) < 700
    )  # reduced, but to twice the size for the large network at least
    for name, preprocessing in (("pixels", SMALL), ("large_pixels", large)):
        first, cut, repeated = block.column(name).to_pylist()
        expected = Transform(preprocessing)(one.pixels, one.extent)
        assert first == expected.tobytes(), name
        assert cut is repeated is None
