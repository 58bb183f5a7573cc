"""Protobuf's wire format as far as sparse initializers need it: varints in bulk, fields without parsing.

Python's protobuf holds one index of ``int64_data`` as an object while a message is built or listed; numpy
packs and unpacks millions of them in a few passes. Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LENGTH_DELIMITED = 2
_FIXED_BYTES = {1: 8, 5: 4}  # wire type: bytes of a fixed-size value
_VARINT_LIMITS = [
    1 << (7 * length) for length in range(1, 6)
]  # below the first: 1 byte, below the next: 2, …
_CHUNK_ELEMENTS = 2**20


class Field(NamedTuple):
    """A field: its number and wire type, where its tag begins, where its payload begins and ends."""

    number: int
    wire_type: int
    begin: int
    payload: int
    end: int


def text(string: str | bytes) -> str:
    """A message's string as str. Python's protobuf gives bytes for one that is not UTF-8.

    Raises:
        ValueError: It is not UTF-8.
    """
    return string if isinstance(string, str) else string.decode("utf-8")


def varint(number: int) -> bytes:
    """``number`` >= 0 as a varint: seven bits a byte, lowest first, the high bit set on all but the last."""
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def field_head(number: int, payload_bytes: int) -> bytes:
    """Tag and length that stand before a length-delimited payload."""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(payload_bytes)


def packed_index_bytes(kept: NDArray[np.bool_]) -> int:
    """Size of the packed varints of the positions where the flat ``kept`` is True, without building them."""
    total, low = 0, 0
    for length, high in enumerate(_VARINT_LIMITS, start=1):
        total += length * int(np.count_nonzero(kept[low:high]))
        low = high
    return total


def expected_index_bytes(size: int, density: float) -> int:
    """The same for ``size`` positions of which a share ``density`` is kept, spread evenly."""
    total, low = 0.0, 0
    for length, high in enumerate(_VARINT_LIMITS, start=1):
        total += length * density * max(0, min(size, high) - low)
        low = high
    return round(total)


def packed_indices(kept: NDArray[np.bool_]) -> Iterator[bytes]:
    """The packed varints of the positions where the flat ``kept`` is True, ascending, piece by piece."""
    for start in range(0, kept.size, _CHUNK_ELEMENTS):
        yield pack_ascending(np.flatnonzero(kept[start : start + _CHUNK_ELEMENTS]) + start)


def pack_ascending(numbers: NDArray[np.int64]) -> bytes:
    """Ascending numbers in [0, 2^35) as packed varints; ascending, so equal lengths stand together."""
    pieces = []
    for length, part in enumerate(np.split(numbers, np.searchsorted(numbers, _VARINT_LIMITS)), start=1):
        encoded = np.empty((part.size, length), np.uint8)
        for place in range(length):
            more = 0x80 if place < length - 1 else 0
            encoded[:, place] = (part >> (7 * place)) & 0x7F | more
        pieces.append(encoded.tobytes())
    return b"".join(pieces)


def unpack_varints(packed: bytes) -> NDArray[np.int64]:
    """The numbers in packed varints, two's complement as in ``int64_data``.

    Raises:
        ValueError: The bytes end inside a number, or a number is longer than ten bytes.
    """
    octets = np.frombuffer(packed, np.uint8)
    pieces, start = [np.empty(0, np.int64)], 0
    while start < octets.size:
        chunk = octets[start : start + _CHUNK_ELEMENTS]
        ends = np.flatnonzero(chunk < 0x80)
        if not ends.size:
            raise ValueError("packed numbers end inside a number")
        begins = np.concatenate(([0], ends[:-1] + 1))
        lengths = ends - begins + 1
        if lengths.max() > 10:
            raise ValueError("a packed number is longer than ten bytes")
        numbers = np.zeros(ends.size, np.uint64)
        for place in range(int(lengths.max())):
            longer = lengths > place
            part = (chunk[begins[longer] + place] & 0x7F).astype(np.uint64)
            numbers[longer] |= part << np.uint64(7 * place)
        pieces.append(numbers.view(np.int64))
        start += int(ends[-1]) + 1
    return np.concatenate(pieces)


def fields(message: bytes | mmap.mmap, start: int, stop: int) -> Iterator[Field]:
    """The fields of the message that lies in ``message[start:stop]``, in order.

    Raises:
        EOFError: A field runs past ``stop``.
        ValueError: A tag that no message has.
    """
    while start < stop:
        begin = start
        tag, start = _read_varint(message, start, stop)
        number, wire_type = tag >> 3, tag & 7
        payload = start
        if wire_type == 0:
            _, start = _read_varint(message, start, stop)
        elif wire_type == LENGTH_DELIMITED:
            length, payload = _read_varint(message, start, stop)
            start = payload + length
        elif wire_type in _FIXED_BYTES:
            start += _FIXED_BYTES[wire_type]
        else:
            raise ValueError(f"wire type {wire_type} at byte {begin}")
        if number == 0:
            raise ValueError(f"field number 0 at byte {begin}")
        if start > stop:
            raise EOFError(f"field {number} at byte {begin} needs {start - stop} bytes more")
        yield Field(number, wire_type, begin, payload, start)


def _read_varint(message: bytes | mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """The varint at ``start`` and the position after it."""
    number = 0
    for place in range(10):
        if start + place >= stop:
            raise EOFError(f"a number at byte {start} is cut")
        octet = message[start + place]
        number |= (octet & 0x7F) << (7 * place)
        if octet < 0x80:
            return number, start + place + 1
    raise ValueError(f"a number at byte {start} is longer than ten bytes")
