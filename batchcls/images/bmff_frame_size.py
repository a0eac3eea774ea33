"""Size of the frames that an AV1 or HEVC decoder allocates, read from the coded data.

Decoders use the size in the coded data, not the size in the boxes around it: a file whose boxes state 64 x 64 can
contain a frame of 16,384 x 16,384. Therefore both are checked against the limit.
"""

from collections.abc import Iterator

from batchcls.images.formats import DecodeError, unpack
from batchcls.schema import Reason

Size = tuple[int, int]
"""Width and height in pixels."""

_AV1_SEQUENCE_HEADER = 1
_HEVC_SEQUENCE_PARAMETERS = 33
# A still image has a few units; files with many more are malicious.
_MAX_UNITS = 1_000
# The fields that are read from a header are within this many bytes, including operating points and sub-layers.
_HEADER_BYTES = 1024


class _Bits:
    """Reads big-endian bit fields; reading beyond the end of the data is a DecodeError (corrupt)."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise DecodeError(Reason.CORRUPT, "the header of the coded data is too short")
        return self._value >> self._left & (1 << count) - 1

    def exp_golomb(self) -> int:
        """Read an unsigned Exp-Golomb code, uvlc in AV1 and ue(v) in HEVC."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


def av1_sizes(data: bytes | memoryview, start: int, end: int) -> Iterator[Size]:
    """Yield the maximum frame size of each sequence header among the OBUs in data[start:end].

    Raises:
        DecodeError: corrupt.
    """
    units = 0
    while start < end:
        units = _count_unit(units)
        flags = data[start]
        start += 2 if flags & 4 else 1
        size, start = _leb128(data, start, end) if flags & 2 else (end - start, start)
        if flags >> 3 & 15 == _AV1_SEQUENCE_HEADER:
            yield _av1_sequence(_Bits(data[start : min(start + size, start + _HEADER_BYTES, end)]))
        start += size


def _count_unit(units: int) -> int:
    if units >= _MAX_UNITS:
        raise DecodeError(Reason.CORRUPT, f"the coded data has more than {_MAX_UNITS} units")
    return units + 1


def _leb128(data: bytes | memoryview, start: int, end: int) -> tuple[int, int]:
    value = 0
    for index in range(8):
        if start + index >= end:
            break
        byte = data[start + index]
        value |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            return value, start + index + 1
    raise DecodeError(Reason.CORRUPT, "the coded data contains a unit without a length")


def _av1_sequence(bits: _Bits) -> Size:
    bits.read(4)  # profile, still image
    if bits.read(1):
        bits.read(5)  # reduced header: level only
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return bits.read(width_bits) + 1, bits.read(height_bits) + 1


def _skip_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.read(1):  # timing info
        bits.read(64)
        if bits.read(1):
            bits.exp_golomb()
        if bits.read(1):  # decoder model info
            delay_bits = bits.read(5) + 1
            bits.read(42)
    has_display_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:
            bits.read(1)
        if delay_bits and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if has_display_delay and bits.read(1):
            bits.read(4)


def hevc_configured_sizes(data: bytes | memoryview, start: int, end: int) -> Iterator[Size]:
    """Yield the frame size of each sequence parameter set in the body of an hvcC box.

    Raises:
        DecodeError: corrupt or truncated.
    """
    (arrays,) = unpack(">B", data, start + 22)
    start += 23
    for _ in range(arrays):
        _, units = unpack(">BH", data, start)
        start += 3
        for _ in range(units):
            (length,) = unpack(">H", data, start)
            start += 2
            if start + length > end:
                raise DecodeError(Reason.CORRUPT, "the decoder configuration is too short")
            yield from _hevc_unit(data, start, length)
            start += length


def hevc_sizes(data: bytes | memoryview, start: int, end: int, length_bytes: int) -> Iterator[Size]:
    """Yield the frame size of each sequence parameter set among the units in data[start:end].

    Raises:
        DecodeError: corrupt.
    """
    units = 0
    while start + length_bytes < end:
        units = _count_unit(units)
        length = int.from_bytes(data[start : start + length_bytes], "big")
        start += length_bytes
        yield from _hevc_unit(data, start, min(length, end - start))
        start += length


def _hevc_unit(data: bytes | memoryview, start: int, length: int) -> Iterator[Size]:
    if length > 2 and data[start] >> 1 & 0x3F == _HEVC_SEQUENCE_PARAMETERS:
        body = bytes(data[start + 2 : start + min(length, _HEADER_BYTES)])
        # Encoders insert a 3 after two zeros to avoid start codes; it is not part of the data.
        yield _hevc_sequence(_Bits(body.replace(b"\0\0\3", b"\0\0")))


def _hevc_sequence(bits: _Bits) -> Size:
    bits.read(4)
    sub_layers = bits.read(3)
    bits.read(1 + 96)  # general profile, tier and level
    present = [(bits.read(1), bits.read(1)) for _ in range(sub_layers)]
    if sub_layers:
        bits.read(2 * (8 - sub_layers))
    for has_profile, has_level in present:
        bits.read(88 * has_profile + 8 * has_level)
    bits.exp_golomb()
    if bits.exp_golomb() == 3:
        bits.read(1)
    return bits.exp_golomb(), bits.exp_golomb()
