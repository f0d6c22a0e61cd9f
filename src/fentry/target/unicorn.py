"""An emulated machine as a target: bare-metal programs and static Linux programs, in this process.

:func:`load` reads an ELF file and gives a stopped :class:`UnicornTarget`. Memory is host memory
(``guestspace.py``), time is instructions retired (``retired.py``), system calls are those of ``linuxabi.py``.
Everything is deterministic: same program, same input, same clock.

Facts of the emulator, checked with 2.1.4, that this file is built on:

* A trap stops with pc *four* past the instruction, whatever its length; a breakpoint or an illegal length stops at it.
* Privilege and floating point are ours to switch on: it starts in the highest mode with floating point off, and
  applies machine-mode control registers only when written in machine mode.
* ``uc_mem_write`` does not drop translated code, nor does a write to the host memory behind a page: that takes
  ``uc_ctl_remove_cache``, which also drops blocks that only contain the bytes (2 us).
* ``uc_emu_stop`` from the per-instruction hook stops *before* that instruction, exactly.
* The cycle and instret counters are those of this host, and reading them cannot be trapped: a program that reads
  them is not deterministic. The time register traps, and reads as the virtual clock here.
* Unmapping costs 60 ns per page of the region, touched or not.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from unicorn import Uc, UcError, unicorn_const

from fentry.errors import AskedWrong, BadImage, EngineBug, Fault, Gone, OutOfReach, Unsupported
from fentry.target import Mapping as MappedRange
from fentry.target import Module, Stop, Target
from fentry.target.baremetal import Board
from fentry.target.guestspace import Space
from fentry.target.linuxabi import LinuxAbi, Program
from fentry.target.linuxfiles import Stream, uninterrupted
from fentry.target.linuxmemory import MMAP_TOP, TASK_SIZE
from fentry.target.linuxsignal import Ended, Signals
from fentry.target.machine import Machine, machine_for
from fentry.target.programfile import ProgramFile, read_program
from fentry.target.retired import CLOCK, OVERHEAD, Retired

SLICE = 20_000_000
"""Instructions between two looks at the host (about 0.1 s): how late a Ctrl-C or a drain may come."""

_PIE_BASE = TASK_SIZE // 3 * 2 & -(1 << 20)  # ELF_ET_DYN_BASE, arch/riscv/include/asm/elf.h
_NOWHERE = (1 << 64) - 16  # an address that no program counter has: emu_start wants an end
_SIGILL, _SIGTRAP, _SIGBUS, _SIGSEGV = 4, 5, 7, 11
_ILLEGAL = 2  # trap number of an illegal instruction: privileged ISA, table of mcause


def _pages(size: int) -> int:
    return -(-size // 4096) * 4096


class UnicornTarget(Target):
    """A program in an emulated machine of one hart. Made by :func:`load`.

    ``wait`` runs it; ``resume`` only says that it may run. Registers are those of ``regs(1)``: integer registers
    and the program counter.
    """

    kind = "unicorn"
    pid = 0
    sliced = True

    def __init__(self, machine: Machine) -> None:
        self.arch = machine.name
        self.words = ""  #: one line on how the program ended; empty after an ordinary exit
        self._machine = machine
        self._open: Uc | None = Uc(machine.arch, machine.mode)
        self._space = Space(self._open, low=0x10000, high=TASK_SIZE)
        self._retired = Retired(self._open)
        self._modules: list[Module] = []
        self.clock_at = 0  #: where the program can read ``clock`` (8 bytes)
        self.overhead_at = 0  #: and ``overhead``
        self._given: list[tuple[int, int]] = []  # what the abilities mapped
        self._running = False
        self._halt = False
        self._end: Stop | None = None
        self._trapped: tuple[int, int] | None = None  # (pc, instructions so far) of the last breakpoint
        self._slept = 0
        self._last_trap = -1  # instructions so far, at the last trap into a board's handler
        self._linux: LinuxAbi | None = None
        self._board: Board | None = None
        self.allocator = _Allocator(self)
        self.shared = _Shared(self)
        self.code_sync = _CodeSync(self)
        self.stepper = _Stepper(self)

    def __enter__(self) -> UnicornTarget:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _uc(self) -> Uc:
        if self._open is None:
            raise Gone("this target was closed")
        return self._open

    # -- time -------------------------------------------------------------------------------------
    @property
    def retired(self) -> int:
        """Instructions that the program itself has retired; system calls and sleep are free."""
        return self._retired.clock - (self._linux.slept if self._linux else self._slept)

    @property
    def overhead(self) -> int:
        """Instructions retired inside the arena."""
        return self._retired.overhead

    @property
    def clock(self) -> int:
        """Virtual time in nanoseconds: ``retired``, and what the program slept."""
        return self._retired.clock

    def set_arena(self, *ranges: tuple[int, int]) -> None:
        """Count instructions in these [low, high) ranges as ``overhead`` instead of as the program's."""
        self._retired.set_ranges(list(ranges))

    # -- memory -----------------------------------------------------------------------------------
    def read(self, at: int, size: int) -> bytes:
        """Read exactly `size` bytes. Raises Fault, Gone. Works after the program ended, too."""
        _ = self._uc
        return self._space.read(at, size)

    def write(self, at: int, data: bytes) -> None:
        """Write `data`, through page protection. Raises Fault, Gone. Code must be synchronised after it."""
        _ = self._uc
        self._space.write(at, data)

    def mappings(self) -> list[MappedRange]:
        """All mapped ranges in address order; devices are named "[uart]" and the like."""
        _ = self._uc
        return self._space.mappings()

    def modules(self) -> list[Module]:
        """The program: it is linked statically, so there is nothing else."""
        _ = self._uc
        return list(self._modules)

    # -- registers --------------------------------------------------------------------------------
    def threads(self) -> list[int]:
        """One hart, number 1; none after the end."""
        _ = self._uc
        return [] if self._end else [1]

    def regs(self, tid: int) -> dict[str, int]:
        """Registers by name. Works after the program ended, too."""
        self._only(tid)
        numbers = self._machine.regs
        return dict(zip(numbers, self._uc.reg_read_batch(list(numbers.values())), strict=True))

    def set_regs(self, tid: int, regs: dict[str, int]) -> None:
        """Write the named registers. Raises AskedWrong for a name or a value that does not exist; then none is."""
        self._only(tid)
        numbers = self._machine.regs
        for name, value in regs.items():
            if name not in numbers:
                raise AskedWrong(f"{self.arch} has no register {name!r} to write", hint=" ".join(numbers))
            if not 0 <= value < 1 << 64:
                raise AskedWrong(f"{value:#x} does not fit register {name}")
        self._trapped = None
        for name, value in regs.items():
            self._uc.reg_write(numbers[name], value)

    def _only(self, tid: int) -> None:
        _ = self._uc
        if tid != 1:
            raise AskedWrong(f"no thread {tid}", hint="the only one is 1")

    # -- start --------------------------------------------------------------------------------------
    def _load_segments(self, image: ProgramFile, bias: int, ram: int) -> None:
        """Map the segments page by page with the union of their flags, and `ram` bytes of board RAM around them."""
        page = self.page
        board = (self._machine.board_base, self._machine.board_base + _pages(ram)) if ram else (0, 0)
        spans = [
            (s.start + bias & -page, _pages(s.end + bias), _pages(s.start + bias + len(s.data)), s)
            for s in image.segments
        ]
        edges = sorted({edge for span in spans for edge in span[:3]} | set(board))
        for start, end in pairwise(edges):
            over = [s for low, high, _, s in spans if low <= start < high]
            in_board = board[0] <= start < board[1]
            if not over and not in_board:
                continue
            if start < self._space.low or end > self._space.high:
                raise BadImage(image.path, f"wants memory at {start:#x}, outside the machine's address space")
            # Free RAM of a board is what it is on the board: writable and executable.
            perms = "".join(max(s.perms[i] for s in over) for i in range(3)) if over else "rwx"
            file = next((s for low, _, data_end, s in spans if low <= start < data_end and s.data), None)
            offset = start - (file.start + bias & -page) + (file.offset & -page) if file else 0
            name = image.path if file else "" if over else "[ram]"
            self._space.map(start, end - start, perms, path=name, offset=offset)
        for s in image.segments:
            self._space.write(s.start + bias, s.data)
        low, high = min(span[0] for span in spans), max(span[1] for span in spans)
        name = os.path.basename(image.path)  # noqa: PTH119 - Module holds strings
        self._modules = [Module(name, image.path, image.path, bias, low, high, main=True)]

    def _start_linux(self, program: Program, streams: tuple[Stream, Stream, Stream], ram: int, epoch: int) -> None:
        machine, uc = self._machine, self._uc
        shape = machine.frame
        trampoline = MMAP_TOP
        self._space.map(trampoline, self.page, "r-x", path="[sigreturn]")
        self._space.write(trampoline, shape.code)
        fp = (*machine.fp_regs, machine.fp_control)

        def put_fp(values: list[int]) -> None:
            for number, value in zip(fp, values, strict=True):
                self._uc.reg_write(number, value)

        signals = Signals(
            self._space,
            shape,
            get=lambda: self.regs(1),
            put=lambda values: self.set_regs(1, values),
            get_fp=lambda: [int(self._uc.reg_read(number)) for number in fp],
            put_fp=put_fp,
            trampoline=trampoline,
        )
        self._linux = LinuxAbi(self._space, self._retired, signals, program, streams, ram=ram, epoch=epoch)
        sp = self._linux.start()
        for number, value in machine.start_linux:
            uc.reg_write(number, value)
        self.set_regs(1, {machine.sp: sp, machine.pc: program.entry})

    def _start_bare(self, image: ProgramFile, stdin: Stream, stdout: Stream) -> None:
        machine, uc = self._machine, self._uc
        self._board = Board(uc, self._space, machine.traps, stdin, stdout)
        for number, value in machine.start_bare:
            uc.reg_write(number, value)
        top = max((r.end for r in self._space if r.path == "[ram]"), default=0)
        self.set_regs(1, {machine.sp: top, machine.pc: image.entry})

    def _start_clock(self) -> None:
        """Map the page of the clocks where the program can read it."""
        page = self.page
        at = self._place(page)
        self._space.map(at, page, "r--", path="[clock]", host=self._retired.page)
        self.clock_at = at + CLOCK
        self.overhead_at = at + OVERHEAD

    def _place(self, size: int, *, near: int | None = None, reach: int = 0, at: int | None = None) -> int:
        """Find room for `size` bytes; keeps out of the heap's way while there is room elsewhere."""
        _ = self._uc
        if size <= 0:
            raise AskedWrong(f"a mapping of {size} bytes")
        if at is not None:
            return at
        size = _pages(size)
        heap = (self._linux.memory.keep_free(),) if self._linux else ()
        if near is None:
            return self._space.hole(size, top=MMAP_TOP, avoid=heap)
        try:
            return self._space.hole(size, near=near, reach=reach, avoid=heap)
        except OutOfReach:
            return self._space.hole(size, near=near, reach=reach)

    # -- run control ------------------------------------------------------------------------------
    def resume(self) -> None:
        """Let the program run at the next ``wait``. Raises Gone after its end."""
        self._alive()
        self._running = True

    def stop(self) -> None:
        """Stop the program; from ``on_slice`` this ends the ``wait`` under way. Raises Gone after its end."""
        self._alive()
        self._running = False
        self._halt = True

    def close(self) -> None:
        """Let go of the machine, its memory and its files. Shared views stay valid."""
        if self._open is None:
            return
        self._running = False
        if self._linux:
            self._slept = self._linux.slept
            self._linux.close()
        if self._board:
            self._board.close(self._open)
        # The machine goes before the memory that it looks at.
        space, self._space = self._space, Space(None, low=0, high=0)
        self._linux = self._board = self._open = None
        space.release()

    def wait(
        self, budget: int | None = None, *, on_slice: Callable[[], None] | None = None, every: int = SLICE
    ) -> Stop:
        """Run until something happens.

        Args:
            budget: stop after this many instructions, exactly, tracer's included.
            on_slice: called after each `every` instructions and once after the last; it may read, write, and stop.
            every: instructions.

        Returns: why it stopped: "exited", "signalled" (then ``words`` says what happened), "trap" (a breakpoint
            instruction at pc; resuming there without a change kills the program with SIGTRAP, as no tracer did
            anything) or "stopped" (budget spent, or ``stop`` was called).
        Raises: Unsupported for what is not emulated, with the program stopped before it. KeyboardInterrupt leaves the
            program stopped between two instructions; ``resume`` and ``wait`` go on. AskedWrong if not resumed.
        """
        if self._end:
            return self._end
        self._alive()
        if not self._running:
            raise AskedWrong("the target is stopped; waiting would take for ever", hint="resume it first")
        if every <= 0 or (budget is not None and budget < 0):
            raise AskedWrong("a slice or budget of no instructions")
        self._halt = False
        try:
            while True:
                slice_size = every if budget is None else min(every, budget)
                self._retired.left = slice_size
                stop = self._run_slice() if slice_size else None
                if budget is not None:
                    budget -= slice_size - self._retired.left
                if on_slice:
                    on_slice()
                if stop is not None:
                    return stop
                if self._halt or budget == 0:
                    return Stop("stopped", 0, 1, self._pc())
        finally:
            self._running = False

    def run(self, budget: int | None = None, *, on_slice: Callable[[], None] | None = None) -> Stop:
        """Resume and wait."""
        self.resume()
        return self.wait(budget, on_slice=on_slice)

    def _alive(self) -> None:
        _ = self._uc
        if self._end:
            status = self._end.status << 8 if self._end.kind == "exited" else self._end.status
            raise Gone(f"the program has {self._end.kind} ({self._end.status})", status=status)

    def _pc(self) -> int:
        return int(self._uc.reg_read(self._machine.regs[self._machine.pc]))

    def _set_pc(self, pc: int) -> None:
        self._uc.reg_write(self._machine.regs[self._machine.pc], pc)

    def _run_slice(self) -> Stop | None:
        """Run until the slice is used up (None) or there is something to tell.

        A trap stays noted until it was dealt with, so that a Ctrl-C between the two loses nothing.
        """
        retired = self._retired
        try:
            while True:
                stop = None
                if retired.trap is not None:
                    stop = self._settle(None)
                elif not retired.left:
                    return None
                else:
                    error = self._emulate()
                    if self._board:
                        self._board.flush()
                        if self._board.ended:
                            raise self._board.ended
                    if error is not None:
                        stop = self._settle(error)
                    elif retired.trap is None and retired.left:
                        raise Ended("signalled", 6, f"waits for an interrupt at {self._pc():#x}, and none will come")
                if stop is not None:
                    return stop
        except Ended as end:
            self.words = end.words
            self._end = Stop(end.kind, end.status, 1, self._pc())
            return self._end

    def _emulate(self) -> UcError | None:
        """Run until a hook stops it. Gives the emulator's error, if that is why."""
        self._retired.clear()
        try:
            self._uc.emu_start(self._pc(), _NOWHERE)
        except UcError as e:
            return e
        return None

    def _settle(self, error: UcError | None) -> Stop | None:
        """Deal with the trap or the error that ended the last run. Gives a Stop if it is a breakpoint."""
        machine, retired = self._machine, self._retired
        trap = retired.trap
        pc = self._pc() - (machine.trap_skew if trap is not None else 0)
        if trap in machine.call_traps:
            if self._linux:
                self._call(self._linux, pc)
            else:
                retired.clear()
                self._set_pc(pc)
                cause = 8 + (self._board.privilege(self._uc) if self._board else 0)
                self._die(_SIGILL, 1, pc, cause, f"system call at {pc:#x} on a bare machine with no trap vector")
            return None
        access = retired.access
        invalid = error is not None and error.errno == unicorn_const.UC_ERR_INSN_INVALID
        retired.clear()
        self._set_pc(pc)
        if access is not None:
            self._bad_access(access, pc)
        elif invalid and self._at_breakpoint(pc):
            retired.take_back(pc)
            progress = retired.clock + retired.overhead
            if self._trapped != (pc, progress):
                self._trapped = (pc, progress)
                return Stop("trap", _SIGTRAP, 1, pc)
            self._die(_SIGTRAP, 1, pc, 3, f"breakpoint instruction at {pc:#x}")
        elif invalid or trap == _ILLEGAL:
            if not self._read_time(pc):
                retired.take_back(pc)
                self._die(_SIGILL, 1, pc, _ILLEGAL, f"illegal instruction at {pc:#x}")
        elif trap is not None:
            retired.take_back(pc)
            self._die(_SIGBUS, 1, pc, trap, f"misaligned access (trap {trap}) at {pc:#x}")
        else:
            raise EngineBug(f"the emulator stopped at {pc:#x}: {error}")
        return None

    def _call(self, linux: LinuxAbi, pc: int) -> None:
        """Do the system call at `pc`; the program counter is past it already unless it ends the program.

        A Ctrl-C waits until it is done, except while input is awaited: then it is done again later.
        """
        machine, retired = self._machine, self._retired
        with uninterrupted():
            regs = self.regs(1)
            linux.signals.returned = False
            try:
                result = linux.call(regs[machine.call], tuple(regs[name] for name in machine.arguments), pc)
            except (Ended, Unsupported):
                retired.clear()
                self._set_pc(pc)
                raise
            if not linux.signals.returned:
                self.set_regs(1, {machine.arguments[0]: result})
            retired.clear()
            linux.signals.deliver()

    def _bad_access(self, access: tuple[int, int, int], pc: int) -> None:
        kind, address, size = access
        c = unicorn_const
        if kind in (c.UC_MEM_FETCH_UNMAPPED, c.UC_MEM_FETCH_PROT):
            what, cause = "fetch", 1
        else:
            self._retired.take_back(pc)  # a fetch that fails begins no instruction
            write = kind in (c.UC_MEM_WRITE_UNMAPPED, c.UC_MEM_WRITE_PROT)
            what, cause = ("store", 7) if write else ("load", 5)
        mapped = self._space.at(address) is not None
        why = "the page does not allow it" if mapped else "nothing is mapped there"
        words = f"{what} of {size} bytes at {address:#x} from {pc:#x}: {why}"
        self._die(_SIGSEGV, 2 if mapped else 1, address, cause, words)

    def _at_breakpoint(self, pc: int) -> bool:
        try:
            return any(self._space.read(pc, len(code)) == code for code in self._machine.breakpoints)
        except Fault:
            return False

    def _read_time(self, pc: int) -> bool:
        """Emulate an instruction that reads the time register. Gives False if it is not one."""
        mask, value, shift = self._machine.time_read
        # counted already by the hook: it retires here
        try:
            (word,) = struct.unpack("<I", self._space.read(pc, 4))
        except Fault:
            return False
        if word & mask & ~(0x1F << shift) != value:
            return False
        number = word >> shift & 0x1F
        if number:
            self._uc.reg_write(self._machine.numbered + number, self._retired.clock)
        self._set_pc(pc + 4)
        return True

    def _die(self, signal: int, code: int, address: int, cause: int, words: str) -> None:
        """Deliver a fault: to a handler, to the board's trap vector, or as the end (Ended)."""
        if self._linux:
            self._linux.signals.fault(signal, code, address, words)
            return
        progress = self._retired.clock + self._retired.overhead
        if self._last_trap == progress:
            raise Ended("signalled", signal, f"{words}; the trap handler itself traps at once")
        self._last_trap = progress
        if not (self._board and self._board.enter_trap(self._uc, self._set_pc, self._pc(), cause, address)):
            raise Ended("signalled", signal, words)


# -- abilities ------------------------------------------------------------------------------------


class _Allocator:
    """Memory in the emulated address space, backed lazily by this host."""

    def __init__(self, target: UnicornTarget) -> None:
        self._target = target

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
        """Map zeroed private memory, as the contract says; every mapping here is sparse, and nothing forks.

        Raises: OutOfReach, AskedWrong (taken, or w and x at once), Unsupported (no hole, or too large).
        """
        if "w" in perms and "x" in perms:
            raise AskedWrong(f"memory that is both writable and executable ({perms}) is never mapped")
        if name not in ("", "noreserve", "wipeonfork"):
            raise AskedWrong(f"no kind of memory is called {name!r}", hint="noreserve, wipeonfork")
        space = self._target._space
        at = self._target._place(size, near=near, reach=reach, at=at)
        if intend is not None:
            intend(at)
        space.map(at, _pages(size), perms)
        self._target._given.append((at, at + _pages(size)))
        return at

    def unmap(self, at: int, size: int) -> None:
        """Unmap what ``map`` or ``share`` returned, or whole pages of it. Raises AskedWrong for anything else."""
        target = self._target
        _ = target._uc
        end = at + _pages(size)
        for i, (low, high) in enumerate(target._given):
            if low <= at < end <= high:
                target._space.unmap(at, end - at)
                target._given[i : i + 1] = [part for part in ((low, at), (end, high)) if part[0] < part[1]]
                return
        raise AskedWrong(f"{at:#x}, {size:#x} bytes were not mapped by this allocator")


class _Shared:
    """Memory that this process and the program both see: one host buffer, mapped by pointer."""

    def __init__(self, target: UnicornTarget) -> None:
        self._target = target

    def share(self, size: int, name: str) -> tuple[int, memoryview]:
        """Map shared memory; the view stays valid after the target is closed."""
        target = self._target
        at = target._place(size)
        host = target._space.map(at, _pages(size), "rw-", path=f"[{name}]")
        target._given.append((at, at + _pages(size)))
        return at, memoryview(host)[:size]


class _CodeSync:
    """Drop translations of code that was written."""

    def __init__(self, target: UnicornTarget) -> None:
        self._target = target

    def sync(self, at: int, size: int) -> None:
        """Drop every translated block that holds a byte of [at, at+size). Raises Fault if it is not mapped."""
        if size > 0:
            if self._target._space.covered(at, size) < size:
                raise Fault(at, size, "synchronise")
            self._target._uc.ctl_remove_cache(at, at + size)


class _Stepper:
    """Exactly one instruction at a time."""

    def __init__(self, target: UnicornTarget) -> None:
        self._target = target

    def step(self, tid: int) -> None:
        """Execute one instruction; a system call is one. Raises Gone if the program ends by it."""
        target = self._target
        target._only(tid)
        target.resume()
        stop = target.wait(1)
        if stop.kind in ("exited", "signalled"):
            target._alive()


# -- loading --------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str],
    argv: Sequence[str | bytes] = (),
    env: Mapping[str, str] | Sequence[str] = (),
    *,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    ram: int | None = None,
    arch: str | None = None,
    abi: str = "auto",
    epoch: int = 1_600_000_000,
) -> UnicornTarget:
    """Load a program into a fresh machine, stopped at its first instruction.

    Args:
        path: a statically linked ELF executable (fixed or position independent).
        argv: the whole argument vector, its first word included; ``(path,)`` if empty.
        env: environment, as a mapping or as "NAME=VALUE" words; empty if not given.
        stdin: where descriptor 0 (or the serial port) reads: None is this process's own, a number is a
            descriptor, bytes are the input itself, or an object with ``read(size)``.
        stdout: where descriptor 1 writes: None, a descriptor, or an object with ``write(data)``.
        stderr: the same for descriptor 2.
        ram: bytes of RAM of a bare board (128 MiB if not given), or the bytes that a Linux program may
            map, its stack and image not counted (1 GiB).
        arch: refuse anything but this instruction set, by kernel name.
        abi: "linux", "bare", or "auto": bare if the file is ET_EXEC, begins at or above the address where RAM
            begins on a board, and no note says that it is a Linux program (NT_GNU_ABI_TAG).
        epoch: time of day at instruction 0, in seconds, for Linux programs.

    Raises: BadImage, AskedWrong (another architecture, a bad argument), Unsupported (dynamically linked).
    """
    name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - paths in Module and maps are strings
    image = read_program(name)
    machine = machine_for(image.machine, image.bits)
    if machine is None:
        raise AskedWrong(f"{name}: ELF machine {image.machine} ({image.bits} bit) is not emulated here")
    if arch is not None and arch != machine.name:
        raise AskedWrong(f"{name} is a {machine.name} program, and {arch} was asked for")
    if abi not in ("auto", "linux", "bare"):
        raise AskedWrong(f"abi {abi!r}", hint="auto, linux, bare")
    if abi == "auto":
        bare = image.fixed and not image.for_linux and image.entry >= machine.board_base
        abi = "bare" if bare else "linux"
    if image.interpreter:
        raise Unsupported(
            f"{name} is dynamically linked (its loader is {image.interpreter})",
            hint="link it with -static, or trace it under an emulator with a GDB stub",
        )
    if ram is not None and ram <= 0:
        raise AskedWrong(f"{ram} bytes of RAM")
    target = UnicornTarget(machine)
    try:
        bias = 0 if image.fixed else _PIE_BASE
        target._load_segments(image, bias, (ram or 128 << 20) if abi == "bare" else 0)
        if abi == "bare":
            target._start_bare(image, stdin, stdout)
        else:
            words = [f"{k}={v}" for k, v in env.items()] if isinstance(env, Mapping) else env
            program = Program(
                path=name,
                entry=image.entry + bias,
                headers=image.headers + bias if image.headers else 0,
                header_count=image.header_count,
                end=max(s.end for s in image.segments) + bias,
                machine=machine.name,
                hwcap=machine.hwcap,
                argv=[os.fsencode(word) for word in argv or (os.fsdecode(path),)],
                env=[os.fsencode(word) for word in words],
            )
            if any(b"\0" in word for word in (*program.argv, *program.env)):
                raise AskedWrong("an argument or environment word contains a zero byte")
            target._start_linux(program, (stdin, stdout, stderr), ram or 1 << 30, epoch)
        target._start_clock()
    except BaseException:
        target.close()
        raise
    return target
