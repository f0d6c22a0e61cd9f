"""Records to columns: vectorised decoding of rings into Arrow tables.

A record names its site and kind by a *mark* (see :mod:`fentry.record.layout`). Marks are resolved with
arithmetic on whole blocks: subtract the table's base, shift by its stride, look up two small arrays. Blocks
are small enough to stay in the cache of one core, which is what decides the speed here.

Columns of an event table (one row per event, extensions folded in):

======== ======= ==================================================================================
ts       u64     raw clock value; for clock ``order`` the position in the thread's stream
ns       i64     unix time in ns; null for clock ``order``, or where the clock's rate is not known
pid, tid u32     whose event it is
site     u32     index into the trace's sites
kind     u8      :class:`fentry.record.layout.Kind`
stack    u16     bits 19..4 of the frame's stack position; 0 where not asked for
payload  u64     parent ip of an entry, return value of an exit; null where not recorded
duration u64     clock units; null unless the target recorded it with an exit without entry
seq      u64     position in the thread's stream
lost     u32     events of this thread known to be missing right before this one (0: none)
======== ======= ==================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fentry.errors import BadTrace
from fentry.record import layout
from fentry.record.layout import Kind, Table

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

#: Records decoded at a time: 16 bytes of each, and the temporaries, stay in a second-level cache.
BLOCK = 1 << 14
#: Largest slot, and so largest stride, that a table may claim.
MAX_STRIDE = 1 << 16
NO_KIND = 255
NO_SITE = 0xFFFFFFFF

SCHEMA = pa.schema(
    [
        ("ts", pa.uint64()),
        ("ns", pa.int64()),
        ("pid", pa.uint32()),
        ("tid", pa.uint32()),
        ("site", pa.uint32()),
        ("kind", pa.uint8()),
        ("stack", pa.uint16()),
        ("payload", pa.uint64()),
        ("duration", pa.uint64()),
        ("seq", pa.uint64()),
        ("lost", pa.uint32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Clock:
    """What a time stamp means.

    Args:
        kind: "tsc", "mono", "icount" (instructions retired) or "order" (no time, only sequence).
        hz: clock values per second; 0 if it must be found from two epoch pairs.
        epoch: pairs (clock value, unix time in ns), taken at the beginning and at the end.
    """

    kind: str
    hz: float = 0.0
    epoch: tuple[tuple[int, int], ...] = ()

    @property
    def timed(self) -> bool:
        """Stamps are times, not positions."""
        return self.kind != "order"

    @property
    def ns_per_tick(self) -> float:
        """Nanoseconds per clock value; 0.0 if that is not known, 1.0 for clock ``order``."""
        if not self.timed:
            return 1.0
        if self.hz > 0:
            return 1e9 / self.hz
        if len(self.epoch) > 1:
            (clock0, ns0), (clock1, ns1) = self.epoch[0], self.epoch[-1]
            if clock1 > clock0 and ns1 > ns0:
                return (ns1 - ns0) / (clock1 - clock0)
        return 0.0

    def unix_ns(self, ts: U64) -> I64 | None:
        """Convert stamps to unix nanoseconds; None where that cannot be done."""
        scale = self.ns_per_tick
        if not self.timed or not scale:
            return None
        clock0, ns0 = self.epoch[0] if self.epoch else (0, 0)
        out = np.empty(len(ts), dtype=np.int64)
        base, real = np.uint64(clock0), np.empty(min(len(ts), BLOCK))
        for low in range(0, len(ts), BLOCK):
            part = ts[low : low + BLOCK]
            scaled = real[: len(part)]
            # two's complement: stamps before the first epoch pair come out negative, as they should
            np.multiply((part - base).view(np.int64), scale, out=scaled)
            np.rint(scaled, out=scaled)
            np.add(scaled.astype(np.int64), ns0, out=out[low : low + BLOCK])
        return out


@dataclass(slots=True)
class Columns:
    """Decoded events as plain arrays of one length; what :func:`to_table` makes a table of."""

    ts: U64
    site: npt.NDArray[np.uint32]
    kind: npt.NDArray[np.uint8]
    stack: npt.NDArray[np.uint16]
    payload: U64 | None = None
    has_payload: Flags | None = None  #: None: all, where there is a payload at all
    duration: U64 | None = None
    has_duration: Flags | None = None
    position: U64 | None = None  #: clock order: stream position, or that of the parent ring for a nested event
    gaps: list[tuple[int, int]] = field(default_factory=list)  #: (row, events missing right before it)

    def __len__(self) -> int:
        return len(self.ts)

    def take(self, rows: npt.NDArray[np.intp]) -> Columns:
        """Give the rows in this order; their gaps go with them."""

        def pick(array: npt.NDArray[np.generic] | None) -> npt.NDArray[np.generic] | None:
            return None if array is None else array[rows]

        gaps: list[tuple[int, int]] = []
        if self.gaps:
            count = np.zeros(len(self), dtype=np.uint32)
            for row, lost in self.gaps:
                count[row] = min(lost, NO_SITE)
            moved = count[rows]
            gaps = [(int(i), int(moved[i])) for i in np.flatnonzero(moved)]
        return Columns(
            self.ts[rows],
            self.site[rows],
            self.kind[rows],
            self.stack[rows],
            pick(self.payload),  # type: ignore[arg-type]  # pick keeps the element type; numpy's stubs cannot say so
            pick(self.has_payload),  # type: ignore[arg-type]  # as above
            pick(self.duration),  # type: ignore[arg-type]  # as above
            pick(self.has_duration),  # type: ignore[arg-type]  # as above
            pick(self.position),  # type: ignore[arg-type]  # as above
            gaps,
        )


class Marks:
    """Tables of marks, flattened for vectorised lookup.

    Args:
        tables: from the trace's meta data; not trusted.
        nsites: length of the trace's site list.

    Raises:
        BadTrace: a table that cannot be.
    """

    def __init__(self, tables: Sequence[Table], nsites: int) -> None:
        tables = sorted((t for t in tables if t.sites), key=lambda t: t.base)
        kinds: list[npt.NDArray[np.uint8]] = []
        sites: list[npt.NDArray[np.uint32]] = []
        end = 1
        for table in tables:
            if not 1 <= table.stride <= MAX_STRIDE:
                raise BadTrace(f"a table of marks with stride {table.stride}")
            if not end <= table.base <= layout.MARK_MASK:
                raise BadTrace(f"a table of marks at {table.base:#x} that overlaps another")
            end = table.base + table.stride * len(table.sites)
            kind = np.full(table.stride, NO_KIND, dtype=np.uint8)
            for offset, value in table.marks.items():
                if not 0 <= offset < table.stride:
                    raise BadTrace(f"a mark at offset {offset} of a slot of {table.stride} bytes")
                kind[offset] = int(value)
            site = np.asarray(table.sites, dtype=np.int64)
            if len(site) and (int(site.max()) >= nsites or int(site.min()) < -1):
                raise BadTrace("a table of marks names a site that is not listed")
            kinds.append(kind)
            sites.append(site.astype(np.uint32))
        self._base = np.array([t.base for t in tables], dtype=np.uint64)
        self._stride = np.array([t.stride for t in tables], dtype=np.uint64)
        self._span = np.array([t.stride * len(t.sites) for t in tables], dtype=np.uint64)
        self._kind_at = np.cumsum([0, *(len(k) for k in kinds)])[:-1].astype(np.uint64)
        self._site_at = np.cumsum([0, *(len(s) for s in sites)])[:-1].astype(np.uint64)
        self._kinds = np.concatenate(kinds) if kinds else np.empty(0, np.uint8)
        self._sites = np.concatenate(sites) if sites else np.empty(0, np.uint32)
        shifts = [t.stride.bit_length() - 1 if t.stride & (t.stride - 1) == 0 else -1 for t in tables]
        self._shift = np.array([max(s, 0) for s in shifts], dtype=np.uint64)
        self._shifts = bool(tables) and min(shifts) >= 0
        returning = np.zeros(nsites, dtype=bool)
        for table in tables:
            if {Kind.EXIT, Kind.UNWOUND} & set(table.marks.values()):
                used = np.asarray(table.sites, dtype=np.int64)
                returning[used[used >= 0]] = True
        #: per site: its returns are recorded
        self.returning: Flags = returning

    def resolve(self, mark: U64, site: npt.NDArray[np.uint32], kind: npt.NDArray[np.uint8]) -> None:
        """Fill `site` and `kind` for `mark` (one block); kind is NO_KIND for a mark of no table."""
        if not len(self._base):
            kind[:] = NO_KIND
            return
        single = len(self._base) == 1
        table = np.intp(0) if single else np.maximum(np.searchsorted(self._base, mark, "right") - 1, 0)
        off = mark - self._base[table]
        outside = off >= self._span[table]
        astray = bool(outside.any())
        if astray:
            off[outside] = 0
        if self._shifts:
            slot = off >> self._shift[table]
            off &= self._stride[table] - np.uint64(1)
        else:
            slot = off // self._stride[table]
            off -= slot * self._stride[table]
        if not single:
            off += self._kind_at[table]
            slot += self._site_at[table]
        # every index is in range by now; mode="clip" only spares the check
        np.take(self._kinds, off.view(np.int64), out=kind, mode="clip")
        np.take(self._sites, slot.view(np.int64), out=site, mode="clip")
        if astray:
            kind[outside] = NO_KIND


class Decoder:
    """Turns records into columns, and counts what made no sense.

    Args:
        marks: tables of the trace.
        clock: says whether the first word of a record is a stamp or a payload.
    """

    def __init__(self, marks: Marks, clock: Clock) -> None:
        self.marks = marks
        self.clock = clock
        self.damaged = 0  #: records whose mark is of no table, and extensions of no record

    def columns(
        self, words: U64, *, position: int = 0, nested: bool = False, gaps: Sequence[tuple[int, int]] = ()
    ) -> Columns:
        """Decode whole records: no record's extensions may be missing at the end.

        Args:
            words: shape (n, 2): the two words of each record.
            position: stream position of the first record.
            nested: of a ring with level > 0 (matters for clock ``order``).
            gaps: (record, events missing right before it), ascending.
        """
        # the smallest word tells, in one pass without a temporary, that there are only whole records
        if not len(words) or words[:, 1].min() >= layout.EXT_LIMIT:
            out = self._records(words)
            out.gaps = list(gaps)
            if not self.clock.timed and not nested:
                out.position = np.uint64(position) + np.arange(len(words), dtype=np.uint64) * np.uint64(layout.RECORD)
        else:
            out = self._extended(words, position, nested, gaps)
        good = (out.kind != NO_KIND) & (out.site != NO_SITE)
        return out if bool(good.all()) else self._drop(out, good)

    def _records(self, words: U64) -> Columns:
        """Resolve records that are no extensions; marks of no table come out as NO_KIND or NO_SITE."""
        n = len(words)
        out = Columns(np.empty(n, np.uint64), np.empty(n, np.uint32), np.empty(n, np.uint8), np.empty(n, np.uint16))
        halves = words.view(np.uint16)
        mask = np.uint64(layout.MARK_MASK)
        for low in range(0, n, BLOCK):
            high = min(n, low + BLOCK)
            self.marks.resolve(words[low:high, 1] & mask, out.site[low:high], out.kind[low:high])
            out.stack[low:high] = halves[low:high, 7]
            out.ts[low:high] = words[low:high, 0]
        if not self.clock.timed:
            out.payload = out.ts
        return out

    def _drop(self, columns: Columns, good: Flags) -> Columns:
        """Leave out records that make no sense; a gap before one moves to the next good one."""
        self.damaged += int(len(good) - good.sum())
        rows = np.flatnonzero(good)
        moved: dict[int, int] = {}
        for row, lost in columns.gaps:
            at = int(np.searchsorted(rows, row))
            if at < len(rows):
                moved[at] = moved.get(at, 0) + lost
        columns.gaps = []
        kept = columns.take(rows)
        kept.gaps = sorted(moved.items())
        return kept

    def _extended(self, words: U64, position: int, nested: bool, gaps: Sequence[tuple[int, int]]) -> Columns:
        plain: Flags = words[:, 1] >= np.uint64(layout.EXT_LIMIT)
        # one extension behind every record is what the function tracer writes; slices are then enough
        paired = len(words) % 2 == 0 and bool(plain[::2].all()) and not plain[1::2].any()
        out = self._records(words[::2] if paired else words[plain])
        count = len(out)
        if not self.clock.timed and not nested:
            out.position = np.uint64(position) + np.flatnonzero(plain).astype(np.uint64) * np.uint64(layout.RECORD)
        if paired:
            owner = np.arange(len(words)) >> 1
            belongs, extensions = np.arange(count), words[1::2]
        else:
            owner = np.cumsum(plain) - 1  # of each word pair: the record that it is, or belongs to
            belongs, extensions = owner[~plain], words[~plain]
        which, value = extensions[:, 1], extensions[:, 0]
        known = (belongs >= 0) & (which >= layout.EXT_PARENT) & (which <= layout.EXT_DURATION)
        if not known.all():
            self.damaged += int(len(known) - known.sum())
            belongs, which, value = belongs[known], which[known], value[known]
        hit = (which == layout.EXT_PARENT) | (which == layout.EXT_RETVAL)
        if hit.any() and out.payload is None:
            if paired and len(value) == count and hit.all():
                out.payload = value.copy()
            else:
                out.payload, out.has_payload = _scatter(count, belongs[hit], value[hit])
        hit = which == layout.EXT_DURATION
        if hit.any():
            out.duration, out.has_duration = _scatter(count, belongs[hit], value[hit])
        hit = which == layout.EXT_POS
        if hit.any() and nested and not self.clock.timed:
            # an event without a position of its own keeps its place behind the one before it
            out.position = np.maximum.accumulate(_scatter(count, belongs[hit], value[hit])[0])
        moved: dict[int, int] = {}
        for record, lost in gaps:
            row = int(owner[record]) + int(not plain[record]) if record < len(owner) else count
            if row < count:
                moved[row] = moved.get(row, 0) + lost
        out.gaps = sorted(moved.items())
        return out


def _scatter(count: int, rows: npt.NDArray[np.intp], values: U64) -> tuple[U64, Flags]:
    """Spread `values` over `count` rows; the second array says which rows got one."""
    out, got = np.zeros(count, np.uint64), np.zeros(count, bool)
    out[rows] = values
    got[rows] = True
    return out, got


def whole_records(words: U64) -> int:
    """How many of these word pairs can be decoded now: the last record may still miss extensions.

    Returns: the index of the last record that is no extension, or all if there is none near the end.
    """
    for back in range(1, min(len(words), 8) + 1):
        if words[-back, 1] >= layout.EXT_LIMIT:
            return len(words) - back
    return len(words)


def join(parts: Sequence[Columns]) -> Columns:
    """Put columns one after the other."""
    if len(parts) == 1:
        return parts[0]
    gaps: list[tuple[int, int]] = []
    row = 0
    for part in parts:
        gaps += [(row + at, lost) for at, lost in part.gaps]
        row += len(part)

    def both(values: Sequence[U64 | None], has: Sequence[Flags | None]) -> tuple[U64 | None, Flags | None]:
        if all(v is None for v in values):
            return None, None
        whole = [np.zeros(len(p), np.uint64) if v is None else v for p, v in zip(parts, values, strict=True)]
        if all(h is None and v is not None for h, v in zip(has, values, strict=True)):
            return np.concatenate(whole), None
        marks = [np.full(len(p), v is not None) if h is None else h for p, v, h in zip(parts, values, has, strict=True)]
        return np.concatenate(whole), np.concatenate(marks)

    payload, has_payload = both([p.payload for p in parts], [p.has_payload for p in parts])
    duration, has_duration = both([p.duration for p in parts], [p.has_duration for p in parts])
    position, _ = both([p.position for p in parts], [None] * len(parts))
    return Columns(
        np.concatenate([p.ts for p in parts]),
        np.concatenate([p.site for p in parts]),
        np.concatenate([p.kind for p in parts]),
        np.concatenate([p.stack for p in parts]),
        payload,
        has_payload,
        duration,
        has_duration,
        position,
        gaps,
    )


def merge(sources: Sequence[Iterator[tuple[U64, Columns]]]) -> Iterator[tuple[npt.NDArray[np.intp], Columns]]:
    """Merge streams by key, in memory that depends on the batches and not on the streams.

    Args:
        sources: each gives (keys, columns) with keys that never go down within the source.

    Yields: (which source each row is from, rows in order of their keys; rows of equal keys in order of sources).
    """
    live: list[tuple[int, Iterator[tuple[U64, Columns]]]] = list(enumerate(sources))
    heads: dict[int, tuple[U64, Columns]] = {}
    while True:
        for number, source in list(live):
            while number not in heads:
                batch = next(source, None)
                if batch is None:
                    live.remove((number, source))
                    break
                if len(batch[0]):
                    heads[number] = batch
        if not heads:
            return
        bound = min(keys[-1] for keys, _ in heads.values())
        parts: list[Columns] = []
        keys_of: list[U64] = []
        origin: list[npt.NDArray[np.intp]] = []
        for number in sorted(heads):
            keys, columns = heads[number]
            cut = int(np.searchsorted(keys, bound, "right"))
            if not cut:
                continue
            whole = cut == len(keys)
            parts.append(columns if whole else columns.take(np.arange(cut)))
            keys_of.append(keys[:cut])
            origin.append(np.full(cut, number, dtype=np.intp))
            if whole:
                del heads[number]
            else:
                heads[number] = keys[cut:], columns.take(np.arange(cut, len(keys)))
        if len(parts) == 1:
            yield origin[0], parts[0]
            continue
        order = np.argsort(np.concatenate(keys_of), kind="stable")
        yield np.concatenate(origin)[order], join(parts).take(order)


def to_table(
    columns: Columns,
    clock: Clock,
    *,
    pid: int | npt.NDArray[np.uint32],
    tid: int | npt.NDArray[np.uint32],
    seq: int | U64,
) -> pa.Table:
    """Make the Arrow table that the module's docstring describes.

    Args:
        columns: decoded events.
        clock: converts stamps.
        pid: owner of all rows, or of each row.
        tid: likewise.
        seq: position in the thread's stream of the first row, or of each row.
    """
    n = len(columns)
    seqs = np.arange(seq, seq + n, dtype=np.uint64) if isinstance(seq, int) else seq
    ts = columns.ts if clock.timed else seqs
    ns = clock.unix_ns(ts)
    lost = np.zeros(n, np.uint32)
    for row, count in columns.gaps:
        lost[row] = min(count, NO_SITE)

    def owners(value: int | npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        return np.full(n, value, np.uint32) if isinstance(value, int) else value

    def nullable(values: U64 | None, has: Flags | None) -> pa.Array:
        if values is None:
            return pa.nulls(n, pa.uint64())
        return pa.array(values, mask=None if has is None else ~has)

    return pa.Table.from_arrays(
        [
            pa.array(ts),
            pa.nulls(n, pa.int64()) if ns is None else pa.array(ns),
            pa.array(owners(pid)),
            pa.array(owners(tid)),
            pa.array(columns.site),
            pa.array(columns.kind),
            pa.array(columns.stack),
            nullable(columns.payload, columns.has_payload),
            nullable(columns.duration, columns.has_duration),
            pa.array(seqs),
            pa.array(lost),
        ],
        schema=SCHEMA,
    )


def decode(
    words: U64, tables: Sequence[Table], clock: Clock, *, nsites: int, pid: int = 0, tid: int = 0
) -> tuple[pa.Table, int]:
    """Decode the records of one thread in one go.

    Args:
        words: shape (n, 2): the two words of each record.
        tables: what marks mean.
        clock: what stamps mean.
        nsites: length of the trace's site list.
        pid: owner.
        tid: owner.

    Returns: the table, and how many records made no sense.
    """
    decoder = Decoder(Marks(tables, nsites), clock)
    columns = decoder.columns(words)
    return to_table(columns, clock, pid=pid, tid=tid, seq=0), decoder.damaged


def columns_of(table: pa.Table) -> Columns:
    """Give the arrays of an event table again; ``ts`` is then the table's (a position for clock ``order``)."""

    def array(name: str) -> npt.NDArray[np.generic]:
        column = table.column(name)
        one = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        values: npt.NDArray[np.generic] = one.to_numpy(zero_copy_only=False)
        return values

    def nullable(name: str) -> tuple[U64 | None, Flags | None]:
        column = table.column(name)
        if column.null_count == len(column):
            return None, None
        values = column.fill_null(0).to_numpy()
        return values, (column.is_valid().to_numpy() if column.null_count else None)

    payload, has_payload = nullable("payload")
    duration, has_duration = nullable("duration")
    lost = array("lost")
    return Columns(
        array("ts"),  # type: ignore[arg-type]  # the schema says what it is; pyarrow has no types
        array("site"),  # type: ignore[arg-type]  # as above
        array("kind"),  # type: ignore[arg-type]  # as above
        array("stack"),  # type: ignore[arg-type]  # as above
        payload,
        has_payload,
        duration,
        has_duration,
        None,
        [(int(row), int(lost[row])) for row in np.flatnonzero(lost)],
    )
