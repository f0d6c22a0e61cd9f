"""The tables of one ELF file, each checked against the file before it is believed.

Where each field lies comes from pyelftools' structure definitions (both classes, both byte orders);
numpy then reads whole tables at once, because one object per entry costs about 30 us: 65,535 hostile
program headers would take two seconds, and the 10,000 symbols of an interpreter half of one.

Nothing in a file is trusted. A number that points outside the file empties the table it describes;
only what makes the whole file useless (no ELF header, program headers outside the file) raises
:class:`~fentry.errors.BadImage`. Sizes are bytes and addresses are link-time virtual addresses.

Source: System V gABI, chapters 4 and 5; DT_GNU_HASH and versions as the GNU linker writes them.
"""

from __future__ import annotations

import os
import stat
import struct
import weakref
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from elftools.elf.structs import ELFStructs
from numpy.typing import NDArray

from fentry.errors import BadImage

Table = NDArray[Any]

ET_REL, ET_EXEC, ET_DYN = 1, 2, 3
PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_GNU_EH_FRAME = 1, 2, 3, 4, 0x6474E550
SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOTE, SHT_NOBITS, SHT_REL = 1, 2, 3, 4, 7, 8, 9
SHT_DYNSYM, SHT_SYMTAB_SHNDX, SHT_GNU_VERSYM = 11, 18, 0x6FFFFFFF
SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, SHF_COMPRESSED = 2, 4, 1, 0x800
SHN_UNDEF, SHN_LORESERVE, SHN_ABS, SHN_XINDEX = 0, 0xFF00, 0xFFF1, 0xFFFF
DT_NEEDED, DT_PLTRELSZ, DT_PLTGOT, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_RELA, DT_RELASZ = 1, 2, 3, 4, 5, 6, 7, 8
DT_STRSZ, DT_SONAME, DT_REL, DT_RELSZ, DT_PLTREL, DT_DEBUG, DT_JMPREL = 10, 14, 17, 18, 20, 21, 23
DT_RELRSZ, DT_RELR, DT_GNU_HASH, DT_VERSYM, DT_FLAGS_1 = 35, 36, 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFB
DF_1_PIE = 0x08000000
STT_NOTYPE, STT_FUNC, STT_SECTION, STT_FILE, STT_TLS, STT_GNU_IFUNC = 0, 2, 3, 4, 6, 10
STB_LOCAL, STB_GLOBAL, STB_WEAK = 0, 1, 2

LAST = (1 << 64) - 1  #: the last address there is; no code reaches it
MAX_NAME = 1 << 16  #: bytes; the longest mangled names seen in the field are a tenth of this
MAX_DYNAMIC = 1 << 12  #: entries of PT_DYNAMIC; real ones have fewer than a hundred
MAX_HITS = 1 << 16  #: places in a string table that one name is looked for


class Source:
    """Random access to the bytes of a file, or of memory. A read outside of it raises BadImage."""

    def __init__(self, path: str, size: int, *, data: bytes | None = None, fd: int = -1) -> None:
        self.path = path
        self.size = size
        self._data = data
        self._fd = fd

    @classmethod
    def open(cls, path: str) -> Source:
        """Open a regular file for reading.

        The descriptor lives as long as the object. Reads go through pread and not through a
        mapping: a file cut short while it is mapped would kill this process with SIGBUS.
        """
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise BadImage(path, f"cannot be opened: {why}", hint="check the path and its permissions") from None
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            os.close(fd)
            raise BadImage(path, "not a regular file", hint="name an ELF program or library")
        source = cls(path, about.st_size, fd=fd)
        weakref.finalize(source, os.close, fd)
        return source

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """(device, inode, size, mtime in ns) of the open file; zeros for memory."""
        if self._fd < 0:
            return (0, 0, self.size, 0)
        about = os.fstat(self._fd)
        return (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)

    def read(self, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes at file offset `offset`. Raises BadImage."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BadImage(self.path, f"truncated: {size} bytes at offset {offset:#x} end outside the file")
        if self._data is not None:
            return self._data[offset : offset + size]
        pieces = []
        while size:
            try:
                piece = os.pread(self._fd, min(size, 1 << 30), offset)
            except OSError as error:
                raise BadImage(self.path, f"cannot be read: {error.strerror}") from None
            if not piece:
                raise BadImage(self.path, "became shorter while it was read", hint="try again")
            pieces.append(piece)
            offset += len(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@dataclass(frozen=True, slots=True)
class Segment:
    """One loaded piece of an image: a PT_LOAD entry (of a relocatable object: one section)."""

    vaddr: int
    memsz: int
    offset: int  #: in the file
    filesz: int
    perms: str  #: "r-x" and the like


@dataclass(frozen=True, slots=True)
class Section:
    """One section header. `addr` is made up for relocatable objects, see :class:`Elf`."""

    index: int
    name: str
    kind: int  #: sh_type
    flags: int
    addr: int
    offset: int
    size: int
    link: int
    info: int

    @property
    def end(self) -> int:
        """One past the last address."""
        return self.addr + self.size

    @property
    def loaded(self) -> bool:
        """Whether it takes memory in the running program."""
        return bool(self.flags & SHF_ALLOC)


class Relocations(NamedTuple):
    """Columns of equal length; `addend` is None where it lies in the relocated word (REL)."""

    offset: Table  #: u64, address of the word (in objects: offset into the section)
    kind: Table  #: u32
    symbol: Table  #: u32, index into the symbol table
    addend: Table | None  #: u64, modulo 2**64


@dataclass(slots=True)
class SymbolTable:
    """Columns of a symbol table and its strings."""

    source: str  #: "symtab" or "dynsym"; "debug" and "minidebug" are given by who opened that file
    names_at: Table  #: u32 offsets into `strings`
    value: Table  #: u64 addresses
    size: Table  #: u64
    kind: Table  #: u8, STT_*
    bind: Table  #: u8, STB_*
    section: Table  #: u32
    hidden: Table  #: bool: not the default version of its name
    strings: bytes

    def names(self, which: Table) -> tuple[list[str], Table]:
        """(names, old) of the given rows.

        Names come without version suffix, and "" where the file gives none; `old` tells which are not the
        default version of their name. Unprintable characters come out escaped, so that a name can be shown
        on a terminal. Overlapping strings can make a small file name gigabytes: the work is limited to
        four times the string table, and what comes after has no name.
        """
        strings, known, outdated = self.strings, {0: ""}, set[int]()
        left = 4 * len(strings) + MAX_NAME
        out = []
        offsets = self.names_at[which].tolist()
        for at in offsets:
            name = known.get(at)
            if name is None:
                end = strings.find(b"\0", at, at + MAX_NAME) if left > 0 else -1
                left -= end - at if end >= 0 else MAX_NAME
                name = _printable(strings[at:end]) if end >= 0 else ""
                known[at] = name
                if self._old(at, end):
                    outdated.add(at)
            out.append(name)
        old = self.hidden[which]
        if outdated:
            old = old | np.isin(self.names_at[which], np.array(sorted(outdated), np.uint32))
        return out, old

    def _old(self, at: int, end: int) -> bool:
        """Whether the string is f@VERSION; f@@VERSION is the default. Only full tables write it so."""
        mark = self.strings.find(b"@", at, end) if end > at else -1
        return mark > at and self.strings[mark : mark + 2] != b"@@"

    def is_old(self, row: int) -> bool:
        """Whether a row is not the default version of its name."""
        at = int(self.names_at[row])
        return bool(self.hidden[row]) or self._old(at, self.strings.find(b"\0", at, at + MAX_NAME))

    def rows_named(self, name: str) -> Table:
        """Indices of the rows called `name`, with any version."""
        want, strings, starts = name.encode("utf-8", "replace"), self.strings, list[int]()
        for ending in (b"\0", b"@"):
            at = strings.find(want + ending) if want else -1
            while at >= 0 and len(starts) < MAX_HITS:
                starts.append(at)
                at = strings.find(want + ending, at + 1)
        return np.flatnonzero(np.isin(self.names_at, np.array(starts, np.uint32)))


def _printable(raw: bytes) -> str:
    name = raw.decode("utf-8", "backslashreplace")
    cut = name.find("@")
    if cut > 0:
        name = name[:cut]
    if not name.isprintable():
        name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return name


@cache
def _layouts(bits: int, little: bool) -> dict[str, np.dtype[np.void]]:
    """Numpy layouts of the ELF structures of one class and byte order, from pyelftools."""
    structs: Any = ELFStructs(little_endian=little, elfclass=bits)
    structs.create_basic_structs()
    structs.create_advanced_structs()
    order = "<" if little else ">"
    layouts = {}
    for name in ("Ehdr", "Phdr", "Shdr", "Sym", "Rel", "Rela", "Dyn"):
        at, fields = 0, {}
        for sub in getattr(structs, f"Elf_{name}").subcons:
            size = sub.sizeof()
            if size in (1, 2, 4, 8):
                fields[sub.name] = (np.dtype(f"{order}u{size}"), at)
            at += size
        layouts[name] = np.dtype(
            {
                "names": list(fields),
                "formats": [kind for kind, _ in fields.values()],
                "offsets": [where for _, where in fields.values()],
                "itemsize": at,
            }
        )
    return layouts


class Elf:
    """Tables of one ELF file.

    A relocatable object has no addresses yet. It gets some here: a section with contents lies at its
    own file offset, one without (.bss) after the end of the file. They are unique, as aligned as the
    object asks for, and easy to find with a hex dump.

    Args:
        source: the bytes.

    Raises: BadImage.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.path = source.path
        ident = source.read(0, 16) if source.size >= 16 else b""
        if ident[:4] != b"\x7fELF":
            raise BadImage(self.path, "not an ELF file", hint="name an ELF program or library, not a script")
        if ident[4] not in (1, 2) or ident[5] not in (1, 2):
            raise BadImage(self.path, f"unknown ELF class {ident[4]} or byte order {ident[5]}")
        self.bits = 32 * ident[4]
        self.little = ident[5] == 1
        self.order = "<" if self.little else ">"
        self._layout = _layouts(self.bits, self.little)
        head = self._rows("Ehdr", 0, 1)
        if not len(head):
            raise BadImage(self.path, "truncated: the ELF header is incomplete")
        self._head = {name: int(head[0][name]) for name in head.dtype.names or ()}
        self.type = self._head["e_type"]
        self.machine = self._head["e_machine"]
        self.entry = self._head["e_entry"]
        if self.type not in (ET_REL, ET_EXEC, ET_DYN):
            raise BadImage(
                self.path,
                "a core dump, not a program" if self.type == 4 else f"unknown ELF type {self.type}",
                hint="name the program or library itself",
            )
        self.sections = self._read_sections()
        self.segments = self._read_segments()

    # -- raw access -------------------------------------------------------------------------------
    def _rows(self, layout: str, offset: int, count: int) -> Table:
        """Up to `count` rows at a file offset; fewer where the file ends."""
        kind = self._layout[layout]
        count = max(0, min(count, (self.source.size - offset) // kind.itemsize))
        if offset < 0 or not count:
            return np.empty(0, kind)
        return np.frombuffer(self.source.read(offset, count * kind.itemsize), kind)

    def contents(self, section: Section) -> bytes:
        """Bytes of a section; empty for .bss, for compressed ones and for what lies outside the file."""
        if section.kind == SHT_NOBITS or section.flags & SHF_COMPRESSED:
            return b""
        if section.offset + section.size > self.source.size:
            return b""
        return self.source.read(section.offset, section.size)

    def file_offset(self, vaddr: int) -> tuple[int, int]:
        """(file offset, bytes from there to the end of the segment in the file); (0, 0) if not in the file."""
        load = self.load_at(vaddr)
        if load is None:
            return (0, 0)
        skip = vaddr - load.vaddr
        room = min(load.filesz - skip, self.source.size - load.offset - skip)
        return (load.offset + skip, room) if room > 0 else (0, 0)

    def load_at(self, vaddr: int) -> Segment | None:
        """The segment that holds an address; of segments that overlap, the one that begins last."""
        index = bisect_right(self._load_starts, vaddr) - 1
        load = self._sorted_loads[index] if index >= 0 else None
        return load if load is not None and vaddr < load.vaddr + load.memsz else None

    def at(self, vaddr: int, size: int) -> bytes:
        """Up to `size` file-backed bytes at an address; fewer at the end of the segment."""
        offset, room = self.file_offset(vaddr)
        return self.source.read(offset, min(size, room)) if room else b""

    # -- headers ----------------------------------------------------------------------------------
    def _read_sections(self) -> list[Section]:
        offset = self._head["e_shoff"]
        if not offset or self._head["e_shentsize"] != self._layout["Shdr"].itemsize:
            return []
        first = self._rows("Shdr", offset, 1)
        if not len(first):
            return []
        # gABI: numbers that do not fit the header are in section 0
        count = self._head["e_shnum"] or int(first[0]["sh_size"])
        names_in = self._head["e_shstrndx"]
        names_in = int(first[0]["sh_link"]) if names_in == SHN_XINDEX else names_in
        rows = self._rows("Shdr", offset, count)
        columns = [rows[f"sh_{name}"].tolist() for name in ("name", "type", "flags", "addr", "offset", "size")]
        columns += [rows["sh_link"].tolist(), rows["sh_info"].tolist()]
        table = list(zip(*columns, strict=True))
        names = b""
        if names_in < len(table):
            _, kind, _, _, at, size, _, _ = table[names_in]
            if kind == SHT_STRTAB and at + size <= self.source.size:
                names = self.source.read(at, size)
        sections: list[Section] = []
        known: dict[int, str] = {}
        after = -(-self.source.size // 4096) * 4096
        for index, (name, kind, flags, addr, at, size, link, info) in enumerate(table):
            if self.type == ET_REL and flags & SHF_ALLOC:
                addr = at
                if kind == SHT_NOBITS:
                    addr, after = after, (after + -(-size // 4096) * 4096) % (1 << 64)
            if name not in known:
                stop = names.find(b"\0", name, name + 256)
                known[name] = _printable(names[name:stop]) if stop >= 0 else ""
            sections.append(Section(index, known[name], kind, flags, addr, at, size, link, info))
        return sections

    def _read_segments(self) -> list[tuple[int, Segment]]:
        if self.type == ET_REL:
            return [
                (
                    PT_LOAD,
                    Segment(s.addr, s.size, s.offset, 0 if s.kind == SHT_NOBITS else s.size, _section_perms(s.flags)),
                )
                for s in self.sections
                if s.loaded and s.size
            ]
        offset, count = self._head["e_phoff"], self._head["e_phnum"]
        if not offset or not count:
            return []
        if self._head["e_phentsize"] != self._layout["Phdr"].itemsize:
            raise BadImage(self.path, f"program headers of {self._head['e_phentsize']} bytes each")
        rows = self._rows("Phdr", offset, count)
        if len(rows) != count:
            raise BadImage(self.path, "truncated: the program headers end outside the file")
        columns = [rows[f"p_{name}"].tolist() for name in ("type", "vaddr", "memsz", "offset", "filesz", "flags")]
        return [
            (kind, Segment(vaddr, memsz, at, min(filesz, memsz) if kind == PT_LOAD else filesz, _perms(flags)))
            for kind, vaddr, memsz, at, filesz, flags in zip(*columns, strict=True)
        ]

    @cached_property
    def loads(self) -> list[Segment]:
        """PT_LOAD entries in file order."""
        return [segment for kind, segment in self.segments if kind == PT_LOAD]

    @cached_property
    def _sorted_loads(self) -> list[Segment]:
        return sorted((load for load in self.loads if load.memsz), key=lambda load: load.vaddr)

    @cached_property
    def _load_starts(self) -> list[int]:
        return [load.vaddr for load in self._sorted_loads]

    def segment(self, kind: int) -> Segment | None:
        """The first program header of a kind."""
        return next((segment for found, segment in self.segments if found == kind), None)

    def named(self, name: str) -> list[Section]:
        """All sections of a name: objects may have one per text section.

        Honest sections do not overlap, so the list ends where their sizes exceed that of the file.
        """
        found, left = [], self.source.size
        for section in self.sections:
            if section.name == name and section.size <= left:
                found.append(section)
                left -= section.size
        return found

    @cached_property
    def code(self) -> list[tuple[int, int]]:
        """Sorted, disjoint (start, end) of code that is in the file: text sections within x segments."""
        mapped = [
            (load.vaddr, min(load.vaddr + min(load.filesz, max(0, self.source.size - load.offset)), LAST))
            for load in self.loads
            if "x" in load.perms
        ]
        wanted = SHF_ALLOC | SHF_EXECINSTR
        texts = [(s.addr, s.end) for s in self.sections if s.flags & wanted == wanted and s.kind != SHT_NOBITS]
        return _intersection(_union(mapped), _union(texts)) if texts else _union(mapped)

    @cached_property
    def build_id(self) -> str:
        """Hex digits of the NT_GNU_BUILD_ID note, or ""."""
        places = [(s.offset, s.filesz) for kind, s in self.segments if kind == PT_NOTE]
        places += [(s.offset, s.size) for s in self.named(".note.gnu.build-id")]
        for offset, size in places[:16]:
            if offset + size > self.source.size or size > 1 << 16:
                continue
            data, at = self.source.read(offset, size), 0
            while at + 12 <= len(data):
                name_size, size, kind = struct.unpack_from(f"{self.order}3I", data, at)
                name = data[at + 12 : at + 12 + name_size]
                at += 12 + -(-name_size // 4) * 4
                if kind == 3 and name == b"GNU\0" and 0 < size <= 64:
                    return data[at : at + size].hex()
                at += -(-size // 4) * 4
        return ""

    @cached_property
    def interp(self) -> str:
        """Path of the dynamic loader, or ""."""
        asked = self.segment(PT_INTERP)
        if asked is None or asked.offset + asked.filesz > self.source.size:
            return ""
        return _printable(self.source.read(asked.offset, min(asked.filesz, 4096)).split(b"\0")[0])

    # -- dynamic ----------------------------------------------------------------------------------
    @cached_property
    def dynamic(self) -> dict[int, list[int]]:
        """Tag to values of PT_DYNAMIC, in order."""
        tags: dict[int, list[int]] = {}
        where = self.segment(PT_DYNAMIC)
        if where is None:
            return tags
        rows = self._rows("Dyn", where.offset, min(where.filesz // self._layout["Dyn"].itemsize, MAX_DYNAMIC))
        for tag, value in zip(rows["d_tag"].tolist(), rows["d_val"].tolist(), strict=True):
            if tag == 0:
                break
            tags.setdefault(tag, []).append(value)
        return tags

    def tag(self, tag: int) -> int:
        """First value of a dynamic tag, or 0."""
        return self.dynamic.get(tag, [0])[0]

    @cached_property
    def _dynamic_strings(self) -> bytes:
        at = self.tag(DT_STRTAB)
        return self.at(at, self.tag(DT_STRSZ)) if at else b""

    def dynamic_strings(self, tag: int) -> list[str]:
        """Strings that every entry of a dynamic tag names."""
        out = []
        for at in self.dynamic.get(tag, []):
            end = self._dynamic_strings.find(b"\0", at, at + 4096)
            if end > at:
                out.append(_printable(self._dynamic_strings[at:end]))
        return out

    def _dynamic_symbol_count(self) -> int:
        """How many dynamic symbols there are, from the hash tables (no section headers needed)."""
        if at := self.tag(DT_HASH):
            head = np.frombuffer(self.at(at, 8).ljust(8, b"\0"), f"{self.order}u4")
            return int(head[1])
        at = self.tag(DT_GNU_HASH)
        head = np.frombuffer(self.at(at, 16).ljust(16, b"\0"), f"{self.order}u4") if at else np.zeros(4, np.uint32)
        buckets, first, bloom = int(head[0]), int(head[1]), int(head[2])
        if not buckets:
            return 0
        at += 16 + bloom * (self.bits // 8)
        raw = self.at(at, 4 * buckets)
        if len(raw) != 4 * buckets:
            return 0
        last = int(np.frombuffer(raw, f"{self.order}u4").max())
        if last < first:
            return first
        at += 4 * buckets + 4 * (last - first)
        chain = self.at(at, self.file_offset(at)[1] & ~3)
        ends = np.flatnonzero(np.frombuffer(chain, f"{self.order}u4") & 1)
        return last + 1 + int(ends[0]) if len(ends) else 0

    # -- symbols ----------------------------------------------------------------------------------
    @cached_property
    def symtab(self) -> SymbolTable | None:
        """The full symbol table, or None."""
        for section in self.sections:
            if section.kind == SHT_SYMTAB and section.link < len(self.sections):
                rows = self._section_rows("Sym", section)
                if len(rows) > 1:
                    return self._symbols("symtab", rows, self.contents(self.sections[section.link]), section)
        return None

    @cached_property
    def dynsym(self) -> SymbolTable | None:
        """The dynamic symbol table, or None. Without section headers its length is that of the hash table."""
        for section in self.sections:
            if section.kind == SHT_DYNSYM and section.link < len(self.sections):
                rows = self._section_rows("Sym", section)
                if len(rows) > 1:
                    return self._symbols("dynsym", rows, self.contents(self.sections[section.link]), section)
        at = self.tag(DT_SYMTAB)
        offset, room = self.file_offset(at) if at else (0, 0)
        count = min(self._dynamic_symbol_count(), room // self._layout["Sym"].itemsize)
        rows = self._rows("Sym", offset, count)
        return self._symbols("dynsym", rows, self._dynamic_strings, None) if len(rows) > 1 else None

    def _section_rows(self, layout: str, section: Section) -> Table:
        if section.kind == SHT_NOBITS or section.flags & SHF_COMPRESSED:
            return np.empty(0, self._layout[layout])
        return self._rows(layout, section.offset, section.size // self._layout[layout].itemsize)

    def _symbols(self, source: str, rows: Table, strings: bytes, section: Section | None) -> SymbolTable:
        homes = rows["st_shndx"].astype(np.uint32)
        value = rows["st_value"].astype(np.uint64, copy=self.type == ET_REL)
        hidden = np.zeros(len(rows), bool)
        if source == "dynsym":
            hidden = self._hidden_versions(len(rows))
        elif section is not None:
            extra = next((s for s in self.sections if s.kind == SHT_SYMTAB_SHNDX and s.link == section.index), None)
            if extra is not None:
                data = self.contents(extra)
                wide = np.frombuffer(data[: len(data) & ~3], f"{self.order}u4")
                use = np.flatnonzero(homes[: len(wide)] == SHN_XINDEX)
                homes[use] = wide[use]
        if self.type == ET_REL:
            bases = np.array([s.addr for s in self.sections] or [0], np.uint64)
            inside = homes < len(bases)
            value[inside] += bases[homes[inside]]
        info = rows["st_info"]
        return SymbolTable(
            source=source,
            names_at=rows["st_name"].astype(np.uint32, copy=False),
            value=value,
            size=rows["st_size"].astype(np.uint64, copy=False),
            kind=info & 15,
            bind=info >> 4,
            section=homes,
            hidden=hidden,
            strings=strings,
        )

    def _hidden_versions(self, count: int) -> Table:
        """Which dynamic symbols are not the default version of their name (bit 15 of .gnu.version)."""
        raw = b""
        table = next((s for s in self.sections if s.kind == SHT_GNU_VERSYM), None)
        if table is not None:
            raw = self.contents(table)
        if not raw and (at := self.tag(DT_VERSYM)):
            raw = self.at(at, 2 * count)
        hidden = np.zeros(count, bool)
        versions = np.frombuffer(raw[: len(raw) & ~1], f"{self.order}u2")[:count]
        hidden[: len(versions)] = versions & 0x8000 != 0
        return hidden

    # -- relocations ------------------------------------------------------------------------------
    def section_relocations(self, index: int) -> list[Relocations]:
        """Relocations that an object has for its section number `index`."""
        return [
            self._relocations(self._section_rows("Rela" if s.kind == SHT_RELA else "Rel", s))
            for s in self._relocators.get(index, [])
        ]

    @cached_property
    def _relocators(self) -> dict[int, list[Section]]:
        found, left = dict[int, list[Section]](), self.source.size
        for section in self.sections:
            if section.kind in (SHT_RELA, SHT_REL) and section.size <= left:
                found.setdefault(section.info, []).append(section)
                left -= section.size  # as in named(): honest tables do not overlap
        return found

    @cached_property
    def relocations(self) -> list[Relocations]:
        """What the dynamic loader applies: DT_RELA, DT_REL, and DT_JMPREL.

        DT_RELR is left out because it adds the load bias to a word that already holds the link-time
        value: the file has the answer.
        """
        found = []
        plt = "Rel" if self.tag(DT_PLTREL) == DT_REL else "Rela"
        for layout, where, bytes_in in (
            ("Rela", DT_RELA, DT_RELASZ),
            ("Rel", DT_REL, DT_RELSZ),
            (plt, DT_JMPREL, DT_PLTRELSZ),
        ):
            at = self.tag(where)
            offset, room = self.file_offset(at) if at else (0, 0)
            size = min(self.tag(bytes_in), room)
            if size:
                found.append(self._relocations(self._rows(layout, offset, size // self._layout[layout].itemsize)))
        return found

    def _relocations(self, rows: Table) -> Relocations:
        info = rows["r_info"].astype(np.uint64)
        low, mask = (np.uint64(32), 0xFFFFFFFF) if self.bits == 64 else (np.uint64(8), 0xFF)
        addend = None
        if "r_addend" in (rows.dtype.names or ()):
            addend = rows["r_addend"].astype(np.uint64)
        return Relocations(
            rows["r_offset"].astype(np.uint64),
            (info & np.uint64(mask)).astype(np.uint32),
            (info >> low).astype(np.uint32),
            addend,
        )


def _perms(flags: int) -> str:
    return f"{'r' if flags & 4 else '-'}{'w' if flags & 2 else '-'}{'x' if flags & 1 else '-'}"


def _section_perms(flags: int) -> str:
    return f"r{'w' if flags & SHF_WRITE else '-'}{'x' if flags & SHF_EXECINSTR else '-'}"


def _union(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, disjoint ranges. Adjacent ones stay apart: a section's end bounds what is in it."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if end <= start:
            continue
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _intersection(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            out.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return out
