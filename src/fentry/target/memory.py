"""Memory of a process through /proc/PID/mem: reads, and writes that page protection does not hinder.

The file stays bound to the address space it was opened on. After an exec, or after the last thread has
gone, it reads as empty: that is how both are noticed, and why a write can never hit a successor.

The kernel lets a write through a read-only private page and copies the page for it (FOLL_FORCE). Since
Linux 6.12 ``proc_mem.force_override=`` may forbid that, to all or to all but the tracer; then the words
go through PTRACE_POKEDATA, which is not subject to it.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterable
from typing import Final

from fentry.errors import Denied, Fault, Gone
from fentry.target import ptrace

_PAGE: Final = 4096
_MOST: Final = 1 << 30  #: bytes a single pread is asked for; the kernel stops at 2 GiB
_TOP: Final = 1 << 63  #: file offsets, and user addresses, end here


class Memory:
    """The address space that process `tid` has now.

    Args:
        tid: any live thread of the process.
        tracee: gives a stopped thread of ours, or 0 if none is held now.
    """

    def __init__(self, tid: int, tracee: Callable[[], int]) -> None:
        self._tid = tid
        self._tracee = tracee
        try:
            self._fd = os.open(f"/proc/{tid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise Gone(f"process {tid} is gone") from None
        except PermissionError:
            raise Denied(
                f"not permitted to open /proc/{tid}/mem",
                hint="run as the process's own user with kernel.yama.ptrace_scope=0, or as root",
            ) from None

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def gone(self, at: int) -> bool:
        """Whether the address space has ended; `at` is any address."""
        try:
            return os.pread(self._fd, 1, at) == b""
        except OSError:
            return False

    def read(self, at: int, size: int) -> bytes:
        """Read exactly `size` bytes. Raises Fault, Gone."""
        if size <= 0:
            return b""
        if at < 0 or at + size > _TOP:
            raise Fault(at, size)
        parts = []
        while size:
            try:
                part = os.pread(self._fd, min(size, _MOST), at)
            except OSError as error:
                raise self._refusal(error, at, size, "read") from None
            if not part:
                raise Gone(f"process {self._tid} is gone, or replaced its program by exec")
            parts.append(part)
            at += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, at: int, data: bytes) -> None:
        """Write `data`, through page protection. Raises Fault, Gone."""
        if not data:
            return
        if at < 0 or at + len(data) > _TOP:
            raise Fault(at, len(data), "write")
        view = memoryview(data)
        while view:
            try:
                done = os.pwrite(self._fd, view, at)
            except OSError as error:
                if error.errno in (errno.EIO, errno.EPERM, errno.EACCES) and self._tracee():
                    self.poke(at, bytes(view))
                    return
                raise self._refusal(error, at, len(view), "write") from None
            if not done:
                raise Gone(f"process {self._tid} is gone, or replaced its program by exec")
            view = view[done:]
            at += done

    def poke(self, at: int, data: bytes) -> None:
        """Write `data` word by word through the tracer's own request; a thread must be held. Raises Fault."""
        start, end = at & -8, (at + len(data) + 7) & -8
        words = bytearray(self.read(start, end - start))
        words[at - start : at - start + len(data)] = data
        for offset in range(0, len(words), 8):
            word = int.from_bytes(words[offset : offset + 8], "little")
            try:
                ptrace.request(ptrace.POKEDATA, self._tracee(), start + offset, word)
            except OSError as error:
                raise self._refusal(error, at, len(data), "write") from None

    def write_many(self, writes: Iterable[tuple[int, bytes]]) -> None:
        """Write many small pieces; every thread must be stopped.

        Pieces that begin in one page go out together: the bytes between the first and the last are read
        and written back, which only a stopped process bears. Pieces must not overlap.
        """
        ordered = sorted(writes, key=lambda piece: piece[0])
        for _, group in itertools.groupby(ordered, key=lambda piece: piece[0] // _PAGE):
            pieces = list(group)
            start = pieces[0][0]
            if len(pieces) == 1:
                self.write(start, pieces[0][1])
                continue
            last, tail = pieces[-1]
            span = bytearray(self.read(start, last + len(tail) - start))
            for at, data in pieces:
                span[at - start : at - start + len(data)] = data
            self.write(start, bytes(span))

    def _refusal(self, error: OSError, at: int, size: int, what: str) -> Exception:
        if error.errno == errno.ESRCH:
            return Gone(f"process {self._tid} is gone")
        if what == "write":
            return Fault(
                at,
                size,
                what,
                hint="not mapped, a shared file mapping without write permission, or a kernel booted with "
                "proc_mem.force_override=never (=ptrace while nobody traces)",
            )
        return Fault(at, size, what)
