"""Memory in another process: where there is room for it, mapping it, sharing it.

A range must often lie near code, within the reach of a jump, and never in the way of something that
grows: the heap grows up from the program break, the first thread's stack grows down.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fentry.errors import AskedWrong, Denied, Gone, OutOfReach, TargetRefused, Unsupported
from fentry.target import procfs
from fentry.target.inject import Injector
from fentry.target.procfs import Region

_PAGE: Final = 4096
_LOW: Final = 1 << 16  #: vm.mmap_min_addr as every distribution has it
_HIGH: Final = (1 << 47) - _PAGE  #: TASK_SIZE without five-level addresses
_HEAP_ROOM: Final = 1 << 30  #: bytes left above the program break where possible
_STACK_ROOM: Final = 1 << 28  #: bytes left below the first thread's stack

# include/uapi/asm-generic/mman*.h, include/uapi/linux/memfd.h, include/uapi/linux/fcntl.h
_PROT: Final = {"r": 1, "w": 2, "x": 4}
_MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS = 0x01, 0x02, 0x20
_MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x4000, 0x100000
_MADV_NOHUGEPAGE, _MADV_DONTDUMP, _MADV_WIPEONFORK = 15, 16, 18
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_NOEXEC_SEAL = 1, 2, 8
_F_ADD_SEALS: Final = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4

_NR: Final = {"close": 3, "mmap": 9, "munmap": 11, "madvise": 28, "memfd_create": 319}  # syscall_64.tbl


def holes(regions: list[Region], size: int, low: int, high: int, near: int, brk: int) -> list[int]:
    """Addresses at which `size` bytes are free within [low, high), best first.

    Best is what stays clear of the growth of heap and stack, then what is closest to `near`. A page is left
    free on either side where there is room, so that an overrun of the neighbour faults.

    Args:
        regions: what is mapped, in address order.
        size: bytes, whole pages.
        low: lowest address allowed.
        high: one past the highest.
        near: the address to be close to.
        brk: where the heap starts, or 0.
    """
    heap_end = max([brk, *(r.mapping.end for r in regions if r.mapping.path == "[heap]")])
    ends = [_LOW, *(region.mapping.end for region in regions)]
    starts = [*(region.mapping.start for region in regions), _HIGH]
    grows = [*(region.mapping.path == "[stack]" for region in regions), False]
    found: list[tuple[int, int, int]] = []
    for end, start, stack in zip(ends, starts, grows, strict=True):
        if start - end < size:
            continue
        clear_end = max(end, heap_end + _HEAP_ROOM) if brk and end <= heap_end + _HEAP_ROOM and start > brk else end
        clear_start = start - _STACK_ROOM if stack else start
        for rank, a, b in (
            (0, clear_end + _PAGE, clear_start - _PAGE),
            (1, clear_end, clear_start),
            (2, end, start),
        ):
            first, last = max(a, low), min(b, high) - size
            first = (first + _PAGE - 1) & -_PAGE
            last &= -_PAGE
            if first > last:
                continue
            # rank 2 is in the way of something that grows: then as far from it as the hole allows
            away = first if stack else last
            at = away if rank == 2 else min(max(near, first), last) & -_PAGE
            found.append((rank, abs(at - near), at))
            break
    return [at for _, _, at in sorted(found)]


class ProcessAllocator:
    """Maps and unmaps memory in a stopped process by injected system calls (ability: Allocator).

    Args:
        injector: runs them.
        check: raises unless every thread is stopped.
        tid: gives a live thread.
    """

    def __init__(self, injector: Injector, check: Callable[[], None], tid: Callable[[], int]) -> None:
        self._injector = injector
        self._check = check
        self._tid = tid

    def map(
        self,
        size: int,
        perms: str,
        *,
        near: int | None = None,
        reach: int = 0,
        at: int | None = None,
        name: str = "",
        intend: Callable[[int], None] | None = None,
    ) -> int:
        """Map zeroed private memory; see :class:`fentry.target.Allocator`.

        Raises: OutOfReach, AskedWrong, TargetRefused (the kernel's reason), Gone, Denied.
        """
        self._check()
        prot = _prot(perms)
        if size <= 0 or name not in ("", "wipeonfork", "noreserve"):
            raise AskedWrong(f"cannot map {size} bytes of kind {name!r}")
        size = (size + _PAGE - 1) & -_PAGE
        if name == "noreserve" and self._locks():
            raise TargetRefused(
                f"the target locks all its memory (mlockall): {size >> 20} MiB of sparse memory would all be allocated",
                hint="trace entries only: -p function",
            )
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | (_MAP_NORESERVE if name == "noreserve" else 0)
        if at is not None:
            if intend is not None:
                intend(at)
            where = self._map_at(at, size, prot, flags)
            if where < 0:
                raise _refused("mmap", where, size)
        elif near is not None or intend is not None:
            if near is None:  # high up, above where the kernel begins to look: in nobody's way
                near, reach = _HIGH, _HIGH
            where = self._map_near(near, reach, size, prot, flags, intend)
        else:
            where = self._injector.syscall(_NR["mmap"], 0, size, prot, flags, -1, 0)
            if where < 0:
                raise _refused("mmap", where, size)
        self._advise(where, size, name)
        return where

    def unmap(self, at: int, size: int) -> None:
        """Unmap a range that ``map`` or ``share`` returned."""
        self._check()
        result = self._injector.syscall(_NR["munmap"], at, (size + _PAGE - 1) & -_PAGE)
        if result < 0:
            raise _refused("munmap", result, size)

    def _locks(self) -> bool:
        """Whether new mappings are locked (MCL_FUTURE), so that each of their pages is allocated at once.

        Only a new mapping tells; it is tried where memory is locked at all.
        """
        tid = self._tid()
        before = _locked_kib(tid)
        if before == 0:
            return False
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS
        where = self._injector.syscall(_NR["mmap"], 0, _PAGE, _PROT["r"], flags, -1, 0)
        if where < 0:
            return True
        locked = _locked_kib(tid) > before
        self._injector.syscall(_NR["munmap"], where, _PAGE)
        return locked

    def _map_at(self, at: int, size: int, prot: int, flags: int) -> int:
        """Map exactly at `at`; gives it, or a negative errno."""
        where = self._injector.syscall(_NR["mmap"], at, size, prot, flags | _MAP_FIXED_NOREPLACE, -1, 0)
        if where >= 0 and where != at:  # a kernel before 4.17 took the address for a hint
            self._injector.syscall(_NR["munmap"], where, size)
            return -errno.EEXIST
        return where

    def _map_near(
        self, near: int, reach: int, size: int, prot: int, flags: int, intend: Callable[[int], None] | None
    ) -> int:
        tid = self._tid()
        high = min(near + reach, _HIGH)  # [vsyscall] lies beyond
        places = holes(procfs.regions(tid), size, near - reach, high, near, procfs.start_brk(tid))
        for place in places:
            if intend is not None:
                intend(place)
            where = self._map_at(place, size, prot, flags)
            if where >= 0:
                return where
            if where not in (-errno.EEXIST, -errno.EPERM):
                raise _refused("mmap", where, size)
        raise OutOfReach(near, near + reach + size if places else near + reach, reach)

    def _advise(self, at: int, size: int, name: str) -> None:
        wanted = {"wipeonfork": (_MADV_WIPEONFORK,), "noreserve": (_MADV_DONTDUMP, _MADV_NOHUGEPAGE)}.get(name, ())
        for advice in wanted:
            result = self._injector.syscall(_NR["madvise"], at, size, advice)
            if result == -errno.EINVAL and advice == _MADV_NOHUGEPAGE:
                continue  # a kernel without huge pages
            if result < 0:
                self._injector.syscall(_NR["munmap"], at, size)
                raise _refused("madvise", result, size)


class ProcessShared:
    """Memory that this process and a stopped one both see (ability: Shared).

    It is an anonymous file (memfd): created in the target, opened by us through /proc, mapped by both, its
    descriptor closed. It lives as long as either maps it, and its size is sealed.
    """

    def __init__(self, injector: Injector, check: Callable[[], None], tid: Callable[[], int]) -> None:
        self._injector = injector
        self._check = check
        self._tid = tid
        self.inodes: dict[str, int] = {}  #: of each shared region, by its name

    def share(self, size: int, name: str) -> tuple[int, memoryview]:
        """Map `size` bytes of shared memory; gives (target address, writable host view).

        If we are killed in the middle, an empty descriptor may stay behind in the target.

        Raises: AskedWrong (more than there is memory), TargetRefused, Gone, Denied.
        """
        self._check()
        size = (size + _PAGE - 1) & -_PAGE
        text = name.encode()
        if size <= 0 or not text or len(text) > 200 or b"\0" in text:
            raise AskedWrong(f"cannot share {size} bytes as {name[:40]!r}")
        if size > (free := _available()):
            raise AskedWrong(
                f"{size >> 20} MiB of shared memory were asked for, {free >> 20} MiB are free",
                hint="ask for smaller or fewer rings",
            )
        run = self._injector.syscall
        at_name = self._injector.place(text + b"\0")
        fd = run(_NR["memfd_create"], at_name, _MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
        if fd == -errno.EINVAL:  # before Linux 6.3
            fd = run(_NR["memfd_create"], at_name, _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
        if fd < 0:
            raise _refused("memfd_create", fd, size)
        try:
            ours = _open(f"/proc/{self._injector.tid}/fd/{fd}")
            try:
                os.ftruncate(ours, size)
                fcntl.fcntl(ours, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
                view = memoryview(mmap.mmap(ours, size))
                self.inodes[name] = os.fstat(ours).st_ino
            except OSError as error:
                raise TargetRefused(f"cannot share {size} bytes: {error.strerror}") from None
            finally:
                os.close(ours)
            at = run(_NR["mmap"], 0, size, _prot("rw-"), _MAP_SHARED, fd, 0)
            if at < 0:
                raise _refused("mmap", at, size)
        finally:
            run(_NR["close"], fd)
        return at, view

    def reopen(self, name: str) -> tuple[int, memoryview]:
        """Map a region that somebody shared earlier under this name; the target may run.

        The kernel opens a mapped file without a name (map_files) only for CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN;
        others can still read the region as ordinary target memory.

        Raises: AskedWrong (no such region), Denied, Gone.
        """
        tid = self._tid()
        for region in procfs.regions(tid):
            mapping = region.mapping
            if mapping.path == f"/memfd:{name} (deleted)" and mapping.offset == 0:
                ours = _open(f"/proc/{tid}/map_files/{mapping.start:x}-{mapping.end:x}")
                try:
                    return mapping.start, memoryview(mmap.mmap(ours, mapping.size))
                finally:
                    os.close(ours)
        raise AskedWrong(f"process {tid} has no shared region {name!r}")


def _locked_kib(tid: int) -> int:
    """How much memory a process has locked, in KiB."""
    return int(procfs.status(tid).get("VmLck", "0 kB").split()[0])


def _prot(perms: str) -> int:
    if not perms or any(letter not in "rwx-" for letter in perms) or ("w" in perms and "x" in perms):
        raise AskedWrong(f"cannot map memory with permissions {perms!r}", hint='use "r-x", "rw-" or "r--"')
    return sum(_PROT[letter] for letter in set(perms) if letter in _PROT)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise Denied(
            f"not permitted to open {path}",
            hint="run as root (CAP_CHECKPOINT_RESTORE), or read the region as ordinary memory of the process",
        ) from None
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"{path} is gone") from None


def _refused(call: str, result: int, size: int) -> TargetRefused:
    name = errno.errorcode.get(-result, str(-result))
    hints = {
        errno.ENOMEM: "check RLIMIT_AS, vm.max_map_count and vm.overcommit_memory of the target",
        errno.EAGAIN: "the target locks its memory (mlockall): raise RLIMIT_MEMLOCK",
        errno.EMFILE: "the target has no file descriptor left (RLIMIT_NOFILE)",
        errno.EEXIST: "something is mapped there already",
    }
    return TargetRefused(
        f"{call} of {size} bytes in the target failed: {name} ({os.strerror(-result)})", hint=hints.get(-result, "")
    )


def _available() -> int:
    """Bytes of memory that can be had without swapping."""
    for line in itertools.islice(Path("/proc/meminfo").read_text().splitlines(), 8):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise Unsupported("/proc/meminfo has no MemAvailable")
