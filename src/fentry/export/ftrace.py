"""Text exactly as the kernel's function and function_graph tracers print it.

Sources: kernel/trace/trace_output.c (``trace_print_context``, ``trace_find_mark``) and
kernel/trace/trace_functions_graph.c (``print_graph_*``, ``trace_print_graph_duration``), Linux 6.12.

Two things differ of necessity, and none of them in the layout. Records do not say on which CPU they were made:
the CPU column holds the *lane* instead, the number of the thread in the trace, which also keeps threads apart as CPUs
do in a kernel trace (``one_cpu`` puts all on CPU 0 and prints the kernel's context-switch rules).
And the five flags after it (interrupts, preemption) describe kernel states that a program does not have: dots.

Whether an entry is a leaf is known when its thread's next event is there, and only then it is printed: where threads
interleave, a line stands where its thread went on. That needs no look ahead, and so no memory.

An exception that leaves a frame is marked in a comment, ``} /* name: unwound */``. A frame left by longjmp gets no
closing brace, like any function whose return the kernel did not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

import pyarrow as pa

from fentry.export import Exporter, Header, clock_ns, numbers, optional, parents, printable
from fentry.record.layout import Kind
from fentry.record.stack import Bit, Frame, Stack

_ENTRY, _EXIT, _TAIL, _UNWOUND, _PLAIN = (int(k) for k in (Kind.ENTRY, Kind.EXIT, Kind.TAIL, Kind.UNWOUND, Kind.PLAIN))

_FUNCTION_HEADER = """\
# tracer: function
#
# entries-in-buffer/entries-written: {kept}/{written}   #P:{cpus}
#
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""

#: trace_find_mark: ns that must be exceeded, and the sign
_MARKS = ((10**9, "$"), (10**8, "@"), (10**7, "*"), (10**6, "#"), (10**5, "!"), (10**4, "+"))
_BLANK = " " * 14 + "|  "
_RULE = " ------------------------------------------\n"
_MAX_ERRNO = 4095


class FunctionText(Exporter):
    """``trace`` of the function tracer: one line per entry. Returns are not shown.

    Args:
        out: where to write.
        parent: add `` <-caller`` where it was recorded (kernel option print-parent).
    """

    name = "function"

    def __init__(self, out: TextIO, *, parent: bool = True) -> None:
        self._out = out
        self._parent = parent

    def begin(self, header: Header) -> None:
        """Write the legend."""
        self._header = header
        written = header.events + sum(n for n in header.meta.lost.values() if n > 0)
        cpus = max(len(header.threads), 1)
        self._out.write(_FUNCTION_HEADER.format(kept=header.events, written=written, cpus=cpus))
        self._names = [printable(site.name) for site in header.meta.sites]
        self._tasks = {
            key: f"{printable(t.comm):>16s}-{t.tid:<7d} [{t.lane:03d}] ..... " for key, t in header.lanes.items()
        }

    def rows(self, table: pa.Table) -> None:
        """Write a line per entry."""
        kind = table.column("kind").to_numpy()
        entered = (kind == _ENTRY) | (kind == _TAIL) | (kind == _PLAIN)
        lost = table.column("lost").to_numpy()
        chosen = entered | (lost != 0)
        if not chosen.all():
            table = table.filter(pa.array(chosen))
            entered, lost = entered[chosen], lost[chosen]
        if not table.num_rows:
            return
        usecs = (clock_ns(table, self._header.meta) + 500) // 1000
        callers = parents(table, self._header, entered) if self._parent else [""] * table.num_rows
        lanes = self._header.lanes
        lines = []
        for pid, tid, site, usec, caller, missing, shown in zip(
            numbers(table, "pid"),
            numbers(table, "tid"),
            numbers(table, "site"),
            usecs.tolist(),
            callers,
            lost.tolist(),
            entered.tolist(),
            strict=True,
        ):
            if missing:
                lines.append(f"CPU:{lanes[pid, tid].lane} [LOST {missing} EVENTS]\n")
            if shown:
                tail = f" <-{caller}\n" if caller else "\n"
                time = f"{usec // 1000000:5d}.{usec % 1000000:06d}: "
                lines.append(f"{self._tasks[pid, tid]}{time}{self._names[site]}{tail}")
        self._out.write("".join(lines))

    def lost(self, count: int) -> None:
        """Say so; no CPU can be named."""
        self._out.write(f"CPU:0 [LOST {count} EVENTS]\n")

    def end(self) -> None:
        """Flush."""
        self._out.flush()


@dataclass(slots=True)
class _Lane:
    """Printing state of one thread."""

    cpu: int
    comm: str
    pid: int
    stack: Stack = field(default_factory=Stack)
    pending: tuple[int, Frame, int] | None = None  #: (ns, call, depth) of an entry until the thread's next event


class GraphText(Exporter):
    """``trace`` of the function_graph tracer.

    Args:
        out: where to write.
        proc: show the funcgraph-proc column; None: if there is more than one thread.
        abstime: show the funcgraph-abstime column.
        retval: show return values that were recorded (funcgraph-retval).
        tail: name the function after every closing brace (funcgraph-tail).
        one_cpu: put every thread on CPU 0, in the order of time, with context-switch rules.
    """

    name = "function_graph"

    def __init__(
        self,
        out: TextIO,
        *,
        proc: bool | None = None,
        abstime: bool = False,
        retval: bool = False,
        tail: bool = False,
        one_cpu: bool = False,
    ) -> None:
        self._out = out
        self._proc = proc
        self._abstime = abstime
        self._retval = retval
        self._tail = tail
        self._one_cpu = one_cpu
        self._last: _Lane | None = None  # whose event came last
        self._shown: _Lane | None = None  # whose line was printed last

    def begin(self, header: Header) -> None:
        """Write the two header lines."""
        self._header = header
        clock = header.meta.clock
        self._scale = clock.ns_per_tick if clock.timed else 0.0
        self._names = [printable(site.name) for site in header.meta.sites]
        self._lanes = {
            key: _Lane(0 if self._one_cpu else t.lane, printable(t.comm), t.tid) for key, t in header.lanes.items()
        }
        self._width = len(str(max((lane.cpu for lane in self._lanes.values()), default=0)))
        if self._proc is None:
            self._proc = len(self._lanes) > 1
        first, second = "#", "#"
        if self._abstime:
            first, second = first + "     TIME       ", second + "      |         "
        first, second = first + " CPU", second + " |  "
        if self._proc:
            first, second = first + "  TASK/PID       ", second + "   |    |        "
        first, second = first + "  DURATION   ", second + "   |   |      "
        self._out.write(
            f"# tracer: function_graph\n#\n{first}               FUNCTION CALLS\n{second}               |   |   |   |\n"
        )

    def rows(self, table: pa.Table) -> None:
        """Write lines of entries and returns."""
        if not table.num_rows:
            return
        times = clock_ns(table, self._header.meta)
        kinds = table.column("kind").to_numpy().copy()
        sites = table.column("site").to_numpy()
        unhooked = ~self._header.returning[sites] & ((kinds == _ENTRY) | (kinds == _TAIL))
        kinds[unhooked] = _PLAIN
        lines: list[str] = []
        for pid, tid, ts, ns, site, kind, bits, payload, duration, lost in zip(
            numbers(table, "pid"),
            numbers(table, "tid"),
            numbers(table, "ts"),
            times.tolist(),
            sites.tolist(),
            kinds.tolist(),
            numbers(table, "stack"),
            optional(table, "payload"),
            optional(table, "duration"),
            numbers(table, "lost"),
            strict=True,
        ):
            lane = self._lanes[pid, tid]
            stack = lane.stack
            if lost:
                self._open(lines, lane)
                lines.append(f"CPU:{lane.cpu} [LOST {lost} EVENTS]\n")
            if self._one_cpu and self._last is not None and self._last is not lane:
                self._open(lines, self._last)
            closed = stack.event(ts, site, kind, bits, payload, duration, lost)
            if kind in (_ENTRY, _TAIL):
                self._open(lines, lane)
                lane.pending = (ns, stack.frames[-1], len(stack.frames) - 1)
                self._last = lane
            elif kind == _PLAIN:
                self._open(lines, lane)
                self._leaf(lines, lane, ns, site, len(stack.frames), None, None)
            elif lane.pending is not None and len(closed) == 1 and closed[0] is lane.pending[1] and kind == _EXIT:
                ns, frame, depth = lane.pending
                lane.pending = None
                self._leaf(lines, lane, ns, frame.site, depth, self._took(frame.dur), payload)
            else:
                self._open(lines, lane)
                self._close(lines, lane, ns, closed)
        self._out.write("".join(lines))

    def lost(self, count: int) -> None:
        """Say so; no CPU can be named."""
        self._flush()
        self._out.write(f"CPU:0 [LOST {count} EVENTS]\n")

    def end(self) -> None:
        """Print entries still waiting for their next event, and flush."""
        self._flush()
        self._out.flush()

    # -- within -----------------------------------------------------------------------------------
    def _flush(self) -> None:
        lines: list[str] = []
        for lane in self._lanes.values():
            self._open(lines, lane)
        self._out.write("".join(lines))

    def _took(self, ticks: int) -> int | None:
        return round(max(ticks, 0) * self._scale) if self._scale and ticks >= 0 else None

    def _prologue(self, lines: list[str], lane: _Lane, ns: int) -> str:
        if self._one_cpu:
            if self._shown is not None and self._shown is not lane:
                was, now = _task(self._shown), _task(lane)
                lines.append(f"{_RULE} {lane.cpu:{self._width}d}) {was} => {now}\n{_RULE}\n")
            self._shown = lane
        usec = (ns + 500) // 1000
        time = f"{usec // 1000000:5d}.{usec % 1000000:06d} |  " if self._abstime else ""
        proc = f"{_task(lane)} | " if self._proc else ""
        return f"{time} {lane.cpu:{self._width}d}) {proc}"

    def _open(self, lines: list[str], lane: _Lane) -> None:
        """Print a waiting entry as one that calls something."""
        if lane.pending is not None:
            ns, frame, depth = lane.pending
            lane.pending = None
            lines.append(f"{self._prologue(lines, lane, ns)}{_BLANK}{'  ' * depth}{self._names[frame.site]}() {{\n")

    def _leaf(
        self, lines: list[str], lane: _Lane, ns: int, site: int, depth: int, took: int | None, value: int | None
    ) -> None:
        comment = f" /* = {_value(value)} */" if self._retval and value is not None else ""
        start = self._prologue(lines, lane, ns)
        lines.append(f"{start}{_duration(took)}{'  ' * depth}{self._names[site]}();{comment}\n")

    def _close(self, lines: list[str], lane: _Lane, ns: int, closed: Sequence[Frame]) -> None:
        """Print the braces of an exit: of the call itself and of the tail calls that return with it."""
        for frame in closed:
            if frame.flags & Bit.PASSED:
                continue
            name = self._names[frame.site]
            unseen = frame.flags & (Bit.OPEN_AT_START | Bit.UNMATCHED | Bit.TIMED)
            comment = ""
            if frame.flags & Bit.UNWOUND:
                comment = f" /* {name}: unwound */"
            elif self._retval and frame.retval is not None:
                comment = f" /* {name} = {_value(frame.retval)} */"
            elif self._tail or unseen:
                comment = f" /* {name} */"
            took = None if frame.flags & (Bit.OPEN_AT_START | Bit.UNMATCHED) else self._took(frame.dur)
            depth = max(frame.depth - lane.stack.base, 0)
            lines.append(f"{self._prologue(lines, lane, ns)}{_duration(took)}{'  ' * depth}}}{comment}\n")


def _task(lane: _Lane) -> str:
    """``print_graph_proc``: 7 characters of the name, dash, pid, centred in 14."""
    text = f"{lane.comm[:7]}-{lane.pid}"
    spaces = max(14 - len(text), 0)
    return " " * (spaces // 2) + text + " " * (spaces - spaces // 2)


def _duration(ns: int | None) -> str:
    """``trace_print_graph_duration`` with its overhead mark: 14 columns and the bar."""
    if ns is None:
        return _BLANK
    sign = next((sign for limit, sign in _MARKS if ns > limit), " ")
    usecs, rest = divmod(ns, 1000)
    text = str(usecs)
    if len(text) < 7:
        # at most seven characters of number, of which three are the fraction
        text += "." + f"{rest:03d}"[: 7 - len(text)]
    return f"{sign} {text} us {' ' * max(8 - len(text), 0)}|  "


def _value(value: int) -> str:
    """``print_graph_retval``: hexadecimal, but what looks like a negative errno (of 64 or 32 bits) in decimal."""
    signed = value - (1 << 64) if value >> 63 else value
    if value >> 32 == 0 and value >> 31:
        signed = value - (1 << 32)
    return str(signed) if -_MAX_ERRNO <= signed < 0 else hex(value)
