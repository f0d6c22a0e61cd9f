"""Chrome JSON (Trace Event Format) in chunks: ``chunk-0001.json``, ``chunk-0002.json``, ...

Viewers of this format load a file into memory as a whole, so a long trace is cut. Every chunk loads alone: it names
processes and threads, opens the calls that were running where it begins, and closes those that run on where it ends
(both have ``"continued": true``). Times are microseconds of the trace's clock with three decimals; for clock
``order`` one event is one microsecond.

Calls are B and E events; instants (PLAIN entries, exits without entry, losses) are i; calls of which only the end was
recorded are X. Source: the "Trace Event Format" document of the Chromium project.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pyarrow as pa

from fentry.errors import AskedWrong
from fentry.export import Exporter, Header, clock_ns, numbers, optional
from fentry.record.layout import Kind
from fentry.record.meta import utf8
from fentry.record.stack import Bit, Flag, Frame, Stack

_ENTRY, _TAIL, _PLAIN = int(Kind.ENTRY), int(Kind.TAIL), int(Kind.PLAIN)


@dataclass(slots=True)
class _Lane:
    ids: str  #: the pid and tid members of its events
    now: int = 0  #: ns of its newest event; never goes back
    stack: Stack = field(default_factory=Stack)


class Chrome(Exporter):
    """Writes chunks into a directory.

    Args:
        path: directory; made if absent.
        limit: events of a chunk, about (what is re-opened at its begin comes on top).

    Raises:
        AskedWrong: a limit that is none.
    """

    name = "chrome"

    def __init__(self, path: str | os.PathLike[str], limit: int = 200_000) -> None:
        if limit < 1:
            raise AskedWrong(f"a chunk of {limit} events cannot be")
        self._path = Path(path)
        self._limit = limit
        self._file: IO[str] | None = None
        self.chunks = 0  #: written so far

    def begin(self, header: Header) -> None:
        """Make the directory. Raises AskedWrong if that cannot be."""
        self._header = header
        clock = header.meta.clock
        self._scale = (clock.ns_per_tick or 1.0) if clock.timed else 1000.0
        self._names = [_text(site.name) for site in header.meta.sites]
        self._lanes = {key: _Lane(f'"pid":{t.pid},"tid":{t.tid}') for key, t in header.lanes.items()}
        self._now = 0
        self._room = 0
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            for old in self._path.glob("chunk-[0-9]*.json"):
                old.unlink()
        except OSError as error:
            raise AskedWrong(f"cannot write to {self._path}: {error.strerror}", hint="name another place") from None
        self._open_chunk()

    def rows(self, table: pa.Table) -> None:
        """Write events."""
        sites = table.column("site").to_numpy()
        kinds = table.column("kind").to_numpy().copy()
        kinds[~self._header.returning[sites] & ((kinds == _ENTRY) | (kinds == _TAIL))] = _PLAIN
        out: list[str] = []
        for pid, tid, ts, ns, site, kind, bits, payload, duration, lost in zip(
            numbers(table, "pid"),
            numbers(table, "tid"),
            numbers(table, "ts"),
            clock_ns(table, self._header.meta).tolist(),
            sites.tolist(),
            kinds.tolist(),
            numbers(table, "stack"),
            optional(table, "payload"),
            optional(table, "duration"),
            numbers(table, "lost"),
            strict=True,
        ):
            lane = self._lanes[pid, tid]
            if self._room <= 0:
                self._write(out)
                out = []
                self._close_chunk()
                self._open_chunk()
            self._room -= 1
            lane.now = at = max(lane.now, ns)
            self._now = max(self._now, at)
            time = f'"ts":{_us(at)},{lane.ids}'
            if lost:
                out.append(f'{{"ph":"i","s":"t","name":"LOST {lost} EVENTS",{time}}}')
            closed = lane.stack.event(ts, site, kind, bits, payload, duration, lost)
            if kind == _PLAIN:
                out.append(f'{{"ph":"i","s":"t","name":{self._names[site]},{time}}}')
                continue
            for frame in closed:
                out.append(self._closing(frame, lane, time, ns))
            if kind in (_ENTRY, _TAIL):
                out.append(f'{{"ph":"B","name":{self._names[site]},{time}}}')
        self._write(out)

    def lost(self, count: int) -> None:
        """Write it as a global instant at the end."""
        self._write([f'{{"ph":"i","s":"g","name":"LOST {count} EVENTS","ts":{_us(self._now)},"pid":0,"tid":0}}'])

    def end(self) -> None:
        """Close what is open."""
        self._close_chunk()

    # -- within -----------------------------------------------------------------------------------
    def _closing(self, frame: Frame, lane: _Lane, time: str, ns: int) -> str:
        members = [f'"{name}":true' for bit, name in _SHOWN if frame.flags & bit] if frame.flags else []
        if frame.retval is not None:
            members.append(f'"retval":"{frame.retval:#x}"')
        extra = f',"args":{{{",".join(members)}}}' if members else ""
        if frame.flags & Bit.UNMATCHED:
            return f'{{"ph":"i","s":"t","name":{self._names[frame.site]},{time}{extra}}}'
        if frame.flags & (Bit.TIMED | Bit.OPEN_AT_START):
            took = round(frame.dur * self._scale)
            start = f'"ts":{_us(max(ns - took, 0))},"dur":{_us(took)},{lane.ids}'
            return f'{{"ph":"X","name":{self._names[frame.site]},{start}{extra}}}'
        return f'{{"ph":"E",{time}{extra}}}'

    def _write(self, events: list[str]) -> None:
        assert self._file is not None
        if events:
            self._file.write(",\n" + ",\n".join(events))

    def _open_chunk(self) -> None:
        self.chunks += 1
        self._room = self._limit
        meta, threads = self._header.meta, self._header.threads
        self._file = (self._path / f"chunk-{self.chunks:04d}.json").open("w", encoding="utf-8")
        other = {"chunk": str(self.chunks), "clock": meta.clock.kind, "arch": meta.arch}
        head = [f'{{"displayTimeUnit":"ns","otherData":{json.dumps(other)},"traceEvents":[\n']
        names = [
            f'{{"ph":"M","name":"process_name","pid":{pid},"tid":0,"args":{{"name":{_text(meta.comm(pid))}}}}}'
            for pid in dict.fromkeys(t.pid for t in threads)
        ]
        names += [
            f'{{"ph":"M","name":"thread_name","pid":{t.pid},"tid":{t.tid},"args":{{"name":{_text(t.comm)}}}}}'
            for t in threads
        ]
        # the list must not be empty, or begin with a comma
        names.append('{"ph":"M","name":"trace_format","pid":0,"tid":0,"args":{"name":"fentry"}}')
        self._file.write("".join(head) + ",\n".join(names))
        self._write(
            [
                f'{{"ph":"B","name":{self._names[frame.site]},"ts":{_us(self._cut(lane))},{lane.ids},'
                f'"args":{{"continued":true}}}}'
                for lane in self._lanes.values()
                for frame in lane.stack.frames
            ]
        )

    def _close_chunk(self) -> None:
        assert self._file is not None
        self._write(
            [
                f'{{"ph":"E","ts":{_us(self._cut(lane))},{lane.ids},"args":{{"continued":true}}}}'
                for lane in self._lanes.values()
                for _ in lane.stack.frames
            ]
        )
        self._file.write("\n]}\n")
        self._file.close()
        self._file = None

    def _cut(self, lane: _Lane) -> int:
        """When a chunk ends for a thread: now; where threads have no common time, at its newest event."""
        return self._now if self._header.meta.clock.timed else lane.now


_SHOWN = tuple(
    (flag.value, str(flag.name).lower())
    for flag in (Flag.UNWOUND, Flag.PASSED, Flag.LOST, Flag.UNSURE, Flag.OPEN_AT_START, Flag.UNMATCHED, Flag.TAIL)
)


def _us(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03d}"


def _text(name: str) -> str:
    return json.dumps(utf8(name))
