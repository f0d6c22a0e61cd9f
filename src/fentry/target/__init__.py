"""Target: where code runs. Memory, registers, threads, run control; it knows no tracing.

A target is one file in this folder (``process.py``, ``unicorn.py``, ...) with a subclass of
:class:`Target`. The base is eight verbs. Everything else is an *ability*: an attribute that is
an object or None, so that "has it" and "how it works" cannot disagree. Ask with
:func:`need` at arm time, never at hit time.

Addresses are target virtual addresses; sizes are bytes; register names are those of the
architecture's ``facts.py`` (kernel names: ``rip rsp ...``, ``pc sp ra ...``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fentry.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapped range, as in /proc/PID/maps."""

    start: int
    end: int
    perms: str  #: "r-xp" as the kernel prints it
    offset: int  #: file offset of ``start``
    path: str  #: file path, "[heap]"..., or "" for anonymous

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Module:
    """One loaded image: where its file is and how far it was moved.

    ``bias`` is what must be added to a link-time address of the image to get a target address.
    """

    name: str  #: base name, e.g. "libc.so.6"; "[vdso]" for the vdso
    path: str  #: as the target names it
    file: str  #: a path that this host can open (through the target's root), or "" if none
    bias: int
    start: int  #: lowest mapped address
    end: int  #: one past the highest mapped address
    main: bool = False  #: the program itself


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a target that was running is not running now."""

    kind: str  #: "exited" | "signalled" | "stopped" | "trap"
    status: int = 0  #: exit status, or the signal number
    tid: int = 0
    pc: int = 0


class Readable(Protocol):
    """What can be looked at: every Target, and a process that is not stopped."""

    def read(self, at: int, size: int) -> bytes:
        """Read exactly `size` bytes. Raises Fault, Gone."""

    def mappings(self) -> list[Mapping]:
        """All mapped ranges in address order."""


class Allocator(Protocol):
    """Ability: map and unmap memory in the target."""

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
        """Map zeroed private memory.

        Args:
            size: bytes, rounded up to pages.
            perms: "r-x", "rw-" or "r--"; never both w and x.
            near: an address the whole range must lie within ``reach`` of.
            reach: bytes; used with ``near``.
            at: exactly here, or fail.
            name: "wipeonfork" (a forked child sees zeros), "noreserve" (sparse, not dumped,
                no huge pages) or "".
            intend: told the address before anything is mapped there, so that it can be noted; told another if
                that one was taken meanwhile.

        Raises:
            OutOfReach: no hole near enough. Unsupported: the target cannot map.
        """

    def unmap(self, at: int, size: int) -> None:
        """Unmap a range that ``map`` or ``share`` returned."""


class Shared(Protocol):
    """Ability: memory that this process and the target both see at once."""

    def share(self, size: int, name: str) -> tuple[int, memoryview]:
        """Map `size` bytes of shared memory; gives (target address, writable host view)."""


class CodeSync(Protocol):
    """Ability: make written code seen by every hart or core."""

    def sync(self, at: int, size: int) -> None:
        """Discard stale instructions in [at, at+size)."""


class Stepper(Protocol):
    """Ability: execute exactly one instruction of one thread while all others stay stopped."""

    def step(self, tid: int) -> None:
        """Step `tid` once. Raises Gone if it exits."""


class Target(ABC):
    """Where code runs.

    Life: created stopped; ``resume`` lets it run, ``stop`` halts every thread; ``close`` lets go
    of it for good (a process runs on unless this object started it and ``kill`` was asked for).
    """

    arch: str  #: kernel name of the instruction set, e.g. "riscv64"
    kind: str  #: "process", "unicorn", ...
    pid: int  #: process id, or 0
    page: int = 4096
    sliced: bool = False  #: runs only inside wait(on_slice=...): rings are drained between slices, not beside it
    system_calls: bool = False  #: code that the tracer puts there may make (native) system calls
    clock_at: int = 0  #: address of a u64 that holds the target's virtual time, or 0

    allocator: Allocator | None = None
    shared: Shared | None = None
    code_sync: CodeSync | None = None
    stepper: Stepper | None = None

    @abstractmethod
    def read(self, at: int, size: int) -> bytes:
        """Read exactly `size` bytes. Raises Fault, Gone."""

    @abstractmethod
    def write(self, at: int, data: bytes) -> None:
        """Write `data`, through page protection (code included). Raises Fault, Gone."""

    @abstractmethod
    def threads(self) -> list[int]:
        """Thread ids, the first one first."""

    @abstractmethod
    def regs(self, tid: int) -> dict[str, int]:
        """Registers of a stopped thread, by name."""

    @abstractmethod
    def set_regs(self, tid: int, regs: dict[str, int]) -> None:
        """Write the named registers of a stopped thread; others stay."""

    @abstractmethod
    def resume(self) -> None:
        """Let every thread run. Does not wait."""

    @abstractmethod
    def stop(self) -> None:
        """Stop every thread. Idempotent. Raises Gone."""

    def touched(self, start: int, end: int) -> list[tuple[int, int]]:
        """Page ranges inside [start, end) that were ever written; a target that cannot tell gives all of it."""
        return [(start, end)] if start < end else []

    @property
    def clock(self) -> int:
        """Virtual time now, where ``clock_at`` tells it to the program; else 0."""
        return 0

    def relatives(self, name: str) -> list[Target]:
        """Other running targets that inherited the region shared as `name` (forked children), stopped."""
        return []

    def forbids(self, numbers: Iterable[int]) -> str:
        """Why code that the tracer puts there may not make all of these (native) system calls, or ""; stopped."""
        return ""

    def set_arena(self, *ranges: tuple[int, int]) -> None:  # noqa: B027 - a target without such a clock ignores it
        """Tell which [start, end) ranges hold the tracer's code; a target with a virtual clock keeps it apart."""

    @abstractmethod
    def close(self) -> None:
        """Let go. Idempotent, never raises for a target that is gone."""

    # -- what is loaded -------------------------------------------------------------------------
    @abstractmethod
    def mappings(self) -> list[Mapping]:
        """All mapped ranges in address order."""

    @abstractmethod
    def modules(self) -> list[Module]:
        """Loaded images, the program itself first."""


T = TypeVar("T")


def need(ability: T | None, what: str, *, target: Target) -> T:
    """Give the ability or refuse, at arm time.

    Raises: Unsupported naming what is missing and on which target.
    """
    if ability is None:
        raise Unsupported(f"a {target.kind} target has no {what}", hint="fentry doctor lists what each target can do")
    return ability
