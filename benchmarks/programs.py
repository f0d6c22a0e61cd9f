"""The hot program in each of its builds, running and waiting for commands: plain, traced by us, or by another tool."""

from __future__ import annotations

import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from fentry.errors import Gone
from fentry.record import layout
from fentry.record.layout import Policy
from fentry.target import process
from fentry.tracers.session import Outcome, Plan, Session
from tests.programs.build import build

HERE = Path(__file__).parent
#: bytes per ring, ours and the floor's: fits the second level cache of anything
RING = 65_536
#: the same alignment of function and loop in every build
COMMON = ("-falign-functions=64", "-falign-loops=64")

#: form -> flags that make the compiler leave room for it
FORMS = {
    "sled": ("-fpatchable-function-entry=5",),
    "fentry": ("-pg", "-mfentry"),
    "entry-jump": (),
}


def hot(*flags: str, more: tuple[Path, ...] = (), extra: tuple[str, ...] = ()) -> Path:
    """Build the hot program."""
    return build(HERE / "hot.c", flags=(*COMMON, *flags), more=more, extra=extra)


def cpus() -> tuple[str, str]:
    """Two processors to run on, the last first: interrupts like the first one."""
    there = sorted(os.sched_getaffinity(0))
    return str(there[-1]), str(there[0])


class Running(AbstractContextManager["Running"], ABC):
    """A hot program that waits for commands."""

    def __init__(self) -> None:
        stdin, self._write = os.pipe()
        self._read, stdout = os.pipe()
        try:
            self._start(stdin, stdout)
        finally:
            os.close(stdin)
            os.close(stdout)
        self._answers: IO[str] = os.fdopen(self._read)

    def ask(self, command: str) -> str:
        """Give one command and wait for its answer."""
        os.write(self._write, command.encode() + b"\n")
        answer = self._answers.readline().strip()
        if not answer:
            raise Gone("the hot program ended")
        return answer

    def measure(self, calls: int, threads: int = 1) -> float:
        """Nanoseconds per call."""
        return float(self.ask(f"run {threads} {calls}"))

    @abstractmethod
    def _start(self, stdin: int, stdout: int) -> None:
        """Start the program with these descriptors."""

    @abstractmethod
    def _end(self) -> None:
        """Wait for it; its standard input is closed."""

    def __exit__(self, *exc: object) -> None:
        os.close(self._write)
        try:
            self._end()
        finally:
            self._answers.close()


class Plain(Running):
    """Started as it is, or under another tool.

    Args:
        path: the program.
        scratch: a directory to run in: programs built with -pg leave their gmon.out there.
        before: the command that runs it.
    """

    def __init__(self, path: Path, scratch: Path, *before: str) -> None:
        self._command, self._scratch = [*before, str(path), *cpus()], scratch
        super().__init__()

    def _start(self, stdin: int, stdout: int) -> None:
        self._child = subprocess.Popen(
            self._command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=self._scratch
        )

    def _end(self) -> None:
        self.words = self._child.communicate()[1]
        if self._child.returncode:
            raise Gone(f"{Path(self._command[0]).name} failed: {self.words[-300:]}")


class Traced(Running):
    """Traced by a session of ours.

    Args:
        path: the program.
        directory: where the trace goes; the program runs in its parent.
        tracer: name of a tracer.
        drained: keep draining; else the ring is a flight recorder that nobody reads meanwhile.
        plan: more fields of the session's plan.
    """

    def __init__(self, path: Path, directory: Path, tracer: str, *, drained: bool = False, **plan: Any) -> None:
        self._path, self._directory = path, directory
        settings: dict[str, Any] = {"ring_size": RING, "rings": 16, "policy": Policy.OVERWRITE} | plan
        self._plan = Plan(tracer=tracer, wanted=["callee"], **settings)
        self._drained = drained
        self.outcome = Outcome()
        self.recorded = 0  #: records ever written to the rings, known at the end
        self.hits = 0  #: calls counted in the target, known at the end
        super().__init__()

    def _start(self, stdin: int, stdout: int) -> None:
        argv = [str(self._path), *cpus()]
        target = process.spawn(argv, stdin=stdin, stdout=stdout, cwd=self._directory.parent)
        shutil.rmtree(self._directory, ignore_errors=True)
        self.session = Session(target, self._plan, directory=self._directory, started=True, argv=argv)
        try:
            self.session.start()
        except BaseException:
            target.kill()
            target.close()
            raise
        if not self._drained and self.session._drainer is not None:
            # a thread of ours that wakes up every millisecond would be measured, too
            self.session._drainer.stop()

    def _end(self) -> None:
        with self.session:
            self.session.wait()
            self.outcome = self.session.finish()
            region = self.session.engine.region
            if region is not None:
                self.recorded = int(region._rings[:, layout.H_POS // 8].sum()) // layout.RECORD
            self.hits = sum(row.hits for row in self.session.rows())
