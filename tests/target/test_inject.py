"""Whatever a tracer does to a process, and wherever it dies while doing it, the process must not notice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from fentry.target import ptrace
from fentry.target.memory import Memory
from fentry.target.process import attach
from tests.target.steady import FLAGS, ROLES, SOURCE, Steady

pytestmark = pytest.mark.live


@pytest.fixture
def steady(build, tmp_path):
    running = []

    def start(main: str) -> Steady:
        running.append(Steady(build(SOURCE, opt="-O1", flags=FLAGS), tmp_path, main))
        return running[-1]

    yield start
    for one in running:
        one.end()


def work(pid: int) -> None:
    """What a tracer does: attach, map, share, write, let go; then once more."""
    target = attach(pid)
    code = target.allocator.map(8192, "r-x", near=target.modules()[0].start, reach=1 << 31)
    target.write(code, b"\x90" * 64)
    target.resume()
    target.stop()
    at, view = target.shared.share(4096, "steady")
    view[0] = 1
    assert target.read(at, 1) == b"\x01"
    target.allocator.unmap(at, 4096)
    target.allocator.unmap(code, 8192)
    target.close()


class Steps:
    """Counts everything that is done to a process, and kills this process at one of the steps."""

    def __init__(self, deadly: int, *, after: bool) -> None:
        self.count = 0
        self._deadly, self._after = deadly, after

    def through(self, function: Callable) -> Callable:
        def step(*args):
            self.count += 1
            if self.count == self._deadly and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*args)
            finally:
                if self.count == self._deadly:
                    os.kill(os.getpid(), signal.SIGKILL)

        return step


def die_at(pid: int, deadly: int, *, after: bool) -> bool:
    """Trace `pid` from a child process that kills itself at a step; False if it came to the end first."""
    child = os.fork()
    if child == 0:
        try:
            steps = Steps(deadly, after=after)
            ptrace.request = steps.through(ptrace.request)
            Memory.write = steps.through(Memory.write)
            work(pid)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the tracer failed: {status}"
    return status != 0


@pytest.mark.slow
@pytest.mark.parametrize("main", ROLES)
def test_a_tracer_killed_at_any_step_is_not_noticed(steady, main: str) -> None:
    """`main` is what the thread does that system calls are injected into."""
    program = steady(main)
    for after in (False, True):
        step = 1
        while die_at(program.pid, step, after=after):
            program.alive()
            step += 1
        assert step > 60, "fewer steps than attaching takes: something was not counted"
    program.alive()
    assert not [tid for tid, state in program.states().items() if state in "tT"]


@pytest.mark.parametrize("main", ROLES)
def test_a_tracer_at_work_is_not_noticed(steady, main: str) -> None:
    program = steady(main)
    for _ in range(10):
        work(program.pid)
        program.alive()
    assert program.eintr == 0
