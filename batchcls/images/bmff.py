"""AVIF and HEIC: which of the images in their boxes is meant, how large it is, and whether it is all there.

Both are boxes of the ISO base media file format (ISO/IEC 14496-12) around images of ISO/IEC 23008-12.
The `meta` box names items; the primary one is the image, perhaps put together from others (a grid of
tiles) and with its transparency in yet another. AVIF sequences keep their frames in a track instead.
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
_OTHER_CODINGS = {
    b"avc1": "H.264",
    b"vvc1": "H.266",
    b"evc1": "EVC",
    b"jpeg": "JPEG",
    b"j2k1": "JPEG 2000",
    b"unci": "uncompressed samples",
}
# Put together from other items, which a "dimg" reference names.
_DERIVED = frozenset({b"grid", b"iovl", b"iden", b"tmap"})
# Top-level boxes that are cut off make a file truncated; what is none of these behind the image is junk.
_TOP_LEVEL = frozenset(b"ftyp meta mdat moov moof free skip wide uuid idat sidx mfra".split())
# Far more than any file has. They bound the time of reading.
_MAX_EXTENTS = 50_000
_MAX_PARTS = 2_000
# Coded frames are padded to whole blocks.
_PADDING = 64
# Entropy-coded data does not end in so many of them; a download that never came to its end does.
_ZEROS = 64


@dataclass(slots=True)
class _Location:
    """Where the data of an item lies: in the file, or in the idat box of its meta box."""

    is_in_box: bool
    extents: list[tuple[int, int]]


@dataclass(slots=True)
class _Items:
    """What a meta box says of its items, by item id."""

    primary: int | None = None
    kinds: dict[int, bytes] = field(default_factory=dict)
    locations: dict[int, _Location] = field(default_factory=dict)
    parts: dict[int, list[int]] = field(default_factory=dict)
    auxiliary: dict[int, list[int]] = field(default_factory=dict)
    properties: list[BmffBox] = field(default_factory=list)
    property_numbers: dict[int, list[int]] = field(default_factory=dict)
    box_data: BmffBox | None = None


def read_bmff(data: bytes) -> Header:
    """Size of the image that an AVIF or HEIC shows first.

    `width` and `height` are those that the boxes give the primary item, before it is turned.
    `allocated_pixels` is the most that one of the images takes that are decoded for it: the whole, a
    tile, its transparency, as the boxes and as the coded data give them.

    Raises:
        DecodeError: not_an_image for a video or sound; unsupported_format for other codings and for
            sequences without a still image; truncated where a box or the data of an item lies beyond
            the end; corrupt.
    """
    brands = _brands(data)
    if not brands & (_AVIF_BRANDS | _HEIF_BRANDS):
        raise DecodeError(Reason.NOT_AN_IMAGE, "a container of video, sound or something else, and no image")
    boxes = {box.kind: box for box in reversed(list(_top_level(data)))}
    # libavif shows the first frame of a sequence that calls itself one, else the primary item.
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
        raise DecodeError(Reason.CORRUPT, "the file's brands cannot be read")
    return {major, *(unpack("4s", data, offset)[0] for offset in range(16, size, 4))}


def _top_level(data: bytes) -> Iterator[BmffBox]:
    """The boxes of the file, up to what is no box."""
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
            raise DecodeError(Reason.CORRUPT, f"the file's items lie in more than {_MAX_EXTENTS} pieces")
        extents = []
        for _ in range(count):
            cursor.skip(index_bytes)
            extents.append((base + cursor.integer(offset_bytes), cursor.integer(length_bytes)))
        if method < 2:  # 2 takes the data of another item, which no image here does
            items.locations[item] = _Location(method == 1, extents)


def _read_references(data: bytes, box: BmffBox, items: _Items) -> None:
    (version,) = unpack(">B", data, box.start)
    id_bytes = 4 if version else 2
    for entry in boxes_within(data, box.start + 4, box.end):
        cursor = Cursor(data, entry)
        item = cursor.integer(id_bytes)
        others = [cursor.integer(id_bytes) for _ in range(cursor.count(2))]
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
                # The upper bit says that a reader has to know the property.
                items.property_numbers[item] = [
                    int.from_bytes(numbers[place : place + width], "big") & (1 << 8 * width - 1) - 1
                    for place in range(0, len(numbers), width)
                ]


def _require_extents(data: bytes, items: _Items) -> None:
    for location in items.locations.values():
        for offset, length in location.extents:
            box = items.box_data
            start, end = (box.start, box.end) if location.is_in_box and box else (0, len(data))
            if start + offset + length > end:
                reason = Reason.CORRUPT if location.is_in_box else Reason.TRUNCATED
                raise DecodeError(reason, "the file ends before the data that its items name")


def _item_header(data: bytes, items: _Items, brands: set[bytes]) -> Header:
    if items.primary is None or items.primary not in items.kinds:
        raise DecodeError(Reason.CORRUPT, "the file does not say which of its items is the image")
    needed = _needed(items, items.primary)
    coding = next((items.kinds.get(item) for item in needed if items.kinds.get(item) not in _DERIVED), None)
    kind = _FORMATS.get(coding or b"")
    if kind is None:
        name = _OTHER_CODINGS.get(coding or b"", "something else")
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"HEIF of {name} is not decoded")
    if kind == Format.AVIF and not brands & _AVIF_BRANDS:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, "AVIF that does not call itself one is not decoded")
    own = _properties(items, items.primary)
    whole = next((_extent(data, box) for box in own if box.kind == b"ispe"), (0, 0))
    # Pillow shows all of an AVIF, as browsers do; libheif crops, and adds the padding of blocks by that.
    crops = (_crop(data, box, whole) for box in own if box.kind == b"clap" and kind == Format.HEIC)
    width, height = next(crops, whole)
    turns = sum(data[box.start] & 1 for box in own if box.kind == b"irot" and box.end > box.start)
    largest = max((w * h for item in needed for w, h in _sizes(data, items, item, whole)), default=0)
    return checked_header(
        kind, width, height, tile=largest, is_rotated_by_decoder=kind == Format.HEIC and turns % 2 == 1
    )


def _needed(items: _Items, primary: int) -> list[int]:
    """The primary item, what it is put together from, and the transparency of each, nearest first."""
    found, waiting = {primary: None}, [primary]
    while waiting:
        item = waiting.pop(0)
        for other in items.parts.get(item, []) + items.auxiliary.get(item, []):
            if other not in found:
                found[other] = None
                waiting.append(other)
        if len(found) > _MAX_PARTS:
            raise DecodeError(Reason.CORRUPT, f"the image is put together from more than {_MAX_PARTS}")
    return list(found)


def _properties(items: _Items, item: int) -> list[BmffBox]:
    numbers = items.property_numbers.get(item, [])
    return [items.properties[number - 1] for number in numbers if 0 < number <= len(items.properties)]


def _extent(data: bytes, box: BmffBox) -> Size:
    width, height = unpack(">II", data, box.start + 4)
    return width, height


def _crop(data: bytes, box: BmffBox, whole: Size) -> Size:
    """Width and height that a clap box leaves; a box that makes no sense leaves all."""
    width, width_parts, height, height_parts = unpack(">IIII", data, box.start)
    if not width_parts or not height_parts:
        return whole
    width, height = round(width / width_parts), round(height / height_parts)
    return (width, height) if 0 < width <= whole[0] and 0 < height <= whole[1] else whole


def _sizes(data: bytes, items: _Items, item: int, whole: Size) -> Iterator[Size]:
    """Every size that a decoder may take an item for; those of coded frames only beyond their padding."""
    extents = [_extent(data, box) for box in _properties(items, item) if box.kind == b"ispe"]
    yield from extents
    width, height = extents[0] if extents else whole
    for coded in _coded_sizes(data, items, item):
        if coded[0] > width + _PADDING or coded[1] > height + _PADDING:
            yield coded


def _coded_sizes(data: bytes, items: _Items, item: int) -> Iterator[Size]:
    location, kind = items.locations.get(item), items.kinds.get(item)
    content = _content(data, items, location) if location else b""
    if kind in _FORMATS and len(content) >= _ZEROS and not any(content[-_ZEROS:]):
        raise DecodeError(Reason.TRUNCATED, "the coded data is filled up with zeros")
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
    """The data of an item; a length of zero reaches to the end of the file, as it does for decoders."""
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
        raise DecodeError(Reason.CORRUPT, "the pieces of an item overlap")
    return b"".join(pieces)


def _derived_size(content: bytes | memoryview, offset: int) -> Iterator[Size]:
    """The canvas of a grid or an overlay, as its own data gives it."""
    if len(content) < 2:
        return
    layout = ">II" if content[1] & 1 else ">HH"
    if content[0] == 0:
        width, height = unpack(layout, content, 2 + offset)
        yield width, height


def _sequence_header(data: bytes, movie: BmffBox) -> Header:
    """Size of the first track of images in an AVIF sequence."""
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
    raise DecodeError(Reason.CORRUPT, "the AVIF sequence has no track of images")


def _descendants(data: bytes, track: BmffBox) -> dict[bytes, BmffBox]:
    """The first box of each type below a track, as far as its sizes and its first frame need them."""
    found: dict[bytes, BmffBox] = {}
    waiting = [track]
    while waiting:
        parent = waiting.pop()
        for box in boxes_within(data, parent.start, parent.end):
            found.setdefault(box.kind, box)
            if box.kind in (b"mdia", b"minf", b"stbl"):
                waiting.append(box)
    return found


def _first_frame(data: bytes, boxes: dict[bytes, BmffBox]) -> Iterator[Size]:
    """The sizes in the first frame of a track, all of whose frames have to be in the file."""
    chunks = _table(data, boxes, b"stco", 4) or _table(data, boxes, b"co64", 8)
    frames = _table(data, boxes, b"stsz", 4)
    if not chunks or not frames:
        raise DecodeError(Reason.CORRUPT, "the AVIF sequence has no frame")
    # Where each frame lies takes another table; the last chunk holds the last frame, the only one all.
    if chunks[-1] + (sum(frames) if len(chunks) == 1 else frames[-1]) > len(data):
        raise DecodeError(Reason.TRUNCATED, "the file ends before the frames that its track names")
    yield from av1_sizes(data, chunks[0], min(chunks[0] + frames[0], len(data)))


def _table(data: bytes, boxes: dict[bytes, BmffBox], kind: bytes, width: int) -> list[int]:
    """The entries of a table of chunk offsets or, with a size that may hold for all, of frames."""
    if kind not in boxes:
        return []
    cursor = Cursor(data, boxes[kind])
    cursor.skip(4)
    same = cursor.integer(4) if kind == b"stsz" else 0
    count = cursor.count(4, _MAX_EXTENTS)
    return [same] * count if same else [cursor.integer(width) for _ in range(count)]
