"""Look at a live process without stopping it: memory, mappings, modules.

What the kernel asks for is the right to trace, not the tracing itself; so this works beside another fentry, and
beside a debugger that holds the process.
"""

from __future__ import annotations

import platform
from types import TracebackType

from fentry.errors import AskedWrong, Gone
from fentry.target import Mapping, Module, procfs
from fentry.target.memory import Memory


class Onlooker:
    """A process that goes on while it is read; two reads need not belong to one moment.

    Args:
        pid: process id.

    Raises: AskedWrong (no such process, a thread's id), Gone (it has ended), Denied.
    """

    def __init__(self, pid: int) -> None:
        try:
            facts = procfs.status(pid)
        except Gone:
            raise AskedWrong(f"no process {pid}", hint="ps -e lists them") from None
        if facts.get("Tgid", str(pid)) != str(pid):
            raise AskedWrong(f"{pid} is a thread of process {facts['Tgid']}", hint=f"give {facts['Tgid']}")
        # the first thread may have ended: then its entry is a zombie without memory
        alive = [tid for tid in procfs.tids(pid) if procfs.state(tid) not in ("", "Z", "X")]
        if not alive:
            raise Gone(f"process {pid} has ended (its parent has not taken note yet)")
        self.pid = pid
        self.arch = platform.machine()
        self._tid = alive[0]
        self._memory = Memory(self._tid, lambda: 0)

    def read(self, at: int, size: int) -> bytes:
        """Read exactly `size` bytes. Raises Fault, Gone."""
        return self._memory.read(at, size)

    def mappings(self) -> list[Mapping]:
        """All mapped ranges in address order. Raises Gone, Denied."""
        return [region.mapping for region in procfs.regions(self._tid)]

    def modules(self) -> list[Module]:
        """Loaded images, the program itself first. Raises Gone, Denied."""
        return procfs.modules(self._tid, self.read)

    def close(self) -> None:
        """Let go. Idempotent."""
        self._memory.close()

    def __enter__(self) -> Onlooker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
