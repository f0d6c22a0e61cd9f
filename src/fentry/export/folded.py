r"""Folded stacks: ``main;parse;eval 1234``, one line per call path, the input of every flame graph tool.

The format has no place to say what the number is, so the weight is chosen by name and belongs into the
file's name: :attr:`Folded.suffix`. ``self_ns`` (ns spent in the function itself) adds up to the traced time; ``calls``
counts calls; ``total`` is the inclusive time of each path in ns, for tables rather than flame graphs,
because it counts callees again in every caller.

A semicolon in a name is spelled ``\x3b`` and control characters likewise. Calls without a known duration weigh
nothing but in ``calls``.
"""

from __future__ import annotations

from typing import TextIO

import numpy as np
import pyarrow as pa

from fentry.errors import AskedWrong
from fentry.export import Exporter, Header, by_thread, printable
from fentry.record.calls import Matcher, Rows
from fentry.record.stack import Bit

WEIGHTS = ("self_ns", "calls", "total")


class Folded(Exporter):
    """Writes folded stacks at the end; until then it keeps one number per call path.

    Args:
        out: where to write.
        weight: "self_ns", "calls" or "total".
        threads: begin every path with ``comm-tid``.

    Raises:
        AskedWrong: an unknown weight.
    """

    name = "folded"

    def __init__(self, out: TextIO, weight: str = "self_ns", *, threads: bool = False) -> None:
        if weight not in WEIGHTS:
            raise AskedWrong(f"weight {weight!r} is not known", hint="choose one of " + ", ".join(WEIGHTS))
        self._out = out
        self._weight = weight
        self._threads = threads

    @property
    def suffix(self) -> str:
        """How a file of this weight should end."""
        return f".{self._weight}.folded"

    def begin(self, header: Header) -> None:
        """Refuse a weight that this trace does not have."""
        if self._weight != "calls" and not (header.meta.clock.timed and header.meta.clock.ns_per_tick):
            raise AskedWrong(f"the trace has no times to weigh by ({self._weight})", hint="weigh by calls")
        self._header = header
        self._names = [printable(site.name).replace(";", "\\x3b") for site in header.meta.sites]
        self._matchers: dict[tuple[int, int], Matcher] = {}
        self._open: dict[tuple[int, int], dict[int, int]] = {}  # per thread: row of an open call -> its path
        self._paths: dict[tuple[int, int], int] = {}  # (path of the caller, site) -> path
        self._sum: list[int] = []  # per path
        self._roots: dict[tuple[int, int], int] = {}
        for number, key in enumerate(header.lanes):
            # without thread frames, all threads share the one root -1
            self._roots[key] = -2 - number if self._threads else -1
            self._matchers[key] = Matcher(header.returning)
            self._open[key] = {}
        self._tasks = [printable(f"{t.comm}-{t.tid}").replace(";", "\\x3b") for t in header.threads]

    def rows(self, table: pa.Table) -> None:
        """Add the calls that ended."""
        for key, part in by_thread(table):
            self._add(key, self._matchers[key].feed(part))

    def lost(self, count: int) -> None:
        """Nothing to write: a stack that was not seen has no line."""

    def end(self) -> None:
        """Write the lines, sorted."""
        for key, matcher in self._matchers.items():
            self._add(key, matcher.finish())
        clock = self._header.meta.clock
        scale = clock.ns_per_tick if self._weight != "calls" else 1.0
        spelled: dict[int, str] = {-2 - i: task for i, task in enumerate(self._tasks)}
        lines: dict[str, int] = {}
        for (above, site), path in self._paths.items():  # in order of making: callers first
            name = self._names[site]
            spelled[path] = f"{spelled[above]};{name}" if above in spelled else name
            if self._sum[path]:
                lines[spelled[path]] = lines.get(spelled[path], 0) + self._sum[path]
        for line in sorted(lines):
            self._out.write(f"{line} {round(lines[line] * scale)}\n")
        self._out.flush()

    def _add(self, key: tuple[int, int], rows: Rows) -> None:
        """Give every call its path. Callers have smaller row numbers, and are here or still open."""
        frames = self._matchers[key].stack.frames
        known = self._open[key]
        root, paths, sums = self._roots[key], self._paths, self._sum
        where = dict(known)

        def path_of(row: int, parent: int, site: int) -> int:
            at = (where.get(parent, root), site)
            path = paths.get(at)
            if path is None:
                path = paths[at] = len(sums)
                sums.append(0)
            where[row] = path
            return path

        if self._weight == "calls":
            entered = (rows.flags & (Bit.OPEN_AT_START | Bit.UNMATCHED)) == 0
            weight = entered.astype(np.int64)
        else:
            weight = np.maximum(rows.own if self._weight == "self_ns" else rows.dur, 0)
        calls = list(zip(rows.row.tolist(), rows.parent.tolist(), rows.site.tolist(), weight.tolist(), strict=True)) + [
            (frame.row, frame.parent, frame.site, 0) for frame in frames
        ]
        calls.sort()
        for row, parent, site, amount in calls:
            path = where[row] if row in where else path_of(row, parent, site)
            sums[path] += amount
        self._open[key] = {frame.row: where[frame.row] for frame in frames}
