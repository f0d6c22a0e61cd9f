"""Where the mirror of the stacks lies: nowhere that keeps a stack from being mirrored."""

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from fentry.record.layout import Kind
from tests.live.tracing import trace

pytestmark = pytest.mark.live


@pytest.mark.parametrize("kind", ["pie", "exec", "static"])
def test_returns_of_threads_that_begin_later_are_seen(build, tmp_path, kind):
    """Their stacks are mapped after the mirror was: it must not have taken the room that is mirrored."""
    program = build("threads.c", flags=("-fpatchable-function-entry=5",), kind=kind)
    seen = trace([program, "3", "1000"], tmp_path, wanted=["work", "leaf"], tracer="function_graph")
    kinds = pa.concat_tables(seen.trace.events()).column("kind")
    assert pc.sum(pc.equal(kinds, int(Kind.PLAIN))).as_py() == 0
    assert pc.sum(pc.equal(kinds, int(Kind.EXIT))).as_py() == 2 * 3 * 1000
