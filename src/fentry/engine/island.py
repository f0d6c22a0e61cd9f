"""Islands: the engine's code near the sites it serves.

One island holds, in this order: the compiled programs, constants, tables of slots, displaced instructions, and what
unwinders need to know. It is mapped readable and executable, never writable, and filled from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fentry.arch import Arch, Displaced, ReturnPlane, SlotLayout, SlotPlan, SlotShape, UnwindInfo
from fentry.engine.census import Site
from fentry.engine.ops import Op, Programs, marks, specialise
from fentry.engine.unwind import PHDR_INFO_ROOM, Object, phdr_info
from fentry.errors import EngineBug
from fentry.program.compile import Blob, compile_programs
from fentry.program.context import Layout
from fentry.program.ir import Spec
from fentry.record.layout import Kind, Table

#: bytes set aside for the displaced instructions of one site: 5 to 19 bytes that may grow, and a jump
DISPLACED_ROOM = 64
#: bytes set aside for the call frame information of one slot
FRAME_INFO_ROOM = 192


@dataclass(slots=True)
class SlotTable:
    """Slots of one shape, for sites that share the same ops."""

    ops: tuple[Op, ...]
    form: str
    sites: list[Site]
    shape: SlotShape
    layout: SlotLayout
    row: int  #: first counter row
    base: int = 0

    @property
    def hooked(self) -> bool:
        """Returns are hooked here."""
        return self.shape.exit > 0

    def slot(self, index: int) -> int:
        """Address of a slot."""
        return self.base + index * self.layout.stride

    def marks(self, op: Op) -> dict[int, Kind]:
        """Offsets of this op's marks."""
        return marks(self.layout, self.ops).get(self.ops.index(op), {}) if op in self.ops else {}

    def table(self, op: Op, index: dict[int, int]) -> Table:
        """What a decoder needs, for one op; `index` maps site addresses to numbers."""
        return Table(self.base, self.layout.stride, self.marks(op), [index[s.at] for s in self.sites])


@dataclass(slots=True)
class Island:
    """A finished island: where it is, its bytes, and what it holds."""

    at: int
    size: int
    code: bytes
    tables: list[SlotTable]
    bodies: dict[int, int]  #: site address -> where its body goes on
    unwind: list[Object] = field(default_factory=list)  #: one per table with return hooks
    displaced: dict[int, tuple[int, Displaced]] = field(default_factory=dict)

    def moves(self, site: Site) -> dict[int, int]:
        """Where a thread goes on that is caught inside a site: {offset from the site: address}."""
        if site.at in self.displaced:
            to, moved = self.displaced[site.at]
            return {old: to + new for old, new in moved.moves if old}
        # inside a sled nothing has happened yet, and nothing will until its end
        return dict.fromkeys(range(1, site.sled.size), site.at + site.sled.resume)


def _up(n: int, to: int) -> int:
    return (n + to - 1) & -to


def group(
    arch: Arch, sites: Sequence[tuple[Site, tuple[Op, ...]]], *, returns: bool, first_row: int
) -> list[SlotTable]:
    """Sort sites into tables: same form, same ops, same way of returning."""
    found: dict[tuple[str, tuple[Op, ...], bool], list[Site]] = {}
    for site, ops in sites:
        hooked = returns and site.verdict.returns and any(op.exit for op in ops)
        found.setdefault((site.sled.form, ops, hooked), []).append(site)
    tables = []
    row = first_row
    for (form, ops, hooked), members in found.items():
        entering = sum(op.entry is not None for op in ops)
        leaving = sum(op.exit is not None for op in ops) if hooked else 0
        shape = SlotShape(entering, leaving, form)
        members.sort(key=lambda s: s.at)
        tables.append(SlotTable(ops, form, members, shape, arch.slot_layout(shape), row))
        row += len(members)
    return tables


def room_for(tables: Sequence[SlotTable], blob: int) -> int:
    """Bytes that an island with these tables needs at most."""
    total = _up(blob + blob // 4, 4096) + 4096
    for t in tables:
        n = len(t.sites)
        total += _up(n * t.layout.stride, 4096) + n * (DISPLACED_ROOM + (FRAME_INFO_ROOM if t.hooked else 0)) + 4096
    return _up(total, 4096)


class _Library:
    """Specs by content, so that equal programs are compiled once."""

    def __init__(self) -> None:
        self.names: dict[Spec, str] = {}

    def name(self, spec: Spec | None) -> str:
        """Name of a spec's program, "" for none."""
        if spec is None:
            return ""
        key = spec
        if key not in self.names:
            self.names[key] = f"{spec.name}.{len(self.names)}"
        return self.names[key]

    def specs(self) -> list[Spec]:
        """What to compile."""
        return [replace(spec, name=name) for spec, name in self.names.items()]


def _programs(arch: Arch, tables: Sequence[SlotTable], library: _Library) -> list[list[Programs]]:
    out = []
    for t in tables:
        shift = t.layout.stride.bit_length() - 1
        row = []
        for op in t.ops:
            programs = specialise(op, arch.dialect, t.form, hooked=t.hooked, base=t.base, shift=shift, row=t.row)
            for spec in (programs.entry, programs.tail, programs.plain, programs.exit, programs.unwound):
                library.name(spec)
            row.append(programs)
        out.append(row)
    return out


def code_size(arch: Arch, layout: Layout, tables: Sequence[SlotTable]) -> int:
    """Size of the programs of these tables (addresses not final)."""
    library = _Library()
    _programs(arch, tables, library)
    return len(compile_programs(arch, layout, library.specs()).code)


def build(
    arch: Arch,
    layout: Layout,
    tables: list[SlotTable],
    at: int,
    size: int,
    *,
    plane: ReturnPlane | None,
    personality: int,
    resume_unwind: int,
) -> Island:
    """Fill an island of `size` bytes at `at`.

    Args:
        arch: of the target.
        layout: the session's addresses.
        tables: from :func:`group`; their bases are set here.
        at: address of the mapping.
        size: bytes of it.
        plane: the shadow stack, if any table hooks returns.
        personality: the target's __gcc_personality_v0, or 0.
        resume_unwind: its _Unwind_Resume, or 0.
    """
    blob_room = _up(max(code_size(arch, layout, tables), 1) * 5 // 4, 4096)
    cursor = at + blob_room + 4096  # a page for constants
    for t in tables:
        t.base = _up(cursor, t.layout.stride)
        cursor = t.base + len(t.sites) * t.layout.stride
    slots_end = cursor
    library = _Library()
    chosen = _programs(arch, tables, library)
    blob: Blob = compile_programs(arch, layout, library.specs())
    if len(blob.code) > blob_room:
        raise EngineBug("programs grew between two compilations")
    code = bytearray(size)
    code[: len(blob.code)] = blob.code

    consts_at = at + blob_room
    if plane is not None:
        slots_at = tables[0].base
        consts = arch.return_consts(plane, slots_at, slots_end - slots_at)
        code[blob_room : blob_room + len(consts)] = consts

    def address(spec: Spec | None) -> int:
        return at + blob.symbols[library.name(spec)]

    cursor = _up(slots_end, 64)
    bodies: dict[int, int] = {}
    displaced: dict[int, tuple[int, Displaced]] = {}
    for t, programs in zip(tables, chosen, strict=True):
        entering = [p for p in programs if p.entry is not None]
        leaving = [p for p in reversed(programs) if p.exit is not None] if t.hooked else []
        entry = tuple(address(p.entry) for p in entering)
        tail = tuple(address(p.tail) for p in entering) if t.hooked else None
        plain = tuple(address(p.plain) for p in entering) if t.hooked else None
        exits = tuple(address(p.exit) for p in leaving)
        unwound = tuple(address(p.unwound) for p in leaving)
        for site in t.sites:
            sled = site.sled
            resume = site.at + sled.resume
            body = resume
            if sled.moved:
                moved = arch.displace(sled, site.at, cursor, resume)
                code[cursor - at : cursor - at + len(moved.code)] = moved.code
                displaced[site.at] = (cursor, moved)
                body = cursor
                cursor = _up(cursor + len(moved.code), 16)
            bodies[site.at] = body
        slots = arch.slots(
            SlotPlan(
                at=t.base,
                site=t.sites[0].at,
                sled=t.sites[0].sled,
                body=bodies[t.sites[0].at],
                entry=entry,
                exit=exits,
                consts=consts_at,
                tail=tail,
                plain=plain,
                plane=plane,
                resume_unwind=resume_unwind,
                unwound=unwound,
            ),
            [(s.at, s.sled) for s in t.sites],
            [bodies[s.at] for s in t.sites],
        )
        code[t.base - at : t.base - at + len(slots)] = slots
    unwind: list[Object] = []
    cursor = _up(cursor, 16)
    for t in tables:
        if not t.hooked:
            continue
        info = arch.frame_info(
            t.shape, [t.slot(i) for i in range(len(t.sites))], cursor, UnwindInfo(plane, personality)
        )
        if not info:
            continue
        header_at = cursor
        code[cursor - at : cursor - at + len(info)] = info
        cursor = _up(cursor + len(info), 16)
        start, end = t.base, t.base + len(t.sites) * t.layout.stride
        record = phdr_info(cursor, start, end - start, header_at, len(info))
        code[cursor - at : cursor - at + len(record)] = record
        unwind.append(Object(start, end - start, header_at, cursor))
        cursor = _up(cursor + PHDR_INFO_ROOM, 16)
    if cursor > at + size:
        raise EngineBug(f"island of {size} bytes is too small by {cursor - at - size}")
    return Island(at, size, bytes(code), tables, bodies, unwind, displaced)
