"""Function ranges from unwind tables (.eh_frame): what a stripped file still says about its functions.

Every function that an exception or a backtrace may pass has a frame description entry (FDE) with its
start and size. Nothing else of the table is needed here except one fact: an entry point starts with
the frame its caller left, so an FDE whose first rule changes the frame *before* any instruction ran
describes a piece that is jumped to with a frame already built (`.cold` parts, PLT stubs).

Source: LSB Core 5.0, 10.6 "Exception Frames"; DWARF 5, 6.4.2 and 7.24.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fentry.image.elf import ET_REL, PT_GNU_EH_FRAME, Elf, Table

MAX_RECORDS = 1 << 22  #: CIEs and FDEs; the largest browsers have a quarter of this

#: DW_EH_PE_ value formats: low four bits of an encoding to struct code and size
_FORMATS = {0x02: ("H", 2), 0x03: ("I", 4), 0x04: ("Q", 8), 0x0A: ("h", 2), 0x0B: ("i", 4), 0x0C: ("q", 8)}
_PCREL, _ABSOLUTE, _DATAREL, _OMIT = 0x10, 0x00, 0x30, 0xFF

#: call frame instructions that define a frame: def_cfa and its kin (0c-0e, 12-14); advance is 40-7f, offset 80-bf;
#: undefined (07) at the start says that there is no caller: a thread's or a context's first code
_DEFINES = frozenset((0x07, 0x0C, 0x0D, 0x0E, 0x12, 0x13, 0x14, *range(0x80, 0xC0)))

_NOT_ZERO = re.compile(rb"[^\0]")


class Frames(NamedTuple):
    """Code ranges that FDEs cover, as columns sorted by start; starts are unique."""

    start: Table  #: u64
    size: Table  #: u64
    cold: Table  #: bool: entered with a frame already built, not by a call

    def take(self, keep: Table) -> Frames:
        """Those rows for which `keep` is true."""
        return Frames(self.start[keep], self.size[keep], self.cold[keep])


@dataclass(frozen=True, slots=True)
class _Cie:
    encoding: int
    augmented: bool
    signal: bool


def frame_ranges(elf: Elf) -> Frames:
    """What the FDEs of a file cover; of equal starts the first. Empty if there are none or they make no sense.

    Objects give nothing: their FDEs are not relocated yet, and they always have a symbol table.
    """
    tables = [] if elf.type == ET_REL else [(s.addr, elf.contents(s), False) for s in elf.named(".eh_frame")]
    if elf.type != ET_REL and not any(data for _, data, _ in tables):
        tables = _through_header(elf)
    starts, sizes, colds = array("Q"), array("Q"), array("B")
    for base, data, open_ended in tables:
        for start, size, cold in _walk(elf, base, data, open_ended=open_ended):
            starts.append(start)
            sizes.append(size)
            colds.append(cold)
    unique, first = np.unique(np.array(starts, np.uint64), return_index=True)
    return Frames(unique, np.array(sizes, np.uint64)[first], np.array(colds, np.uint8)[first] != 0)


def _through_header(elf: Elf) -> list[tuple[int, bytes, bool]]:
    """.eh_frame by way of PT_GNU_EH_FRAME, for files without section headers: its end is its terminator."""
    header = elf.segment(PT_GNU_EH_FRAME)
    head = elf.at(header.vaddr, 12) if header is not None else b""
    if header is None or len(head) < 12 or head[0] != 1:
        return []
    value = _pointer(elf, head, 4, header.vaddr + 4, head[1], header.vaddr)
    if value is None:
        return []
    _, room = elf.file_offset(value[0])
    return [(value[0], elf.at(value[0], room), True)] if room else []


def _walk(elf: Elf, base: int, data: bytes, *, open_ended: bool) -> Iterator[tuple[int, int, bool]]:
    """(start, size, cold) of each FDE."""
    order, cies = elf.order, dict[int, _Cie | None]()
    read_u32, size, at = struct.Struct(f"{order}I").unpack_from, len(data), 0
    for _ in range(MAX_RECORDS):
        if at + 8 > size:
            break
        (length,) = read_u32(data, at)
        body = at + 4
        if length == 0:
            if open_ended:
                break
            # padding between the tables of two inputs; skip all of it at once
            more = _NOT_ZERO.search(data, body)
            if more is None:
                break
            at = max(body, more.start() & ~3)
            continue
        if length == 0xFFFFFFFF:
            if at + 12 > size:
                break
            (length,) = struct.unpack_from(f"{order}Q", data, body)
            body += 8
        end = body + length
        if end > size or length < 4:
            break
        (back,) = read_u32(data, body)
        if back:
            where = body - back
            if where not in cies:
                cies[where] = _read_cie(elf, data, where)
            cie = cies[where]
            # a signal frame starts one byte early, for unwinders that look up pc - 1, and is never called
            if cie is not None and not cie.signal and (piece := _read_fde(elf, data, body + 4, end, base, cie)):
                yield piece
        at = end


def _read_cie(elf: Elf, data: bytes, at: int) -> _Cie | None:
    """The common entry at offset `at`, or None if it is none that can be used."""
    if at < 0 or at + 9 > len(data):
        return None
    length, ident = struct.unpack_from(f"{elf.order}II", data, at)
    end = at + 4 + length
    if ident != 0 or length == 0xFFFFFFFF or end > len(data):
        return None
    version = data[at + 8]
    stop = data.find(b"\0", at + 9, end)
    if version not in (1, 3, 4) or stop < 0:
        return None
    augmentation = data[at + 9 : stop]
    at = stop + 1
    if not augmentation:
        return _Cie(_ABSOLUTE, augmented=False, signal=False)
    if augmentation[:1] != b"z" or b"eh" in augmentation:
        return None
    if version == 4:
        at += 2  # address size, segment size
    at = _skip_leb(data, _skip_leb(data, at, end), end)  # code and data alignment
    at = at + 1 if version == 1 else _skip_leb(data, at, end)  # return address register
    at = _skip_leb(data, at, end)  # length of what follows
    encoding, signal = _ABSOLUTE, False
    for letter in augmentation[1:]:
        if letter in b"RLP" and at >= end:
            return None
        if letter == ord("R"):
            encoding = data[at]
            at += 1
        elif letter == ord("L"):
            at += 1
        elif letter == ord("P"):
            width = elf.bits // 8 if data[at] & 15 == 0 else _FORMATS.get(data[at] & 15, ("", 0))[1]
            if not width:
                return None
            at += 1 + width
        elif letter == ord("S"):
            signal = True
    return _Cie(encoding, augmented=True, signal=signal)


def _read_fde(elf: Elf, data: bytes, at: int, end: int, base: int, cie: _Cie) -> tuple[int, int, bool] | None:
    start = _pointer(elf, data, at, base + at, cie.encoding, 0)
    if start is None:
        return None
    # the size has the format of the start, but is never relative to anything
    extent = _pointer(elf, data, start[1], 0, cie.encoding & 0x07, 0)
    if extent is None or extent[1] > end or not extent[0] or not start[0]:
        return None
    at = extent[1]
    if cie.augmented and at < end:
        skip = at
        at = _skip_leb(data, at, end)
        at += data[skip] if at == skip + 1 else end
    first = next((op for op in data[at : min(end, at + 8)] if op), 0)
    return start[0], extent[0], first in _DEFINES


def _pointer(elf: Elf, data: bytes, at: int, address: int, encoding: int, base: int) -> tuple[int, int] | None:
    """(value, offset after it) of an encoded pointer; None if it is omitted, indirect or of no known kind."""
    code, width = _FORMATS.get(encoding & 0x0F, ("", 0))
    if encoding & 0x0F == 0:
        code, width = ("Q", 8) if elf.bits == 64 else ("I", 4)
    if encoding == _OMIT or encoding & 0x80 or not width or at + width > len(data):
        return None
    (value,) = struct.unpack_from(elf.order + code, data, at)
    relative = encoding & 0x70
    if relative == _PCREL:
        value += address
    elif relative == _DATAREL:
        value += base
    elif relative != _ABSOLUTE:
        return None
    return value % (1 << elf.bits), at + width


def _skip_leb(data: bytes, at: int, end: int) -> int:
    while at < end and data[at] & 0x80:
        at += 1
    return at + 1
