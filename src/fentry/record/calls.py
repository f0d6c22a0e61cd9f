"""Events to calls, whole columns at a time.

:class:`fentry.record.stack.Stack` holds the rules, one event at a time. :class:`Matcher` gives the same answer for
columns: as long as entries and exits pair up like brackets, nesting depth is a running sum, and partners
are neighbours after a stable sort by depth. Each pair is then verified; at the first that does not fit,
a stretch of events takes the exact way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fentry.record.event import U64, Clock, Columns, Flags, columns_of
from fentry.record.layout import Kind
from fentry.record.stack import Bit, Frame, Stack

if TYPE_CHECKING:
    from fentry.record.store import Trace

I64 = npt.NDArray[np.int64]

_ENTRY, _EXIT, _TAIL, _UNWOUND, _PLAIN = (int(k) for k in (Kind.ENTRY, Kind.EXIT, Kind.TAIL, Kind.UNWOUND, Kind.PLAIN))


_FIELDS = attrgetter("row", "parent", "ts", "dur", "own", "site", "depth", "retval", "flags")
_MOST = (1 << 63) - 1


def _clamped(values: Sequence[int]) -> Sequence[int]:
    """Durations of damaged traces can exceed what a column holds."""
    return values if max(values, default=0) <= _MOST else [min(value, _MOST) for value in values]


@dataclass(slots=True)
class Rows:
    """Closed calls of one thread as arrays of one length, in no particular order."""

    row: I64
    parent: I64  #: row of the enclosing call in the same thread, or -1
    ts: U64
    dur: I64  #: clock units, -1 where there is none
    own: I64
    site: npt.NDArray[np.uint32]
    depth: npt.NDArray[np.int32]
    retval: U64
    has_retval: Flags
    flags: npt.NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def of(cls, frames: Sequence[Frame]) -> Rows:
        """Rows of frames that :class:`Stack` closed."""
        columns = list(zip(*map(_FIELDS, frames), strict=True)) or [()] * 9
        row, parent, ts, dur, own, site, depth, retval, flags = columns
        return cls(
            np.array(row, np.int64),
            np.array(parent, np.int64),
            np.array(ts, np.uint64),
            np.array(_clamped(dur), np.int64),
            np.array(_clamped(own), np.int64),
            np.array(site, np.uint32),
            np.array(depth, np.int32),
            np.array([value or 0 for value in retval], np.uint64),
            np.array([value is not None for value in retval], bool),
            np.array(flags, np.uint16),
        )

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Put rows one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls))) if parts else cls.of([])


class Matcher:
    """Calls of one thread from its events, a batch at a time.

    Args:
        returning: per site, whether its returns are recorded (``Marks.returning``).
        exact: always take the exact way (for tests).
    """

    #: events that take the exact way after a pair did not fit; doubles while it keeps happening (more than
    #: these would only keep more frames alive at a time, which costs)
    WINDOW = (512, 1 << 13)
    #: events tried at a time in columns; doubles while it works
    SPAN = (1 << 14, 1 << 20)

    def __init__(self, returning: Flags, *, exact: bool = False) -> None:
        self.stack = Stack()
        self.exact = exact
        self._instant = ~returning
        self._window = self.WINDOW[0]
        self._span = self.SPAN[0]

    def feed(self, table: pa.Table) -> Rows:
        """Take events of this thread, in order; give the calls that ended."""
        events = columns_of(table)
        if self._instant.any():
            entered = (events.kind == _ENTRY) | (events.kind == _TAIL)
            events.kind = np.where(entered & self._instant[events.site], np.uint8(_PLAIN), events.kind)
        out: list[Rows] = []
        gaps = dict(events.gaps)
        stops = [*sorted(gaps), len(events)]
        at = stop = 0
        while at < len(events):
            while stops[stop] < at:
                stop += 1
            if at in gaps:
                at = self._slow(events, at, at + 1, gaps[at], out)
                stop += 1
                continue
            limit = min(stops[stop], at + self._span)
            if self.exact or self.stack.loose or limit - at < 64:
                at = self._slow(events, at, min(limit, at + self.WINDOW[1]), 0, out)
                continue
            tried, fits = limit - at, self._fast(events, at, limit, out)
            if fits < tried:
                while 0 < fits < tried:  # the part that fits may itself end earlier, for another reason
                    tried, fits = fits, self._fast(events, at, at + fits, out)
                at += fits
                self._span = max(self.SPAN[0], self._span // 2)
                at = self._slow(events, at, min(stops[stop], at + self._window), 0, out)
                self._window = min(2 * self._window, self.WINDOW[1])
            else:
                at = limit
                self._window = self.WINDOW[0]
                self._span = min(2 * self._span, self.SPAN[1])
        return Rows.join(out)

    def finish(self) -> Rows:
        """Give the calls that never ended."""
        return Rows.of(self.stack.finish())

    def _slow(self, events: Columns, low: int, high: int, lost: int, out: list[Rows]) -> int:
        take = self.stack.event
        closed: list[Frame] = []
        payload = _optional(events.payload, events.has_payload, low, high)
        duration = _optional(events.duration, events.has_duration, low, high)
        for ts, site, kind, bits, value, took in zip(
            events.ts[low:high].tolist(),
            events.site[low:high].tolist(),
            events.kind[low:high].tolist(),
            events.stack[low:high].tolist(),
            payload,
            duration,
            strict=True,
        ):
            closed += take(ts, site, kind, bits, value, took, lost)
            lost = 0
        if closed:
            out.append(Rows.of(closed))
        return high

    def _fast(self, events: Columns, low: int, high: int, out: list[Rows]) -> int:
        """Match [low, high) in columns if all of it nests properly.

        Returns: how many events from `low` on nest properly. Only if that is all of them, something was done.
        """
        stack = self.stack
        carry = stack.frames
        c, n = len(carry), len(carry) + high - low
        kind = np.concatenate([np.array([f.kind for f in carry], np.uint8), events.kind[low:high]])
        entry, tail = kind == _ENTRY, kind == _TAIL
        plain, leave = kind == _PLAIN, (kind == _EXIT) | (kind == _UNWOUND)
        # brackets[i]: depth, by entries alone, of the frame that event i opens, closes or (tail) jumps from
        level = np.cumsum(entry.astype(np.int32) - leave)
        brackets = level - (entry | tail)
        below = np.flatnonzero((brackets < 0) & ~plain)
        if len(below):
            return max(0, int(below[0]) - c)
        site = np.concatenate([np.array([f.site for f in carry], np.uint32), events.site[low:high]])
        bits = np.concatenate([np.array([f.bits for f in carry], np.uint16), events.stack[low:high]])

        chosen = np.flatnonzero(~plain)
        by_depth = chosen[_stable_order(brackets[chosen])]
        opens = entry[by_depth]
        partner = by_depth[np.maximum.accumulate(np.where(opens, np.arange(len(by_depth)), 0))]
        fits = (bits[partner] == bits[by_depth]) & ((site[partner] == site[by_depth]) | ~leave[by_depth])
        if not fits.all():
            return max(0, int(by_depth[~fits].min()) - c)

        end = np.full(n, -1, np.int64)  # of each frame: the event that closes it
        closing = leave[by_depth]
        end[partner[closing]] = by_depth[closing]
        extra = None
        owner = np.arange(n)
        if tail.any():
            jumps = tail[by_depth]
            owner[by_depth[jumps]] = partner[jumps]
            end[tail] = end[owner[tail]]
            # a tail call deepens what comes after it until its owner returns
            step = tail.astype(np.int32)
            np.subtract.at(step, end[tail & (end >= 0)], 1)
            extra = np.cumsum(step)
        self._emit(events, low, kind, site, level, extra, end, owner, out)
        return high - low

    def _emit(
        self,
        events: Columns,
        low: int,
        kind: npt.NDArray[np.uint8],
        site: npt.NDArray[np.uint32],
        level: npt.NDArray[np.int32],
        extra: npt.NDArray[np.int32] | None,
        end: I64,
        owner: I64,
        out: list[Rows],
    ) -> None:
        """Make rows of frames whose ends are known, and keep the others as the stack."""
        stack, carry = self.stack, self.stack.frames
        c, n = len(carry), len(kind)
        high = low + n - c
        frame = (kind == _ENTRY) | (kind == _TAIL)
        plain = kind == _PLAIN
        has_row = np.flatnonzero(frame | plain)
        depth = level - (kind == _ENTRY) if extra is None else level + extra - frame
        ts = np.concatenate([np.array([f.ts for f in carry], np.uint64), events.ts[low:high]])
        if stack.since is None:
            stack.since = int(events.ts[low])

        # the enclosing frame is the last one opened one level up
        framed = np.flatnonzero(frame)
        order = framed[_stable_order(depth[framed])]
        span = n.bit_length()
        keys = (depth[order].astype(np.int64) << span) + order
        inner = has_row[depth[has_row] > 0]
        asked = inner[_stable_order(depth[inner])]
        found = np.searchsorted(keys, ((depth[asked].astype(np.int64) - 1) << span) + asked) - 1
        up = np.full(n, -1, np.int64)
        up[asked] = order[found]

        number = np.full(n, -1, np.int64)
        number[:c] = [f.row for f in carry]
        number[has_row[c:]] = stack.rows + np.arange(len(has_row) - c)
        stack.rows += len(has_row) - c
        parent = np.where(up >= 0, number[up], -1)
        parent[:c] = [f.parent for f in carry]

        flags = np.zeros(n, np.uint16)
        flags[kind == _TAIL] |= Bit.TAIL
        flags[plain] |= Bit.PLAIN
        flags[_recursive(frame, plain, site, end)] |= Bit.RECURSIVE
        if carry and carry[0].gap != stack.gaps:
            flags[: n if end[0] < 0 else end[0]] |= Bit.UNSURE
        flags[:c] = [f.flags for f in carry]
        flags[:c] |= np.array([Bit.LOST if f.gap != stack.gaps else 0 for f in carry], np.uint16)
        done = np.flatnonzero(frame & (end >= 0))
        flags[done[kind[end[done]] == _UNWOUND]] |= Bit.UNWOUND

        took = np.maximum((ts[end[done]] - ts[done]).view(np.int64), 0)
        child = np.zeros(n, np.int64)
        child[:c] = [f.child for f in carry]
        # parents of the carried frames are carried, right below them
        up[:c] = np.arange(-1, c - 1)
        above = up[done]
        np.add.at(child, above[above >= 0], took[above >= 0])
        stack.roots += int(took[above < 0].sum())
        dur, own = np.full(n, -1, np.int64), np.full(n, -1, np.int64)
        dur[done] = took
        own[done] = np.maximum(took - child[done], 0)
        retval, has_retval = np.zeros(n, np.uint64), np.zeros(n, bool)
        if events.payload is not None:
            at = end[done] - c + low
            retval[done] = events.payload[at]
            has_retval[done] = True if events.has_payload is None else events.has_payload[at]

        rows = np.flatnonzero((frame & (end >= 0)) | plain)
        out.append(
            Rows(
                number[rows],
                parent[rows],
                ts[rows],
                dur[rows],
                own[rows],
                site[rows],
                (depth[rows] + stack.base).astype(np.int32),
                retval[rows],
                has_retval[rows],
                flags[rows],
            )
        )
        open_: dict[int, Frame] = {}
        for i in np.flatnonzero(frame & (end < 0)).tolist():
            if i < c:
                kept = carry[i]
            else:
                kept = Frame()
                kept.row, kept.parent, kept.ts = int(number[i]), int(parent[i]), int(ts[i])
                kept.site, kept.bits, kept.kind = int(site[i]), int(events.stack[i - c + low]), int(kind[i])
                kept.flags, kept.gap, kept.depth = int(flags[i]), stack.gaps, int(depth[i]) + stack.base
                kept.retval, kept.dur, kept.own = None, -1, -1
                kept.owner = None if kind[i] == _ENTRY else open_[int(owner[i])]
            kept.child = int(child[i])
            open_[i] = kept
        stack.restore(list(open_.values()))


def _stable_order(values: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
    """Order of small numbers; as 16-bit integers they are sorted by radix, in linear time."""
    if len(values) and int(values.max()) < 1 << 15:
        return np.argsort(values.astype(np.int16), kind="stable")
    return np.argsort(values, kind="stable")


def _recursive(frame: Flags, plain: Flags, site: npt.NDArray[np.uint32], end: I64) -> Flags:
    """Of each frame and instant: is a frame of the same site open already?"""
    n = len(frame)
    begun = np.flatnonzero(frame | plain)
    ended = np.flatnonzero(frame & (end >= 0))
    bits = n.bit_length()
    # one number per change, ordered by site, then time; the low bit tells opening from closing
    change = np.concatenate(
        [
            ((site[begun].astype(np.int64) << bits) + begun) << 1 | 1,
            ((site[ended].astype(np.int64) << bits) + end[ended]) << 1,
        ]
    )
    change.sort()
    at = (change >> 1) & ((1 << bits) - 1)
    opening = (change & 1).astype(bool)
    step = np.where(opening, np.where(plain[at], 0, 1), -1)
    running = np.cumsum(step)
    group = change >> (bits + 1)
    fresh = np.flatnonzero(np.diff(group, prepend=-1))
    before = np.repeat((running - step)[fresh], np.diff(np.append(fresh, len(group))))
    out = np.zeros(n, bool)
    out[at[opening]] = (running - step - before)[opening] > 0
    return out


def _optional(values: U64 | None, has: Flags | None, low: int, high: int) -> list[int | None]:
    if values is None:
        return [None] * (high - low)
    numbers: list[int | None] = values[low:high].tolist()
    if has is None:
        return numbers
    return [number if there else None for number, there in zip(numbers, has[low:high].tolist(), strict=True)]


SCHEMA = pa.schema(
    [
        ("ts", pa.uint64()),
        ("ns", pa.int64()),
        ("dur", pa.int64()),
        ("own", pa.int64()),
        ("pid", pa.uint32()),
        ("tid", pa.uint32()),
        ("site", pa.uint32()),
        ("depth", pa.int32()),
        ("row", pa.int64()),
        ("parent_row", pa.int64()),
        ("retval", pa.uint64()),
        ("flags", pa.uint16()),
    ]
)


def to_table(rows: Rows, clock: Clock, *, pid: int, tid: int) -> pa.Table:
    """Make the Arrow table of calls.

    Columns: ts (u64, clock value of the entry), ns (unix time of it; null for clock ``order``), dur and own (i64, ns;
    for clock ``order`` events of the thread; null where there is none; own is dur without callees), pid, tid, site,
    depth (i32), row (i64, number of the call in its thread by entry), parent_row (i64, row of the
    enclosing call, null if none), retval (u64, null where not recorded), flags (u16, :class:`Flag`).
    """
    n = len(rows)
    scale = clock.ns_per_tick
    ns = clock.unix_ns(rows.ts)

    def lasting(values: I64) -> pa.Array:
        if not scale:
            return pa.nulls(n, pa.int64())
        scaled = values if scale == 1.0 else np.rint(values * scale).astype(np.int64)
        return pa.array(scaled, mask=values < 0)

    return pa.Table.from_arrays(
        [
            pa.array(rows.ts),
            pa.nulls(n, pa.int64()) if ns is None else pa.array(ns),
            lasting(rows.dur),
            lasting(rows.own),
            pa.array(np.full(n, pid, np.uint32)),
            pa.array(np.full(n, tid, np.uint32)),
            pa.array(rows.site),
            pa.array(rows.depth),
            pa.array(rows.row),
            pa.array(rows.parent, mask=rows.parent < 0),
            pa.array(rows.retval, mask=~rows.has_retval),
            pa.array(rows.flags),
        ],
        schema=SCHEMA,
    )


def iter_calls(trace: Trace) -> Iterator[pa.Table]:
    """Give all calls, thread by thread, each in a batch when it ended: memory does not grow with the trace.

    ``row`` and ``parent_row`` count within the thread; depths can be negative (see :class:`Stack`).
    """
    for thread in trace.threads:
        matcher = Matcher(trace.marks.returning)
        for batch in trace.events_of(thread):
            yield to_table(matcher.feed(batch), trace.meta.clock, pid=thread.pid, tid=thread.tid)
        yield to_table(matcher.finish(), trace.meta.clock, pid=thread.pid, tid=thread.tid)


def calls(trace: Trace) -> pa.Table:
    """Give all calls as one table, by thread and entry; ``parent_row`` is then the index of a row of the table.

    Depths begin at 0 in every thread. Calls of which only the exit was recorded get the depth and parent that their
    times imply.
    """
    parts: list[pa.Table] = []
    first = 0
    for thread in trace.threads:
        matcher = Matcher(trace.marks.returning)
        rows = [matcher.feed(batch) for batch in trace.events_of(thread)]
        whole = _settle(Rows.join([*rows, matcher.finish()]))
        whole.parent[whole.parent >= 0] += first
        whole.row += first
        first += len(whole)
        parts.append(to_table(whole, trace.meta.clock, pid=thread.pid, tid=thread.tid))
    return pa.concat_tables(parts).combine_chunks() if parts else SCHEMA.empty_table()


def _settle(rows: Rows) -> Rows:
    """Order one thread's calls by entry, number them, and place those whose surroundings became known late."""
    early = (rows.flags & Bit.OPEN_AT_START) != 0
    late = (rows.flags & Bit.TIMED) != 0
    if early.any():
        # a call that was open at the start encloses what has no other parent and ended before it
        by_depth = np.flatnonzero(early)[np.argsort(rows.depth[early], kind="stable")]
        depths, numbers = rows.depth[by_depth], rows.row[by_depth]
        orphan = np.flatnonzero(rows.parent < 0)
        at = np.searchsorted(depths, rows.depth[orphan] - 1)
        inside = (at < len(depths)) & (depths[np.minimum(at, len(depths) - 1)] == rows.depth[orphan] - 1)
        rows.parent[orphan[inside]] = numbers[at[inside]]
    rank = np.where(early, rows.depth.astype(np.int64) - (1 << 32), rows.row)
    if late.any():
        _nest(rows, np.flatnonzero(late & (rows.parent < 0)))
        order = np.lexsort((rows.depth, rank, rows.ts)) if late.all() else np.lexsort((rank, rows.ts))
    else:
        order = np.argsort(rank, kind="stable")
    place = np.empty(len(rows) and int(rows.row.max()) + 1, np.int64)
    place[rows.row[order]] = np.arange(len(order))
    out = Rows(*(getattr(rows, f.name)[order] for f in fields(Rows)))
    out.parent = np.where(out.parent >= 0, place[np.maximum(out.parent, 0)], -1) if len(out) else out.parent
    out.row = np.arange(len(out))
    out.depth = out.depth - out.depth.min() if len(out) else out.depth
    return out


def _nest(rows: Rows, late: npt.NDArray[np.intp]) -> None:
    """Give TIMED calls the parents that their intervals imply. They come in order of their ends."""
    waiting: list[tuple[int, int]] = []  # (start, index) of calls that nothing encloses yet
    children: dict[int, list[int]] = {}
    by_end = late[np.argsort(rows.row[late], kind="stable")]
    for index, start in zip(by_end.tolist(), rows.ts[by_end].tolist(), strict=True):
        while waiting and waiting[-1][0] >= start:
            inner = waiting.pop()[1]
            rows.parent[inner] = rows.row[index]
            children.setdefault(index, []).append(inner)
        waiting.append((start, index))
    level = [index for _, index in waiting]
    depth = 0
    while level:
        rows.depth[level] += depth
        level = [inner for index in level for inner in children.get(index, ())]
        depth += 1
