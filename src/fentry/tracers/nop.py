"""Tracer nop: the smallest legal tracer. Its program returns at once; it shows what being hooked costs."""

from __future__ import annotations

from fentry.engine.ops import Op
from fentry.program.ir import Spec
from fentry.tracers import Options, Tracer


class Nop(Tracer):
    """Call an empty program at each entry."""

    name = "nop"
    summary = "hook functions and do nothing"
    events = False

    def op(self, options: Options, *, clock: str) -> Op:
        """Give the op."""
        self.check(options)
        return Op("nop", entry=Spec("nop", record=False))


TRACER = Nop()
