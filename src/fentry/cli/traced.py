r"""A traced program from its start to its end: who gets which signal, when tracing stops, how we exit.

The rules, for each verb that traces:

* A program that we started shares our terminal and process group, so the terminal's signals reach it without us. The
  first Ctrl-C (or Ctrl-\) is the program's alone: we wait for what it does. A second one within two seconds, SIGTERM or
  SIGHUP mean us: the program is put back to what it was and goes on, the trace is complete, and we end by that signal.
* A process that we attached to gets none of our signals: the first one detaches.
* An emulated program lives inside us: the first one ends it.
* When tracing ends before the program (``--duration``, a full disk), the program goes on untraced, and we wait for
  its end: our exit status is the program's in any case, and a signal that killed it kills us.
* What goes wrong before the first instruction ran means that the program is not run at all.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fentry.cli import show
from fentry.cli.options import Asked
from fentry.errors import Gone, TraceError

if TYPE_CHECKING:
    from fentry.target import Stop, Target
    from fentry.tracers.session import Outcome, Session

#: seconds between two looks at what was asked of us meanwhile
_TICK = 0.2
#: seconds within which a second Ctrl-C is more of the first one; an interpreter at its prompt gets many, far apart
_TOGETHER = 2.0
_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_FOR_US = (signal.SIGTERM, signal.SIGHUP)


class Signals:
    """What was sent to us while a program is traced. Handlers only take note; see :meth:`leaving`."""

    def __init__(self) -> None:
        self._shared = 0
        self._last = 0
        self._when = -_TOGETHER
        self._mine = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (*_TERMINAL, *_FOR_US):
            # what our parent had us ignore (nohup, a background job) stays ignored
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number in _TERMINAL:
            now = time.monotonic()
            self._shared = self._shared + 1 if now - self._when < _TOGETHER else 1
            self._last, self._when = number, now
        else:
            self._mine = number

    def leaving(self, *, patience: int) -> int:
        """The signal that tells us to leave, or 0.

        Args:
            patience: how many of the terminal's signals are the program's alone.
        """
        return self._mine or (self._last if self._shared > patience else 0)


@dataclass(slots=True)
class Run:
    """One traced run, while and after it happened.

    Attributes:
        session: what traced it.
        started: the program is our child (or lives in us), so its status is ours.
        why: why tracing ended: "end", "time", "signal", "trouble" (the trace cannot be written), "stuck" (the
            program cannot go on) or "enough".
        outcome: what the session says; set at the end.
        stop: how the program ended, None if it goes on.
        number: the signal that told us to leave, or 0.
        error: what went wrong after the program had begun.
    """

    session: Session
    started: bool
    why: str = "end"
    outcome: Outcome | None = None
    stop: Stop | None = None
    number: int = 0
    error: TraceError | None = None

    def status(self) -> int:
        """Exit status for :func:`fentry.cli.main`; below zero, the signal that must end us."""
        status = 1 if self.error is not None else 0
        if not self.started:
            return status
        if self.stop is None:
            return -self.number if self.number else status
        if self.stop.kind == "signalled":
            return -self.stop.status
        return self.stop.status if self.stop.status > 0 else status


def is_foreign(path: str) -> bool:
    """Tell whether a file is a program of another machine than this one."""
    from fentry.target.launch import elf_kind

    try:
        with Path(path).open("rb") as file:
            if file.read(4) != b"\x7fELF":
                return False
        return elf_kind(path) != elf_kind("/proc/self/exe")
    except (OSError, TraceError):  # starting it will say what is wrong
        return False


def find(program: str) -> str:
    """Find the file of a program as a shell would; the word itself if there is none."""
    import shutil

    return program if "/" in program else shutil.which(program) or program


def open_target(asked: Asked) -> Target:
    """Start, attach to or load what is asked for; it is stopped.

    Raises: whatever the target raises.
    """
    if asked.pid:
        from fentry.target.process import attach

        return attach(asked.pid)
    path = find(asked.argv[0])
    if asked.emulate or is_foreign(path):
        import os

        from fentry.target.unicorn import load

        return load(path, asked.argv, dict(os.environ))
    from fentry.target.process import spawn

    return spawn(asked.argv)


@contextmanager
def traced(asked: Asked, *, directory: Path | None, tracer: str, **plan: Any) -> Iterator[Run]:
    """Give a session that runs; what is started is not run at all if it cannot be traced.

    The body waits (:func:`wait`) and looks at what there is; afterwards the target is let go of.

    Raises: what the target, the session or the engine say.
    """
    from fentry.tracers.session import Session

    started = not asked.pid
    target = open_target(asked)
    try:
        with show.Progress("looking at the program", enabled=not asked.quiet) as progress:
            session = Session(
                target,
                asked.make_plan(tracer=tracer, **plan),
                directory=directory,
                started=started,
                progress=progress,
                argv=asked.argv,
            )
            session.start()
    except BaseException as error:
        if started:
            _put_away(target)
            if isinstance(error, TraceError) and not isinstance(error, Gone):
                error.message += f"; {asked.argv[0]} was not run"
        target.close()
        raise
    try:
        yield Run(session, started)
    finally:
        # whatever went wrong in between: nothing of ours stays in the target
        with contextlib.suppress(TraceError):
            session.finish()
        target.close()


def _put_away(target: Target) -> None:
    """Kill a program that has not begun."""
    kill: Callable[[], None] | None = getattr(target, "kill", None)
    if kill is not None:
        kill()


def wait(run: Run, asked: Asked, signals: Signals, *, enough: Callable[[], bool] = lambda: False) -> None:
    """Wait until the program, or the tracing, is over; finish the session; fill in what became of it.

    Args:
        run: a run under way.
        asked: the command line.
        signals: what was sent to us.
        enough: asked a few times a second; True ends the tracing.
    """
    session = run.session
    patience = 1 if run.started and session.target.pid else 0
    deadline = None if asked.duration_s is None else time.monotonic() + asked.duration_s
    # a program that writes to our terminal must not find our progress line in its output
    ours = not asked.quiet and not run.started
    with show.Progress("tracing", enabled=ours) as progress:
        while True:
            run.number = signals.leaving(patience=patience)
            if run.number:
                run.why = "signal"
                break
            left = _TICK if deadline is None else min(_TICK, deadline - time.monotonic())
            if left <= 0:
                run.why = "time"
                break
            try:
                run.stop = session.wait(left)
            except TraceError as error:  # an emulated program did what the emulator does not do
                run.error, run.why = error, "stuck"
                break
            if run.stop is not None:
                break
            if session.failed or enough():
                run.why = "trouble" if session.failed else "enough"
                break
            progress(f"tracing process {session.target.pid}; Ctrl-C ends the tracing, not the process")
    try:
        with show.Progress("detaching", enabled=not asked.quiet):
            run.outcome = session.finish()
    except TraceError as error:
        run.error = run.error or error
        run.outcome = session.outcome
    run.stop = run.stop or run.outcome.stop
    if run.error is not None:
        show.complain_of(run.error)
    if run.started and run.stop is None and run.why not in ("signal", "stuck"):
        _wait_for_end(run, signals, patience)


def _wait_for_end(run: Run, signals: Signals, patience: int) -> None:
    """Wait for a program that goes on untraced, to hand its status on."""
    target = run.session.target
    target.resume()
    while run.stop is None and not run.number:
        run.stop = run.session.wait(_TICK)
        run.number = signals.leaving(patience=patience)


def remark(run: Run) -> None:
    """Say :func:`remarks`."""
    for line in remarks(run):
        show.say(f"fentry: {line}")


def remarks(run: Run) -> list[str]:
    """What must be said of a run besides its result: losses, functions left out, what could not be undone."""
    outcome = run.outcome
    if outcome is None:
        return []
    out = list(outcome.notes)
    words: str = getattr(run.session.target, "words", "")  # a machine that is ours knows why a program crashed
    if words:
        out.append(words)
    if outcome.lost:
        out.append(f"{show.count(outcome.lost, 'event')} lost (a larger --buffer-size, or --policy block, keeps more)")
    report = outcome.restored
    if report is not None:
        out += [f"not put back: {strange.message}" for strange in report.strange]
        if report.left_mapped and run.session.target.pid:  # an emulated program ends with us
            out.append(f"some of fentry's memory stays in process {run.session.target.pid}: {report.left_mapped}")
    if run.why == "signal" and run.started and run.stop is None and run.session.target.pid:
        out.append(f"process {run.session.target.pid} goes on without fentry")
    return out
