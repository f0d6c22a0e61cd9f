"""Per-function statistics: from a trace's calls, or from counters that the target kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fentry.record.calls import I64, Matcher, Rows
from fentry.record.stack import UNTRUE, Bit

if TYPE_CHECKING:
    from fentry.record.store import Site, Trace

#: Calls whose entry was not recorded: they are no hits.
_NOT_ENTERED = Bit.OPEN_AT_START | Bit.UNMATCHED
_NEVER = np.iinfo(np.int64).max


@dataclass(slots=True)
class Counters:
    """One number per site, in clock units where it is a time.

    ``total`` counts only the outermost of nested calls of one function, so that it never exceeds the time that
    passed; ``own`` is the time without traced callees, and adds up over recursion. Calls whose
    duration is not known for sure (still open, left by longjmp, events lost meanwhile) are hits without time.
    ``low`` is the largest i64 where no call was timed.
    """

    hits: I64
    total: I64
    own: I64
    low: I64
    high: I64

    @classmethod
    def zero(cls, nsites: int) -> Counters:
        """Counters of `nsites` sites that nothing happened at."""
        hits, total, own, high = (np.zeros(nsites, np.int64) for _ in range(4))
        return cls(hits, total, own, np.full(nsites, _NEVER, np.int64), high)

    def add(self, rows: Rows) -> None:
        """Count calls."""
        n = len(self.hits)
        entered = (rows.flags & _NOT_ENTERED) == 0
        self.hits += np.bincount(rows.site[entered], minlength=n)
        true = ((rows.flags & UNTRUE) == 0) & (rows.dur >= 0)
        site, dur = rows.site[true], rows.dur[true]
        outermost = (rows.flags[true] & Bit.RECURSIVE) == 0
        np.add.at(self.total, site[outermost], dur[outermost])
        np.add.at(self.own, site, rows.own[true])
        np.minimum.at(self.low, site, dur)
        np.maximum.at(self.high, site, dur)

    def rows(self, sites: Sequence[Site], ns_per_tick: float) -> list[dict[str, Any]]:
        """Give the rows that ``fentry stat`` shows: functions that were hit, most total time first.

        Args:
            sites: names, in the order of the counters.
            ns_per_tick: nanoseconds of a clock unit; 0.0 if the counters hold hits alone.

        Returns: function, module, hits, total_ns, self_ns, min_ns, max_ns; times are None where nothing was timed.
        """
        out = []
        for i in np.flatnonzero(self.hits | (self.low != _NEVER)).tolist():
            timed = bool(ns_per_tick) and self.low[i] != _NEVER

            def ns(values: npt.NDArray[np.int64], i: int = i, timed: bool = timed) -> int | None:
                return round(int(values[i]) * ns_per_tick) if timed else None

            out.append(
                {
                    "function": sites[i].name,
                    "module": sites[i].module,
                    "hits": int(self.hits[i]),
                    "total_ns": ns(self.total),
                    "self_ns": ns(self.own),
                    "min_ns": ns(self.low),
                    "max_ns": ns(self.high),
                }
            )
        return sorted(out, key=lambda r: (-(r["total_ns"] or 0), -r["hits"], r["module"], r["function"]))


def stat(trace: Trace) -> list[dict[str, Any]]:
    """Give the statistics of a trace: see :meth:`Counters.rows`. Times need a clock other than ``order``."""
    counters = Counters.zero(len(trace.meta.sites))
    for thread in trace.threads:
        matcher = Matcher(trace.marks.returning)
        for batch in trace.events_of(thread):
            counters.add(matcher.feed(batch))
        counters.add(matcher.finish())
    clock = trace.meta.clock
    return counters.rows(trace.meta.sites, clock.ns_per_tick if clock.timed else 0.0)
