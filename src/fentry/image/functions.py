"""The list of functions: symbols of every table merged, aliases folded, gaps filled from unwind tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fentry.image.elf import (
    LAST,
    SHN_ABS,
    SHN_LORESERVE,
    SHN_UNDEF,
    SHN_XINDEX,
    STB_GLOBAL,
    STB_LOCAL,
    STB_WEAK,
    STT_FUNC,
    STT_GNU_IFUNC,
    STT_NOTYPE,
    SymbolTable,
    Table,
)
from fentry.image.unwind import Frames

_COLD = re.compile(r"\.cold(\.\d+)?$")
_SOURCES = ("symtab", "debug", "minidebug", "dynsym")
CHUNK = 4096  #: functions made at once, which bounds the memory of what is known of them meanwhile
_GLOBAL, _WEAK, _LOCAL = 0, 1, 2  # what is neither local nor weak (GNU_UNIQUE) counts as global


@dataclass(frozen=True, slots=True)
class Function:
    """One function of an image; there is one per address.

    ``name`` is the preferred one of all symbols at the address, by these rules in order: the default
    version of a symbol before an old one; a name that somebody wrote before one that the compiler made
    (with a dot: ``f.localalias``); a global or weak name, which programs link to, before a local one;
    fewer leading underscores; global before weak; shorter; alphabetical. C libraries decided the order:
    it calls their functions ``write`` and ``fork``, and not ``__GI___write`` (local) or ``__fork`` (global,
    where ``fork`` is weak). The others are in ``aliases``.
    """

    name: str
    address: int  #: link-time virtual address
    size: int  #: bytes; where the symbol says 0: up to the next function or the end of the section
    source: str  #: "symtab" | "dynsym" | "debug" | "minidebug" | "eh_frame" | "patchable": where the name is from
    aliases: tuple[str, ...] = ()
    ifunc: bool = False  #: the address is that of the resolver, which gives the real function (STT_GNU_IFUNC)
    sized: bool = True  #: False where `size` is only an upper bound
    cold: bool = False  #: entered by a jump from another function, not by a call (`f.cold`)


@dataclass(frozen=True, slots=True)
class FunctionList:
    """Functions sorted by address, and which of them a name means where several bear it."""

    functions: list[Function]
    ambiguous: dict[str, int]  #: name to the address that is meant, for names at more than one address


class _Rows(NamedTuple):
    """Symbols that may be functions, as columns in order of address, then of table.

    Columns and not objects: a file that is nothing but symbols must not cost ten times its size.
    """

    address: Table
    size: Table
    ifunc: Table
    hidden: Table
    binding: Table  #: _GLOBAL, _WEAK, _LOCAL
    source: Table  #: index into _SOURCES
    names: list[str]

    def take(self, which: Table) -> _Rows:
        """The given rows, in the given order."""
        return _Rows(
            self.address[which],
            self.size[which],
            self.ifunc[which],
            self.hidden[which],
            self.binding[which],
            self.source[which],
            [self.names[row] for row in which.tolist()],
        )


def build(
    tables: Sequence[tuple[str, SymbolTable]],
    frames: Frames,
    code: list[tuple[int, int]],
    not_functions: list[tuple[int, int]],
) -> FunctionList:
    """Merge symbol tables and unwind ranges.

    Args:
        tables: (source, table) pairs.
        frames: unwind ranges.
        code: disjoint (start, end) of code, sorted; what starts elsewhere is dropped.
        not_functions: sorted, disjoint (start, end) of PLT stubs; unwind ranges that start there are dropped.
    """
    rows = _collect(tables, frames, code)
    keep = _inside(code, frames.start) & ~_inside(not_functions, frames.start)
    frames = frames.take(keep)
    extra = ~_covered(rows.address, rows.size, frames.start) & ~np.isin(frames.start, rows.address)
    first = np.flatnonzero(np.diff(rows.address, prepend=np.uint64(0)))  # no symbol is at address 0
    known = rows.address[first]
    starts = np.sort(np.concatenate((known, frames.start[extra])))
    functions: list[Function] = []
    for low in range(0, len(starts), CHUNK):
        piece = starts[low : low + CHUNK]
        after = int(starts[low + CHUNK]) if low + CHUNK < len(starts) else LAST
        functions += _functions(piece, after, _limits(piece, code), rows, known, first, frames)
    return FunctionList(functions, _ambiguous(rows))


def _functions(
    starts: Table, after: int, limits: Table, rows: _Rows, known: Table, first: Table, frames: Frames
) -> Iterator[Function]:
    """The functions at some `starts`, the next of which is at `after`.

    Args:
        starts: addresses; each is named by rows, covered by an unwind range, or both.
        after: address of the function after the last of them.
        limits: ends of the code ranges that hold them.
        rows: all symbols.
        known: addresses that rows name.
        first: first row of each.
        frames: unwind ranges.
    """
    group, has_rows = np.searchsorted(known, starts), np.isin(starts, known)
    frame, has_frame = np.searchsorted(frames.start, starts), np.isin(starts, frames.start)
    addresses = starts.tolist()
    for index, (start, following) in enumerate(zip(addresses, [*addresses[1:], after], strict=True)):
        room = int(limits[index]) - start
        frame_size = int(frames.size[frame[index]]) if has_frame[index] else 0
        if has_rows[index]:
            number = int(group[index])
            low, high = int(first[number]), int(first[number + 1]) if number + 1 < len(first) else len(rows.address)
            yield _named(rows, low, high, start, frame_size, min(following - start, room), room)
        else:
            cold = bool(frames.cold[frame[index]])
            yield Function(f"sub_{start:x}", start, min(frame_size, room), "eh_frame", cold=cold)


def _collect(tables: Sequence[tuple[str, SymbolTable]], frames: Frames, code: list[tuple[int, int]]) -> _Rows:
    parts, loose = [], []
    for source, table in tables:
        kind, bind, home = table.kind, table.bind, table.section
        typed = (kind == STT_FUNC) | (kind == STT_GNU_IFUNC)
        label = (kind == STT_NOTYPE) & (bind == STB_GLOBAL) & (home < SHN_LORESERVE) & (table.size == 0)
        defined = (home != SHN_UNDEF) & ((home < SHN_LORESERVE) | (home == SHN_ABS) | (home > SHN_XINDEX))
        inside = defined & (table.value != 0) & _inside(code, table.value)
        parts.append(_part(source, table, np.flatnonzero(typed & inside)))
        loose.append(_part(source, table, np.flatnonzero(label & inside)))
    rows = _merged(parts)
    # labels without a type (hand-written assembly) count where nothing better covers the address
    labels = _merged(loose)
    by_frame = _covered(frames.start, frames.size, labels.address) & ~np.isin(labels.address, frames.start)
    free = ~_covered(rows.address, rows.size, labels.address) & ~np.isin(labels.address, rows.address) & ~by_frame
    return _merged([rows, labels.take(np.flatnonzero(free))]) if free.any() else rows


def _part(source: str, table: SymbolTable, which: Table) -> _Rows:
    names, old = table.names(which)
    # assemblers' own labels: mapping symbols ($x, $d) and temporaries
    good = np.array([bool(name) and not name.startswith(("$", ".L")) for name in names], bool)
    if not good.all():
        names = [name for name, kept in zip(names, good.tolist(), strict=True) if kept]
    which = which[good]
    bind = table.bind[which]
    return _Rows(
        address=table.value[which],
        size=np.minimum(table.size[which], np.uint64(LAST) - table.value[which]),
        ifunc=table.kind[which] == STT_GNU_IFUNC,
        hidden=old[good],
        binding=np.where(bind == STB_LOCAL, _LOCAL, np.where(bind == STB_WEAK, _WEAK, _GLOBAL)).astype(np.uint8),
        source=np.full(len(which), _SOURCES.index(source), np.uint8),
        names=names,
    )


def _merged(parts: list[_Rows]) -> _Rows:
    if not parts:
        column = np.empty(0, np.uint64)
        return _Rows(column, column, column != 0, column != 0, column, column, [])
    joined = parts[0]
    if len(parts) > 1:
        joined = _Rows(
            np.concatenate([part.address for part in parts]),
            np.concatenate([part.size for part in parts]),
            np.concatenate([part.ifunc for part in parts]),
            np.concatenate([part.hidden for part in parts]),
            np.concatenate([part.binding for part in parts]),
            np.concatenate([part.source for part in parts]),
            [name for part in parts for name in part.names],
        )
    if (joined.address[1:] >= joined.address[:-1]).all():
        return joined
    return joined.take(np.argsort(joined.address, kind="stable"))


def _preference(rows: _Rows, row: int) -> tuple[bool, bool, bool, int, int, int, str, int]:
    """Sort key of a name; the rules are in :class:`Function`."""
    name, binding = rows.names[row], int(rows.binding[row])
    underscores = len(name) - len(name.lstrip("_"))
    compiler_made = "." in name
    source = int(rows.source[row])
    return (bool(rows.hidden[row]), compiler_made, binding == _LOCAL, underscores, binding, len(name), name, source)


def _named(rows: _Rows, low: int, high: int, start: int, frame_size: int, bound: int, room: int) -> Function:
    """The function that rows `low` to `high` - 1 name.

    Args:
        rows: all rows.
        low: first row.
        high: one past the last row.
        start: its address.
        frame_size: what unwind tables say of its size, or 0.
        bound: bytes up to the next function.
        room: bytes up to the end of the section.
    """
    best, size, ifunc = low, int(rows.size[low]), bool(rows.ifunc[low])
    aliases: tuple[str, ...] = ()
    if high - low > 1:
        best, *others = sorted(range(low, high), key=lambda row: _preference(rows, row))
        unique = dict.fromkeys(rows.names[row] for row in others)
        unique.pop(rows.names[best], None)
        aliases = tuple(unique)
        size = next((int(rows.size[row]) for row in range(low, high) if rows.size[row]), 0)
        ifunc = bool(rows.ifunc[low:high].any())
    name, source = rows.names[best], _SOURCES[int(rows.source[best])]
    size = size or frame_size
    known = min(size, room) if size else bound
    return Function(name, start, known, source, aliases, ifunc, sized=size > 0, cold=bool(_COLD.search(name)))


def _ambiguous(rows: _Rows) -> dict[str, int]:
    """Names at several addresses, with the one that is meant: default version, then global, then lowest."""
    repeated = {one for one, other in pairwise(sorted(rows.names)) if one == other}
    best: dict[str, tuple[bool, int, int]] = {}
    several = set[str]()
    for row, name in enumerate(rows.names):
        if name not in repeated:
            continue
        rank = (bool(rows.hidden[row]), int(rows.binding[row]), int(rows.address[row]))
        known = best.setdefault(name, rank)
        if known[2] != rank[2]:
            several.add(name)
        best[name] = min(known, rank)
    return {name: best[name][2] for name in several}


def _covered(starts: Table, sizes: Table, values: Table) -> Table:
    """Which of `values` lie in one of the ranges, which are sorted by start and may overlap."""
    if not len(starts):
        return np.zeros(len(values), bool)
    reach = np.maximum.accumulate(starts + np.minimum(sizes, np.uint64(LAST) - starts))
    index = np.searchsorted(starts, values, "right").astype(np.int64) - 1
    return (index >= 0) & (values < reach[np.maximum(index, 0)])


def _inside(ranges: list[tuple[int, int]], values: Table) -> Table:
    """Which of `values` lie in one of the sorted, disjoint `ranges`."""
    starts = np.array([start for start, _ in ranges], np.uint64)
    sizes = np.array([min(end, LAST) - start for start, end in ranges], np.uint64)
    return _covered(starts, sizes, values)


def _limits(starts: Table, code: list[tuple[int, int]]) -> Table:
    """End of the code range that holds each start."""
    if not len(starts):
        return starts
    lows = np.array([start for start, _ in code], np.uint64)
    highs = np.array([min(end, LAST) for _, end in code], np.uint64)
    return highs[np.searchsorted(lows, starts, "right") - 1]


def add_patchable(known: list[Function], labels: Iterable[int], code: list[tuple[int, int]]) -> list[Function]:
    """Add the functions that only a patchable entry tells of; each ends where the next one begins.

    Args:
        known: functions sorted by address.
        labels: addresses of patchable entries that belong to none of them.
        code: disjoint (start, end) of code, sorted.
    """
    have = np.array([function.address for function in known], np.uint64)
    fresh = np.setdiff1d(np.fromiter(labels, np.uint64), have)
    fresh = fresh[_inside(code, fresh)]
    if not len(fresh):
        return known
    every = np.sort(np.concatenate((have, fresh)))
    ends = np.minimum(_limits(every, code), np.append(every, np.uint64(LAST))[1:])
    sizes = (ends - every)[np.isin(every, fresh)]
    added = [
        Function(f"sub_{start:x}", start, size, "patchable", sized=False)
        for start, size in zip(fresh.tolist(), sizes.tolist(), strict=True)
    ]
    return sorted([*known, *added], key=lambda function: function.address)
