"""A target that is nothing but a dictionary of pages: for tests of what the engine does to a target.

It runs nothing. Memory, threads and registers are what a test puts there; every write and every stop is noted in
order, so that a test can ask what came first. It can be told to lie: to change a write, or to fail at one.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fentry.arch import load
from fentry.errors import AskedWrong, Fault, Gone, OutOfReach, Unsupported
from fentry.target import Mapping, Module, Target

_TOP = 1 << 47
_NORESERVE = 0x4000  # MAP_NORESERVE, uapi/asm-generic/mman.h; Python has it since 3.13


@dataclass(slots=True)
class _Memory:
    """One mapping: bytes that may be shared with this process."""

    start: int
    data: memoryview
    perms: str
    path: str = ""

    @property
    def end(self) -> int:
        return self.start + len(self.data)


@dataclass(slots=True)
class Journal:
    """What was done to a fake target, in order."""

    writes: list[tuple[int, bytes]] = field(default_factory=list)
    syncs: list[tuple[int, int]] = field(default_factory=list)


class FakeTarget(Target):
    """Pages and threads in this process's memory.

    Args:
        arch: name of an architecture.
        memory: (address, bytes, protection, name) of what is mapped from the beginning; whole pages after rounding.
            The first executable one is the program itself.
        threads: registers of each thread; those not named are 0.
    """

    kind = "fake"
    pid = 0

    def __init__(
        self,
        arch: str,
        memory: Iterable[tuple[int, bytes, str, str]] = (),
        threads: Iterable[dict[str, int]] = ({},),
    ) -> None:
        self.arch = load(arch).name
        names = load(arch).facts.REGS  # type: ignore[attr-defined]  # each architecture has its table of names
        self._memory: list[_Memory] = []
        self._threads = {1 + i: {**dict.fromkeys(names, 0), **regs} for i, regs in enumerate(threads)}
        self.running = False
        self.done = Journal()
        self.on_write: Callable[[int, bytes], bytes] | None = None  #: may change what is written, or raise
        self._closed = False
        for at, data, perms, path in memory:
            self._add(at, data, perms, path)
        self.allocator = _Allocator(self)
        self.shared = _Shared(self)
        self.code_sync = _Sync(self)

    # -- memory -----------------------------------------------------------------------------------
    def _add(self, at: int, data: bytes, perms: str, path: str, size: int = 0) -> _Memory:
        start = at & -self.page
        end = (at + max(size, len(data)) + self.page - 1) & -self.page
        for m in self._memory:
            if start < m.end and m.start < end:
                raise AskedWrong(f"{start:#x}..{end:#x} is mapped already")
        body = _zeros(end - start)
        body[at - start : at - start + len(data)] = data
        added = _Memory(start, body, perms, path)
        self._memory.append(added)
        self._memory.sort(key=lambda m: m.start)
        return added

    def _parts(self, at: int, size: int, what: str) -> list[tuple[_Memory, int, int]]:
        """(mapping, offset, length) of each part of [at, at + size)."""
        self._check()
        parts = []
        while size > 0:
            m = next((m for m in self._memory if m.start <= at < m.end), None)
            if m is None:
                raise Fault(at, size, what)
            length = min(size, m.end - at)
            parts.append((m, at - m.start, length))
            at, size = at + length, size - length
        return parts

    def read(self, at: int, size: int) -> bytes:
        """Read exactly `size` bytes. Raises Fault, Gone."""
        return b"".join(bytes(m.data[o : o + n]) for m, o, n in self._parts(at, size, "read"))

    def write(self, at: int, data: bytes) -> None:
        """Write and note it. Raises Fault, Gone."""
        parts = self._parts(at, len(data), "write")
        if self.on_write is not None:
            data = self.on_write(at, data)
        if data:
            self.done.writes.append((at, bytes(data)))
        done = 0
        for m, o, n in parts:
            m.data[o : o + n] = data[done : done + n]
            done += n

    # -- threads ----------------------------------------------------------------------------------
    def threads(self) -> list[int]:
        """Thread ids."""
        self._check()
        return list(self._threads)

    def _thread(self, tid: int) -> dict[str, int]:
        self._check()
        if tid not in self._threads:
            raise AskedWrong(f"no thread {tid}")
        return self._threads[tid]

    def regs(self, tid: int) -> dict[str, int]:
        """Registers of a thread."""
        return dict(self._thread(tid))

    def set_regs(self, tid: int, regs: dict[str, int]) -> None:
        """Write the named registers."""
        mine = self._thread(tid)
        unknown = sorted(set(regs) - set(mine))
        if unknown:
            raise AskedWrong(f"no register {unknown[0]}")
        mine.update(regs)

    def resume(self) -> None:
        """Note that it runs; nothing does."""
        self._check()
        self.running = True

    def stop(self) -> None:
        """Note that it is stopped."""
        self._check()
        self.running = False

    def close(self) -> None:
        """Be gone."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise Gone("the fake target was closed")

    # -- what is loaded ---------------------------------------------------------------------------
    def mappings(self) -> list[Mapping]:
        """All mapped ranges in address order."""
        self._check()
        return [Mapping(m.start, m.end, m.perms + "p", 0, m.path) for m in self._memory]

    def modules(self) -> list[Module]:
        """One module for each name that an executable mapping has; the first is the program."""
        self._check()
        names = dict.fromkeys(m.path for m in self._memory if "x" in m.perms and m.path)
        found = []
        for i, name in enumerate(names):
            mine = [m for m in self._memory if m.path == name]
            found.append(Module(name, name, "", 0, mine[0].start, mine[-1].end, main=i == 0))
        return found


def _zeros(size: int) -> memoryview:
    """Memory that costs nothing until it is written: the mirror of a stack is terabytes."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE))


class _Allocator:
    """Maps zeroed pages."""

    def __init__(self, target: FakeTarget) -> None:
        self.target = target

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
        """See :class:`fentry.target.Allocator`."""
        target = self.target
        target._check()
        if "w" in perms and "x" in perms:
            raise Unsupported("memory is never mapped both writable and executable")
        size = (size + target.page - 1) & -target.page
        if at is None:
            low, high = (target.page, _TOP) if near is None else (max(target.page, near - reach), near + reach)
            at = self._hole(size, (low + target.page - 1) & -target.page, high)
            if at < 0:
                raise OutOfReach(near or 0, 0, reach)
        if intend is not None:
            intend(at)
        target._add(at, b"", perms, "", size)
        return at

    def _hole(self, size: int, low: int, high: int) -> int:
        """The lowest room of `size` bytes in [low, high), or -1."""
        for m in self.target._memory:
            if m.end <= low:
                continue
            if low + size <= m.start:
                break
            low = m.end
        return low if low + size <= high else -1

    def unmap(self, at: int, size: int) -> None:
        """Unmap what is mapped in a range, as munmap does; nothing there is fine."""
        target = self.target
        target._check()
        end = at + ((size + target.page - 1) & -target.page)
        left = []
        for m in target._memory:
            if m.start < at:
                left.append(_Memory(m.start, m.data[: at - m.start], m.perms, m.path))
            if m.end > end:
                left.append(_Memory(max(m.start, end), m.data[max(0, end - m.start) :], m.perms, m.path))
        target._memory = [m for m in left if m.data]


class _Shared:
    """Memory that is this process's own, too."""

    def __init__(self, target: FakeTarget) -> None:
        self.target = target

    def share(self, size: int, name: str) -> tuple[int, memoryview]:
        """See :class:`fentry.target.Shared`."""
        at = _Allocator(self.target).map(size, "rw-")
        m = next(m for m in self.target._memory if m.start == at)
        m.path = f"/memfd:{name} (deleted)"
        return at, m.data[:size]


class _Sync:
    """Notes what was synchronised."""

    def __init__(self, target: FakeTarget) -> None:
        self.target = target

    def sync(self, at: int, size: int) -> None:
        """See :class:`fentry.target.CodeSync`."""
        self.target.done.syncs.append((at, size))
