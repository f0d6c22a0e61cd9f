"""Detach whatever is going on: frames in flight return right, nothing stays behind, children are freed too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fentry.record.layout import Policy
from fentry.target.process import attach
from fentry.tracers.session import Plan, Session
from tests.safety.checked import bases, fentry_holds, picture, recover, visit
from tests.target.steady import die_at

pytestmark = pytest.mark.live

TRACERS = ("function", "function_graph", "profile")
FORKS = Path(__file__).parent / "programs" / "forks.c"
SMALL = {"ring_size": 1 << 14, "rings": 64}


@pytest.mark.slow
@pytest.mark.parametrize("tracer", TRACERS)
def test_visits_under_load(checked, tmp_path, full: bool, tracer: str) -> None:
    """Four threads dive hundreds deep, others are blocked, suspended or in signal handlers beneath hooked frames."""
    program = checked(hard=True)
    before = picture(program.pid)
    frames = 0
    for cycle in range(3334 if full else 8):
        outcome = visit(program.pid, Plan(tracer=tracer, **SMALL), tmp_path / "trace", 0.002)
        report = outcome.restored
        assert report is not None, f"visit {cycle}: {outcome.stop}"
        assert not report.strange
        assert not report.left_mapped
        frames += report.frames
        program.alive(1)
        assert before.differs(picture(program.pid)) == "", f"after visit {cycle}"
    assert bases(program.pid) == {0}
    program.alive()
    assert frames > 100 or tracer == "function", "hardly a frame was in flight"


@pytest.mark.slow
def test_a_hundred_visits(checked, tmp_path) -> None:
    program = checked()
    before = picture(program.pid)
    for cycle in range(100):
        # the engine's part of a visit is the same for all tracers; the cheapest comes most often
        tracer = TRACERS[1 + cycle // 10 % 2] if cycle % 10 == 0 else "function"
        outcome = visit(program.pid, Plan(tracer=tracer, wanted=("dive", "mix"), **SMALL), tmp_path / "trace", 0)
        assert outcome.restored is not None
        program.alive(1)
        assert before.differs(picture(program.pid)) == "", f"after visit {cycle}"
    assert bases(program.pid) == {0}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("policy", list(Policy))
def test_frames_of_resting_threads(checked, tmp_path, tracer: str, policy: Policy) -> None:
    """Mostly blocked: the frames that are put right belong to threads in read, poll, futex and nanosleep."""
    program = checked()
    before = picture(program.pid)
    outcome = visit(program.pid, Plan(tracer=tracer, policy=policy, **SMALL), tmp_path / "trace", 0.05)
    assert outcome.restored
    assert outcome.restored.frames > 100 or tracer == "function"
    program.alive()
    assert before.differs(picture(program.pid)) == ""


# -- forked children ----------------------------------------------------------------------------------------
class Forks:
    """A running ``forks``."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.pid = self.process.pid
        assert self.line() == "ready"

    def line(self) -> str:
        return self.process.stdout.readline().rstrip("\n")

    def ask(self, command: str) -> str:
        self.process.stdin.write(command + "\n")
        return self.line()

    def child(self, command: str = "fork") -> int:
        word, pid = self.ask(command).split()
        assert word == "child"
        return int(pid)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def forks(build):
    program = Forks(build(FORKS, opt="-O1", flags=("-Wextra", "-Wl,-z,now")))
    yield program
    program.end()


def own_code(pid: int) -> bytes:
    """Code of the program itself: it lies at the same address in parent and children."""
    return next(iter(sorted(picture(pid).code.items())))[1]


@pytest.mark.parametrize("tracer", TRACERS)
def test_children_that_were_forked_meanwhile_are_restored_too(forks: Forks, tmp_path, tracer: str) -> None:
    """They inherit hooks, and frames in flight; grandchildren as well."""
    before = own_code(forks.pid)
    maps = Path(f"/proc/{forks.pid}/maps").read_text()
    earlier = forks.child()
    with (
        attach(forks.pid) as target,
        Session(target, Plan(tracer=tracer, **SMALL), directory=tmp_path / "trace", started=False) as session,
    ):
        session.start()
        children = [forks.child(), forks.child("twice")]
        children.append(int(forks.line().split()[1]))
        assert forks.ask("work") == "work 0"
        assert all(fentry_holds(child) for child in children)
        session.finish()
    for pid in (forks.pid, *children):
        assert own_code(pid) == before, f"process {pid}"
        assert not fentry_holds(pid), f"process {pid}"
        assert bases(pid) == {0}
    assert Path(f"/proc/{forks.pid}/maps").read_text() == maps
    assert forks.ask("work") == "work 0"
    assert own_code(earlier) == before
    for child in (*reversed(children), earlier):  # a grandchild before its parent
        assert forks.ask(f"end {child}") == f"ended {child} 0"


def test_children_of_a_killed_tracers_target_recover(forks: Forks, tmp_path) -> None:
    """Each by itself, in any order, although they share one journal."""
    before = own_code(forks.pid)
    children = []

    def work() -> None:
        with (
            attach(forks.pid) as target,
            Session(
                target, Plan(tracer="function_graph", **SMALL), directory=tmp_path / "trace", started=False
            ) as session,
        ):
            session.start()
            target.stop()
            target.close()
            session.finish = lambda: None

    assert not die_at(work, -1, after=False)  # it ends without undoing anything
    assert fentry_holds(forks.pid)
    children = [forks.child(), forks.child()]
    for pid in (children[0], forks.pid, children[1]):
        report = recover(pid)
        assert not report.strange
        assert not report.left_mapped
        assert own_code(pid) == before
        assert not fentry_holds(pid)
        assert forks.ask("work") == "work 0"
    for child in children:
        assert forks.ask(f"end {child}") == f"ended {child} 0"
