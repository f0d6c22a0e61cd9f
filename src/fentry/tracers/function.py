"""Tracer function: one event per call, with the caller, as the kernel's function tracer."""

from __future__ import annotations

from fentry.engine.ops import Op
from fentry.program.ir import Spec
from fentry.tracers import Options, Tracer


class Function(Tracer):
    """Record each entry."""

    name = "function"
    summary = "each call, with its caller"
    options = frozenset({"parent"})

    def op(self, options: Options, *, clock: str) -> Op:
        """Give the op."""
        self.check(options)
        return Op("function", entry=Spec("function"), parent=options.parent)


TRACER = Function()
