"""threads.c: many threads at once; nothing is lost that is not counted as lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from fentry.record.layout import Policy
from tests.live.tracing import TRACERS, Seen, run, trace

pytestmark = pytest.mark.live

NAMES = ("work", "leaf", "left", "right", "thread_main")


def truth(threads: int, calls: int, generations: int) -> dict[str, int]:
    total = threads * calls * generations
    return {"work": total, "leaf": total, "left": total // 2, "right": total // 2, "thread_main": threads * generations}


def traced(build, tmp_path: Path, sizes: tuple[int, int, int], **how) -> Seen:
    program = build("threads.c", flags=("-fpatchable-function-entry=16",))
    argv = [program, *map(str, sizes)]
    seen = trace(argv, tmp_path, wanted=NAMES, **how)
    assert seen.did == run(argv)
    return seen


@pytest.mark.parametrize("tracer", TRACERS)
def test_each_call_of_each_thread(build, tmp_path, tracer: str) -> None:
    seen = traced(build, tmp_path, (6, 20000, 2), tracer=tracer)
    assert seen.outcome.lost == 0
    assert seen.counts == truth(6, 20000, 2)


def test_a_full_ring_makes_the_program_wait(build, tmp_path) -> None:
    seen = traced(build, tmp_path, (4, 20000, 1), ring_size=4096, policy=Policy.BLOCK)
    assert seen.outcome.lost == 0
    assert seen.counts == truth(4, 20000, 1)


def test_what_is_dropped_is_counted(build, tmp_path) -> None:
    """Rings of 256 records and threads that are faster than any reader: recorded + lost is what happened."""
    sizes = (4, 200_000, 1)
    seen = traced(build, tmp_path, sizes, tracer="function", parent=False, ring_size=4096, policy=Policy.DROP)
    assert seen.outcome.lost > 0
    assert sum(seen.counts.values()) + seen.outcome.lost == sum(truth(*sizes).values())


@pytest.mark.parametrize("tracer", TRACERS)
def test_threads_wait_for_the_rings_of_those_that_end(build, tmp_path, tracer: str) -> None:
    sizes = (24, 2000, 1)
    seen = traced(build, tmp_path, sizes, tracer=tracer, rings=8, policy=Policy.BLOCK)
    assert seen.outcome.lost == 0
    assert seen.counts == truth(*sizes)


def test_more_threads_than_rings(build, tmp_path) -> None:
    """Threads that find no ring run on; what they would have said is counted."""
    sizes = (24, 2000, 1)
    seen = traced(build, tmp_path, sizes, tracer="function", parent=False, rings=8, policy=Policy.DROP)
    assert sum(seen.counts.values()) + seen.outcome.lost == sum(truth(*sizes).values())


@pytest.mark.parametrize("tracer", ["function", "profile"])
def test_a_thousand_threads(build, tmp_path, tracer: str) -> None:
    """Four at a time, a thousand in all, with sixteen rings: rings pass from those that ended to those that begin."""
    sizes = (4, 10, 250)
    seen = traced(build, tmp_path, sizes, tracer=tracer, rings=16, policy=Policy.BLOCK)
    assert seen.outcome.lost == 0
    assert seen.counts == truth(*sizes)
