"""ptrace and what goes with it, thinly: numbers, structures, one function per request. No policy.

Every function here raises OSError with the kernel's errno, and nothing else; what that means for the
user is decided in ``process.py``. All requests must come from the thread (not merely the process)
that seized the tracee: the kernel answers ESRCH to any other.

Sources: ptrace(2); Linux ``include/uapi/linux/ptrace.h``, ``include/uapi/linux/elf.h`` (regset notes),
``arch/x86/include/asm/user_64.h`` (order of user_regs_struct).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Final

POKEDATA: Final = 5
CONT: Final = 7
SINGLESTEP: Final = 9
GETREGS: Final = 12
SETREGS: Final = 13
DETACH: Final = 17
SYSCALL: Final = 24
SETOPTIONS: Final = 0x4200
GETREGSET: Final = 0x4204
SEIZE: Final = 0x4206
INTERRUPT: Final = 0x4207
LISTEN: Final = 0x4208
GETSIGMASK: Final = 0x420A
SETSIGMASK: Final = 0x420B
GET_RSEQ_CONFIGURATION: Final = 0x420F
GET_SYSCALL_USER_DISPATCH_CONFIG: Final = 0x4211

#: report syscall stops as SIGTRAP|0x80. It also makes the death of the tracer harmless there: the kernel
#: would send the stop's own signal number to the thread, and 0x85 is not a valid one.
O_TRACESYSGOOD: Final = 1
O_TRACEEXEC: Final = 1 << 4
O_EXITKILL: Final = 1 << 20
O_SUSPEND_SECCOMP: Final = 1 << 21

EVENT_EXEC: Final = 4
EVENT_STOP: Final = 128

NT_X86_XSTATE: Final = 0x202

WALL: Final = 0x40000000  #: __WALL: wait for threads too
ALL_SIGNALS: Final = 2**64 - 1
WORD: Final = 2**64 - 1

#: user_regs_struct: one u64 each, in this order.
# fmt: off
REGS: Final = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax",
    "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)
# fmt: on
_RegsArray = ctypes.c_uint64 * len(REGS)

_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _RseqConfig(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class _DispatchConfig(ctypes.Structure):
    _fields_ = (
        ("mode", ctypes.c_uint64),
        ("selector", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


@dataclass(frozen=True, slots=True)
class Event:
    """What waitpid said about one thread.

    Args:
        kind: "stop" (PTRACE_EVENT_STOP: halted on request, or in a group stop), "signal" (about to take
            one), "syscall" (at entry or exit), "event" (another PTRACE_EVENT), "gone" (exited, or no
            longer ours).
        signal: signal number of a "signal" or of the group stop a "stop" belongs to (SIGTRAP: none).
        status: the raw wait status; -1 where there is none.
    """

    kind: str
    signal: int = 0
    status: int = -1

    @property
    def event(self) -> int:
        """PTRACE_EVENT number of a "stop" or an "event"."""
        return self.status >> 16


def decode(status: int) -> Event:
    """Give the Event of a raw wait status."""
    if not os.WIFSTOPPED(status):
        return Event("gone", status=status)
    signal, event = (status >> 8) & 0xFF, status >> 16
    if event == EVENT_STOP:
        return Event("stop", signal, status)
    if event:
        return Event("event", signal, status)
    if signal & 0x80:
        return Event("syscall", signal & 0x7F, status)
    return Event("signal", signal, status)


def poll(tid: int) -> Event | None:
    """Give the next Event of a traced thread, or None if nothing happened yet. Never blocks."""
    try:
        pid, status = os.waitpid(tid, os.WNOHANG | WALL)
    except ChildProcessError:
        return Event("gone")
    return decode(status) if pid else None


def request(op: int, tid: int, addr: int = 0, data: int = 0) -> int:
    """Make one ptrace call; every request of this package passes here. Raises OSError."""
    result = int(_ptrace(op, tid, addr, data))
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return result


def seize(tid: int, options: int) -> None:
    """Become the tracer of `tid` without stopping it."""
    request(SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """Ask a seized thread to stop; the stop arrives as an Event."""
    request(INTERRUPT, tid)


def regs(tid: int) -> dict[str, int]:
    """Read the general registers of a stopped thread; unsigned 64-bit values by kernel name."""
    values = _RegsArray()
    request(GETREGS, tid, 0, ctypes.addressof(values))
    return dict(zip(REGS, values, strict=True))


def set_regs(tid: int, regs: dict[str, int]) -> None:
    """Write all general registers of a stopped thread; each name of REGS must be there."""
    values = _RegsArray(*[regs[name] & WORD for name in REGS])
    request(SETREGS, tid, 0, ctypes.addressof(values))


def regset(tid: int, note: int, room: int) -> bytes:
    """Read the register set `note` (an ELF note type), at most `room` bytes."""
    buffer = ctypes.create_string_buffer(room)
    vec = _IoVec(ctypes.addressof(buffer), room)
    request(GETREGSET, tid, note, ctypes.addressof(vec))
    return buffer.raw[: vec.size]


def sigmask(tid: int) -> int:
    """Read the blocked signals of a stopped thread: bit n-1 is signal n.

    In a call that swaps the mask for its duration (ppoll, sigsuspend) this is the mask to come back to.
    """
    mask = ctypes.c_uint64()
    request(GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.value


def set_sigmask(tid: int, mask: int) -> None:
    """Set the blocked signals of a stopped thread; SIGKILL and SIGSTOP are left out by the kernel."""
    value = ctypes.c_uint64(mask)
    request(SETSIGMASK, tid, 8, ctypes.addressof(value))


def rseq_area(tid: int) -> int:
    """Give the address of the thread's struct rseq, or 0: none registered, or a kernel before 5.13."""
    config = _RseqConfig()
    try:
        request(GET_RSEQ_CONFIGURATION, tid, ctypes.sizeof(config), ctypes.addressof(config))
    except OSError:
        return 0
    return int(config.at)


def redirects_syscalls(tid: int) -> bool:
    """Whether the thread has its system calls handed back to user space (prctl PR_SET_SYSCALL_USER_DISPATCH)."""
    config = _DispatchConfig()
    try:
        request(GET_SYSCALL_USER_DISPATCH_CONFIG, tid, ctypes.sizeof(config), ctypes.addressof(config))
    except OSError:  # kernels before 6.4 cannot tell
        return False
    return bool(config.mode)
