"""Run a program under a session and keep everything that a test compares: its own doings, counts, the trace.

    plain = run(argv)
    seen = trace(argv, directory, tracer="function_graph")
    assert seen.did == plain
    assert seen.counts == independent

Programs read from and write to files, never to pipes of ours: a pipe that is full would make the program wait for
the test, and the test waits for the program.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fentry.record.layout import Kind
from fentry.record.store import Trace
from fentry.target import Stop
from fentry.target.process import ProcessTarget, spawn
from fentry.target.unicorn import load
from fentry.tracers.session import Outcome, Plan, Row, Session

#: seconds until a program under test is taken for one that hangs
PATIENCE = 120.0
CALLS = (int(Kind.ENTRY), int(Kind.TAIL), int(Kind.PLAIN))
TRACERS = ("function", "function_graph", "profile")


@dataclass(frozen=True, slots=True)
class Did:
    """What a program did: exit status (below zero: the signal that ended it), and what it wrote."""

    status: int
    stdout: bytes
    stderr: bytes = b""


@dataclass(slots=True)
class Seen:
    """One traced run."""

    did: Did
    outcome: Outcome
    counts: dict[str, int]  #: calls by function name, as traced
    rows: list[Row]
    directory: Path
    retired: int = 0  #: the emulated program's own instructions
    sites: int = 0
    forms: frozenset[str] = frozenset()
    unhooked: frozenset[str] = frozenset()  #: functions that have a reason why they cannot be traced
    writable_code: list[str] = field(default_factory=list)

    @property
    def trace(self) -> Trace:
        """The trace, opened."""
        return Trace.open(self.directory)


def run(
    argv: Sequence[str | Path], *, stdin: bytes = b"", env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Did:
    """Run a program without us."""
    done = subprocess.run(
        [str(a) for a in argv],
        check=False,
        input=stdin,
        capture_output=True,
        env=environment(env),
        cwd=cwd,
        timeout=PATIENCE,
    )
    return Did(done.returncode, done.stdout, done.stderr)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, with what makes programs depend on nothing else."""
    return {**os.environ, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", **(more or {})}


def trace(
    argv: Sequence[str | Path],
    directory: Path,
    *,
    tracer: str = "function_graph",
    wanted: Sequence[str] = (),
    unwanted: Sequence[str] = (),
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    detach_after: float | None = None,
    **plan: object,
) -> Seen:
    """Run a program from its start to its end under a session.

    Args:
        argv: the program and its arguments.
        directory: an empty directory for everything that is written.
        tracer: name of a tracer.
        wanted: filter patterns.
        unwanted: filter patterns.
        stdin: what it reads.
        env: more environment.
        cwd: where it starts.
        detach_after: let go of it after so many seconds; it goes on untraced.
        **plan: more fields of Plan.
    """
    words = [str(a) for a in argv]
    (directory / "in").write_bytes(stdin)
    with (
        (directory / "in").open("rb") as source,
        (directory / "out").open("wb") as out,
        (directory / "err").open("wb") as err,
    ):
        target = spawn(words, env=environment(env), cwd=cwd, stdin=source, stdout=out, stderr=err)
    watch = Watch(target)
    session = Session(
        target,
        Plan(tracer=tracer, wanted=wanted, unwanted=unwanted, **plan),  # type: ignore[arg-type]  # fields by name
        directory=directory / "trace",
        argv=words,
    )
    with session:
        try:
            session.start()
            stop = session.wait(PATIENCE if detach_after is None else detach_after)
            assert stop is not None or detach_after is not None, f"it still runs after {PATIENCE} s"
            outcome = session.finish()
            if outcome.stop is None:
                target.resume()
                outcome.stop = target.wait(PATIENCE)
                assert outcome.stop is not None, f"untraced again, it does not end in {PATIENCE} s"
        except BaseException:
            target.kill()
            raise
        return _seen(session, outcome, directory, Did(status(outcome.stop), b"", b""), watch)


def emulate(
    argv: Sequence[str | Path],
    directory: Path,
    *,
    tracer: str = "function_graph",
    wanted: Sequence[str] = (),
    stdin: bytes = b"",
    **plan: object,
) -> Seen:
    """The same for a program in the emulator."""
    words = [str(a) for a in argv]
    with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
        target = load(words[0], words, stdin=stdin, stdout=out.fileno(), stderr=err.fileno())
        session = Session(
            target,
            Plan(tracer=tracer, wanted=wanted, **plan),  # type: ignore[arg-type]  # fields by name
            directory=directory / "trace",
            argv=words,
        )
        with session:
            session.start()
            stop = session.wait(PATIENCE)
            assert stop is not None, f"it still runs after {PATIENCE} s"
            outcome = session.finish()
            retired = target.retired
            seen = _seen(session, outcome, directory, Did(status(stop), b"", b""), None)
            seen.retired = retired
            return seen


def status(stop: Stop | None) -> int:
    """A program's end as subprocess gives it."""
    assert stop is not None
    assert stop.kind in ("exited", "signalled"), stop
    return -stop.status if stop.kind == "signalled" else stop.status


def _seen(session: Session, outcome: Outcome, directory: Path, did: Did, watch: Watch | None) -> Seen:
    rows = session.rows()
    counts = Counter[str]()
    if session.tracer.events:
        counts.update(calls_by_name(Trace.open(directory / "trace")))
    for row in rows:
        counts[row.function] += row.hits
    return Seen(
        Did(did.status, (directory / "out").read_bytes(), (directory / "err").read_bytes()),
        outcome,
        dict(counts),
        rows,
        directory / "trace",
        sites=len(session.sites),
        forms=frozenset(s.sled.form for s in session.sites),
        unhooked=frozenset(v.name for _, c in session.censuses.values() for v in c.verdicts if v.sled is None),
        writable_code=watch.writable_code if watch else [],
    )


def calls_by_name(traced: Trace, *, pid: int = 0) -> dict[str, int]:
    """Calls by function name in a trace; of one process, or of all."""
    hits = np.zeros(len(traced.meta.sites), dtype=np.int64)
    for batch in traced.events():
        kind = batch.column("kind").to_numpy()
        called = np.isin(kind, CALLS)
        if pid:
            called &= batch.column("pid").to_numpy() == pid
        hits += np.bincount(batch.column("site").to_numpy()[called], minlength=len(hits))
    assert not traced.damage, traced.damage
    counts = Counter[str]()
    for site, n in zip(traced.meta.sites, hits.tolist(), strict=True):
        if n:
            counts[site.name] += n
    return dict(counts)


class Watch:
    """Looks at a live target's memory each time that it is about to run, for code that can be written."""

    def __init__(self, target: ProcessTarget) -> None:
        self.writable_code: list[str] = []
        self.looks = 0
        self._target = target
        self._resume: Callable[[], None] = target.resume
        target.resume = self._look_and_resume  # type: ignore[method-assign]  # a spy around this one object

    def _look_and_resume(self) -> None:
        self.looks += 1
        self.writable_code += writable_code(self._target.pid)
        self._resume()


def writable_code(pid: int) -> list[str]:
    """Mappings of a process that are both writable and executable."""
    try:
        text = Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [line for line in text.splitlines() if line.split()[1].startswith("rwx") or "wx" in line.split()[1]]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What must be the same before and after: every file-backed code range, mappings, threads."""

    code: dict[tuple[int, int, str], str]
    mappings: tuple[str, ...]
    threads: frozenset[int]


def anatomy(pid: int) -> Anatomy:
    """Read a process from outside, without us. It need not be stopped: code and the list of mappings stand still."""
    code = {}
    mappings = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            where, perms, offset, _, inode, *name = line.split(maxsplit=5)
            start, end = (int(word, 16) for word in where.split("-"))
            path = name[0] if name else ""
            if inode != "0" and perms.startswith("r-x"):
                memory.seek(start)
                code[start, end, path] = hashlib.sha256(memory.read(end - start)).hexdigest()
            if path or perms != "rw-p":  # anonymous data is the program's own, and grows
                mappings.append(f"{where if path not in ('[heap]', '[stack]') else ''} {perms} {offset} {path}")
    return Anatomy(code, tuple(mappings), frozenset(int(t.name) for t in Path(f"/proc/{pid}/task").iterdir()))


def bases(pid: int, registers: Iterable[str] = ("fs_base", "gs_base")) -> dict[int, tuple[int, ...]]:
    """Segment bases of every thread, read in a short stop."""
    from fentry.target.process import attach

    with attach(pid) as target:
        return {tid: tuple(target.regs(tid)[r] for r in registers) for tid in target.threads()}


def end(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> int:
    """End a process that we started."""
    process.send_signal(number)
    return process.wait(PATIENCE)
