"""throw.cpp: control flow that does not return the way it came, with every frame on its way hooked.

Each scene prints the same with and without us; its functions are called as often as the program itself counts.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fentry.record.layout import Kind
from tests.live.tracing import TRACERS, calls_by_name, run, trace
from tests.programs.counts import own_counts, run_counted

pytestmark = pytest.mark.live

SCENES = ("throw", "rethrow", "nested", "pointer", "longjmp", "fork", "cancel", "backtrace", "altstack", "coroutines")
FLAGS = ("-rdynamic",)


def cells() -> list:
    """(compiler, optimisation, kind, stripped): four by default, every one with --full."""
    sample = {
        ("gcc", "-O2", "pie", False),
        ("clang", "-O0", "pie", True),
        ("gcc", "-O0", "static", False),
        ("clang", "-O3", "static", True),
    }
    return [
        pytest.param(*cell, id="-".join(map(str, cell)), marks=[] if cell in sample else [pytest.mark.matrix])
        for cc in ("gcc", "clang")
        for opt in ("-O0", "-O1", "-O2", "-O3")
        for kind in ("pie", "static")
        for cell in ((cc, opt, kind, False), (cc, opt, kind, True))
    ]


def throwing(build, tool, directory: Path, cc: str, opt: str, kind: str, stripped: bool) -> Path:
    program = build("throw.cpp", cc=cc, opt=opt, kind=kind, flags=FLAGS if kind == "pie" else ())
    if stripped:
        bare = directory / "bare"
        subprocess.run([tool("strip"), "-o", bare, program], check=True)
        return bare
    return program


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(("cc", "opt", "kind", "stripped"), cells())
def test_every_function_of_every_library(build, tool, tmp_path, tracer, cc, opt, kind, stripped) -> None:
    program = throwing(build, tool, tmp_path, cc, opt, kind, stripped)
    plain = run([program])
    assert plain.status == 0
    seen = trace([program], tmp_path, tracer=tracer, wanted=["*:*"])
    assert seen.did == plain
    assert seen.outcome.lost == 0
    assert seen.writable_code == []
    assert seen.sites > 500


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("scene", [*SCENES, "signals"])
def test_scene_alone(build, tmp_path, tracer: str, scene: str) -> None:
    program = build("throw.cpp", flags=FLAGS)
    seen = trace([program, scene], tmp_path, tracer=tracer)
    assert seen.did == run([program, scene])
    if scene in ("signals", "altstack", "fork"):
        return  # how often handlers run is not fixed; a child that leaves by _exit writes no counts
    own = own_counts(run_counted([build("throw.cpp", flags=(*FLAGS, "-DCOUNT")), scene])[1])
    fixed = {name for name in own if name.startswith("f_")} - seen.unhooked
    assert fixed
    assert {name: seen.counts.get(name) for name in fixed} == {name: own[name] for name in fixed}


def test_an_exception_leaves_unwound_exits(build, tmp_path) -> None:
    """Frames that an exception passed are closed, and told from those that returned."""
    program = build("throw.cpp", flags=FLAGS)
    seen = trace([program, "throw"], tmp_path, wanted=["f_*"])
    kinds = dict.fromkeys(Kind, 0)
    for batch in seen.trace.events():
        for kind in batch.column("kind").to_pylist():
            kinds[Kind(kind)] += 1
    assert kinds[Kind.UNWOUND] > 0
    assert kinds[Kind.ENTRY] == kinds[Kind.EXIT] + kinds[Kind.UNWOUND]


def test_a_forked_child_has_events_of_its_own(build, tmp_path) -> None:
    """Frames that were open at the fork close in both processes; each records under its own number."""
    program = build("throw.cpp", flags=FLAGS)
    seen = trace([program, "fork"], tmp_path)
    assert seen.did == run([program, "fork"])
    traced = seen.trace
    pids = {thread.pid for thread in traced.threads}
    parent = traced.meta.target.pid
    children = sorted(pids - {parent})
    assert len(children) == 5
    assert all(calls_by_name(traced, pid=child)["f_after_jump"] == 21 for child in children)
    assert "f_after_jump" not in calls_by_name(traced, pid=parent)


def test_a_handler_is_traced_while_it_interrupts_what_is_traced(build, tmp_path) -> None:
    program = build("throw.cpp", flags=FLAGS)
    seen = trace([program, "signals"], tmp_path, wanted=["f_handler", "f_loaded*"])
    assert seen.did == run([program, "signals"])
    assert seen.counts["f_handler"] >= 2000
    assert seen.counts["f_loaded"] > seen.counts["f_handler"]
