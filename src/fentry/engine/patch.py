"""The only writer of the target's code.

Read, compare with what must be there, note the change in the undo journal, write, read back, synchronise. All
places are verified before the first is written. A mismatch shows both byte strings and stops.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from fentry.arch import load
from fentry.engine.journal import Entry, Journal
from fentry.errors import Fault, PatchMismatch, TargetRefused
from fentry.target import Target, need


@dataclass(frozen=True, slots=True)
class Change:
    """One place: what must be there, and what shall be."""

    at: int
    expect: bytes
    put: bytes


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


def apply(target: Target, changes: Sequence[Change], journal: Journal | None) -> None:
    """Make all changes or none.

    The target must be stopped, and no thread may be inside a place (see :func:`leave`).

    Raises: PatchMismatch before anything was written, or after a write that did not take; Fault, Gone.
    """
    spans = _spans(changes)
    images: list[bytearray] = []
    for start, end, group in spans:
        found = target.read(start, end - start)
        image = bytearray(found)
        for c in group:
            at = c.at - start
            if image[at : at + len(c.expect)] != c.expect:
                raise PatchMismatch(c.at, c.expect, bytes(image[at : at + len(c.expect)]))
        for c in group:
            image[c.at - start : c.at - start + len(c.put)] = c.put
        images.append(image)
    if journal is not None:
        journal.intend([Entry(c.at, c.expect, c.put) for c in changes])
    for (start, end, group), image in zip(spans, images, strict=True):
        # only the changed bytes' range of the span is written; what lies between is what was read with
        # the target stopped
        target.write(start, bytes(image))
        back = target.read(start, end - start)
        if back != image:
            bad = next(c for c in group if back[c.at - start : c.at - start + len(c.put)] != c.put)
            raise PatchMismatch(bad.at, bad.put, back[bad.at - start : bad.at - start + len(bad.put)], when="after")
        if target.code_sync is not None:
            target.code_sync.sync(start, end - start)


def write_new(target: Target, at: int, code: bytes) -> None:
    """Fill memory that nobody executes yet (a fresh island)."""
    target.write(at, code)
    if target.code_sync is not None:
        target.code_sync.sync(at, len(code))


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
    apply(target, todo, None)
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


def leave(target: Target, places: Sequence[tuple[int, int]], *, inside: bool = False, limit: int = 100_000) -> None:
    """Step every thread out of the given (start, end) ranges.

    Args:
        places: disjoint ranges.
        inside: False: a thread whose pc is *at* a start is fine (nothing of the place has run yet);
            True: it must leave as well (the code goes away).
        limit: steps per thread before giving up.

    Raises: Unsupported if the target cannot step; Gone.
    """
    pc_name = load(target.arch).pc
    ordered = sorted(places)
    starts = [p[0] for p in ordered]

    def caught(pc: int) -> bool:
        i = bisect_right(starts, pc) - 1
        if i < 0:
            return False
        start, end = ordered[i]
        return (start <= pc if inside else start < pc) and pc < end

    for tid in target.threads():
        if not caught(target.regs(tid)[pc_name]):
            continue
        stepper = need(target.stepper, "single step", target=target)
        for _ in range(limit):
            stepper.step(tid)
            if not caught(target.regs(tid)[pc_name]):
                break
        else:
            raise TargetRefused(f"thread {tid} does not leave the code that must change")
