"""A symbol file of the hooks in a process, for debuggers.

A debugger learns of code from files, not from the functions of the C library that the target's own unwinders ask
(:mod:`fentry.engine.unwind`). The file says where the slots with return hooks lie, what each is called, and how
their frames are left:

* ``.text``, ``.text.1``, ...: one for each table of slots, without bytes, at the address where it is;
* ``.eh_frame``: the tables' call frame information one behind the other, as it stands in the target. Its addresses are
  absolute (see ``Arch.frame_info``) and a frame's distance to its CIE does not change, so it may lie anywhere;
* ``.symtab``: a function ``fentry:NAME`` for each slot.

Everything is read from the target, by way of its undo journal, so it needs neither the tracer that made it nor a stop.

Sources: System V ABI (gABI) chapter 4, sections and symbols; LSB Core 5.0, 10.6, ``.eh_frame`` and ``.eh_frame_hdr``.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fentry.arch import Arch, load
from fentry.engine.journal import Entry, Meta
from fentry.engine.restore import find_journal
from fentry.errors import BadImage, Fault, TargetRefused
from fentry.image import Image
from fentry.target import Module, Readable

#: names of slots: with the function's name behind it, or alone where that is not known
PREFIX = "fentry"
#: bytes of frame information that one table may have: a million hooks
FRAMES_MAX = 1 << 28

_EHDR, _SHDR, _SYM = 64, 64, 24
_ET_EXEC, _EV_CURRENT, _CLASS64, _LITTLE = 2, 1, 2, 1
_PROGBITS, _SYMTAB, _STRTAB, _NOBITS = 1, 2, 3, 8
_ALLOC, _EXECINSTR = 2, 4
_LOCAL_FUNC = 2  #: st_info: STB_LOCAL, STT_FUNC
#: .eh_frame_hdr: version 1, then the encoding of the pointer to .eh_frame: sdata4, relative to where it stands
_HEADER = b"\x01\x1b"


@dataclass(frozen=True, slots=True)
class Hooks:
    """One table of slots with return hooks."""

    start: int
    size: int
    frames_at: int  #: where its frame information lies in the target
    frames: bytes  #: whole CIEs and FDEs, without a terminator
    slots: list[tuple[int, int]]  #: (address, size) of each, as the FDEs say


def read(target: Readable, arch_name: str) -> tuple[list[Hooks], dict[int, int]]:
    """Read the hooks of a process, which may run meanwhile; what it holds is untrusted.

    Returns: the tables, and {address of a slot: address of the place that leads to it} as far as known.
    Raises: TargetRefused (nothing of ours, damaged, or changed while it was read), Gone, Denied.
    """
    found = find_journal(target)
    if found is None:
        raise TargetRefused("the process holds nothing of fentry's", hint="it is not being traced")
    meta, entries = found
    tables = [_hooks(target, meta, *unwind) for unwind in meta.unwind]
    slots = {at for table in tables for at, _ in table.slots}
    return tables, _places(load(arch_name), entries, slots)


def names(modules: Sequence[Module], places: dict[int, int]) -> dict[int, str]:
    """Names of slots: {address of the slot: name of the function it hooks}.

    Args:
        modules: of the process.
        places: from :func:`read`.
    """
    named = {}
    for module in modules:
        inside = {slot: at - module.bias for slot, at in places.items() if module.start <= at < module.end}
        if not inside or not module.file:
            continue
        try:
            functions = Image.open(module.file).functions()
        except (BadImage, OSError):
            continue  # its hooks stay without a function's name
        starts = [f.address for f in functions]
        for slot, at in inside.items():
            i = bisect.bisect_right(starts, at) - 1
            if i >= 0 and at < functions[i].address + max(functions[i].size, 1):
                named[slot] = functions[i].name
    return named


def encode(tables: Sequence[Hooks], named: dict[int, str], machine: int) -> bytes:
    """Build the file.

    Args:
        tables: from :func:`read`, at least one.
        named: from :func:`names`.
        machine: e_machine.
    """
    strings, section_names = bytearray(b"\0"), bytearray(b"\0")
    symbols = bytearray(_SYM)
    for number, table in enumerate(tables, 1):
        for at, size in table.slots:
            name = f"{PREFIX}:{named[at]}" if at in named else PREFIX
            symbols += struct.pack("<IBBHQQ", len(strings), _LOCAL_FUNC, 0, number, at, size)
            strings += name.encode("utf-8", "surrogateescape") + b"\0"
    frames = b"".join(table.frames for table in tables) + b"\0\0\0\0"
    texts = [(f".text.{i}" if i else ".text", table.start, table.size) for i, table in enumerate(tables)]
    last = len(tables) + 4
    headers = bytearray(_SHDR)
    body = bytearray()

    def section(name: str, kind: int, flags: int, at: int, data: bytes | int, *, link: int = 0, info: int = 0) -> None:
        body.extend(b"\0" * (-len(body) % 8))
        size = data if isinstance(data, int) else len(data)
        entry = _SYM if kind == _SYMTAB else 0
        align = 1 if kind == _STRTAB else 8
        headers.extend(
            struct.pack(
                "<IIQQQQIIQQ",
                len(section_names), kind, flags, at, _EHDR + len(body), size, link, info, align, entry,
            )
        )  # fmt: skip
        section_names.extend(name.encode() + b"\0")
        if not isinstance(data, int):
            body.extend(data)

    for name, start, size in texts:
        section(name, _NOBITS, _ALLOC | _EXECINSTR, start, size)
    section(".eh_frame", _PROGBITS, _ALLOC, tables[0].frames_at, frames)
    # all symbols are local: sh_info is the number of them
    section(".symtab", _SYMTAB, 0, 0, bytes(symbols), link=last - 1, info=len(symbols) // _SYM)
    section(".strtab", _STRTAB, 0, 0, bytes(strings))
    section(".shstrtab", _STRTAB, 0, 0, bytes(section_names) + b".shstrtab\0")
    body.extend(b"\0" * (-len(body) % 8))
    head = b"\x7fELF" + bytes([_CLASS64, _LITTLE, _EV_CURRENT]) + bytes(9)
    head += struct.pack(
        "<HHIQQQIHHHHHH",
        _ET_EXEC, machine, _EV_CURRENT, 0, 0, _EHDR + len(body), 0, _EHDR, 0, 0, _SHDR, last + 1, last,
    )  # fmt: skip
    return head + bytes(body) + bytes(headers)


def _hooks(target: Readable, meta: Meta, start: int, size: int, header: int, length: int) -> Hooks:
    """Read one table's frame information and check it."""
    home = next((at for at, room in meta.code if at <= start and start + size <= at + room), None)
    room = next((room for at, room in meta.code if at == home), 0)
    if home is None or not (home <= header and header + length <= home + room) or length > FRAMES_MAX:
        raise _damaged("hooks outside the tracer's memory")
    try:
        data = target.read(header, length)
    except Fault:
        raise TargetRefused(
            "the tracer is letting go of the process: its hooks are not mapped any more", hint="look again"
        ) from None
    if data[:2] != _HEADER or len(data) < 8:
        raise _damaged("no frame information where it should be")
    begin = 4 + struct.unpack_from("<i", data, 4)[0]
    slots = []
    end = begin
    for at, cie, record in _records(data, begin):
        end = at + len(record)
        if not cie:
            slot, stride = struct.unpack_from("<QQ", record, 8)
            if not (start <= slot and slot + stride <= start + size):
                raise _damaged("frame information of something else")
            slots.append((slot, stride))
    return Hooks(start, size, header + begin, data[begin:end], slots)


def _records(data: bytes, at: int) -> Iterator[tuple[int, bool, bytes]]:
    """(offset, is it a CIE, bytes) of each record up to the terminator. Raises TargetRefused."""
    while 0 <= at <= len(data) - 4:
        length = struct.unpack_from("<I", data, at)[0]
        if not length:
            return
        record = data[at : at + 4 + length]
        cie = record[4:8] == b"\0\0\0\0"
        if len(record) != 4 + length or length < (8 if cie else 20):
            break
        yield at, cie, record
        at += 4 + length
    raise _damaged("frame information without an end")


def _damaged(what: str) -> TargetRefused:
    return TargetRefused(f"the undo journal is damaged: {what}")


def _places(arch: Arch, entries: Sequence[Entry], slots: set[int]) -> dict[int, int]:
    """{slot: place that leads to it}. Slots of tables that were replaced meanwhile have none."""
    return {to: e.at for e in entries for _, to in arch.branch_targets(e.new, e.at) if to in slots}
