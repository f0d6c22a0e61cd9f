"""A debugger beside us: gdb attaches to a process that is traced, because nobody is attached to it."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.live.test_attach import Server, Visit
from tests.live.tracing import PATIENCE

pytestmark = pytest.mark.live

#: a frame of a backtrace: its function, or nothing where gdb knows no name
FRAME = re.compile(r"^#\d+\s+(?:0x[0-9a-f]+ in )?(\S+) \(", re.MULTILINE)


def backtrace(gdb: str, pid: int) -> list[str]:
    """Function names at a breakpoint in inner(), innermost first; nameless frames left out."""
    words = [gdb, "-nx", "-batch", "-p", str(pid)]
    for command in ("break inner", "continue", "bt", "delete", "detach"):
        words += ["-ex", command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=True)
    return [name for name in FRAME.findall(done.stdout.split("Breakpoint 1, ", 1)[1]) if name != "??"]


@pytest.fixture
def server(build):
    server = Server(build("server.c", flags=("-fpatchable-function-entry=16",)))
    assert server.do("spin 1") == "spin 1"
    yield server
    server.close()


def test_a_breakpoint_and_a_tracer_leave_each_other_alone(server, tool, tmp_path) -> None:
    visit = Visit(server.pid, tmp_path, "function_graph", ["*"])
    with visit.under_way():
        assert backtrace(tool("gdb"), server.pid)[:2] == ["inner", "step"]
    assert visit.counts["step"] > 0
    assert server.do("still").startswith("still ")
    assert server.do("quit") == "quit"


@pytest.mark.xfail(
    strict=True,
    reason="gdb reads unwind information from files and from its JIT interface; islands are in neither, so gdb "
    "guesses at the first hook and loses that function's caller",
)
def test_gdb_names_the_same_callers(server, tool, tmp_path) -> None:
    plain = backtrace(tool("gdb"), server.pid)
    assert plain[:3] == ["inner", "step", "spinner"], "an untraced backtrace must be whole"
    with Visit(server.pid, tmp_path, "function_graph", ["*"]).under_way():
        assert backtrace(tool("gdb"), server.pid) == plain
