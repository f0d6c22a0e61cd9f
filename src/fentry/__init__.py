"""fentry: trace the functions of programs you cannot rebuild.

    with fentry.spawn(["./program"]) as tracing:
        tracing.wait()
    tracing.calls()  # an Arrow table

Three ways in, one thing out: :func:`spawn` starts a program, :func:`attach` takes a running one, :func:`emulate` loads
a program of another machine; each gives a :class:`Tracing`. :func:`load` opens a trace that was recorded earlier,
:func:`functions` says what can be traced. Errors are :class:`TraceError` and its children.

Everything is done from one thread: the kernel lets only the thread that attached to a process stop it again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from fentry.errors import (
    AskedWrong,
    BadImage,
    BadTrace,
    CannotHere,
    Denied,
    EngineBug,
    Gone,
    NothingMatched,
    TargetRefused,
    TraceError,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from fentry.record.store import Trace
    from fentry.target import Stop, Target
    from fentry.tracers.session import Session

__all__ = [
    "AskedWrong",
    "BadImage",
    "BadTrace",
    "CannotHere",
    "Denied",
    "EngineBug",
    "Gone",
    "NothingMatched",
    "TargetRefused",
    "TraceError",
    "Tracing",
    "attach",
    "emulate",
    "functions",
    "load",
    "spawn",
]

Stream = int | IO[bytes] | IO[str] | None


def spawn(
    argv: Sequence[str],
    *,
    tracer: str = "function_graph",
    functions: Sequence[str] = (),
    exclude: Sequence[str] = (),
    directory: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    **plan: Any,
) -> Tracing:
    """Start a program and trace it from its first instruction; use it in a ``with`` statement.

    Args:
        argv: program (looked up in PATH unless it has a slash) and arguments.
        tracer: "function_graph", "function", "profile" or "nop".
        functions: globs; "LIB:GLOB" names a library's functions. Empty: the program's own.
        exclude: globs of what to leave out.
        directory: where to write the trace; None: a temporary one, removed with the last reference to the Tracing.
        env: environment, ours if None.
        cwd: directory to start in, ours if None.
        stdin: a descriptor, an open file, subprocess.DEVNULL, or None for ours; likewise ``stdout`` and ``stderr``.
        stdout: see ``stdin``.
        stderr: see ``stdin``.
        **plan: fields of :class:`fentry.tracers.session.Plan`: clock, policy, ring_size, retval, depth, ...

    Leaving the block waits for the program's end, unless by an exception: then the program goes on untraced.

    Raises:
        TraceError: the program cannot be started or traced; it was not run.

    >>> import fentry
    >>> with fentry.spawn(["sh", "-c", "exit 3"], tracer="function", functions=["libc.so.6:malloc"]) as tracing:
    ...     tracing.wait()
    3
    >>> tracing.lost
    0
    >>> set(tracing.events().column("function").to_pylist())
    {'malloc'}
    """
    asked = _plan(tracer, functions, exclude, plan)
    words = [os.fspath(word) for word in argv]

    def start() -> Target:
        import subprocess

        from fentry.target.process import spawn as start_program

        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            given = [nowhere if s == subprocess.DEVNULL else s for s in (stdin, stdout, stderr)]
            return start_program(words, env=env, cwd=cwd, stdin=given[0], stdout=given[1], stderr=given[2])
        finally:
            os.close(nowhere)

    return Tracing(start, asked, directory, started=True, argv=words)


def attach(
    pid: int,
    *,
    tracer: str = "function_graph",
    functions: Sequence[str] = (),
    exclude: Sequence[str] = (),
    directory: str | os.PathLike[str] | None = None,
    **plan: Any,
) -> Tracing:
    """Trace a process that runs; use it in a ``with`` statement. Leaving the block detaches; the process goes on.

    Args:
        pid: process id.
        tracer: see :func:`spawn`, like all that follows.
        functions: globs.
        exclude: globs of what to leave out.
        directory: where to write the trace.
        **plan: fields of :class:`fentry.tracers.session.Plan`.

    Raises:
        TraceError: it cannot be traced; it goes on unharmed.

    >>> import fentry, subprocess
    >>> with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as cat:
    ...     _ = cat.stdin.write(b"up?"), cat.stdout.read(3)  # its libraries are loaded once it answers
    ...     with fentry.attach(cat.pid, tracer="profile", functions=["libc.so.6:*"]) as tracing:
    ...         answer = cat.communicate(b"hello")[0]
    >>> answer, cat.returncode, all(row["hits"] > 0 for row in tracing.stat())
    (b'hello', 0, True)
    """
    asked = _plan(tracer, functions, exclude, plan)

    def start() -> Target:
        from fentry.target.process import attach as attach_to

        return attach_to(pid)

    return Tracing(start, asked, directory, started=False, argv=())


def emulate(
    path: str | os.PathLike[str],
    *argv: str,
    tracer: str = "function_graph",
    functions: Sequence[str] = (),
    exclude: Sequence[str] = (),
    directory: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    options: Mapping[str, Any] | None = None,
    **plan: Any,
) -> Tracing:
    """Run a program of another machine in the emulator and trace it; use it in a ``with`` statement.

    It runs while :meth:`Tracing.wait` waits, and its clock counts instructions: the same program gives the same trace.

    Args:
        path: a static Linux program, or a bare-metal image.
        *argv: its arguments.
        tracer: see :func:`spawn`, like all that follows.
        functions: globs.
        exclude: globs of what to leave out.
        directory: where to write the trace.
        env: its environment; ours if None.
        stdin: None for ours, a descriptor, bytes, or an object with ``read``.
        stdout: None for ours, a descriptor, or an object with ``write``; likewise ``stderr``.
        stderr: see ``stdout``.
        options: more for :func:`fentry.target.unicorn.load`: ram, abi, epoch.
        **plan: fields of :class:`fentry.tracers.session.Plan`.

    Raises:
        TraceError: it cannot be loaded or traced.
    """
    asked = _plan(tracer, functions, exclude, plan)
    words = [os.fspath(path), *argv]

    def start() -> Target:
        from fentry.target.unicorn import load as load_program

        environment = dict(os.environ if env is None else env)
        return load_program(path, words, environment, stdin=stdin, stdout=stdout, stderr=stderr, **(options or {}))

    return Tracing(start, asked, directory, started=True, argv=words)


def load(directory: str | os.PathLike[str]) -> Trace:
    """Open a recorded trace: events, calls (:func:`fentry.record.calls.calls`), names, losses. Raises BadTrace."""
    from fentry.record.store import Trace

    return Trace.open(directory)


def functions(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """List the functions of a program or library, each with its form or the reason why it cannot be traced.

    Returns: rows with function, module, address (in the file), size, form, reason; one of the last two is None.
    Raises: BadImage.

    >>> import fentry, sys
    >>> rows = fentry.functions(sys.executable)
    >>> all((row["form"] is None) != (row["reason"] is None) for row in rows)
    True
    """
    from fentry.engine import census
    from fentry.image import Image

    taken = census.take(Image.open(os.fspath(path)), main=True)
    return [
        {
            "function": v.name,
            "module": v.module,
            "address": v.function.address,
            "size": v.size,
            "form": v.sled.form if v.sled else None,
            "reason": v.reason or None,
        }
        for v in taken.verdicts
    ]


class Tracing:
    """One traced run: entered it runs, left it is over, and what was recorded stays readable.

    Made by :func:`spawn`, :func:`attach` and :func:`emulate`.
    """

    def __init__(
        self,
        start: Callable[[], Target],
        plan: dict[str, Any],
        directory: str | os.PathLike[str] | None,
        *,
        started: bool,
        argv: Sequence[str],
    ) -> None:
        self._start = start
        self._plan = plan
        self._named = None if directory is None else Path(directory)
        self._started = started
        self._argv = argv
        self._session: Session | None = None
        self._directory: Path | None = None
        self._trace: Trace | None = None

    def __enter__(self) -> Tracing:
        from fentry.tracers.session import Plan, Session

        if self._session is not None:
            raise AskedWrong("a tracing runs once", hint="make another one")
        plan = Plan(**self._plan)
        target = self._start()
        try:
            self._directory = self._place()
            session = Session(target, plan, directory=self._directory, started=self._started, argv=self._argv)
            session.start()
        except BaseException:
            kill: Callable[[], None] | None = getattr(target, "kill", None)
            if self._started and kill is not None:
                kill()
            target.close()
            raise
        self._session = session
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        session = self._running
        try:
            if self._started and kind is None and session.outcome.stop is None:
                self.wait()
            session.finish()
        finally:
            session.target.close()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the program ends; an emulated program runs only meanwhile.

        Args:
            timeout: seconds, or None for as long as it takes.

        Returns: its exit status, as :attr:`exit`; None if the time was up first.
        """
        session = self._running
        if session.outcome.stop is None and not self.stopped:
            session.wait(timeout)
        elif session.outcome.stop is None and self._started:
            session.target.resume()
            session.wait(timeout)
        return self.exit

    def stop(self) -> None:
        """Stop tracing now: the program is put back to what it was and goes on. What was recorded is complete.

        Raises: CannotHere if the disk was full; the trace up to there is readable.
        """
        session = self._running
        session.finish()
        if session.outcome.stop is None:
            session.target.resume()

    @property
    def stopped(self) -> bool:
        """Tracing is over."""
        return self._session is not None and self._session.finished

    @property
    def pid(self) -> int:
        """Process id, 0 in the emulator."""
        return self._running.target.pid

    @property
    def exit(self) -> int | None:
        """Exit status, as subprocess has it: minus the signal's number if one ended it; None while it runs."""
        stop: Stop | None = self._running.outcome.stop
        if stop is None:
            return None
        return -stop.status if stop.kind == "signalled" else stop.status

    @property
    def lost(self) -> int:
        """Events that were lost (full rings of policy drop, more threads than rings)."""
        session = self._running
        region = session.engine.region
        return session.outcome.lost if session.finished or region is None else region.lost

    @property
    def notes(self) -> list[str]:
        """What else should be known: functions left out, and why."""
        return list(self._running.outcome.notes)

    @property
    def trace(self) -> Trace:
        """The trace, with what was recorded so far. Raises AskedWrong for tracers without events."""
        session = self._running
        if not session.tracer.events or self._directory is None:
            raise AskedWrong(f"tracer {session.tracer.name} writes no events", hint="stat() has what it counted")
        if self._trace is None:
            session.flush()
            trace = load(self._directory)
            if not session.finished:
                return trace  # it still grows
            self._trace = trace
        return self._trace

    def events(self) -> pa.Table:
        """Give all events: :data:`fentry.record.event.SCHEMA`, and the columns function and module."""
        import pyarrow as pa

        from fentry.record.event import SCHEMA

        trace = self.trace
        tables = list(trace.events())
        return _named(pa.concat_tables(tables) if tables else SCHEMA.empty_table(), trace)

    def calls(self) -> pa.Table:
        """Give all calls: :data:`fentry.record.calls.SCHEMA`, and the columns function and module."""
        from fentry.record.calls import calls

        trace = self.trace
        return _named(calls(trace), trace)

    def stat(self) -> list[dict[str, Any]]:
        """Give hits and times per function, most time first.

        Returns: rows with function, module, hits, total_ns, self_ns, min_ns, max_ns; times None where not known.
        """
        session = self._running
        if session.tracer.events:
            from fentry.record.stat import stat

            return stat(self.trace)
        from dataclasses import asdict

        timed = session.plan.times and session.engine.clock != "order"
        untimed = {} if timed else dict.fromkeys(("total_ns", "self_ns", "min_ns", "max_ns"))
        return [asdict(row) | untimed for row in session.rows()]

    # -- within -----------------------------------------------------------------------------------
    @property
    def _running(self) -> Session:
        if self._session is None:
            raise AskedWrong("this tracing has not begun", hint="with fentry.spawn(...) as tracing: ...")
        return self._session

    def _place(self) -> Path | None:
        from fentry.tracers import load as load_tracer

        if not load_tracer(self._plan["tracer"]).events:
            return None
        if self._named is not None:
            return self._named
        scratch = tempfile.mkdtemp(prefix="fentry-")
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        return Path(scratch) / "trace"


def _plan(tracer: str, wanted: Sequence[str], unwanted: Sequence[str], more: dict[str, Any]) -> dict[str, Any]:
    """Fields of a Plan. Raises AskedWrong for what is no field."""
    from dataclasses import fields

    from fentry.tracers.session import Plan

    known = {field.name for field in fields(Plan)} - {"tracer", "wanted", "unwanted"}
    if unknown := sorted(set(more) - known):
        raise AskedWrong(f"no option {unknown[0]!r}", hint="options: " + ", ".join(sorted(known)))
    for what, globs in (("functions", wanted), ("exclude", unwanted)):
        if isinstance(globs, str):
            raise AskedWrong(f"{what} is a list of globs", hint=f"{what}=[{globs!r}]")
    return {"tracer": tracer, "wanted": tuple(wanted), "unwanted": tuple(unwanted), **more}


def _named(table: pa.Table, trace: Trace) -> pa.Table:
    """Add names to a table that has sites."""
    import pyarrow as pa

    site = table.column("site").combine_chunks().cast(pa.int32())
    for column, names in (
        ("function", [s.name for s in trace.meta.sites]),
        ("module", [s.module for s in trace.meta.sites]),
    ):
        spelled = [name.encode("utf-8", "backslashreplace").decode() for name in names]
        table = table.append_column(column, pa.DictionaryArray.from_arrays(site, pa.array(spelled, pa.string())))
    return table
