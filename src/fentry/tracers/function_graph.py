"""Tracer function_graph: entries and exits, with durations, nesting and return values."""

from __future__ import annotations

from fentry.engine.ops import Op
from fentry.errors import AskedWrong
from fentry.program.ir import Spec
from fentry.tracers import Options, Tracer


class FunctionGraph(Tracer):
    """Record each entry and exit; with a threshold only the exits of calls that took that long (tracing_thresh)."""

    name = "function_graph"
    summary = "calls and returns, nested, with durations"
    options = frozenset({"retval", "depth", "threshold"})

    def op(self, options: Options, *, clock: str) -> Op:
        """Give the op."""
        self.check(options)
        if clock == "order" and options.threshold:
            raise AskedWrong("clock 'order' has no durations", hint="use another clock, or no threshold")
        common = {"stack": True, "depth": options.depth, "threshold": options.threshold}
        return Op(
            "function_graph",
            entry=Spec("graph_entry", **common),  # type: ignore[arg-type]  # ints and bools by field name
            exit=Spec("graph_exit", exit=True, retval=options.retval, **common),  # type: ignore[arg-type]
        )


TRACER = FunctionGraph()
