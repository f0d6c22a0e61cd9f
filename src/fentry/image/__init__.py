"""Images: what an ELF file says about the functions in it and about the room left for tracing them.

    image = Image.open("/usr/bin/xz")
    for function in image.functions():
        hint = image.sleds().get(function.address)

An :class:`Image` is the file, not a process: every address is a link-time virtual address, to which a
target adds its load bias. Nothing in the file is believed without a check. A file that is no program
raises :class:`~fentry.errors.BadImage`; damage further in makes lists shorter, never wrong on purpose.

Rooms: ``elf`` tables, ``functions`` the list, ``unwind`` ranges of stripped code, ``debugfile`` symbols
elsewhere, ``sled`` room for tracing, ``isa`` patterns as data, ``index`` the cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fentry.errors import BadImage
from fentry.image import debugfile, functions, index, sled, unwind
from fentry.image.debugfile import DEBUG_DIRS
from fentry.image.elf import (
    DF_1_PIE,
    DT_DEBUG,
    DT_FLAGS_1,
    DT_NEEDED,
    DT_PLTGOT,
    DT_SONAME,
    ET_EXEC,
    ET_REL,
    PT_GNU_EH_FRAME,
    SHN_UNDEF,
    STB_GLOBAL,
    STT_FILE,
    STT_SECTION,
    STT_TLS,
    Elf,
    Section,
    Segment,
    Source,
    SymbolTable,
    Table,
)
from fentry.image.functions import Function
from fentry.image.isa import ISAS
from fentry.image.sled import MCOUNT_NAMES, Code, SledHint

__all__ = ["DEBUG_DIRS", "Function", "Image", "Section", "Segment", "SledHint"]

MAX_ZEROS = 1 << 28  #: bytes of .bss that one read gives
CACHED_FROM = 1 << 19  #: bytes of file from which on the index cache pays
_UNWINDERS = ("libgcc_s.so", "libunwind.so", "libstdc++.so", "libc++.so", "libc++abi.so")


class Image:
    """One ELF program, library or relocatable object.

    A relocatable object has no addresses yet; here each of its sections lies at its own file offset.

    Attributes:
        path: as given.
        build_id: hex digits, or "".
        machine: e_machine.
        bits: 32 or 64.
        little: whether little-endian.
        type: "exec" (fixed address, dynamic), "static" (fixed address, no loader), "pie", "static-pie",
            "dyn" (shared object), "rel" (relocatable object).
        entry: address of the first instruction, or 0.
        interp: path of the dynamic loader, or "".
        segments: PT_LOAD entries; of a relocatable object, its sections that take memory.
        sections: section headers; empty if the file has none (any more).
        needed: names of needed libraries.
        soname: its own name, or "".
        has_eh_frame_hdr: whether an unwinder finds its tables (PT_GNU_EH_FRAME).
    """

    def __init__(self, elf: Elf, *, debug_dirs: Sequence[str], cache: bool) -> None:
        self._elf = elf
        self._debug_dirs = tuple(debug_dirs)
        self._cache = cache and elf.source.size >= CACHED_FROM
        if elf.type != ET_REL and not elf.loads:
            raise BadImage(elf.path, "no loadable segments: nothing of this file is ever run")
        self.path = elf.path
        self.build_id = elf.build_id
        self.machine = elf.machine
        self.bits = elf.bits
        self.little = elf.little
        self.entry = elf.entry
        self.interp = elf.interp
        self.segments = tuple(elf.loads)
        self.sections = tuple(elf.sections)
        self.needed = tuple(elf.dynamic_strings(DT_NEEDED))
        self.soname = "".join(elf.dynamic_strings(DT_SONAME)[:1])
        self.type = self._type()
        self.has_eh_frame_hdr = elf.segment(PT_GNU_EH_FRAME) is not None

    @classmethod
    def open(cls, path: str, *, debug_dirs: Sequence[str] = DEBUG_DIRS, cache: bool = True) -> Image:
        """Read an image from a file.

        Args:
            path: a regular file.
            debug_dirs: where separate debug files are looked for; empty: nowhere.
            cache: keep and use the list of functions of large images between runs.

        Raises: BadImage.
        """
        return cls(Elf(Source.open(path)), debug_dirs=debug_dirs, cache=cache)

    @classmethod
    def from_bytes(cls, data: bytes, path: str, *, debug_dirs: Sequence[str] = ()) -> Image:
        """Read an image from memory, such as a vdso; `path` is what errors call it. Raises BadImage."""
        return cls(Elf(Source(path, len(data), data=bytes(data))), debug_dirs=debug_dirs, cache=False)

    def __repr__(self) -> str:
        return f"<Image {self.path} {self.type} machine {self.machine}>"

    def _type(self) -> str:
        elf = self._elf
        if elf.type == ET_REL:
            return "rel"
        if elf.type == ET_EXEC:
            return "exec" if self.interp or self.needed else "static"
        if elf.tag(DT_FLAGS_1) & DF_1_PIE:
            return "pie" if self.interp else "static-pie"
        # linkers before 2016 do not mark programs; but DT_DEBUG is for programs, a soname for libraries
        return "pie" if self.interp and DT_DEBUG in elf.dynamic and not self.soname else "dyn"

    # -- memory -----------------------------------------------------------------------------------
    def read(self, vaddr: int, size: int) -> bytes:
        """Read `size` bytes as they are right after loading: from the file, then zeros (.bss).

        Words that the loader relocates come as the file has them. Raises BadImage if part of the range
        belongs to no segment, or the file lacks it.
        """
        if size < 0:
            raise BadImage(self.path, f"cannot read {size} bytes")
        pieces = []
        while size:
            load = self._elf.load_at(vaddr)
            if load is None:
                raise BadImage(self.path, f"address {vaddr:#x} belongs to no segment")
            skip = vaddr - load.vaddr
            if skip < load.filesz:
                take = min(size, load.filesz - skip)
                pieces.append(self._elf.source.read(load.offset + skip, take))
            else:
                take = min(size, load.memsz - skip)
                if take > MAX_ZEROS:
                    raise BadImage(self.path, f"{take} bytes of zeros at {vaddr:#x} are more than one read gives")
                pieces.append(bytes(take))
            vaddr += take
            size -= take
        return b"".join(pieces)

    def executable_ranges(self) -> list[tuple[int, int]]:
        """Sorted, disjoint (start, end) of code that is in the file.

        Text sections where there are section headers (adjacent ones stay apart), executable segments else.
        """
        return list(self._elf.code)

    @cached_property
    def _code(self) -> Code:
        return Code(self._elf)

    # -- functions --------------------------------------------------------------------------------
    @cached_property
    def _tables(self) -> list[tuple[str, SymbolTable]]:
        """(source, table) of every symbol table; others are looked for only if .symtab is gone."""
        elf, tables = self._elf, []
        if elf.symtab is not None:
            tables.append(("symtab", elf.symtab))
        elif (other := debugfile.separate(elf, self._debug_dirs)) is not None and other.symtab is not None:
            tables.append(("debug", other.symtab))
        elif (other := debugfile.embedded(elf)) is not None and other.symtab is not None:
            tables.append(("minidebug", other.symtab))
        if elf.dynsym is not None:
            tables.append(("dynsym", elf.dynsym))
        return tables

    @cached_property
    def _index(self) -> functions.FunctionList:
        name = self._cache_key() if self._cache else ""
        found = _from_json(index.load(name)) if name else None
        if found is None:
            found = self._build_index()
            if name:
                index.store(name, _to_json(found))
        return found

    def _build_index(self) -> functions.FunctionList:
        code = self._elf.code
        stubs = [(s.addr, s.end) for s in self.sections if s.name.startswith((".plt", ".iplt"))]
        frames = unwind.frame_ranges(self._elf)
        if not self.sections:
            frames = self._without_stubs(frames)
        found = functions.build(self._tables, frames, code, sorted(stubs))
        return functions.FunctionList(self._with_patchable(found.functions), found.ambiguous)

    def _with_patchable(self, known: list[Function]) -> list[Function]:
        """Add functions that only patchable entries tell of.

        Their label is as far behind the first nop as in the functions that are known, if those agree;
        else at the first nop, or at the landing pad right in front of it.
        """
        isa, entries = ISAS.get(self.machine), self._patchable([function.address for function in known])
        strays = [record for record, label in entries if label is None]
        if isa is None or not strays:
            return known
        usual = {max(label - record, 0) for record, label in entries if label is not None}
        before = usual.pop() if len(usual) == 1 else 0
        pads = {size for _, _, size in isa.pads} if not before else set[int]()
        labels = []
        for record in strays:
            pad = next((size for size in pads if isa.pad(self._code.at(record - size, size)) == size), 0)
            labels.append(record + before - pad)
        return functions.add_patchable(known, labels, self._elf.code)

    def _without_stubs(self, frames: unwind.Frames) -> unwind.Frames:
        """Drop PLT stubs where no section says which they are: what begins with a jump through a linked slot."""
        isa, elf = ISAS.get(self.machine), self._elf
        if isa is None:
            return frames
        slots = {offset for table in elf.relocations for offset in table.offset[table.symbol != 0].tolist()}
        # the first entry of a lazy PLT jumps through the third word, after a push of the second
        slots.add(elf.tag(DT_PLTGOT) + 2 * self.bits // 8)
        keep = np.ones(len(frames.start), bool)
        for row, start in enumerate(frames.start.tolist()):
            code = self._code.at(start, 24)
            first = isa.pad(code)
            jumps = {isa.stub_slot(code[at : at + 8], start + at) for at in range(first, first + 8, isa.step)}
            keep[row] = jumps.isdisjoint(slots)
        return frames.take(keep)

    def functions(self) -> list[Function]:
        """All functions, sorted by address, one per address; PLT stubs are not functions.

        From .symtab or, if that is gone, a separate debug file or .gnu_debugdata; from .dynsym; and from
        unwind tables where no symbol covers the code: those are called ``sub_<hex address>``.
        """
        return list(self._index.functions)

    @cached_property
    def _starts(self) -> list[int]:
        return [function.address for function in self._index.functions]

    @cached_property
    def _reach(self) -> Table:
        """For each function, the highest end of it and all before it."""
        ends = (function.address + function.size for function in self._index.functions)
        return np.maximum.accumulate(np.fromiter(ends, np.uint64))

    @cached_property
    def _by_name(self) -> dict[str, Function]:
        names: dict[str, Function] = {}
        for function in self._index.functions:
            for name in (function.name, *function.aliases):
                if self._index.ambiguous.get(name, function.address) == function.address:
                    names[name] = function
        return names

    def function(self, name: str) -> Function | None:
        """The function with a name or alias. Of several: default version, then global, then lowest address."""
        return self._by_name.get(name)

    def at(self, address: int) -> Function | None:
        """The function that contains an address; the innermost if they nest."""
        place = bisect_right(self._starts, address) - 1
        while place >= 0 and self._reach[place] > address:
            function = self._index.functions[place]
            if address < function.address + function.size:
                return function
            place -= 1
        return None

    def symbol(self, name: str) -> int | None:
        """Address of any defined symbol, function or object; global ones first. Not thread-local ones."""
        best: tuple[bool, bool, int, int] | None = None
        for place, (_, table) in enumerate(self._tables):
            for row in table.rows_named(name).tolist():
                if int(table.section[row]) == SHN_UNDEF or int(table.kind[row]) in (STT_SECTION, STT_FILE, STT_TLS):
                    continue
                hidden, local = table.is_old(row), int(table.bind[row]) != STB_GLOBAL
                rank = (hidden, local, place, int(table.value[row]))
                best = rank if best is None else min(best, rank)
        return best[3] if best is not None else None

    @property
    def uses_cxx_unwinder(self) -> bool:
        """Whether exceptions or forced unwinding may run through its frames.

        True if it needs an unwinder library, has landing pads (.gcc_except_table) or names ``_Unwind_*``.
        """
        if any(name.startswith(_UNWINDERS) for name in self.needed) or self._elf.named(".gcc_except_table"):
            return True
        return any(b"_Unwind_" in table.strings for _, table in self._tables)

    # -- room for tracing -------------------------------------------------------------------------
    def call_targets(self, *names: str) -> frozenset[int]:
        """Addresses by which code of this image may call the named functions.

        The functions themselves (if defined here), the bytes of their PLT entries at which a call may aim,
        and the GOT slots that a call may go through.
        """
        targets = self._targets(names)
        return targets.direct | targets.slots

    def _targets(self, names: Sequence[str]) -> sled.CallTargets:
        if self._elf.type == ET_REL:
            return sled.CallTargets(frozenset(), frozenset())
        defined = {address for name in names if (address := self.symbol(name))}
        return sled.find_targets(self._elf, self._code, names, sorted(defined))

    def _symbol_address(self, number: int) -> int:
        """Address of the symbol that relocations of this file call `number`; 0 if undefined."""
        table = self._elf.symtab if self._elf.type == ET_REL else self._elf.dynsym
        if table is None or not 0 < number < len(table.value) or int(table.section[number]) == SHN_UNDEF:
            return 0
        return int(table.value[number])

    def _patchable(self, starts: list[int]) -> list[tuple[int, int | None]]:
        """(first nop, function label or None) of every patchable entry, sorted."""
        isa = ISAS.get(self.machine)
        if isa is None:
            return []
        records = {
            record
            for section in self._elf.named("__patchable_function_entries")
            for record in sled.pointers(self._elf, section, self._symbol_address)
        }
        return [(record, sled.patchable_label(isa, self._code, record, starts)) for record in sorted(records)]

    @cached_property
    def _sleds(self) -> dict[int, SledHint]:
        isa, code, elf = ISAS.get(self.machine), self._code, self._elf
        if isa is None:
            return {}
        hints: dict[int, SledHint] = {}
        for record, label in self._patchable(self._starts):
            if label is not None:
                hints.setdefault(label, sled.patchable_hint(isa, code, record, label))
        sites = {
            site for section in elf.named("__mcount_loc") for site in sled.pointers(elf, section, self._symbol_address)
        }
        for site in sorted(sites):
            owner = self.at(site)
            if owner is not None and not owner.cold:
                kind = sled.recorded_kind(isa, code, site, owner.address)
                hints.setdefault(owner.address, SledHint(kind, site))
        for entry, hint in self._call_hints().items():
            hints.setdefault(entry, hint)
        return hints

    def _call_hints(self) -> dict[int, SledHint]:
        elf, code = self._elf, self._code
        named = [table.rows_named(name) for _, table in self._tables for name in MCOUNT_NAMES]
        if not any(len(rows) for rows in named):
            return {}
        fentry_names, mcount_names = MCOUNT_NAMES[:1], MCOUNT_NAMES[1:]
        if elf.type == ET_REL:
            fentry = sled.object_calls(elf, code, fentry_names)
            mcount = sled.object_calls(elf, code, mcount_names)
        else:
            fentry = sled.find_calls(elf, code, self._targets(fentry_names))
            mcount = sled.find_calls(elf, code, self._targets(mcount_names))
        sites = sorted({*fentry, *mcount})
        return sled.entry_sites(ISAS.get(self.machine), code, sites, self._index.functions, fentry)

    def sleds(self) -> dict[int, SledHint]:
        """Room that the compiler left for tracing, keyed by the address of the function it belongs to.

        Where no trace of it is left (a stripped static program, a discarded section) nothing is found
        here: ``Arch.sled_at(code, "scan")`` looks for nops at the entry itself.
        """
        return dict(self._sleds)

    # -- cache ------------------------------------------------------------------------------------
    def _cache_key(self) -> str:
        debug: list[Any] = []
        if self._elf.symtab is None:
            for path, checksum in debugfile.candidates(self._elf, self._debug_dirs):
                try:
                    debug.append((path, checksum, Source.open(path).identity))
                except BadImage:
                    continue
        return index.key(self.build_id, self._elf.source.identity, debug)


def _to_json(found: functions.FunctionList) -> dict[str, Any]:
    rows = [
        [f.name, f.address, f.size, f.source, list(f.aliases), int(f.ifunc), int(f.sized), int(f.cold)]
        for f in found.functions
    ]
    return {"functions": rows, "ambiguous": found.ambiguous}


def _from_json(value: Any) -> functions.FunctionList | None:
    """The list that was stored, or None if this is not one."""
    try:
        rows, ambiguous, found, last = value["functions"], dict(value["ambiguous"]), list[Function](), 0
        for name, address, size, source, aliases, ifunc, sized, cold in rows:
            if not (type(address) is type(size) is int and last < address and size >= 0):
                return None
            if not (type(name) is type(source) is str and all(type(alias) is str for alias in aliases)):
                return None
            found.append(Function(name, address, size, source, tuple(aliases), bool(ifunc), bool(sized), bool(cold)))
            last = address
        if not all(type(name) is str and type(address) is int for name, address in ambiguous.items()):
            return None
    except (TypeError, KeyError, ValueError):
        return None
    return functions.FunctionList(found, ambiguous)
