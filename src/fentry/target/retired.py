"""A virtual clock for an emulated machine: instructions retired, counted by native code.

The emulator calls a function before each instruction. A function in Python would cost a microsecond; this
one is compiled for the host and adds about 2 ns, which makes a program run 1.7 times slower than with no
hook at all (42 M instructions: 0.12 s without, 0.21 s with; the emulator's own ``count`` costs the same).

Instructions inside the *arena* (what a tracer put there) are counted apart as ``overhead``, so that time
spent in the tracer is not part of any duration. Both counters lie in a page that the guest can read:

    offset 0   clock     instructions of the program itself, plus time it slept
    offset 8   overhead  instructions in the arena

The same module holds the hooks for traps and bad memory accesses: they only note what happened, so
that no Python runs (and no Ctrl-C can arrive) in the middle of an instruction.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

import llvmlite.binding as llvm
from unicorn import Uc, UcError, unicorn_const
from unicorn.unicorn_py3.unicorn import uclib

from fentry.errors import AskedWrong
from fentry.target.guestspace import host_address

CLOCK, OVERHEAD = 0, 8  #: offsets in the page
MAX_RANGES = 64  #: arena ranges

# Words of the state block, in the order in which the code below numbers them.
_PAGE, _LEFT, _STOP, _TRAP, _ACCESS, _ADDRESS, _SIZE, _RANGES, _FIRST = range(9)

# The callback types of unicorn.h 2.1: uc_cb_hookcode_t, uc_cb_hookintr_t, uc_cb_eventmem_t.
_HOOKS = """
define void @instruction(ptr %uc, i64 %at, i32 signext %size, ptr %s) {
entry:
  %left.p = getelementptr i64, ptr %s, i64 1
  %left = load i64, ptr %left.p
  %spent = icmp eq i64 %left, 0
  br i1 %spent, label %halt, label %count
halt:
  %stop.p = getelementptr i64, ptr %s, i64 2
  %stop = load ptr, ptr %stop.p
  %r = call i32 %stop(ptr %uc)
  ret void
count:
  %fewer = sub i64 %left, 1
  store i64 %fewer, ptr %left.p
  %page = load ptr, ptr %s
  %n.p = getelementptr i64, ptr %s, i64 7
  %n = load i64, ptr %n.p
  br label %next
next:
  %i = phi i64 [ 0, %count ], [ %i1, %other ]
  %more = icmp ult i64 %i, %n
  br i1 %more, label %range, label %bump
range:
  %k = shl i64 %i, 1
  %lo.i = add i64 %k, 8
  %hi.i = add i64 %k, 9
  %lo.p = getelementptr i64, ptr %s, i64 %lo.i
  %hi.p = getelementptr i64, ptr %s, i64 %hi.i
  %lo = load i64, ptr %lo.p
  %len = load i64, ptr %hi.p
  %d = sub i64 %at, %lo
  %in = icmp ult i64 %d, %len
  br i1 %in, label %bump, label %other
other:
  %i1 = add i64 %i, 1
  br label %next
bump:
  %which = phi i64 [ 0, %next ], [ 1, %range ]
  %c.p = getelementptr i64, ptr %page, i64 %which
  %c = load i64, ptr %c.p
  %c1 = add i64 %c, 1
  store i64 %c1, ptr %c.p
  ret void
}
define void @trap(ptr %uc, i32 signext %number, ptr %s) {
  %t.p = getelementptr i64, ptr %s, i64 3
  %n = zext i32 %number to i64
  %n1 = add i64 %n, 1
  store i64 %n1, ptr %t.p
  %stop.p = getelementptr i64, ptr %s, i64 2
  %stop = load ptr, ptr %stop.p
  %r = call i32 %stop(ptr %uc)
  ret void
}
define zeroext i1 @access(ptr %uc, i32 signext %type, i64 %at, i32 signext %size, i64 %value, ptr %s) {
  %a.p = getelementptr i64, ptr %s, i64 4
  %t = zext i32 %type to i64
  store i64 %t, ptr %a.p
  %d.p = getelementptr i64, ptr %s, i64 5
  store i64 %at, ptr %d.p
  %z.p = getelementptr i64, ptr %s, i64 6
  %z = zext i32 %size to i64
  store i64 %z, ptr %z.p
  ret i1 false
}
"""


@cache
def _compiled() -> tuple[llvm.ExecutionEngine, dict[str, int]]:
    """Compile the hooks for this host, once per process: (engine that owns the code, addresses)."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(_HOOKS)
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(opt=3)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine, {name: engine.get_function_address(name) for name in ("instruction", "trap", "access")}


class Retired:
    """Counters and notes of one machine.

    Args:
        uc: the machine; the hooks are added to it.
    """

    def __init__(self, uc: Uc) -> None:
        self.page: mmap.mmap = mmap.mmap(-1, mmap.PAGESIZE)
        self._counters = (ctypes.c_uint64 * 2).from_buffer(self.page)
        self._state = (ctypes.c_uint64 * (_FIRST + 2 * MAX_RANGES))()
        self._state[_PAGE] = host_address(self.page)
        self._state[_STOP] = ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value or 0
        self._ranges: list[tuple[int, int]] = []
        _, code = _compiled()
        for kind, name in (
            (unicorn_const.UC_HOOK_CODE, "instruction"),
            (unicorn_const.UC_HOOK_INTR, "trap"),
            (unicorn_const.UC_HOOK_MEM_INVALID, "access"),
        ):
            handle = ctypes.c_size_t()
            # begin > end means: everywhere (unicorn.h, uc_hook_add)
            status = uclib.uc_hook_add(
                uc._uch,
                ctypes.byref(handle),
                kind,
                code[name],
                ctypes.addressof(self._state),
                ctypes.c_uint64(1),
                ctypes.c_uint64(0),
            )
            if status:
                raise UcError(status)

    @property
    def clock(self) -> int:
        """Virtual nanoseconds: the program's own instructions, and what it slept."""
        return self._counters[0]

    @clock.setter
    def clock(self, value: int) -> None:
        self._counters[0] = value

    @property
    def overhead(self) -> int:
        """Instructions retired inside the arena."""
        return self._counters[1]

    @property
    def left(self) -> int:
        """Instructions until the machine stops by itself, of either kind."""
        return self._state[_LEFT]

    @left.setter
    def left(self, value: int) -> None:
        self._state[_LEFT] = value

    def ranges(self) -> list[tuple[int, int]]:
        """The arena, as (low, high) ranges."""
        return list(self._ranges)

    def set_ranges(self, ranges: list[tuple[int, int]]) -> None:
        """Make [low, high) of each range the arena. Raises AskedWrong beyond MAX_RANGES."""
        if len(ranges) > MAX_RANGES:
            raise AskedWrong(f"an arena of {len(ranges)} ranges", hint=f"at most {MAX_RANGES}; join neighbours")
        self._state[_RANGES] = 0
        for i, (low, high) in enumerate(ranges):
            if not 0 <= low <= high < 1 << 64:
                raise AskedWrong(f"arena range {low:#x}..{high:#x}")
            self._state[_FIRST + 2 * i], self._state[_FIRST + 2 * i + 1] = low, high - low
        self._state[_RANGES] = len(ranges)
        self._ranges = list(ranges)

    def clear(self) -> None:
        """Forget the last trap and the last bad access."""
        self._state[_TRAP] = self._state[_ACCESS] = 0

    @property
    def trap(self) -> int | None:
        """Number of the trap that stopped the machine, or None."""
        return self._state[_TRAP] - 1 if self._state[_TRAP] else None

    @property
    def access(self) -> tuple[int, int, int] | None:
        """(UC_MEM_* type, address, size) of the access that failed, or None."""
        s = self._state
        return (s[_ACCESS], s[_ADDRESS], s[_SIZE]) if s[_ACCESS] else None

    def take_back(self, pc: int) -> None:
        """Uncount the instruction at `pc`: it was begun, and trapped."""
        inside = any(low <= pc < high for low, high in self._ranges)
        self._counters[1 if inside else 0] -= 1
