"""Where compilers left room for tracing: patchable entries, recorded mcount sites, and calls to mcount.

Three kinds of traces are read, the surest first:

1. ``__patchable_function_entries``: one pointer per function, to the first nop. Of N nops, M may lie *before*
   the function label, and the pointer then does too. The bytes in the file may be zero, with the value in a
   relocation (RELA), so relocations are applied first.
2. ``__mcount_loc``: one pointer per call of mcount or fentry, or to the nop in its place (-mnop-mcount).
3. Calls to ``mcount``, ``__fentry__`` and their kin: by relocation in objects; in linked files by every
   instruction of the code that calls one of them, through the PLT, the GOT, or directly.

When none of these is left (stripped static program, section discarded) nothing is found here. Then
``Arch.sled_at(code, "scan")`` looks for nops at the entry itself, as strictly as it can.

Source: gcc manual, -fpatchable-function-entry, -pg, -mfentry, -mrecord-mcount; values checked with gcc 12 and clang 14.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fentry.image.elf import ET_REL, SHF_EXECINSTR, Elf, Section, Table
from fentry.image.functions import Function
from fentry.image.isa import ISAS, Isa, Transfer

MCOUNT_NAMES = ("__fentry__", "mcount", "_mcount", "__gnu_mcount_nc", "__mcount")
CHUNK = 1 << 18  #: bytes of code searched at once, which bounds memory
MAX_BEFORE = 256  #: bytes of nops in front of a label


@dataclass(frozen=True, slots=True)
class SledHint:
    """One place made for tracing; the arch decides what can be done with it.

    ``address`` is the first byte that may be patched and is executed at entry: for "patchable" the first
    nop after the label and its landing pad, for "mcount" and "fentry" the call, for "nop" the nop where
    such a call was. With N = M a patchable function has nops before its label only, and ``address``
    is then an ordinary instruction.
    """

    kind: str  #: "patchable" | "mcount" | "fentry" | "nop"
    address: int
    before: int = 0  #: bytes of nops directly in front of the function label


class Code:
    """The executable bytes of a file, by address, read once."""

    def __init__(self, elf: Elf) -> None:
        self.pieces = [(start, elf.at(start, end - start)) for start, end in _affordable(elf)]
        self._starts = [start for start, _ in self.pieces]

    def at(self, address: int, size: int) -> bytes:
        """Up to `size` bytes of code; fewer at the end of a section."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return b""
        start, data = self.pieces[index]
        return data[address - start : address - start + size]


def _affordable(elf: Elf) -> list[tuple[int, int]]:
    """Code ranges; hostile segments that map one piece of the file many times are cut off."""
    left, out = elf.source.size, []
    for start, end in elf.code:
        if end - start <= left:
            out.append((start, end))
            left -= end - start
    return out


@dataclass(frozen=True, slots=True)
class CallTargets:
    """How code may name some functions: by address (of the function or a PLT entry), or through a slot."""

    direct: frozenset[int]
    slots: frozenset[int]


def pointers(elf: Elf, section: Section, symbol_at: Callable[[int], int]) -> list[int]:
    """Values of a section of pointers as they are at run time with load bias 0, zeros dropped.

    Args:
        elf: the file.
        section: its section of pointers.
        symbol_at: gives the address of a symbol by its index, for relocations against symbols.
    """
    width = elf.bits // 8
    data = elf.contents(section)
    values = np.frombuffer(data[: len(data) // width * width], f"{elf.order}u{width}").astype(np.uint64)
    isa = ISAS.get(elf.machine)
    if not len(values) or isa is None:
        return [int(value) for value in values if value]
    base = 0 if elf.type == ET_REL else section.addr
    relocations = elf.section_relocations(section.index) if elf.type == ET_REL else elf.relocations
    for table in relocations:
        where = table.offset - np.uint64(base)
        mine = np.flatnonzero((where < len(values) * width) & (where % np.uint64(width) == 0))
        for row in mine.tolist():
            index, kind = int(where[row]) // width, int(table.kind[row])
            addend = int(values[index] if table.addend is None else table.addend[row])
            if kind == isa.relative and elf.type != ET_REL:
                values[index] = addend % (1 << 64)
            elif kind in isa.words and (symbol := symbol_at(int(table.symbol[row]))):
                values[index] = (symbol + addend) % (1 << 64)
    values &= np.uint64((1 << elf.bits) - 1)
    return [value for value in values.tolist() if value]


def patchable_label(isa: Isa, code: Code, record: int, starts: Sequence[int]) -> int | None:
    """The function label that a record of ``__patchable_function_entries`` belongs to, or None.

    Args:
        isa: the table row.
        code: the code.
        record: address of the first nop.
        starts: function addresses, sorted.
    """
    index = bisect_right(starts, record)
    if index:
        label = starts[index - 1]
        if record == label or record - label == isa.pad(code.at(label, 8)):
            return label
    if index < len(starts) and 0 < starts[index] - record <= MAX_BEFORE:
        gap = code.at(record, starts[index] - record)
        if len(gap) == starts[index] - record and isa.all_nops(gap):
            return starts[index]
    return None


def patchable_hint(isa: Isa, code: Code, record: int, label: int) -> SledHint:
    """The hint of one record. See :class:`SledHint` for the address."""
    if record >= label:
        return SledHint("patchable", record)
    return SledHint("patchable", label + isa.pad(code.at(label, 8)), before=label - record)


def recorded_kind(isa: Isa, code: Code, site: int, entry: int) -> str:
    """What is at a site of ``__mcount_loc`` in the function at `entry`: "nop", "fentry" or "mcount"."""
    if any(code.at(site, len(nop)) == nop for nop in isa.nops):
        return "nop"
    return "fentry" if site - entry in (0, isa.pad(code.at(entry, 8))) else "mcount"


def find_targets(elf: Elf, code: Code, names: Sequence[str], defined: Sequence[int]) -> CallTargets:
    """Addresses and slots through which code of this file can call one of some functions.

    Args:
        elf: the file.
        code: its code.
        names: function names.
        defined: addresses of those that the file itself defines.
    """
    isa = ISAS.get(elf.machine)
    direct, slots = {address for address in defined if address}, set[int]()
    if isa is None:
        return CallTargets(frozenset(direct), frozenset())
    symbols = elf.dynsym
    rows: Table = np.empty(0, np.intp)
    if symbols is not None:
        rows = np.concatenate([symbols.rows_named(name) for name in names]) if names else rows
    wanted = np.array(sorted(direct), np.uint64)
    for table in elf.relocations:
        hit = np.isin(table.symbol, rows) & (table.symbol != 0)
        if table.addend is not None and len(wanted):
            hit |= (table.kind == isa.relative) & np.isin(table.addend, wanted)
        slots.update(table.offset[hit].tolist())
    if len(wanted):
        slots.update(_words_holding(elf, wanted))
    if slots:
        found = [place for form in isa.stubs for place in _find(code, isa, form, frozenset(), frozenset(slots))]
        for start, prefix in found:
            # a call may name any of the bytes that lead into the jump
            direct.update(range(start, start + prefix + 1, isa.step))
    return CallTargets(frozenset(direct), frozenset(slots))


def _words_holding(elf: Elf, wanted: Table) -> list[int]:
    """Addresses of aligned data words that hold one of the `wanted` values: GOT entries filled by the linker."""
    width, left, found = elf.bits // 8, elf.source.size, []
    for load in elf.loads:
        if "x" in load.perms or load.filesz > left:
            continue
        left -= load.filesz
        skip = -load.vaddr % width
        raw = elf.at(load.vaddr + skip, max(0, load.filesz - skip) // width * width)
        words = np.frombuffer(raw[: len(raw) // width * width], f"{elf.order}u{width}")
        hits = np.flatnonzero(np.isin(words, wanted.astype(words.dtype)))
        found += [load.vaddr + skip + width * hit for hit in hits.tolist()]
    return found


def find_calls(elf: Elf, code: Code, targets: CallTargets) -> list[int]:
    """Sorted addresses of every instruction that calls one of the targets."""
    isa = ISAS.get(elf.machine)
    if isa is None or not (targets.direct or targets.slots):
        return []
    return sorted({at for form in isa.calls for at, _ in _find(code, isa, form, targets.direct, targets.slots)})


def _find(code: Code, isa: Isa, form: Transfer, direct: frozenset[int], slots: frozenset[int]) -> list[tuple[int, int]]:
    """(address, bytes of prefix) of each place where `form` leads to a target."""
    goals = np.array(sorted(slots if form.through else direct), np.uint64)
    found: list[tuple[int, int]] = []
    if not len(goals):
        return found
    first_mask, first = form.mask & 0xFF, form.value & 0xFF
    for start, data in code.pieces:
        for base in range(0, len(data), CHUNK):
            # 8 bytes more than the chunk, zeros at the end of the code, for the words that begin in it
            piece = np.frombuffer(
                data[base : base + CHUNK + 8].ljust(min(CHUNK, len(data) - base) + 8, b"\0"), np.uint8
            )
            heads = piece[:-8]
            phase = -(start + base) % isa.step
            at = np.flatnonzero(heads[phase :: isa.step] & np.uint8(first_mask) == first) * isa.step + phase
            words = np.zeros(len(at), np.uint64)
            for byte in range(8):
                words |= piece[at + byte].astype(np.uint64) << np.uint64(8 * byte)
            hit = words & np.uint64(form.mask) == np.uint64(form.value)
            at, words = at[hit], words[hit]
            to = at.astype(np.uint64) + np.uint64(start + base) + form.distances(words)
            for offset in at[np.isin(to, goals)].tolist():
                place = base + offset
                if place + form.size > len(data):
                    continue
                prefix = next((p for p in form.prefixes if place >= len(p) and data.startswith(p, place - len(p))), b"")
                found.append((start + place - len(prefix), len(prefix)))
    return found


def object_calls(elf: Elf, code: Code, names: Sequence[str]) -> list[int]:
    """Addresses of calls to `names` in a relocatable object, by relocation."""
    isa, symbols = ISAS.get(elf.machine), elf.symtab
    if isa is None or symbols is None:
        return []
    rows = np.concatenate([symbols.rows_named(name) for name in names])
    if not len(rows):
        return []
    opcodes = dict(isa.call_relocations)
    found = []
    for section in elf.sections:
        if not section.flags & SHF_EXECINSTR:
            continue
        for table in elf.section_relocations(section.index):
            for row in np.flatnonzero(np.isin(table.symbol, rows)).tolist():
                opcode = opcodes.get(int(table.kind[row]))
                offset = int(table.offset[row])
                if opcode is None or not len(opcode) <= offset < section.size:
                    continue
                at = section.addr + offset - len(opcode)
                if code.at(at, len(opcode)) == opcode:
                    found.append(at)
    return sorted(found)


def entry_sites(
    isa: Isa | None, code: Code, sites: Sequence[int], functions: Sequence[Function], fentry: Sequence[int]
) -> dict[int, SledHint]:
    """Give each call site to the function that contains it: the first one in each, keyed by its address.

    Args:
        isa: the table row.
        code: the code.
        sites: sorted addresses of calls to mcount or fentry.
        functions: all functions, sorted by address.
        fentry: those of `sites` that call ``__fentry__``: they count at the entry only.
    """
    starts = [function.address for function in functions]
    at_entry, hints = set(fentry), dict[int, SledHint]()
    for site in sites:
        index = bisect_right(starts, site) - 1
        if index < 0 or isa is None:
            continue
        function = functions[index]
        entry = function.address
        if function.cold or entry in hints or site >= entry + function.size:
            continue
        if site in at_entry:
            if site - entry in (0, isa.pad(code.at(entry, 8))):
                hints[entry] = SledHint("fentry", site)
        else:
            hints[entry] = SledHint("mcount", site)
    return hints
