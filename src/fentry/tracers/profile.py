"""Tracer profile: hits, total, self, min and max of each function, added up in the target; no events at all."""

from __future__ import annotations

from fentry.engine.ops import Op
from fentry.errors import AskedWrong
from fentry.program.ir import Spec
from fentry.tracers import Options, Tracer


class Profile(Tracer):
    """Count, and unless told otherwise time, each function."""

    name = "profile"
    summary = "hits and times of each function, added up in the target"
    events = False
    options = frozenset({"times"})

    def op(self, options: Options, *, clock: str) -> Op:
        """Give the op."""
        self.check(options)
        if not options.times:
            return Op("profile", entry=Spec("hits", record=False, count=True), counts=True)
        if clock == "order":
            raise AskedWrong("clock 'order' has no durations", hint="count hits alone (--hits), or use another clock")
        return Op(
            "profile",
            entry=Spec("time_entry", record=False, count=True, timed=True),
            exit=Spec("time_exit", exit=True, record=False, timed=True),
            counts=True,
        )


TRACER = Profile()
