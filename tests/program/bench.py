"""An emulated core of each architecture with islands in it: the engine's own code, run without a process.

What is emulated is the machine alone. Programs, slots and islands are what the engine makes; the ring region is one
piece of memory that the core and :class:`fentry.record.ring.Region` share, as target and host do.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import struct
from collections import defaultdict
from dataclasses import dataclass, field, replace

import unicorn
from unicorn import riscv_const, x86_const

from fentry.arch import Arch, ReturnPlane, load
from fentry.engine.census import Site, Verdict
from fentry.engine.island import SlotTable, build, code_size, group, room_for
from fentry.engine.ops import Op
from fentry.image import Function
from fentry.program.context import CONTEXT, COUNTER, NO_KEY, Layout
from fentry.record import layout as ring
from fentry.record.layout import Kind, Policy
from fentry.record.ring import Region, RingInfo
from fentry.target import Module

PAGE = 4096
U64 = (1 << 64) - 1

STOP = 0x5000_0000  #: runs end here
SITES, ISLAND = 0x4000_0000, 0x4100_0000
REGION, CONTEXTS, COUNTS = 0x10_0000_0000, 0x3000_0000, 0x12_0000_0000
CLOCK, THREADS = 0x13_0000_0000, 0x14_0000_0000
STACK_ROOM = 1 << 16  #: bytes of each thread's stack
ROWS = 64


@dataclass(frozen=True)
class Dress:
    """What the bench must know of an instruction set beside its ``Arch``."""

    unicorn: object
    prefix: str
    vectors: tuple[str, ...]  #: floating point and vector registers
    nops: bytes  #: a sled
    ret: bytes
    window: tuple[int, int]  #: stacks that are mirrored
    shadow: int  #: where their shadow begins
    tail_call: str
    kept: frozenset[str]  #: registers that an entry must leave alone
    at_exit: frozenset[str]  #: registers that a hooked return may change


_XMM = tuple(f"xmm{i}" for i in range(16))


def dress(arch: Arch) -> Dress:
    facts = arch.facts
    if arch.name == "x86_64":
        every = frozenset(facts.GENERAL) | set(_XMM)
        return Dress(
            x86_const, "UC_X86_REG_", _XMM, b"\x90" * 5, b"\xc3", arch.dialect.stack_window, 0x2000_0000_0000, "jmp",
            every, frozenset(),
        )  # fmt: skip
    every = frozenset(facts.X[1:]) | set(facts.F)
    return Dress(
        riscv_const, "UC_RISCV_REG_", facts.F, facts.NOP * 2, bytes.fromhex("8280"), (0x6000_0000, 1 << 20),
        0x9_0000_0000, "jump", every - set(facts.SLOT_CLOBBERS), frozenset(facts.EXIT_CLOBBERS) - {"ra"},
    )  # fmt: skip


class Core:
    """Memory that comes into being where it is written, and registers by name."""

    def __init__(self, arch: Arch) -> None:
        self.arch, self.dress = arch, dress(arch)
        facts = arch.facts
        self.uc = unicorn.Uc(getattr(unicorn, facts.UNICORN_ARCH), getattr(unicorn, facts.UNICORN_MODE))
        self._mapped: set[int] = set()
        self.at: dict[int, list] = defaultdict(list)  #: address -> what to call when it is reached
        self.calls: list[int] = []  #: numbers of system calls
        self.pid = self.tid = 100
        if arch.name == "x86_64":
            self.uc.hook_add(unicorn.UC_HOOK_INSN, self._system_call, None, 1, 0, x86_const.UC_X86_INS_SYSCALL)
        else:
            self.uc.reg_write(riscv_const.UC_RISCV_REG_MSTATUS, 0x6000)  # floating point is on
        names = (*facts.GENERAL, *_XMM) if arch.name == "x86_64" else (*facts.X[1:], *facts.F)
        self.names = names
        self.flags = ("eflags",) if arch.name == "x86_64" else ()

    def _system_call(self, uc, _user) -> None:
        number = self["rax"]
        self.calls.append(number)
        by_number = {n: name for name, n in self.arch.dialect.syscalls.items()}
        self["rax"] = {"getpid": self.pid, "gettid": self.tid, "nanosleep": 0}[by_number[number]]
        self["rcx"], self["r11"] = self["rip"], 0x246  # what the instruction destroys
        if by_number[number] == "nanosleep":
            for f in self.at.get(-1, ()):
                f()

    def _id(self, name: str) -> int:
        known = self.arch.facts.UNICORN_REGS.get(name) or self.dress.prefix + name.upper()
        return getattr(self.dress.unicorn, known)

    def __getitem__(self, name: str) -> int:
        return self.uc.reg_read(self._id(name))

    def __setitem__(self, name: str, value: int) -> None:
        self.uc.reg_write(self._id(name), value)

    def registers(self) -> dict[str, int]:
        return {n: self[n] for n in self.names}

    def everything(self) -> dict[str, int]:
        return {n: self[n] for n in (*self.names, *self.flags, self.arch.pc)}

    def restore(self, registers: dict[str, int]) -> None:
        for name, value in registers.items():
            self[name] = value

    def randomise(self, rnd: random.Random) -> None:
        """Fill every register but the stack and thread pointers."""
        for n in self.names:
            if n not in (self.arch.sp, "tp"):
                self[n] = rnd.randrange(1 << (128 if n.startswith("xmm") else 64))

    def map(self, at: int, size: int) -> None:
        for page in range(at & -PAGE, at + size, PAGE):
            if page not in self._mapped:
                self.uc.mem_map(page, PAGE)
                self._mapped.add(page)

    def share(self, at: int, size: int) -> memoryview:
        """Memory that this process sees as well."""
        buffer = mmap.mmap(-1, size)
        view = memoryview(buffer)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        self.uc.mem_map_ptr(at, (size + PAGE - 1) & -PAGE, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE, address)
        return view

    def write(self, at: int, data: bytes) -> None:
        self.map(at, len(data))
        self.uc.mem_write(at, data)

    def read(self, at: int, size: int) -> bytes:
        return bytes(self.uc.mem_read(at, size))

    def word(self, at: int) -> int:
        return struct.unpack("<Q", self.read(at, 8))[0]

    def put(self, at: int, value: int) -> None:
        self.write(at, struct.pack("<Q", value & U64))

    def watch(self, address: int, call) -> None:
        """Call `call` each time before the instruction at `address` runs."""
        self.at[address].append(call)
        self.uc.hook_add(unicorn.UC_HOOK_CODE, lambda *_: [f() for f in self.at[address]], None, address, address)

    def run(self, start: int, until: int = STOP, count: int = 0) -> None:
        self.uc.emu_start(start, until, count=count or 1_000_000)
        if not count:
            assert self[self.arch.pc] == until, f"stopped at {self[self.arch.pc]:#x}"


@dataclass(frozen=True)
class Event:
    """One decoded event."""

    ring: int
    level: int
    kind: Kind
    site: int
    a: int
    stack: int
    extensions: dict[int, int] = field(hash=False, default_factory=dict)


@dataclass
class Thread:
    pointer: int
    top: int  #: stack pointer to start from
    segment: int = 0


class Bench:
    """A core with a ring region, contexts, shadow planes, counters, and functions to be hooked."""

    def __init__(
        self,
        name: str,
        *,
        clock: str = "memory",
        policy: Policy = Policy.DROP,
        nrings: int = 4,
        ring_size: int = 4096,
        sliced: bool = False,
        system_calls: bool = True,
    ) -> None:
        self.arch = load(name)
        self.core = core = Core(self.arch)
        self.dress = core.dress
        self.nrings, self.ring_size, self.clock = nrings, ring_size, clock
        self.region = Region.format(core.share(REGION, ring.region_size(nrings, ring_size)), nrings, ring_size, policy)
        core.map(CONTEXTS, nrings * CONTEXT + PAGE)
        self.empty = (CONTEXTS + nrings * CONTEXT + PAGE - 1) & -PAGE
        core.map(self.empty, PAGE)
        if not self.arch.dialect.segment:
            core.write(CONTEXTS, NO_KEY.to_bytes(8, "little").ljust(CONTEXT, b"\0") * nrings)
        core.map(COUNTS, nrings * ROWS * COUNTER)
        core.map(CLOCK, 8)
        core.map(STOP, PAGE)
        low, size = self.dress.window
        self.plane = ReturnPlane((self.dress.shadow - low) & U64, low, size)
        self.layout = Layout(
            REGION, nrings, ring_size, CONTEXTS, clock, clock_at=CLOCK, shadow=self.plane.off, plane=size,
            counters=COUNTS, sites=ROWS, sliced=sliced, system_calls=system_calls and bool(self.arch.dialect.syscall),
        )  # fmt: skip
        self.sites: list[Site] = []
        self.tables: list[SlotTable] = []
        self.islands: list = []
        self.events_: list[Event] = []
        self._partial: dict[int, list] = defaultdict(list)
        self._threads = 0
        self._next = ISLAND
        self._rows = 0
        self.thread = self.new_thread()

    # -- what there is ---------------------------------------------------------------------------------
    def new_thread(self, *, mirrored: bool = True) -> Thread:
        n = self._threads
        self._threads += 1
        low, size = self.dress.window
        bottom = low + (n + 1) * 2 * STACK_ROOM if mirrored else low - (n + 1) * 2 * STACK_ROOM
        self.core.map(bottom, STACK_ROOM)
        if mirrored:
            for i in range(4):
                self.core.map(bottom + self.plane.off + i * size & U64, STACK_ROOM)
        pointer = THREADS + n * 128  # which a table of contexts tells apart
        self.core.put(pointer, pointer)  # what x86_64 reads at %fs:0
        # a call leaves the stack pointer 8 below a multiple of 16 where it pushes the return address
        return Thread(pointer, bottom + STACK_ROOM // 2 - 8 * self.arch.dialect.return_slot, self.empty)

    def function(self, name: str, body: bytes | None = None, *, form: str = "sled", code: bytes = b"",
                 returns: bool = True) -> Site:  # fmt: skip
        """Place a function: a sled and `body` (which just returns), or `code` without a sled."""
        at = SITES + 0x100 * len(self.sites)
        if form == "entry-jump":
            sled = self.arch.entry_window(code, at, len(code), len(code))
        else:
            sled = self.arch.sled_at(self.dress.nops, "patchable")
            code = sled.idle + (self.dress.ret if body is None else body)
            sled = replace(sled, form=form)
        assert not hasattr(sled, "reason"), sled
        self.core.write(at, code)
        verdict = Verdict(Function(name, at, len(code), "symtab"), "prog", True, sled, at, "", returns)
        site = Site(verdict, Module("prog", "prog", "", 0, SITES, ISLAND, True), at, at)
        self.sites.append(site)
        return site

    def call_then_return(self, to: Site, at: int = 0) -> bytes:
        """Body of the next function: calls `to` and returns."""
        at = at or SITES + 0x100 * len(self.sites) + len(self.dress.nops)
        if self.arch.name == "x86_64":
            call = b"\xe8" + struct.pack("<i", to.at - (at + 4) - 5)
            return bytes.fromhex("4883ec08") + call + bytes.fromhex("4883c408 c3")  # sub rsp, 8; ... add rsp, 8; ret
        from fentry.arch.riscv64 import code

        save = bytes.fromhex("4111 06e4")  # c.addi sp, -16; c.sdsp ra, 8(sp)
        back = bytes.fromhex("a260 4101 8280")  # c.ldsp ra, 8(sp); c.addi sp, 16; ret
        return save + code.call(at + len(save), to.at) + back

    def jump(self, to: Site) -> bytes:
        """Body of the next function: goes on at `to` in its own frame."""
        at = SITES + 0x100 * len(self.sites) + len(self.dress.nops)
        if self.arch.name == "x86_64":
            return b"\xe9" + struct.pack("<i", to.at - at - 5)
        from fentry.arch.riscv64 import code

        return code.jump(at, to.at, "t3")

    def arm(
        self, wanted: list[tuple[Site, tuple[Op, ...]]], *, resume_unwind: int = 0, personality: int = 0
    ) -> list[SlotTable]:
        """Build one island and patch the sites: `wanted` names each site's ops, newest first."""
        returns = any(op.exit for _, ops in wanted for op in ops)
        tables = group(self.arch, wanted, returns=returns, first_row=self._rows)
        self._rows += len(wanted)
        size = room_for(tables, code_size(self.arch, self.layout, tables))
        at, self._next = self._next, self._next + size
        island = build(
            self.arch, self.layout, tables, at, size, plane=self.plane if returns else None,
            personality=personality, resume_unwind=resume_unwind,
        )  # fmt: skip
        self.core.write(at, island.code)
        for t in tables:
            for i, site in enumerate(t.sites):
                self.core.write(site.at, self.arch.arm(site.at, site.sled, t.slot(i), balanced=t.hooked))
        self.tables += tables
        self.islands.append(island)
        return tables

    # -- running -----------------------------------------------------------------------------------------
    def enter(self, thread: Thread, *, below: int = 0) -> None:
        """Become `thread`, about to call something that returns to STOP."""
        core = self.core
        core[self.arch.sp] = thread.top - below
        if self.arch.name == "x86_64":
            core["fs_base"], core["gs_base"] = thread.pointer, thread.segment
            core.put(thread.top - below, STOP)
        else:
            core["tp"], core["ra"] = thread.pointer, STOP

    def leave(self, thread: Thread) -> None:
        if self.arch.name == "x86_64":
            thread.segment = self.core["gs_base"]

    def call(self, site: Site, thread: Thread | None = None, *, seed: int | None = None, below: int = 0) -> None:
        """Call a function; with a seed from random registers, and check that they are kept."""
        thread = thread or self.thread
        if seed is not None:
            self.core.randomise(random.Random(seed))
        self.enter(thread, below=below)
        before = self.core.registers()
        self.core.run(site.at)
        self.leave(thread)
        if seed is not None:
            after = self.core.registers()
            up = 8 if self.arch.name == "x86_64" else 0
            assert after.pop(self.arch.sp) == before.pop(self.arch.sp) + up
            changed = {n for n in after if after[n] != before[n]}
            assert changed <= self.may_change, {n: (hex(before[n]), hex(after[n])) for n in changed - self.may_change}

    @property
    def may_change(self) -> set[str]:
        """Registers that a call of an armed function whose body does nothing may change."""
        hooked = any(t.hooked for t in self.tables)
        return set(self.core.names) - self.dress.kept | (self.dress.at_exit if hooked else set())

    def now(self, value: int) -> None:
        """Set the clock."""
        self.core.put(CLOCK, value)

    # -- what came of it -----------------------------------------------------------------------------------
    def _sink(self, info: RingInfo, data: memoryview) -> None:
        self._partial[info.index] += [(info.level, *w) for w in struct.iter_unpack("<QQ", bytes(data))]

    def events(self, op: Op) -> list[Event]:
        """Drain; give this op's events in the order of rings, then as written. All words must be known marks."""
        return [e for o, e in self.story() if o is op]

    def story(self) -> list[tuple[Op, Event]]:
        """Drain; give all events with the ops they belong to."""
        (self.region.snapshot if self.region.policy is Policy.OVERWRITE else self.region.drain)(self._sink)
        index = {s.at: i for i, s in enumerate(self.sites)}
        meaning = {}
        for o in {o for t in self.tables for o in t.ops}:
            for t in self.tables:
                if o in t.ops:
                    table = t.table(o, index)
                    for i, site in enumerate(table.sites):
                        for offset, kind in table.marks.items():
                            meaning[table.base + i * table.stride + offset] = (o, kind, site)
        out: list[tuple[Op, Event]] = []
        for number in sorted(self._partial):
            for level, a, word in self._partial[number]:
                if word < ring.EXT_LIMIT:
                    extensions = out[-1][1].extensions
                    assert word not in extensions
                    extensions[word] = a
                    continue
                op, kind, site = meaning[word & ring.MARK_MASK]
                out.append((op, Event(number, level, kind, site, a, word >> 48)))
        return out

    def counts(self, site: Site, op: Op, index: int = 0) -> tuple[int, ...]:
        """(hits, total, self, complement of min, max) of one ring's row."""
        for t in self.tables:
            if op in t.ops and site in t.sites:
                at = COUNTS + (index * ROWS + t.row + t.sites.index(site)) * COUNTER
                return struct.unpack("<5Q", self.core.read(at, 40))
        raise AssertionError("no such row")
