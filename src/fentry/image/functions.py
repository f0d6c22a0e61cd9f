"""The list of functions: symbols of every table merged, aliases folded, gaps filled from unwind tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fentry.image.elf import (
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
from fentry.image.unwind import FrameRange

_COLD = re.compile(r"\.cold(\.\d+)?$")
_BINDING = {STB_GLOBAL: 0, STB_WEAK: 1, STB_LOCAL: 2}
_SOURCES = {"symtab": 0, "debug": 1, "minidebug": 2, "dynsym": 3}


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


@dataclass(slots=True)
class _Entry:
    """Symbols at one address, while they are collected: (rank, name, source)."""

    names: list[tuple[tuple[int, int, int], str, str]]
    size: int
    ifunc: bool


@dataclass(frozen=True, slots=True)
class FunctionList:
    """Functions sorted by address, and which of them a name means where several bear it."""

    functions: list[Function]
    ambiguous: dict[str, int]  #: name to the address that is meant, for names at more than one address


def build(
    tables: Sequence[tuple[str, SymbolTable]],
    frames: Iterable[FrameRange],
    code: list[tuple[int, int]],
    not_functions: list[tuple[int, int]],
) -> FunctionList:
    """Merge symbol tables and unwind ranges.

    Args:
        tables: (source, table) pairs.
        frames: unwind ranges sorted by start.
        code: disjoint (start, end) of code, sorted; what starts elsewhere is dropped.
        not_functions: sorted (start, end) of PLT stubs; unwind ranges that start there are dropped.
    """
    found: dict[int, _Entry] = {}
    loose: dict[int, _Entry] = {}
    for source, table in tables:
        for address, entry, typed in _functions_of(source, table, code):
            into = found if typed else loose
            old = into.get(address)
            if old is None:
                into[address] = entry
            else:
                old.names += entry.names
                old.size = old.size or entry.size
                old.ifunc |= entry.ifunc
    frame_at = {frame.start: frame for frame in frames}
    # labels without a type (hand-written assembly) count where nothing better covers the address
    found.update(_uncovered(loose, found, frame_at))
    free = [start for start in _starts_uncovered(sorted(frame_at), found) if start not in found]
    stubs = set(_kept(free, not_functions))
    extra = [start for start in _kept(free, code) if start not in stubs]
    starts = sorted([*found, *extra])
    ends = _ends(starts, code)
    functions = []
    chosen: dict[str, tuple[tuple[int, int, int], int]] = {}
    ambiguous = set[str]()
    for start, end, limit in zip(starts, [*starts, 1 << 64][1:], ends, strict=True):
        function, ranks = _function(start, min(end, limit), limit, found.get(start), frame_at.get(start))
        functions.append(function)
        for name, rank in ranks:
            known = chosen.get(name)
            if known is None:
                chosen[name] = (rank, start)
            else:
                ambiguous.add(name)
                chosen[name] = min(known, (rank, start))
    return FunctionList(functions, {name: chosen[name][1] for name in ambiguous})


def _functions_of(source: str, table: SymbolTable, code: list[tuple[int, int]]) -> Iterable[tuple[int, _Entry, bool]]:
    """(address, entry, has a function type) of every symbol that can be a function."""
    kind, bind, home = table.kind, table.bind, table.section
    typed = (kind == STT_FUNC) | (kind == STT_GNU_IFUNC)
    label = (kind == STT_NOTYPE) & (bind == STB_GLOBAL) & (home < SHN_LORESERVE)
    defined = (home != SHN_UNDEF) & ((home < SHN_LORESERVE) | (home == SHN_ABS) | (home > SHN_XINDEX))
    mask = (typed | label) & defined & (table.value != 0) & _inside_all(code, table.value)
    rows = np.flatnonzero(mask)
    columns = zip(
        table.names(rows),
        table.value[rows].tolist(),
        table.size[rows].tolist(),
        typed[rows].tolist(),
        (kind[rows] == STT_GNU_IFUNC).tolist(),
        bind[rows].tolist(),
        table.hidden[rows].tolist(),
        strict=True,
    )
    place = _SOURCES[source]
    for name, address, size, is_typed, ifunc, binding, hidden in columns:
        if not name or (name[0] in "$." and name.startswith((".L", "$"))) or (not is_typed and size):
            continue
        rank = (int(hidden), _BINDING.get(binding, 0), place)
        yield address, _Entry([(rank, name, source)], size, ifunc), is_typed


def _preference(item: tuple[tuple[int, int, int], str, str]) -> tuple[int, bool, bool, int, int, int, str, int]:
    (hidden, binding, place), name, _ = item
    underscores = len(name) - len(name.lstrip("_"))
    return (hidden, "." in name, binding == _BINDING[STB_LOCAL], underscores, binding, len(name), name, place)


def _function(
    start: int, end: int, limit: int, entry: _Entry | None, frame: FrameRange | None
) -> tuple[Function, list[tuple[str, tuple[int, int, int]]]]:
    """The function at `start`, and the rank of each of its names."""
    if entry is None:
        assert frame is not None
        size = min(frame.size, limit - start)
        return Function(f"sub_{start:x}", start, size, "eh_frame", cold=frame.cold), []
    aliases: tuple[str, ...] = ()
    if len(entry.names) == 1:
        ((rank, name, source),) = entry.names
        ranks = [(name, rank)]
    else:
        best: dict[str, tuple[tuple[int, int, int], str, str]] = {}
        for item in sorted(entry.names, key=_preference):
            best.setdefault(item[1], item)
        (rank, name, source), *others = best.values()
        ranks = [(name, rank)] + [(other, its) for its, other, _ in others]
        aliases = tuple(other for _, other, _ in others)
    size = entry.size or (frame.size if frame is not None else 0)
    sized = size > 0
    size = min(size, limit - start) if sized else end - start
    cold = bool(_COLD.search(name))
    return Function(name, start, size, source, aliases, entry.ifunc, sized, cold), ranks


def _starts_uncovered(starts: list[int], found: dict[int, _Entry]) -> list[int]:
    """Those of the sorted `starts` that lie in no sized function of `found`."""
    out, reach, index = [], 0, 0
    order = sorted(found)
    for start in starts:
        while index < len(order) and order[index] <= start:
            reach = max(reach, order[index] + found[order[index]].size)
            index += 1
        if start >= reach:
            out.append(start)
    return out


def _uncovered(
    loose: dict[int, _Entry], found: dict[int, _Entry], frames: dict[int, FrameRange]
) -> list[tuple[int, _Entry]]:
    free = [start for start in _starts_uncovered(sorted(loose), found) if start not in found]
    frame_starts, out, index, reach = sorted(frames), [], 0, 0
    for start in free:
        while index < len(frame_starts) and frame_starts[index] < start:
            reach = max(reach, frame_starts[index] + frames[frame_starts[index]].size)
            index += 1
        if start in frames or start >= reach:
            out.append((start, loose[start]))
    return out


def _bounds(ranges: list[tuple[int, int]]) -> tuple[Table, Table]:
    return (
        np.array([start for start, _ in ranges], np.uint64),
        np.array([min(end, (1 << 64) - 1) for _, end in ranges], np.uint64),
    )


def _inside_all(ranges: list[tuple[int, int]], values: Table) -> Table:
    """Which of `values` lie in one of the sorted, disjoint `ranges`."""
    if not ranges:
        return np.zeros(len(values), bool)
    starts, ends = _bounds(ranges)
    index = np.searchsorted(starts, values, "right").astype(np.int64) - 1
    return (index >= 0) & (values < ends[np.maximum(index, 0)])


def _kept(values: list[int], ranges: list[tuple[int, int]]) -> list[int]:
    """Those of `values` that lie in one of the ranges."""
    column = np.array(values, np.uint64)
    kept: list[int] = column[_inside_all(ranges, column)].tolist()
    return kept


def _ends(starts: list[int], code: list[tuple[int, int]]) -> list[int]:
    """End of the code range that holds each start."""
    if not starts:
        return []
    lows, highs = _bounds(code)
    index = np.searchsorted(lows, np.array(starts, np.uint64), "right").astype(np.int64) - 1
    return [int(end) for end in highs[np.maximum(index, 0)].tolist()]


def add_patchable(known: list[Function], labels: Iterable[int], code: list[tuple[int, int]]) -> list[Function]:
    """Add the functions that only a patchable entry tells of; each ends where the next one begins.

    Args:
        known: functions sorted by address.
        labels: addresses of patchable entries that belong to none of them.
        code: disjoint (start, end) of code, sorted.
    """
    have = {function.address for function in known}
    starts = sorted({label for label in _kept(list(labels), code) if label not in have})
    if not starts:
        return known
    every = sorted([*have, *starts])
    following = dict(zip(every, [*every[1:], 1 << 64], strict=True))
    added = [
        Function(f"sub_{start:x}", start, min(following[start], end) - start, "patchable", sized=False)
        for start, end in zip(starts, _ends(starts, code), strict=True)
    ]
    return sorted([*known, *added], key=lambda function: function.address)
