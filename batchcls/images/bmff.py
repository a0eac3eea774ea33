"""AVIF and HEIC: which item of the file is the image, how large it is, and whether its data is complete.

Both are boxes of the ISO base media file format (ISO/IEC 14496-12) that contain images of ISO/IEC 23008-12. The `meta`
box lists items. The primary item is the image, possibly composed of other items (a grid of tiles) and with its alpha
channel in yet another item. AVIF sequences store their frames in a track instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from batchcls.images.bmff_boxes import BmffBox, Cursor, box_at, boxes_within
from batchcls.images.bmff_frame_size import Size, av1_sizes, hevc_configured_sizes, hevc_sizes
from batchcls.images.formats import DecodeError, Format, Header, checked_header, unpack
from batchcls.schema import Reason

_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1 miaf".split())
_FORMATS = {b"av01": Format.AVIF, b"hvc1": Format.HEIC, b"hev1": Format.HEIC}
_OTHER_CODECS = {
    b"avc1": "H.264",
    b"vvc1": "H.266",
    b"evc1": "EVC",
    b"jpeg": "JPEG",
    b"j2k1": "JPEG 2000",
    b"unci": "uncompressed samples",
}
# Items composed of other items, which a "dimg" reference lists.
_DERIVED = frozenset({b"grid", b"iovl", b"iden", b"tmap"})
# A file that ends within one of these top-level boxes is truncated; other data after the image is ignored.
_TOP_LEVEL = frozenset(b"ftyp meta mdat moov moof free skip wide uuid idat sidx mfra".split())
# Far more than in real files; they limit the time of reading.
_MAX_EXTENTS = 50_000
_MAX_PARTS = 2_000
# Coded frames are padded to whole blocks.
_MAX_PADDING = 64
# Entropy-coded data does not end in this many zeros, but preallocated files of interrupted downloads do.
_ZEROS = 64


@dataclass(slots=True)
class _Location:
    """Location of the data of an item: in the file, or in the idat box of its meta box."""

    is_in_box: bool
    extents: list[tuple[int, int]]


@dataclass(slots=True)
class _Items:
    """Contents of a meta box, by item id."""

    primary: int | None = None
    kinds: dict[int, bytes] = field(default_factory=dict)
    locations: dict[int, _Location] = field(default_factory=dict)
    parts: dict[int, list[int]] = field(default_factory=dict)
    auxiliary: dict[int, list[int]] = field(default_factory=dict)
    properties: list[BmffBox] = field(default_factory=list)
    property_numbers: dict[int, list[int]] = field(default_factory=dict)
    box_data: BmffBox | None = None


def read_bmff(data: bytes) -> Header:
    """Size of the primary image of an AVIF or HEIC file.

    `width` and `height` are those of the primary item, before rotation. `allocated_pixels` is the size of the largest
    image that is decoded for it (the image itself, a tile, its alpha channel), according to the boxes and to the coded
    data.

    Raises:
        DecodeError: not_an_image for video and audio; unsupported_format for other codecs and for sequences without
            a still image; truncated if a box or the data of an item ends beyond the file; corrupt.
    """
    brands = _brands(data)
    if not brands & (_AVIF_BRANDS | _HEIF_BRANDS):
        raise DecodeError(Reason.NOT_AN_IMAGE, "a container of video, audio or other data, not an image")
    boxes = {box.kind: box for box in reversed(list(_top_level(data)))}
    # libavif decodes the first frame of a file with the major brand avis, otherwise the primary item.
    if data[8:12] == b"avis" and b"moov" in boxes:
        return _sequence_header(data, boxes[b"moov"])
    if b"meta" not in boxes:
        if b"moov" in boxes:
            raise DecodeError(Reason.UNSUPPORTED_FORMAT, "HEIF image sequence without a still image")
        raise DecodeError(Reason.TRUNCATED, "the file ends before its image")
    items = _items(data, boxes[b"meta"])
    _require_extents(data, items)
    return _item_header(data, items, brands)


def _brands(data: bytes) -> set[bytes]:
    size, _, major = unpack(">I4s4s", data, 0)
    if size < 16 or size % 4 or size > 4096:
        raise DecodeError(Reason.CORRUPT, "the brands of the file cannot be read")
    return {major, *(unpack("4s", data, offset)[0] for offset in range(16, size, 4))}


def _top_level(data: bytes) -> Iterator[BmffBox]:
    """Yield the boxes of the file up to the first data that is not a box."""
    start = 0
    while start + 8 <= len(data):
        size, kind = unpack(">I4s", data, start)
        if kind not in _TOP_LEVEL and (size < 8 or start + size > len(data)):
            return
        box, start = box_at(data, start, len(data))
        yield box


def _items(data: bytes, meta: BmffBox) -> _Items:
    items = _Items()
    readers = {
        b"pitm": _read_primary, b"iinf": _read_kinds, b"iloc": _read_locations,
        b"iref": _read_references, b"iprp": _read_properties,
    }  # fmt: skip
    for box in boxes_within(data, meta.start + 4, meta.end):
        if box.kind == b"idat":
            items.box_data = box
        elif box.kind in readers:
            readers[box.kind](data, box, items)
    return items


def _read_primary(data: bytes, box: BmffBox, items: _Items) -> None:
    cursor = Cursor(data, box)
    items.primary = cursor.integer(4 if cursor.integer(4) >> 24 else 2)


def _read_kinds(data: bytes, box: BmffBox, items: _Items) -> None:
    (version,) = unpack(">B", data, box.start)
    for entry in boxes_within(data, box.start + (8 if version else 6), box.end):
        cursor = Cursor(data, entry)
        version = cursor.integer(4) >> 24
        if entry.kind == b"infe" and version >= 2:
            item = cursor.integer(2 if version == 2 else 4)
            cursor.skip(2)
            items.kinds[item] = cursor.skip(4)


def _read_locations(data: bytes, box: BmffBox, items: _Items) -> None:
    cursor, total = Cursor(data, box), 0
    version = cursor.integer(4) >> 24
    sizes = cursor.integer(2)
    offset_bytes, length_bytes, base_bytes = (sizes >> shift & 15 for shift in (12, 8, 4))
    index_bytes = sizes & 15 if version else 0
    for _ in range(cursor.count(4 if version == 2 else 2, 65_535)):
        item = cursor.integer(4 if version == 2 else 2)
        method = cursor.integer(2) & 15 if version else 0
        cursor.skip(2)
        base = cursor.integer(base_bytes)
        count = cursor.integer(2)
        total += count
        if total > _MAX_EXTENTS:
            raise DecodeError(Reason.CORRUPT, f"the items have more than {_MAX_EXTENTS} extents")
        extents = []
        for _ in range(count):
            cursor.skip(index_bytes)
            extents.append((base + cursor.integer(offset_bytes), cursor.integer(length_bytes)))
        if method < 2:  # Method 2 refers to the data of another item, which still images do not use.
            items.locations[item] = _Location(method == 1, extents)


def _read_references(data: bytes, box: BmffBox, items: _Items) -> None:
    (version,) = unpack(">B", data, box.start)
    id_bytes = 4 if version else 2
    for entry in boxes_within(data, box.start + 4, box.end):
        cursor = Cursor(data, entry)
        item = cursor.integer(id_bytes)
        others = cursor.identifiers(cursor.count(2), id_bytes)
        if entry.kind == b"dimg":
            items.parts.setdefault(item, []).extend(others)
        elif entry.kind == b"auxl":
            for other in others:
                items.auxiliary.setdefault(other, []).append(item)


def _read_properties(data: bytes, box: BmffBox, items: _Items) -> None:
    for entry in boxes_within(data, box.start, box.end):
        if entry.kind == b"ipco":
            items.properties = list(boxes_within(data, entry.start, entry.end))
        elif entry.kind == b"ipma":
            cursor = Cursor(data, entry)
            version_and_flags = cursor.integer(4)
            width = 2 if version_and_flags & 1 else 1
            for _ in range(cursor.count(4)):
                item = cursor.integer(4 if version_and_flags >> 24 else 2)
                numbers = cursor.skip(cursor.integer(1) * width)
                # The upper bit marks properties that readers must support.
                items.property_numbers[item] = [
                    int.from_bytes(numbers[start : start + width], "big") & (1 << 8 * width - 1) - 1
                    for start in range(0, len(numbers), width)
                ]


def _require_extents(data: bytes, items: _Items) -> None:
    for location in items.locations.values():
        for offset, length in location.extents:
            box = items.box_data
            start, end = (box.start, box.end) if location.is_in_box and box else (0, len(data))
            if start + offset + length > end:
                reason = Reason.CORRUPT if location.is_in_box else Reason.TRUNCATED
                raise DecodeError(reason, "the file ends before the data of its items")


def _item_header(data: bytes, items: _Items, brands: set[bytes]) -> Header:
    if items.primary is None or items.primary not in items.kinds:
        raise DecodeError(Reason.CORRUPT, "the file does not define which item is the image")
    required = _required_items(items, items.primary)
    codec = next((items.kinds.get(item) for item in required if items.kinds.get(item) not in _DERIVED), None)
    kind = _FORMATS.get(codec or b"")
    if kind is None:
        name = _OTHER_CODECS.get(codec or b"", "an unknown codec")
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"HEIF with {name} is not supported")
    if kind == Format.AVIF and not brands & _AVIF_BRANDS:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, "AVIF without an AVIF brand is not supported")
    properties = _properties(items, items.primary)
    full_size = next((_extent(data, box) for box in properties if box.kind == b"ispe"), (0, 0))
    # Pillow ignores the crop of an AVIF, as browsers do. libheif applies it, because it also removes block padding.
    crops = (_crop(data, box, full_size) for box in properties if box.kind == b"clap" and kind == Format.HEIC)
    width, height = next(crops, full_size)
    turns = sum(data[box.start] & 1 for box in properties if box.kind == b"irot" and box.end > box.start)
    largest = max((w * h for item in required for w, h in _sizes(data, items, item, full_size)), default=0)
    return checked_header(
        kind, width, height, tile=largest, is_rotated_by_decoder=kind == Format.HEIC and turns % 2 == 1
    )


def _required_items(items: _Items, primary: int) -> list[int]:
    """The primary item, the items it is composed of, and their alpha channels, in breadth-first order."""
    found, pending = {primary: None}, [primary]
    while pending:
        item = pending.pop(0)
        for other in items.parts.get(item, []) + items.auxiliary.get(item, []):
            if other not in found:
                found[other] = None
                pending.append(other)
        if len(found) > _MAX_PARTS:
            raise DecodeError(Reason.CORRUPT, f"the image is composed of more than {_MAX_PARTS} items")
    return list(found)


def _properties(items: _Items, item: int) -> list[BmffBox]:
    numbers = items.property_numbers.get(item, [])
    return [items.properties[number - 1] for number in numbers if 0 < number <= len(items.properties)]


def _extent(data: bytes, box: BmffBox) -> Size:
    width, height = unpack(">II", data, box.start + 4)
    return width, height


def _crop(data: bytes, box: BmffBox, full_size: Size) -> Size:
    """Width and height after the crop of a clap box; the full size if the box is invalid."""
    width, width_divisor, height, height_divisor = unpack(">IIII", data, box.start)
    if not width_divisor or not height_divisor:
        return full_size
    width, height = round(width / width_divisor), round(height / height_divisor)
    return (width, height) if 0 < width <= full_size[0] and 0 < height <= full_size[1] else full_size


def _sizes(data: bytes, items: _Items, item: int, full_size: Size) -> Iterator[Size]:
    """All sizes that a decoder may allocate for an item; those of coded frames only if not due to padding."""
    extents = [_extent(data, box) for box in _properties(items, item) if box.kind == b"ispe"]
    yield from extents
    width, height = extents[0] if extents else full_size
    for coded in _coded_sizes(data, items, item):
        if coded[0] > width + _MAX_PADDING or coded[1] > height + _MAX_PADDING:
            yield coded


def _coded_sizes(data: bytes, items: _Items, item: int) -> Iterator[Size]:
    location, kind = items.locations.get(item), items.kinds.get(item)
    content = _content(data, items, location) if location else b""
    if kind in _FORMATS and len(content) >= _ZEROS and not any(content[-_ZEROS:]):
        raise DecodeError(Reason.TRUNCATED, "the coded data is padded with zeros")
    if kind in (b"grid", b"iovl"):
        yield from _derived_size(content, 2 if kind == b"grid" else 8)
    elif kind == b"av01":
        yield from av1_sizes(content, 0, len(content))
    elif kind in (b"hvc1", b"hev1"):
        length_bytes = 4
        for box in _properties(items, item):
            if box.kind == b"hvcC":
                length_bytes = 1 + (unpack(">B", data, box.start + 21)[0] & 3)
                yield from hevc_configured_sizes(data, box.start, box.end)
        yield from hevc_sizes(content, 0, len(content), length_bytes)


def _content(data: bytes, items: _Items, location: _Location) -> bytes | memoryview:
    """The data of an item; a length of zero extends to the end of the file, as in decoders."""
    start = items.box_data.start if location.is_in_box and items.box_data else 0
    end = items.box_data.end if location.is_in_box and items.box_data else len(data)
    view = memoryview(data)
    pieces = [
        view[start + offset : start + offset + length if length else end]
        for offset, length in location.extents
    ]
    if len(pieces) == 1:
        return pieces[0]
    if sum(map(len, pieces)) > len(data):
        raise DecodeError(Reason.CORRUPT, "the extents of an item overlap")
    return b"".join(pieces)


def _derived_size(content: bytes | memoryview, offset: int) -> Iterator[Size]:
    """Size of a grid or an overlay, which is stored in its own data."""
    if len(content) < 2:
        return
    layout = ">II" if content[1] & 1 else ">HH"
    if content[0] == 0:
        width, height = unpack(layout, content, 2 + offset)
        yield width, height


def _sequence_header(data: bytes, movie: BmffBox) -> Header:
    """Size of the first image track of an AVIF sequence."""
    for track in boxes_within(data, movie.start, movie.end):
        if track.kind != b"trak":
            continue
        boxes = _descendants(data, track)
        if b"tkhd" not in boxes or b"hdlr" not in boxes:
            continue
        (handler,) = unpack("4s", data, boxes[b"hdlr"].start + 8)
        if handler == b"pict":
            start = boxes[b"tkhd"].start
            width, height = unpack(">II", data, start + (88 if data[start] else 76))
            coded = max((w * h for w, h in _first_frame(data, boxes)), default=0)
            return checked_header(Format.AVIF, width >> 16, height >> 16, tile=coded)
    raise DecodeError(Reason.CORRUPT, "the AVIF sequence has no image track")


def _descendants(data: bytes, track: BmffBox) -> dict[bytes, BmffBox]:
    """The first box of each type in a track, as far as the size and the first frame require them."""
    found: dict[bytes, BmffBox] = {}
    pending = [track]
    while pending:
        parent = pending.pop()
        for box in boxes_within(data, parent.start, parent.end):
            found.setdefault(box.kind, box)
            if box.kind in (b"mdia", b"minf", b"stbl"):
                pending.append(box)
    return found


def _first_frame(data: bytes, boxes: dict[bytes, BmffBox]) -> Iterator[Size]:
    """Sizes in the first frame of a track, all frames of which must be in the file."""
    chunks = _table(data, boxes, b"stco", 4) or _table(data, boxes, b"co64", 8)
    frames = _table(data, boxes, b"stsz", 4)
    if not chunks or not frames:
        raise DecodeError(Reason.CORRUPT, "the AVIF sequence has no frames")
    # Frame positions are in another table. The last chunk contains at least the last frame, a single chunk all frames.
    if chunks[-1] + (sum(frames) if len(chunks) == 1 else frames[-1]) > len(data):
        raise DecodeError(Reason.TRUNCATED, "the file ends before the frames of its track")
    yield from av1_sizes(data, chunks[0], min(chunks[0] + frames[0], len(data)))


def _table(data: bytes, boxes: dict[bytes, BmffBox], kind: bytes, width: int) -> list[int]:
    """Entries of a table of chunk offsets, or of frame sizes, which may be a single size for all frames."""
    if kind not in boxes:
        return []
    cursor = Cursor(data, boxes[kind])
    cursor.skip(4)
    common_size = cursor.integer(4) if kind == b"stsz" else 0
    count = cursor.count(4, _MAX_EXTENTS)
    return [common_size] * count if common_size else [cursor.integer(width) for _ in range(count)]
