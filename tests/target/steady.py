"""Handle on ``live/steady.c``: a process that checks itself, and how to ask whether it still does so."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from fentry.target import ptrace
from fentry.target.memory import Memory

ROLES = ("spin", "read", "poll", "nap", "sem", "epoll", "ppoll", "calls", "long", "futex")
THREADS = len(ROLES) + 1  # and the pacer
SOURCE = Path(__file__).parent / "live" / "steady.c"
FLAGS = ("-mno-red-zone", "-mavx", "-Wextra")


class Steady:
    """A running ``steady``; `main` is the role of its first thread."""

    def __init__(self, program: Path, directory: Path, main: str) -> None:
        path = directory / f"shm-{main}"
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self._shm = mmap.mmap(file.fileno(), 4096)
        self.process = subprocess.Popen([program, path, main])
        self.pid = self.process.pid
        self.alive()

    def _words(self) -> tuple[int, ...]:
        return struct.unpack_from(f"<{8 + len(ROLES)}Q", self._shm)

    @property
    def eintr(self) -> int:
        """How often a call ended with EINTR that the kernel does not restart after a stop."""
        return self._words()[2]

    def alive(self) -> None:
        """Every thread makes progress and none ever saw anything wrong."""
        before = self._words()
        deadline = time.monotonic() + 20
        while True:
            now = self._words()
            wrong = [role for bit, role in enumerate(ROLES) if now[1] >> bit & 1]
            assert not wrong, f"{now[0]} errors in {wrong}"
            waiting = [
                role
                for i, role in enumerate(ROLES)
                if (now[8 + i] != 1 if role == "long" else now[8 + i] < before[8 + i] + 2)
            ]
            if not waiting:
                return
            assert self.process.poll() is None, f"it ended with {self.process.returncode}"
            assert time.monotonic() < deadline, f"no progress in {waiting}: {self.states()}"
            time.sleep(0.0005)

    def states(self) -> dict[int, str]:
        """State letter of each thread."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return {int(t.name): (t / "stat").read_text().rsplit(")", 1)[1].split()[0] for t in tasks}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._shm.close()


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


def die_at(work: Callable[[], None], deadly: int, *, after: bool) -> bool:
    """Do `work` in a child process that kills itself at a step of it; False if it came to the end first."""
    child = os.fork()
    if child == 0:
        try:
            steps = Steps(deadly, after=after)
            ptrace.request = steps.through(ptrace.request)
            Memory.write = steps.through(Memory.write)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the tracer failed: {status}"
    return status != 0
