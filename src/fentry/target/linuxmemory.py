# ruff: noqa: D102 - sys_NAME is the system call NAME; section 2 of the manual is its docstring
"""Memory calls of an emulated Linux program: brk, mmap and their relatives.

Layout of the address space is that of a kernel with three levels of page tables (256 GiB): the program low, its heap
after it, the stack at the top, mappings from below the stack downwards.
"""

from __future__ import annotations

import errno
import mmap
import os

from fentry.errors import Fault, Unsupported
from fentry.target.guestspace import Space, host_buffer
from fentry.target.linuxfiles import CHUNK, PAGE, Files

TASK_SIZE = 1 << 38  #: TASK_SIZE with three levels of page tables
STACK = 8 << 20  #: bytes of stack, all of them mapped
STACK_TOP = TASK_SIZE - PAGE
MMAP_TOP = STACK_TOP - STACK - (1 << 20)  #: where mappings begin, growing down
BRK_ROOM = 1 << 30  #: kept free of other mappings above the program while there is room elsewhere
MAX_REGIONS = 1024  #: mappings of one program; the emulator's cost of each grows with their number

_PIECES = 16  #: heap regions that may pile up before they are joined
_SHARED, _FIXED, _ANONYMOUS, _NOREPLACE = 1, 0x10, 0x20, 0x100000  # asm-generic/mman-common.h


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _perms(prot: int) -> str:
    """Turn PROT_* bits into "rwx"; writable implies readable, as page tables cannot say otherwise."""
    return ("r" if prot & 3 else "-") + ("w" if prot & 2 else "-") + ("x" if prot & 4 else "-")


class Memory:
    """The heap and the mappings of one program.

    Args:
        space: its address space.
        files: for mappings of files.
        heap: where the heap begins: a page after the program.
        ram: bytes that it may map in all, its stack and image not counted.
    """

    def __init__(self, space: Space, files: Files, *, heap: int, ram: int) -> None:
        self.space = space
        self._files = files
        self._heap = self._brk = heap
        self._ram = ram
        self._used = 0
        self._heap_host: mmap.mmap | None = None
        self._heap_pieces = 0

    def keep_free(self) -> tuple[int, int]:
        """The range in which the heap may yet grow."""
        return self._heap, self._heap + BRK_ROOM

    def _charge(self, size: int) -> None:
        """Count `size` more bytes as the program's. Raises OSError(ENOMEM) beyond its limit."""
        if size < 0 or self._used + size > self._ram or len(self.space) > MAX_REGIONS:
            raise OSError(errno.ENOMEM, "no memory")
        self._used += size

    def _release(self, at: int, size: int) -> None:
        held = sum(min(r.end, at + size) - max(r.start, at) for r in self.space.within(at, at + size))
        if held:
            self.space.unmap(at, size)
            self._used = max(0, self._used - held)

    def sys_brk(self, to: int, *_: int) -> int:
        if not self._heap <= to <= self._heap + min(BRK_ROOM, self._ram):
            return self._brk
        old, new = _pages(self._brk), _pages(to)
        if new > old:
            if self.space.within(old, new) or self._used + new - old > self._ram:
                return self._brk
            self._used += new - old
            if self._heap_host is None:
                self._heap_host = host_buffer(BRK_ROOM)
            self.space.map(old, new - old, "rw-", path="[heap]", host=self._heap_host, base=old - self._heap)
            self._zero(old, new - old)  # it may have been used, given back, and taken again
            self._heap_pieces += 1
            if self._heap_pieces == _PIECES:
                self._heap_pieces = 1
                self.space.join(self._heap, new)
        elif new < old:
            self._release(new, old - new)
        self._brk = to
        return to

    def _zero(self, at: int, size: int) -> None:
        for region in self.space.within(at, at + size):
            lo, hi = max(at, region.start), min(at + size, region.end)
            if region.host is not None:
                start = region.base + lo - region.start
                region.host.madvise(mmap.MADV_DONTNEED, start, hi - lo)  # private anonymous: reads as zeros again

    def _find(self, size: int) -> int:
        try:
            return self.space.hole(size, top=MMAP_TOP, avoid=(self.keep_free(),))
        except Unsupported:
            raise OSError(errno.ENOMEM, "no hole") from None

    def _map(self, at: int, size: int, perms: str, path: str = "", offset: int = 0) -> None:
        self._charge(size)
        try:
            self.space.map(at, size, perms, path=path, offset=offset)
        except Unsupported:
            self._used -= size
            raise OSError(errno.ENOMEM, "no memory") from None

    def sys_mmap(self, at: int, size: int, prot: int, flags: int, fd: int, offset: int) -> int:
        if not size or offset % PAGE:
            raise OSError(errno.EINVAL, "bad length or offset")
        if size > TASK_SIZE:
            raise OSError(errno.ENOMEM, "too long")
        size, path = _pages(size), ""
        source = -1
        if not flags & _ANONYMOUS:
            source = self._files.host_fd(fd)
            path = os.path.realpath(self._files.file(fd).path)
            if flags & _SHARED and prot & 2:
                raise OSError(errno.ENODEV, "no writable shared mappings of files")
        if flags & (_FIXED | _NOREPLACE):
            if at % PAGE or at + size > TASK_SIZE:
                raise OSError(errno.EINVAL, "bad address")
            if flags & _NOREPLACE and self.space.within(at, at + size):
                raise OSError(errno.EEXIST, "taken")
            if self._used + size > self._ram:
                raise OSError(errno.ENOMEM, "no memory")
            self._release(at, size)
        elif not at or at % PAGE or not self.space.low <= at <= MMAP_TOP - size or self.space.within(at, at + size):
            at = self._find(size)
        self._map(at, size, _perms(prot), path, offset if path else 0)
        done = 0
        while source >= 0 and done < size:
            data = os.pread(source, min(CHUNK, size - done), offset + done)
            if not data:
                break
            self.space.write(at + done, data)
            done += len(data)
        return at

    def sys_munmap(self, at: int, size: int, *_: int) -> int:
        if at % PAGE or not size or at + size > TASK_SIZE:
            raise OSError(errno.EINVAL, "bad range")
        self._release(at, _pages(size))
        return 0

    def sys_mprotect(self, at: int, size: int, prot: int, *_: int) -> int:
        if at % PAGE:
            raise OSError(errno.EINVAL, "bad address")
        if size:
            if len(self.space) > MAX_REGIONS:
                raise OSError(errno.ENOMEM, "too many mappings")
            try:
                self.space.protect(at, _pages(size), _perms(prot))
            except Fault:
                raise OSError(errno.ENOMEM, "not mapped") from None
        return 0

    def sys_mremap(self, at: int, old: int, new: int, flags: int, to: int, *_: int) -> int:
        may_move, fixed = flags & 1, flags & 2
        if at % PAGE or not new or (fixed and (to % PAGE or not may_move or to + new > TASK_SIZE)) or new > TASK_SIZE:
            raise OSError(errno.EINVAL, "bad range")
        old, new = _pages(old), _pages(new)
        region = self.space.at(at)
        if region is None or self.space.covered(at, old) < old or not old:
            raise Fault(at, old)
        if any((r.perms, r.path) != (region.perms, region.path) for r in self.space.within(at, at + old)):
            raise Fault(at, old)  # several mappings at once cannot be moved
        if not fixed:
            if new <= old:
                if new < old:
                    self._release(at + new, old - new)
                return at
            if at + new <= MMAP_TOP and not self.space.within(at + old, at + new):
                self._map(at + old, new - old, region.perms, region.path)
                return at
            if not may_move:
                raise OSError(errno.ENOMEM, "no room to grow")
            to = self._find(new)
        elif to < at + old and at < to + new:
            raise OSError(errno.EINVAL, "overlap")
        perms, path = region.perms, region.path
        if fixed:
            self._release(to, new)
        self._map(to, new, perms, path)
        for done in range(0, min(old, new), CHUNK):
            self.space.write(to + done, self.space.read(at + done, min(CHUNK, min(old, new) - done)))
        self._release(at, old)
        return to

    def sys_madvise(self, at: int, size: int, advice: int, *_: int) -> int:
        if at % PAGE:
            raise OSError(errno.EINVAL, "bad address")
        if self.space.covered(at, _pages(size)) < _pages(size):
            raise OSError(errno.ENOMEM, "not mapped")
        if advice == 4:  # MADV_DONTNEED
            if any(r.path and not r.path.startswith("[") for r in self.space.within(at, at + _pages(size))):
                raise OSError(errno.EINVAL, "a private mapping of a file cannot be read again here")
            self._zero(at, _pages(size))
        return 0
