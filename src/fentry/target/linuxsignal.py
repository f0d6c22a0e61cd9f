# ruff: noqa: D102 - sys_NAME is the system call NAME; section 2 of the manual is its docstring
"""Signals of an emulated Linux program: actions, masks, and the frame a handler runs on.

Only one thread and no timer exist, so a signal comes from the program itself (kill, abort, a broken pipe) or from
what it did (a fault). Frame: ``struct rt_sigframe`` of arch/riscv/kernel/signal.c (6.1), which is
siginfo (128 bytes), then ucontext; see :class:`FrameShape` for what an architecture must say.
"""

from __future__ import annotations

import errno
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass

from fentry.errors import Unsupported
from fentry.target.guestspace import Space

_IGNORED = {17, 18, 23, 28}  #: default action: none (CHLD CONT URG WINCH)
_STOPPING = {19, 20, 21, 22}  #: default action: stop (STOP TSTP TTIN TTOU)
_UNBLOCKABLE = (1 << 8) | (1 << 18)  #: KILL, STOP
_INFO = 128  #: sizeof(siginfo_t)
_SA_SIGINFO, _SA_ONSTACK, _SA_NODEFER, _SA_RESETHAND = 4, 0x08000000, 0x40000000, 0x80000000


class Ended(Exception):
    """The program is over. Fields are those of a Stop.

    Args:
        kind: "exited" or "signalled".
        status: exit status or signal number.
        words: one line for people; empty after an ordinary exit.
    """

    def __init__(self, kind: str, status: int, words: str = "") -> None:
        super().__init__(words)
        self.kind = kind
        self.status = status
        self.words = words


@dataclass(frozen=True, slots=True)
class FrameShape:
    """What an architecture's signal frame looks like; offsets are bytes in ``struct ucontext``.

    Source: arch/*/include/uapi/asm/{ucontext,sigcontext}.h.
    """

    regs: tuple[str, ...]  #: integer registers in frame order, 8 bytes each
    regs_at: int
    fp_regs: tuple[str, ...]  #: emulator's names, 8 bytes each
    fp_at: int
    fp_control: str  #: 4 bytes after them
    size: int  #: sizeof(struct ucontext)
    arguments: tuple[str, str, str]  #: registers of signal number, siginfo and ucontext
    link: str  #: register of the return address
    pc: str
    sp: str
    code: bytes  #: calls rt_sigreturn
    mask_at: int = 40
    stack_at: int = 16


class Signals:
    """Signal state of one thread.

    Args:
        space: its memory.
        shape: what its frame looks like.
        get: reads all integer registers, by name.
        put: writes integer registers.
        get_fp: reads ``shape.fp_regs`` and ``shape.fp_control``, in that order.
        put_fp: writes them.
        trampoline: address of ``shape.code`` in the program.
    """

    def __init__(
        self,
        space: Space,
        shape: FrameShape,
        *,
        get: Callable[[], dict[str, int]],
        put: Callable[[dict[str, int]], None],
        get_fp: Callable[[], list[int]],
        put_fp: Callable[[list[int]], None],
        trampoline: int,
    ) -> None:
        self._space = space
        self._shape = shape
        self._get, self._put, self._get_fp, self._put_fp = get, put, get_fp, put_fp
        self._trampoline = trampoline
        self._actions: dict[int, tuple[int, int, int]] = {}  # handler, flags, mask
        self._mask = 0
        self._pending: dict[int, tuple[int, int]] = {}  # code, address
        self._alternate = (0, 2, 0)  # SS_DISABLE
        self.returned = False  #: rt_sigreturn replaced the registers: the system call has no result

    # -- sending and delivering ---------------------------------------------------------------------
    def send(self, number: int, code: int = -6, address: int = 0) -> None:
        """Make a signal pending. `code` and `address` are siginfo's; -6 is SI_TKILL."""
        self._pending.setdefault(number, (code, address))

    def fault(self, number: int, code: int, address: int, words: str) -> None:
        """Deliver a signal that cannot wait. Raises Ended if nobody handles it."""
        handler = self._actions.get(number, (0, 0, 0))[0]
        if handler in (0, 1) or self._mask >> (number - 1) & 1:
            raise Ended("signalled", number, words)
        self._enter(number, code, address)

    def deliver(self) -> None:
        """Deliver what is pending and not blocked. Raises Ended if that ends the program."""
        for number in sorted(self._pending):
            if self._mask >> (number - 1) & 1:
                continue
            code, address = self._pending.pop(number)
            handler = self._actions.get(number, (0, 0, 0))[0]
            if handler == 0 and number in _STOPPING:
                raise Unsupported(f"the program stops itself with signal {number}, and nobody could continue it")
            if handler == 1 or (handler == 0 and number in _IGNORED):
                continue
            if handler == 0:
                raise Ended("signalled", number, f"signal {number} ({_name(number)}) was sent by the program itself")
            self._enter(number, code, address)

    def _enter(self, number: int, code: int, address: int) -> None:
        shape = self._shape
        handler, flags, mask = self._actions[number]
        regs = self._get()
        stack, stack_flags, stack_size = self._alternate
        top = regs[shape.sp]
        on_it = not stack_flags & 2 and stack <= top - 1 < stack + stack_size
        if flags & _SA_ONSTACK and not stack_flags & 2 and not on_it:
            top = stack + stack_size
        frame = top - _INFO - shape.size & -16
        info = struct.pack("<iiiiQ", number, 0, code, 0, address if code > 0 else 0)
        context = bytearray(shape.size)
        struct.pack_into("<QiiQ", context, shape.stack_at, stack, stack_flags | int(on_it), 0, stack_size)
        struct.pack_into("<Q", context, shape.mask_at, self._mask)
        struct.pack_into(f"<{len(shape.regs)}Q", context, shape.regs_at, *(regs[name] for name in shape.regs))
        *fp, control = self._get_fp()
        struct.pack_into(f"<{len(fp)}QI", context, shape.fp_at, *fp, control)
        region = self._space.at(frame)
        if region is None or "w" not in region.perms or self._space.covered(frame, top - frame) < top - frame:
            raise Ended("signalled", 11, f"no stack is left for the handler of signal {number} at {frame:#x}")
        self._space.write(frame, info.ljust(_INFO, b"\0") + bytes(context))
        self._mask |= mask | (0 if flags & _SA_NODEFER else 1 << (number - 1))
        self._mask &= ~_UNBLOCKABLE
        if flags & _SA_RESETHAND:
            self._actions.pop(number)
        first, second, third = shape.arguments
        self._put(
            {
                first: number,
                second: frame,
                third: frame + _INFO,
                shape.link: self._trampoline,
                shape.sp: frame,
                shape.pc: handler,
            }
        )

    # -- system calls -------------------------------------------------------------------------------
    def sys_rt_sigreturn(self, *_: int) -> int:
        shape = self._shape
        at = self._get()[shape.sp] + _INFO
        context = self._space.read(at, shape.size)
        (self._mask,) = struct.unpack_from("<Q", context, shape.mask_at)
        self._mask &= ~_UNBLOCKABLE
        values = struct.unpack_from(f"<{len(shape.regs)}Q", context, shape.regs_at)
        self._put(dict(zip(shape.regs, values, strict=True)))
        self._put_fp(list(struct.unpack_from(f"<{len(shape.fp_regs)}QI", context, shape.fp_at)))
        self.returned = True
        return 0

    def sys_rt_sigaction(self, number: int, new: int, old: int, size: int, *_: int) -> int:
        if not 1 <= number <= 64 or size != 8 or (new and number in (9, 19)):
            raise OSError(errno.EINVAL, "bad signal")
        before = self._actions.get(number, (0, 0, 0))
        if new:
            handler, flags, mask = struct.unpack("<QQQ", self._space.read(new, 24))
            self._actions[number] = (handler, flags, mask)
        if old:
            self._space.write(old, struct.pack("<QQQ", *before))
        return 0

    def sys_rt_sigprocmask(self, how: int, new: int, old: int, size: int, *_: int) -> int:
        if size != 8 or (new and how > 2):
            raise OSError(errno.EINVAL, "bad mask")
        before = self._mask
        if new:
            (bits,) = struct.unpack("<Q", self._space.read(new, 8))
            self._mask = (before | bits, before & ~bits, bits)[how] & ~_UNBLOCKABLE
        if old:
            self._space.write(old, struct.pack("<Q", before))
        return 0

    def sys_sigaltstack(self, new: int, old: int, *_: int) -> int:
        before = self._alternate
        if new:
            at, flags, size = struct.unpack("<QixxxxQ", self._space.read(new, 24))
            if flags & ~(2 | 1 << 31):
                raise OSError(errno.EINVAL, "bad flags")
            if not flags & 2 and size < 2048:  # MINSIGSTKSZ
                raise OSError(errno.ENOMEM, "too small")
            self._alternate = (at, flags, size)
        if old:
            self._space.write(old, struct.pack("<QiiQ", before[0], before[1], 0, before[2]))
        return 0


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"
