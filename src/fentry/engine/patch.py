"""The only writer of the target's code.

Read, compare with what must be there, note the change in the undo journal, write, read back, synchronise. All
places are verified before the first is written. A mismatch shows both byte strings and stops.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from fentry.arch import Arch
from fentry.engine.journal import Entry, Journal
from fentry.errors import Fault, PatchMismatch, TargetRefused
from fentry.target import Target


@dataclass(frozen=True, slots=True)
class Change:
    """One place: what must be there, and what shall be."""

    at: int
    expect: bytes
    put: bytes


#: bytes above a stack pointer that are searched for signal frames: a coroutine's stack may lie in a huge mapping
_STACK_MAX = 4 << 20
#: places nearer than this are read and written as one span
_GAP = 4096


def _spans(changes: Sequence[Change]) -> list[tuple[int, int, list[Change]]]:
    """Group sorted changes into (start, end, changes) spans that are read and written at once."""
    spans: list[tuple[int, int, list[Change]]] = []
    for c in sorted(changes, key=lambda c: c.at):
        end = c.at + len(c.expect)
        if spans and c.at - spans[-1][1] <= _GAP:
            start, last, group = spans[-1]
            group.append(c)
            spans[-1] = (start, max(last, end), group)
        else:
            spans.append((c.at, end, [c]))
    return spans


def verify(target: Target, changes: Sequence[Change]) -> None:
    """Compare every place with what must be there; nothing is written. The target may run.

    Raises: PatchMismatch, Fault, Gone.
    """
    _verified(target, changes)


def intend(journal: Journal, changes: Sequence[Change]) -> None:
    """Note changes in the undo journal; always before :func:`apply`."""
    journal.intend([Entry(c.at, c.expect, c.put) for c in changes])


def apply(target: Target, changes: Sequence[Change]) -> None:
    """Make all changes or none; those of a tracing engine are in its journal by now.

    The target must be stopped, and no thread may be inside a place (see :func:`move_threads`).

    Raises: PatchMismatch before anything was written, or after a write that did not take; Fault, Gone.
    """
    images = _verified(target, changes)
    try:
        _write(target, images)
    except (Fault, PatchMismatch):
        for start, image, _ in images:  # all or none: what was written already goes back
            with suppress(Fault):
                target.write(start, image)
        raise


def _write(target: Target, images: Sequence[tuple[int, bytes, list[Change]]]) -> None:
    for start, image, group in images:
        new = bytearray(image)
        for c in group:
            new[c.at - start : c.at - start + len(c.put)] = c.put
        # what lies between the places of a span is written as it was read; the target is stopped
        target.write(start, bytes(new))
        back = target.read(start, len(new))
        if back != new:
            bad = next(c for c in group if back[c.at - start : c.at - start + len(c.put)] != c.put)
            raise PatchMismatch(bad.at, bad.put, back[bad.at - start : bad.at - start + len(bad.put)], when="after")
        if target.code_sync is not None:
            target.code_sync.sync(start, len(new))


def _verified(target: Target, changes: Sequence[Change]) -> list[tuple[int, bytes, list[Change]]]:
    """Read all spans and compare all places; gives (start, bytes, changes) of each span."""
    images = []
    for start, end, group in _spans(changes):
        image = target.read(start, end - start)
        for c in group:
            at = c.at - start
            if image[at : at + len(c.expect)] != c.expect:
                raise PatchMismatch(c.at, c.expect, image[at : at + len(c.expect)])
        images.append((start, image, group))
    return images


def write_new(target: Target, at: int, code: bytes) -> None:
    """Fill memory that nobody executes yet (a fresh island); the target may run. Synchronise it before it is used."""
    target.write(at, code)


def synchronise(target: Target, ranges: Sequence[tuple[int, int]]) -> None:
    """Make new code in (start, size) ranges seen by every core; the target is stopped."""
    if target.code_sync is not None:
        for at, size in ranges:
            target.code_sync.sync(at, size)


def restore(target: Target, entries: Sequence[Entry]) -> list[PatchMismatch]:
    """Put old bytes back wherever ours are; gives the places that hold neither.

    The target must be stopped and no thread inside a place.
    """
    strange: list[PatchMismatch] = []
    todo: list[Change] = []
    for start, end, group in _spans([Change(e.at, e.new, e.old) for e in entries]):
        try:
            found = target.read(start, end - start)
        except Fault:  # a module that was unloaded meanwhile has nothing to restore
            for c in group:
                _restore_one(target, c, todo, strange)
            continue
        for c in group:
            now = found[c.at - start : c.at - start + len(c.expect)]
            if now == c.expect:
                todo.append(c)
            elif now != c.put:
                strange.append(PatchMismatch(c.at, c.expect, now))
    apply(target, todo)
    return strange


def _restore_one(target: Target, c: Change, todo: list[Change], strange: list[PatchMismatch]) -> None:
    try:
        now = target.read(c.at, len(c.expect))
    except Fault:
        return
    if now == c.expect:
        todo.append(c)
    elif now != c.put:
        strange.append(PatchMismatch(c.at, c.expect, now))


def saved_pcs(target: Target, arch: Arch) -> list[tuple[int, int, Callable[[int], None]]]:
    """Every place where a thread will go on: (thread, pc, function that changes it).

    That is each thread's own pc, and the pcs that signal frames on its stack will return to. Frames on a stack that the
    thread has switched away from are not seen.
    """
    places: list[tuple[int, int, Callable[[int], None]]] = []
    mappings = target.mappings()
    starts = [m.start for m in mappings]
    for tid in target.threads():
        regs = target.regs(tid)
        pc, sp = regs[arch.pc], regs[arch.sp]
        places.append((tid, pc, partial(_set_pc, target, tid, arch.pc)))
        i = bisect_right(starts, sp) - 1
        if i < 0 or sp >= mappings[i].end:
            continue
        low = sp & -8
        stack = target.read(low, min(mappings[i].end - low, _STACK_MAX) & -8)
        for offset, saved in arch.saved_pcs(stack):
            places.append((tid, saved, partial(_set_word, target, low + offset)))
    return places


def _set_pc(target: Target, tid: int, name: str, pc: int) -> None:
    target.set_regs(tid, {name: pc})


def _set_word(target: Target, at: int, value: int) -> None:
    target.write(at, value.to_bytes(8, "little"))


def move_threads(target: Target, arch: Arch, moves: Mapping[int, tuple[int, Callable[[], Mapping[int, int]]]]) -> None:
    """Move every thread that is inside a place about to be written to where it goes on instead.

    By registers and signal frames, never by single steps: a tracer that is killed while it steps takes
    the target with it (the trap would reach the program).

    Args:
        target: stopped.
        arch: of the target.
        moves: {start of a place: (its size, function that gives {offset: address})}; a thread at the start is fine.

    Raises: TargetRefused if a thread is at an offset that nothing is known about.
    """
    starts = sorted(moves)
    for tid, pc, change in saved_pcs(target, arch):
        i = bisect_right(starts, pc) - 1
        if i < 0:
            continue
        size, find = moves[starts[i]]
        offset = pc - starts[i]
        if not 0 < offset < size:
            continue
        known = find()
        if offset not in known:
            raise TargetRefused(f"thread {tid} stands at {pc:#x}, inside code that must change", hint="try again")
        change(known[offset])


def inside(target: Target, arch: Arch, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Threads that are, or will return from a signal, inside the given (start, size) ranges."""
    return [tid for tid, pc, _ in saved_pcs(target, arch) if any(start <= pc < start + size for start, size in ranges)]
