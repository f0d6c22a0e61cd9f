"""Handle on ``programs/checked.c``: a program that checks itself, and pictures of what must not change."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from fentry.engine import restore
from fentry.target import procfs
from fentry.target.process import attach
from fentry.tracers.session import Outcome, Plan, Session

SOURCE = Path(__file__).parent / "programs" / "checked.c"
FLAGS = ("-Wextra", "-Wno-unused-parameter", "-Wl,-z,now")
ROLES = ("deep", "deep2", "deep3", "deep4", "regs", "read", "poll", "nap", "futex", "coroutine", "signal")
RESTING = ("deep2", "deep3", "deep4")  #: unless it works hard
#: what /proc/PID/status tells of a thread that only itself may change
STATE = ("SigIgn", "SigCgt", "TracerPid", "NoNewPrivs", "Seccomp")


@dataclass(frozen=True)
class Picture:
    """What must be the same after a visit."""

    maps: str
    code: dict[int, bytes]
    threads: dict[int, dict[str, str]]
    descriptors: dict[str, str]

    def differs(self, other: Picture) -> str:
        """What is different in `other`, in words; "" if nothing is."""
        out = []
        mine, theirs = self.maps.splitlines(), other.maps.splitlines()
        out += [f"- {line}" for line in mine if line not in theirs]
        out += [f"+ {line}" for line in theirs if line not in mine]
        for start, code in self.code.items():
            now = other.code.get(start, code)
            out += [f"code at {start + i:#x}" for i in range(min(len(code), len(now))) if code[i] != now[i]][:5]
        for name in ("threads", "descriptors"):
            if getattr(self, name) != getattr(other, name):
                out.append(f"{name}: {getattr(self, name)} became {getattr(other, name)}")
        return "\n".join(out)


def picture(pid: int) -> Picture:
    """Mappings, code, threads with their signal state, descriptors."""
    code = {}
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for region in procfs.regions(pid):
            if "x" in region.mapping.perms and region.mapping.path != "[vsyscall]":
                code[region.mapping.start] = os.pread(memory.fileno(), region.mapping.size, region.mapping.start)
    threads = {
        tid: {name: value for name, value in procfs.status(tid).items() if name in STATE} for tid in procfs.tids(pid)
    }
    links = {entry.name: str(Path(entry.path).readlink()) for entry in os.scandir(f"/proc/{pid}/fd")}
    # an empty descriptor may stay behind if the tracer is killed while it shares memory (target/room.py says so)
    descriptors = {fd: to for fd, to in links.items() if not to.startswith("/memfd:fentry.")}
    return Picture(Path(f"/proc/{pid}/maps").read_text(), code, threads, descriptors)


def bases(pid: int) -> set[int]:
    """The gs bases of all threads."""
    with attach(pid) as target:
        return {target.regs(tid)["gs_base"] for tid in target.threads()}


def fentry_holds(pid: int) -> bool:
    """Whether anything of fentry's is mapped there."""
    return "fentry." in Path(f"/proc/{pid}/maps").read_text()


class Checked:
    """A running ``checked``.

    Args:
        program: its path.
        directory: where its shared page goes.
        hard: it rests never, and dives in four threads.
    """

    def __init__(self, program: Path, directory: Path, *, hard: bool = False) -> None:
        path = directory / "shm"
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self._shm = mmap.mmap(file.fileno(), 4096)
        self.roles = [r for r in ROLES if hard or r not in RESTING]
        self.process = subprocess.Popen([program, path, *(["hard"] if hard else [])])
        self.pid = self.process.pid
        self._until(lambda: self._words()[2] == 1, "it is not ready")

    def _words(self) -> tuple[int, ...]:
        return struct.unpack_from(f"<{8 + len(ROLES)}Q", self._shm)

    def rounds(self) -> dict[str, int]:
        """How many rounds each role has done."""
        words = self._words()
        return {role: words[8 + i] for i, role in enumerate(ROLES) if role in self.roles}

    def _until(self, condition, what: str) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert self.process.poll() is None, f"it ended with {self.process.returncode}"
            assert time.monotonic() < deadline, what
            time.sleep(0.0005)  # between two looks; what is waited for is `condition`

    def alive(self, more: int = 8) -> None:
        """Every thread gets through `more` rounds, those in flight included, and none ever saw a wrong result."""
        before = self.rounds()

        def late() -> list[str]:
            return [r for r, n in self.rounds().items() if n < before[r] + more]

        self._until(lambda: self._words()[0] or not late(), f"no progress: {late()} of {self.rounds()}")
        wrong = [role for bit, role in enumerate(ROLES) if self._words()[1] >> bit & 1]
        assert not wrong, f"{self._words()[0]} wrong results in {wrong}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._shm.close()


def visit(pid: int, plan: Plan, directory: Path, seconds: float) -> Outcome:
    """Trace a running process for a while, as ``fentry record --pid`` does."""
    with attach(pid) as target, Session(target, plan, directory=directory, started=False) as session:
        session.start()
        session.wait(seconds)
        return session.finish()


def recover(pid: int) -> restore.Report:
    """What ``fentry recover PID`` does."""
    with attach(pid) as target:
        return restore.recover(target)
