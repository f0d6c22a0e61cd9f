"""Exporters: a saved trace in other people's formats.

An exporter is one file here with a subclass of :class:`Exporter`: ``begin``, ``rows`` for each batch of events in
order, ``lost`` for losses that have no place in the stream, ``end``. It is handed records and
never an engine, so a trace renders on a machine that has neither the program nor its architecture. It keeps no
more than a batch: how a trace is cut into batches must not show in its output
(:func:`fentry.testing.exporter.check_exporter` checks that).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fentry.record.event import Flags
from fentry.record.meta import Meta
from fentry.record.store import Thread, Trace

__all__ = ["Exporter", "Header", "by_thread", "clock_ns", "export", "printable"]


@dataclass(frozen=True, slots=True)
class Header:
    """What an exporter knows before the first event."""

    meta: Meta
    threads: tuple[Thread, ...]
    events: int  #: events in the trace
    returning: Flags  #: per site: its returns are recorded
    symbolize: Callable[[npt.NDArray[np.uint64]], pa.DictionaryArray]

    @property
    def lanes(self) -> dict[tuple[int, int], Thread]:
        """Threads by (pid, tid)."""
        return {(t.pid, t.tid): t for t in self.threads}


class Exporter(ABC):
    """Writes one format. Its constructor takes where to write, and the format's options."""

    name: str  #: what a user types

    @abstractmethod
    def begin(self, header: Header) -> None:
        """Write what comes before events. Raises AskedWrong if this trace cannot be written so."""

    @abstractmethod
    def rows(self, table: pa.Table) -> None:
        """Take events (``fentry.record.event.SCHEMA``), in order within each thread."""

    @abstractmethod
    def lost(self, count: int) -> None:
        """Take the number of lost events that no row's ``lost`` tells of."""

    @abstractmethod
    def end(self) -> None:
        """Write what comes after events, and let go of files."""


def export(trace: Trace, exporter: Exporter, progress: Callable[[int], None] | None = None) -> None:
    """Run a trace through an exporter.

    Args:
        trace: an open trace.
        exporter: a fresh one.
        progress: called with the number of events done, after each batch.
    """
    header = Header(trace.meta, trace.threads, trace.count(), trace.marks.returning, trace.symbolize)
    exporter.begin(header)
    done = 0
    for table in trace.events():
        exporter.rows(table)
        done += table.num_rows
        if progress is not None:
            progress(done)
    if trace.lost > trace.lost_in_stream:
        exporter.lost(trace.lost - trace.lost_in_stream)
    exporter.end()


def by_thread(table: pa.Table) -> Iterator[tuple[tuple[int, int], pa.Table]]:
    """Split events by (pid, tid); order within each stays."""
    if not table.num_rows:
        return
    key = (table.column("pid").to_numpy().astype(np.uint64) << np.uint64(32)) | table.column("tid").to_numpy()
    if (key == key[0]).all():
        yield (int(key[0]) >> 32, int(key[0]) & 0xFFFFFFFF), table
        return
    order = np.argsort(key, kind="stable")
    cuts = np.flatnonzero(np.diff(key[order])) + 1
    for part in np.split(order, cuts):
        owner = int(key[part[0]])
        yield (owner >> 32, owner & 0xFFFFFFFF), table.take(pa.array(part))


def clock_ns(table: pa.Table, meta: Meta) -> npt.NDArray[np.int64]:
    """Clock readings in ns since the clock's zero.

    Clock ``order`` has no time: a position n is shown as n microseconds, because some number must stand there. A
    clock whose rate is unknown is shown as if it counted ns.
    """
    ts: npt.NDArray[np.uint64] = table.column("ts").to_numpy()
    if not meta.clock.timed:
        return (ts * np.uint64(1000)).astype(np.int64)
    scale = meta.clock.ns_per_tick
    if not scale or scale == 1.0:
        return np.minimum(ts, np.uint64((1 << 63) - 1)).astype(np.int64)
    # The part below a fixed number of ticks is scaled apart, so that a clock that ran for months keeps its
    # nanoseconds, and a stamp comes out the same wherever a batch begins.
    step = 1 << 32
    high = np.rint((ts // np.uint64(step)).astype(np.float64) * (scale * step)).astype(np.int64)
    return high + np.rint((ts % np.uint64(step)).astype(np.float64) * scale).astype(np.int64)


def numbers(table: pa.Table, name: str) -> list[int]:
    """A column without nulls as a list."""
    values: list[int] = table.column(name).to_numpy().tolist()
    return values


def optional(table: pa.Table, name: str) -> list[int | None]:
    """A nullable column as a list."""
    column = table.column(name)
    if column.null_count == len(column):
        return [None] * len(column)
    values: list[int | None] = column.fill_null(0).to_numpy().tolist()
    if column.null_count:
        for row in np.flatnonzero(column.is_null().to_numpy()).tolist():
            values[row] = None
    return values


def parents(table: pa.Table, header: Header, rows: npt.NDArray[np.bool_]) -> list[str]:
    """Names of the callers of `rows`; "" where the parent was not recorded (or for other rows)."""
    payload = table.column("payload")
    known = rows & payload.is_valid().to_numpy() & (pc.fill_null(payload, 0).to_numpy() != 0)
    out = [""] * table.num_rows
    at = np.flatnonzero(known)
    if len(at):
        names = header.symbolize(payload.fill_null(0).to_numpy()[at])
        spelled = [printable(name) for name in names.dictionary.to_pylist()]
        for row, index in zip(at.tolist(), names.indices.to_pylist(), strict=True):
            out[row] = spelled[index]
    return out


def printable(name: str) -> str:
    r"""Spell control characters, lone surrogates and the like as ``\xNN``, so that a name stays on its line."""
    return name if name.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in name)
