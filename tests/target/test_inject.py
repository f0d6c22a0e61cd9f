"""Whatever a tracer does to a process, and wherever it dies while doing it, the process must not notice."""

from __future__ import annotations

import pytest

from fentry.target.process import attach
from tests.target.steady import FLAGS, ROLES, SOURCE, Steady, die_at

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


@pytest.mark.slow
@pytest.mark.parametrize("main", ["spin", "read", "poll", "ppoll", "epoll", "long"])
def test_a_tracer_killed_at_any_step_is_not_noticed(steady, main: str) -> None:
    """`main` is what the thread does that system calls are injected into."""
    program = steady(main)
    for after in (False, True):
        step = 1
        while die_at(lambda: work(program.pid), step, after=after):
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
