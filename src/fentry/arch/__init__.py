"""Arch: one instruction set, described and never instantiated by name.

An architecture is one folder here with the public name ``ARCH``. It does no I/O, asks no clock and
no host question. The engine asks for a *rung*, never for a name:

===== ========== ===========================================================
rung  name       gives
===== ========== ===========================================================
1     known      images, function lists
2     trapped    kprobe, uprobe, kretprobe
3     sledded    function and graph tracers, many ops
4     direct     direct calls, BPF trampolines
5     movable    entry jump without a sled, optprobe, detour buffer
===== ========== ===========================================================
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cache

from fentry.errors import AskedWrong


class Rung(IntEnum):
    """How far a port has come; each rung includes those below."""

    KNOWN = 1
    TRAPPED = 2
    SLEDDED = 3
    DIRECT = 4
    MOVABLE = 5


@dataclass(frozen=True, slots=True)
class Sled:
    """One kind of function-entry sled; the only place that knows its length.

    ``form`` is a word a person reads in ``fentry list``: "sled", "fentry", "mcount", "entry-jump", ...
    """

    form: str
    size: int  #: bytes that are patched, all of them
    idle: bytes  #: what the bytes are before anyone touches them
    resume: int  #: offset from the start of the patched bytes at which the body goes on
    link: str = ""  #: register (or "stack") that holds the resume address when armed by a call
    moved: bool = False  #: True if `idle` are real instructions that must be executed elsewhere


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a function cannot be hooked by a form; `reason` is shown to people."""

    reason: str


@dataclass(frozen=True, slots=True)
class SlotShape:
    """Which program calls a slot makes, in order. Slots of one shape have one layout.

    Args:
        entry: number of programs called at entry.
        exit: number of programs called at exit; 0 means returns are not hooked.
        form: form of the sled, because the way in and out differs.
    """

    entry: int
    exit: int
    form: str


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Where things are in a slot of one shape; offsets from its start.

    The ``*_marks`` are return addresses of program calls: what a record's word holds.
    """

    stride: int
    entry_marks: tuple[int, ...]
    exit_marks: tuple[int, ...] = ()
    tail_marks: tuple[int, ...] = ()
    plain_marks: tuple[int, ...] = ()
    unwound_marks: tuple[int, ...] = ()
    hook: int = -1  #: offset of the return hook (the address a hooked frame returns to), or -1
    pad: int = -1  #: offset of the landing pad that an unwinder enters, or -1
    call: int = -1  #: offset of the first byte of the instruction that calls the body


@dataclass(frozen=True, slots=True)
class ReturnPlane:
    """The parallel shadow stack (architecture D9): where it is and which stacks it mirrors."""

    off: int  #: shadow slot address = stack slot address + off (mod 2**64)
    low: int  #: lowest stack address that is mirrored
    size: int  #: bytes of stack address space that are mirrored


@dataclass(frozen=True, slots=True)
class UnwindInfo:
    """What call frame information refers to."""

    plane: ReturnPlane | None
    personality: int = 0  #: address of __gcc_personality_v0, or 0


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """One slot to be built: everything an arch needs to emit it."""

    at: int  #: address of the slot
    site: int  #: address of the patched bytes
    sled: Sled
    body: int  #: where the body goes on: the resume address, or the displaced instructions
    entry: tuple[int, ...] = ()  #: addresses of entry programs
    exit: tuple[int, ...] = ()  #: addresses of exit programs
    consts: int = 0  #: address of the return constants (``Arch.return_consts``), if exit
    tail: tuple[int, ...] | None = None  #: entry programs for tail calls, where they differ
    plain: tuple[int, ...] | None = None  #: entry programs for stacks outside the window, where they differ
    plane: ReturnPlane | None = None  #: the shadow stack, if exit
    resume_unwind: int = 0  #: address of _Unwind_Resume, or 0 (no unwinder in the target: no landing pad)
    unwound: tuple[int, ...] = ()  #: programs for frames left by an exception


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the LLVM IR of a Program must know of an instruction set (see ``fentry.program.ir``).

    IR snippets are text; ``{out}`` and ``{in}`` stand for SSA values.
    """

    declares: str  #: declarations and attributes that the snippets need
    thread_pointer: str  #: sets {out} to the i64 thread pointer
    cycles: str  #: sets {out} to the i64 of the cheapest monotonic counter
    segment: int = 0  #: address space whose address 0 is the thread's context, or 0: a table hashed by thread pointer
    segment_register: str = ""  #: name of that segment's base in target.regs()
    thread_register: str = ""  #: name of the thread pointer in target.regs(), where a thread may lack one
    get_segment: str = ""  #: sets {out} to the i64 address of the thread's context
    exit_pair: bool = False  #: an exit program is a C function that is given both return registers and returns them
    set_segment: str = ""  #: makes i64 {in} the thread's context
    real_thread_pointer: str = ""  #: the architectural register, where `thread_pointer` reads memory instead
    #: (low, size) of the addresses where a process of this architecture has its stacks; None: ask the target
    stack_window: tuple[int, int] | None = None
    return_slot: bool = False  #: the return address is on the stack (llvm.addressofreturnaddress works)
    atomic_add: bool = False  #: an atomic add to memory is one cheap instruction, an ordinary one is several
    syscall: str = ""  #: sets {out} to the result of system call i64 {nr} with i64 {a} {b} {c} {d}; native targets only
    syscalls: dict[str, int] = field(default_factory=dict)  #: numbers of those that programs use
    #: where an entry program finds the parent address, by form of the sled ("" = any other form):
    #: "next", "after-resume" or "none", see fentry.program.ir.Parent; slots with return hooks have their own rule
    parent: dict[str, str] = field(default_factory=dict)
    features: str = ""  #: LLVM features that keep registers out of a Program's hands
    clobbers: tuple[str, ...] = ()  #: registers that a Program may destroy


@dataclass(frozen=True, slots=True)
class Displaced:
    """Instructions moved out of a patch window: bytes for their new home, ending in a jump back."""

    code: bytes
    moves: tuple[tuple[int, int], ...] = field(default=())  #: (old pc offset, new pc offset) for threads inside


class Arch(ABC):
    """Facts and verbs of one instruction set. See docs/port-an-arch.md for the ladder."""

    name: str
    aliases: tuple[str, ...] = ()
    rung: Rung
    bits: int
    elf_machine: int
    triple: str  #: LLVM target triple
    cpu: str  #: LLVM cpu
    features: str  #: LLVM features
    pc: str  #: register names in target.regs()
    sp: str
    tp: str
    insn_align: int  #: instructions start at multiples of this
    jump_reach: int  #: how far a patched site may lie from its slot
    dialect: Dialect
    unwinds: bool = False  #: exceptions can pass hooked frames: there is frame information and a landing pad

    # -- rung 1 -----------------------------------------------------------------------------------
    @abstractmethod
    def length(self, code: bytes) -> int:
        """Length in bytes of the instruction at the start of `code`; 0 if it is not one."""

    @abstractmethod
    def disassemble(self, code: bytes, at: int) -> list[tuple[int, bytes, str]]:
        """(address, bytes, text) of each instruction; for display only."""

    # -- rung 3 -----------------------------------------------------------------------------------
    @abstractmethod
    def sled_at(self, code: bytes, hint: str) -> Sled | Refusal | None:
        """Recognise a sled at the start of `code`.

        Args:
            code: up to 32 bytes from where a sled may begin.
            hint: "patchable" (listed in __patchable_function_entries), "mcount" (a recorded or
                relocated call to mcount/fentry), or "scan" (only a guess: be strict).

        Returns: the Sled, a Refusal (there is one, but it cannot be used), or None (no sled).
        """

    @abstractmethod
    def landing_pad(self, code: bytes) -> int:
        """Size of a landing pad (endbr64, bti c, lpad) at the start of `code`, or 0."""

    @abstractmethod
    def arm(self, site: int, sled: Sled, slot: int, *, balanced: bool) -> bytes:
        """Bytes that replace the sled: exactly ``sled.size`` of them.

        Args:
            site: address of the bytes.
            sled: what they are.
            slot: address of the slot.
            balanced: the slot hooks the return (architecture D9), which decides call or jump.

        Raises: OutOfReach.
        """

    @abstractmethod
    def slot_layout(self, shape: SlotShape) -> SlotLayout:
        """Layout of slots of this shape."""

    @abstractmethod
    def slot(self, plan: SlotPlan) -> bytes:
        """Emit one slot, exactly ``slot_layout(...).stride`` bytes."""

    def slots(self, plan: SlotPlan, sites: Sequence[tuple[int, Sled]], bodies: Sequence[int]) -> bytes:
        """Emit a table of slots, one behind the other; an arch may do that faster than one by one.

        Args:
            plan: of the first slot.
            sites: (address, sled) of each; the sleds have one form.
            bodies: where each body goes on.
        """
        stride = self.slot_layout(SlotShape(len(plan.entry), len(plan.exit), plan.sled.form)).stride
        rows = zip(sites, bodies, strict=True)
        return b"".join(
            self.slot(replace(plan, at=plan.at + i * stride, site=at, sled=sled, body=body))
            for i, ((at, sled), body) in enumerate(rows)
        )

    @abstractmethod
    def return_consts(self, plane: ReturnPlane, slots: int, size: int) -> bytes:
        """Constants that slots with return hooks read, placed near them by the engine."""

    def frame_info(self, shape: SlotShape, slots: Sequence[int], at: int, unwind: UnwindInfo) -> bytes:
        """Call frame information for slots, as an ``.eh_frame_hdr`` followed by ``.eh_frame``, to lie at `at`.

        Returns: bytes; empty if unwinders of this architecture need nothing.
        """
        return b""

    # -- rung 5 -----------------------------------------------------------------------------------
    @abstractmethod
    def entry_window(self, code: bytes, at: int, size: int, room: int) -> Sled | Refusal:
        """Plan an entry jump without a sled.

        Args:
            code: the function's bytes, and up to 16 of what follows it.
            at: address of ``code[0]``.
            size: size of the function in bytes.
            room: bytes from ``code[0]`` that belong to this function or to padding after it.
        """

    def plan_entries(
        self,
        text: bytes,
        at: int,
        functions: Sequence[tuple[int, int, int]],
        read: Callable[[int, int], bytes],
    ) -> list[Sled | Refusal]:
        """Plan entry jumps for many functions of one text range.

        Args:
            text: the whole executable range.
            at: its address.
            functions: (address, size, room) as in :meth:`entry_window`.
            read: reads up to `size` bytes of the image at an address (jump tables in read-only data).

        Returns: a plan for each function, in order; the patched bytes begin behind the landing pad.
        """
        plans: list[Sled | Refusal] = []
        for address, size, room in functions:
            code = text[address - at : address - at + max(size, min(room, size + 16))]
            plans.append(self.entry_window(code, address, size, room))
        return plans

    @abstractmethod
    def displace(self, sled: Sled, at: int, to: int, resume: int) -> Displaced:
        """Rewrite ``sled.idle`` (from `at`) to run at `to` and go on at `resume`. Raises Rejected."""

    def frame_size(self, code: bytes) -> int:
        """Bytes of stack that the program beginning with `code` takes at its start.

        Only asked where ``dialect.return_slot`` is False: there a program finds its caller's frame by it.
        """
        raise NotImplementedError

    def saved_pcs(self, stack: bytes) -> list[tuple[int, int]]:
        """(offset, value) of the program counters that signal frames in `stack` will return to.

        Args:
            stack: words of a stack, from the stack pointer upwards.
        """
        return []

    def branch_targets(self, code: bytes, at: int) -> list[tuple[int, int]]:
        """(from, to) of every direct branch or call in straight-line decoded `code`."""
        raise NotImplementedError


@cache
def load(name: str) -> Arch:
    """Give the architecture called `name` (kernel name or alias). Raises AskedWrong."""
    for arch in all_archs():
        if name == arch.name or name in arch.aliases:
            return arch
    known = ", ".join(a.name for a in all_archs())
    raise AskedWrong(f"no architecture {name!r}", hint=f"known: {known}")


@cache
def all_archs() -> tuple[Arch, ...]:
    """Every architecture found in this folder."""
    names = [f"{__name__}.{info.name}" for info in pkgutil.iter_modules(__path__) if info.ispkg]
    return tuple(importlib.import_module(name).ARCH for name in names)


def by_elf_machine(machine: int, bits: int) -> Arch:
    """Give the architecture of an ELF file. Raises AskedWrong."""
    for arch in all_archs():
        if arch.elf_machine == machine and arch.bits == bits:
            return arch
    raise AskedWrong(
        f"ELF machine {machine} ({bits} bit) is not an architecture that fentry knows",
        hint="known: " + ", ".join(a.name for a in all_archs()),
    )
