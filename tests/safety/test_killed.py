"""SIGKILL to the tracer, anywhere: the program goes on right, and recovering puts back everything."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading

import pytest

from fentry.engine.journal import Journal
from fentry.errors import TargetRefused
from fentry.record.layout import Policy
from fentry.tracers.session import Plan, Session
from tests.safety.checked import Checked, bases, fentry_holds, picture, recover, visit
from tests.target.steady import die_at

pytestmark = pytest.mark.live

TRACERS = ("function", "function_graph", "profile")
#: small, so that every visit meets full rings too
SMALL = {"ring_size": 1 << 14, "rings": 64}


def killed_at(work, step: int, *, after: bool) -> bool:
    """As die_at, with the journal's own writes as steps too: they go through shared memory."""
    save, intend = Journal.save, Journal.intend

    def counted() -> None:
        # in the child, where die_at has put its counter around the one request that every other step makes
        from fentry.target import ptrace

        through = ptrace.request.__closure__
        assert through, "die_at counts by wrapping ptrace.request"
        steps = next(cell.cell_contents for cell in through if hasattr(cell.cell_contents, "through"))
        Journal.save, Journal.intend = steps.through(save), steps.through(intend)
        work()

    return die_at(counted, step, after=after)


def steps_of(work) -> int:
    """How many steps `work` takes when nobody is killed."""
    reader, writer = os.pipe()

    def counting() -> None:
        from fentry.target import ptrace

        cells = ptrace.request.__closure__
        steps = next(cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "through"))
        Journal.save, Journal.intend = steps.through(Journal.save), steps.through(Journal.intend)
        work()
        os.write(writer, str(steps.count).encode())

    assert not die_at(counting, -1, after=False)
    os.close(writer)
    with os.fdopen(reader) as file:
        return int(file.read())


def spread(count: int, samples: int, seed: int) -> list[int]:
    """`samples` steps from 1 to `count`, one from each of as many equal parts."""
    chance = random.Random(seed)
    if samples >= count:
        return list(range(1, count + 1))
    return [chance.randint(1 + i * count // samples, (i + 1) * count // samples) for i in range(samples)]


def put_right(program: Checked, before, *, recovered: bool = True) -> None:
    """Recover if there is anything to recover; then everything is as before."""
    if recovered and fentry_holds(program.pid):
        report = recover(program.pid)
        assert not report.strange
        assert not report.left_mapped
    program.alive()
    assert before.differs(picture(program.pid)) == ""
    assert bases(program.pid) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("tracer", TRACERS)
def test_killed_at_any_step(checked, tmp_path, full: bool, tracer: str) -> None:
    program = checked()
    before = picture(program.pid)

    def work() -> None:
        visit(program.pid, Plan(tracer=tracer, **SMALL), tmp_path / "trace", 0.01)

    count = steps_of(work)
    assert count > 100, "fewer steps than a session takes: something was not counted"
    program.alive()
    assert before.differs(picture(program.pid)) == ""
    seed = TRACERS.index(tracer)
    for step in range(1, count + 20) if full else spread(count, 13, seed):
        for after in (False, True) if full else (bool(step % 2),):
            killed = killed_at(work, step, after=after)
            try:
                program.alive()
                put_right(program, before)
            except BaseException as error:
                error.add_note(f"{tracer}, killed {'after' if after else 'before'} step {step} of {count}: {killed}")
                raise


@pytest.mark.slow
def test_killed_while_it_recovers(checked, tmp_path, full: bool) -> None:
    """And again, until recovering comes to its end."""
    program = checked()
    before = picture(program.pid)
    plan = Plan(tracer="function_graph", **SMALL)

    def leave_hooked() -> None:
        def work() -> None:
            # killed when it has traced for a while, before it touches the program again
            Session.finish = lambda _session: os.kill(os.getpid(), signal.SIGKILL)
            visit(program.pid, plan, tmp_path / "trace", 0.01)

        assert die_at(work, -1, after=False)

    leave_hooked()
    count = steps_of(lambda: recover(program.pid))
    put_right(program, before)
    assert count > 50
    for step in range(1, count + 20) if full else spread(count, 12, 7):
        leave_hooked()
        killed_at(lambda: recover(program.pid), step, after=bool(step % 2))
        try:
            program.alive()
            put_right(program, before)
        except BaseException as error:
            error.add_note(f"killed at step {step} of {count}")
            raise


@pytest.mark.slow
@pytest.mark.parametrize("tracer", TRACERS)
def test_killed_at_any_time_under_load(checked, tmp_path, full: bool, tracer: str) -> None:
    """Four threads dive deep: hundreds of frames are in flight when the tracer dies, and when all is put right."""
    program = checked(hard=True)
    before = picture(program.pid)
    chance = random.Random(11)
    frames = 0
    for visits in range(200 if full else 4):
        seconds = chance.uniform(0.1, 1.0)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                if visits:
                    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
                else:  # once for certain while functions are hooked, however slow this machine is
                    Session.finish = lambda _session: os.kill(os.getpid(), signal.SIGKILL)
                visit(program.pid, Plan(tracer=tracer, **SMALL), tmp_path / "trace", 60 if visits else 0.05)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert status == signal.SIGKILL
        program.alive(2)
        if fentry_holds(program.pid):
            report = recover(program.pid)
            assert not report.strange
            assert not report.left_mapped
            frames += report.frames
        program.alive(2)
        assert before.differs(picture(program.pid)) == ""
        assert bases(program.pid) == {0}
    assert frames > 0 or tracer == "function", "no frame was ever in flight"


@pytest.mark.parametrize("tracer", ["function", "function_graph"])
def test_nobody_waits_for_a_dead_tracer(checked, tmp_path, tracer: str) -> None:
    """Full rings, a policy that waits for the reader, and no reader: threads give up, and count what is lost."""
    program = checked()
    before = picture(program.pid)

    def work() -> None:
        Session.finish = lambda _session: os.kill(os.getpid(), signal.SIGKILL)
        visit(program.pid, Plan(tracer=tracer, policy=Policy.BLOCK, **SMALL), tmp_path / "trace", 0.01)

    assert die_at(work, -1, after=False)
    program.alive()
    put_right(program, before)


def test_nothing_to_recover(checked) -> None:
    program = checked()
    before = picture(program.pid)
    with pytest.raises(TargetRefused, match="holds nothing of fentry's"):
        recover(program.pid)
    program.alive()
    assert before.differs(picture(program.pid)) == ""
