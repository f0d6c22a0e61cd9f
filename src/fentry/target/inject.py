"""Making a stopped thread of another process run system calls for us, safely even if we die in the middle.

A tracer may be killed between any two requests; the kernel then lets its tracees run. So the thread is
never in a state from which running on would be wrong. Before its registers are touched, a complete signal
frame is put below its stack, as if it had been interrupted by a signal at the point it is really at::

    higher     | thread's own stack                  <- rsp as it was
               | 128 bytes red zone
               | extended FP state, 64-byte aligned
               | place for strings
               | siginfo (zero)
               | ucontext: registers, signal mask
               | restorer                            <- rsp while a call is injected
    lower      | free

and the call starts at an existing ``syscall; ret``. Left alone, the thread makes the (harmless) call, returns
into an existing restorer (``mov $15, %eax; syscall``: rt_sigreturn), and the kernel reloads everything from the
frame: general registers, FP and vector state, signal mask. While we live we see both stops of the call, take
the result, and at the end put the registers back ourselves, from a stop in the kernel's signal code, so that
an interrupted system call restarts by the kernel's own rules.

Order that keeps this true: frame, registers, then the signal mask (all blocked, so that no handler runs in
between); and back: mask, registers, then the bytes below the stack. What differs if we are killed in between:
a call that was interrupted starts again with its whole timeout (rt_sigreturn voids the kernel's restart block),
and what the injected call itself did stays done.

Sources: Linux ``arch/x86/include/uapi/asm/sigcontext.h`` (frame, FP magic), ``arch/x86/kernel/signal_64.c``
(rt_sigreturn), ``arch/x86/kernel/fpu/signal.c`` (checks of the FP state), ``kernel/signal.c`` restore_altstack
(an impossible flag leaves the alternate stack as it is), ``include/uapi/linux/rseq.h``; SDM volume 1, 13.4-13.5
(standard XSAVE layout, CPUID leaf 0DH).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import signal
import struct
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from typing import Final

from fentry.errors import Denied, EngineBug, Fault, Gone, TargetRefused, TraceError, Unsupported
from fentry.target import halt, procfs, ptrace
from fentry.target.memory import Memory
from fentry.target.procfs import Region
from fentry.target.ptrace import Event

_SYSCALL_RET: Final = bytes.fromhex("0f05c3")
_RESTORERS: Final = (bytes.fromhex("48c7c00f0000000f05"), bytes.fromhex("b80f0000000f05"))
_PADDING: Final = 32  #: bytes of zeros taken at the end of a code mapping if it has no such code
_USER_CS: Final = 0x33  #: __USER_CS: the thread runs 64-bit code
_FLAGS: Final = 0x202  #: eflags while a call is injected: interrupts on, no trap, forward
_NO_SYSCALL: Final = ptrace.WORD  #: orig_rax -1: nothing to restart
_RESTARTS: Final = frozenset(-code & ptrace.WORD for code in (512, 513, 514, 516))  # include/linux/errno.h

_NR_RESTART_SYSCALL: Final = 219
_RED_ZONE: Final = 128  # System V psABI 3.2.2
_FRAME: Final = 440  #: return address 8, ucontext 304, siginfo 128
_STRINGS: Final = 256
_UC_FLAGS: Final = 0x7  #: UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
_BAD_ALTSTACK: Final = 0x7F  #: ss_flags that sigaltstack refuses
_XSTATE_ROOM: Final = 1 << 16
_XSTATE_MAGIC1, _XSTATE_MAGIC2 = 0x46505853, 0x46505845
_XSTATE_LEGACY: Final = 576  #: FXSAVE area and XSAVE header
_SW_RESERVED: Final = 464  #: where in the FXSAVE area the kernel looks for the magic

_SYNCHRONOUS: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS)


@dataclass(frozen=True, slots=True)
class _Gadgets:
    call: int  #: address of ``syscall; ret``
    back: int  #: address of the restorer
    restorer: bytes


@dataclass(slots=True)
class _Session:
    """One thread set up for injected calls."""

    tid: int
    gadgets: _Gadgets
    regs: dict[str, int]  #: to put back
    mask: int
    frame: int
    strings: int
    below: bytes  #: what was where the frame is
    padding: tuple[int, bytes] | None = None  #: code bytes borrowed, to be put back
    parked: bool = True  #: still in a stop of the kernel's signal code


class Injector:
    """Runs system calls in one of the stopped threads of a process.

    The thread is chosen and set up at the first call and kept so until :meth:`finish`, which must come before
    the threads are let go.

    Args:
        memory: the process's memory.
        held: stopped threads, kept up to date by the owner.
    """

    def __init__(self, memory: Memory, held: Dict[int, Event]) -> None:
        self._memory = memory
        self._held = held
        self._gadgets: _Gadgets | None = None
        self._session: _Session | None = None

    @property
    def tid(self) -> int:
        """The thread that is set up now, or 0."""
        return self._session.tid if self._session else 0

    def syscall(self, nr: int, *args: int) -> int:
        """Run one system call; gives its result, a negative errno included.

        It must be one that neither blocks nor changes registers, signals or threads.

        Raises: Gone, Denied (seccomp), TargetRefused (no thread is fit for it).
        """
        session = self._session or self._begin()
        regs = self._parked_regs(session)
        regs |= dict(zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), args, strict=False))
        regs |= {"rax": nr, "rip": session.gadgets.call, "rsp": session.frame}
        try:
            ptrace.set_regs(session.tid, regs)
            session.parked = False
            self._run_to_syscall_stop(session)
            self._run_to_syscall_stop(session)
            after = ptrace.regs(session.tid)
        except ProcessLookupError:
            raise self._gone(session) from None
        if after["rip"] != session.gadgets.call + 2:
            raise EngineBug(f"thread {session.tid} is at {after['rip']:#x} after an injected system call {nr}")
        result = after["rax"]
        return result - 2**64 if result >= 2**63 else result

    def place(self, text: bytes) -> int:
        """Put a short string where injected calls can read it; gives its address.

        It stays until the next string or the end of the session.
        """
        if len(text) > _STRINGS:
            raise EngineBug(f"a string of {len(text)} bytes for an injected call; at most {_STRINGS}")
        session = self._session or self._begin()
        self._memory.write(session.strings, text)
        return session.strings

    def finish(self) -> None:
        """Put the thread back exactly as it was. Idempotent. Raises Gone."""
        session = self._session
        if session is None:
            return
        try:
            if not session.parked:
                ptrace.interrupt(session.tid)
                ptrace.request(ptrace.CONT, session.tid)
                event = halt.settle(session.tid)
                if event.kind == "gone":
                    raise self._gone(session)
                session.parked = True
            ptrace.set_sigmask(session.tid, session.mask)
            ptrace.set_regs(session.tid, session.regs)
        except ProcessLookupError:
            raise self._gone(session) from None
        self._session = None
        self._memory.write(session.frame, session.below)
        if session.padding:
            self._memory.write(*session.padding)

    def forget(self) -> None:
        """Drop the thread that was set up: the process is being killed."""
        self._session = None

    # -- a call -----------------------------------------------------------------------------------
    def _run_to_syscall_stop(self, session: _Session) -> None:
        forward = 0
        while True:
            ptrace.request(ptrace.SYSCALL, session.tid, 0, forward)
            try:
                event = halt.await_event(session.tid, "run an injected system call")
            except TargetRefused:
                self._session = None  # out of our hands: when it gets on, it restores itself from its frame
                raise
            if event.kind == "syscall":
                return
            if event.kind == "gone":
                raise self._gone(session)
            forward = event.signal if event.kind == "signal" else 0
            if forward in _SYNCHRONOUS:
                raise EngineBug(f"signal {forward} in thread {session.tid} at an injected system call")

    def _gone(self, session: _Session) -> Gone:
        self._session = None
        return Gone(f"thread {session.tid} was killed while a system call was injected into it")

    @staticmethod
    def _parked_regs(session: _Session) -> dict[str, int]:
        """Registers that lead nowhere but back: the thread would run rt_sigreturn at once."""
        return session.regs | {
            "rip": session.gadgets.back,
            "rsp": session.frame + 8,
            "orig_rax": _NO_SYSCALL,
            "eflags": _FLAGS,
        }

    # -- setting up -------------------------------------------------------------------------------
    def _begin(self) -> _Session:
        if not self._held:
            raise EngineBug("a system call was to be injected into a process that is not stopped")
        regions = procfs.regions(next(iter(self._held)))
        tid, regs = self._choose(regions)
        xstate = _xstate_image(tid)
        fp, strings, frame = _places(regs["rsp"], len(xstate))
        below = self._memory.read(frame, fp + len(xstate) - frame)
        padding = None
        gadgets = self._gadgets if self._gadgets and self._still_there(self._gadgets) else self._find(regions)
        if gadgets:
            self._gadgets = gadgets
        else:
            gadgets, padding = self._borrow(regions)
        mask = ptrace.sigmask(tid)
        regs = self._left_rseq(tid, regs)
        image = bytearray(len(below))
        # the last resort: restart_syscall, which ends with EINTR if we are killed
        restarted = self._restarted(regs) or regs | {"rip": regs["rip"] - 2, "rax": _NR_RESTART_SYSCALL}
        image[:_FRAME] = _frame(restarted, mask, fp, gadgets.back)
        image[fp - frame :] = xstate
        session = _Session(tid, gadgets, regs, mask, frame, strings, below, padding)
        self._memory.write(frame, bytes(image))
        try:
            ptrace.set_regs(tid, self._parked_regs(session))
            ptrace.set_sigmask(tid, ptrace.ALL_SIGNALS)
        except ProcessLookupError:
            raise self._gone(session) from None
        self._session = session
        return session

    def _choose(self, regions: list[Region]) -> tuple[int, dict[str, int]]:
        """The thread that is best fit, and its registers; says of each one why not if none is."""
        second: tuple[int, dict[str, int]] | None = None
        refusals: list[TraceError] = []
        for tid in list(self._held):
            try:
                regs = ptrace.regs(tid)
                allowed = _may_call(tid)
            except (ProcessLookupError, Gone):
                continue
            if regs["cs"] != _USER_CS:
                refusals.append(Unsupported(f"thread {tid} runs 32-bit code"))
            elif allowed:
                refusals.append(allowed)
            elif not (home := _home(regs["rsp"], _places(regs["rsp"], len(_xstate_image(tid)))[2], regions)):
                refusals.append(TargetRefused(f"thread {tid} has too little stack left at {regs['rsp']:#x}"))
            elif home == "stack" and self._restarted(regs) is not None:
                return tid, regs
            else:
                second = second or (tid, regs)
        if second:
            return second
        if refusals:
            raise refusals[0]
        raise Gone("every thread of the process was killed")

    def _left_rseq(self, tid: int, regs: dict[str, int]) -> dict[str, int]:
        """Registers as the kernel would leave them after preempting the thread: out of a restartable sequence.

        Running the thread elsewhere makes the kernel forget the sequence, so we abort it as it would have.
        """
        area = ptrace.rseq_area(tid)
        if not area:
            return regs
        try:
            (current,) = struct.unpack("<Q", self._memory.read(area + 8, 8))
            if not current:
                return regs
            _, _, start, size, abort = struct.unpack("<IIQQQ", self._memory.read(current, 32))
        except Fault:
            return regs
        return regs | {"rip": abort} if 0 <= regs["rip"] - start < size else regs

    def _restarted(self, regs: dict[str, int]) -> dict[str, int] | None:
        """Registers with which an interrupted system call starts again, as arch_do_signal_or_restart would set them.

        A call with a timeout that is interrupted for the second time shows as restart_syscall, which needs what
        rt_sigreturn throws away. Then the true number is read from the ``mov $number, %eax; syscall`` it came from.

        Returns: None if that is not there.
        """
        if regs["orig_rax"] >= 2**63 or regs["rax"] not in _RESTARTS:
            return regs
        again = regs | {"rip": regs["rip"] - 2, "rax": regs["orig_rax"]}
        if regs["orig_rax"] != _NR_RESTART_SYSCALL:
            return again
        code = self._memory.read(regs["rip"] - 7, 7)
        if code[:1] + code[5:] != b"\xb8\x0f\x05":
            return None
        return again | {"rax": int.from_bytes(code[1:5], "little")}

    # -- code to run ------------------------------------------------------------------------------
    def _still_there(self, gadgets: _Gadgets) -> bool:
        try:
            return (
                self._memory.read(gadgets.call, 3) == _SYSCALL_RET
                and self._memory.read(gadgets.back, len(gadgets.restorer)) == gadgets.restorer
            )
        except Fault:
            return False

    def _find(self, regions: list[Region]) -> _Gadgets | None:
        call = back = 0
        found = b""
        for region in regions:
            mapping = region.mapping
            if not _stable_code(region):
                continue
            try:
                code = self._memory.read(mapping.start, mapping.size)
            except Fault:
                continue
            if not call and (offset := code.find(_SYSCALL_RET)) >= 0:
                call = mapping.start + offset
            for restorer in _RESTORERS:
                if not back and (offset := code.find(restorer)) >= 0:
                    back, found = mapping.start + offset, restorer
            if call and back:
                return _Gadgets(call, back, found)
        return None

    def _borrow(self, regions: list[Region]) -> tuple[_Gadgets, tuple[int, bytes]]:
        """Put the code into unused zeros behind a program's own; gives also what must be written back."""
        code = _SYSCALL_RET + b"\xcc" + _RESTORERS[0]
        for region in regions:
            at = region.mapping.end - _PADDING
            if not _stable_code(region) or not region.inode:
                continue
            try:
                old = self._memory.read(at, _PADDING)
                if any(old):
                    continue
                self._memory.write(at, code)
            except Fault:
                continue
            return _Gadgets(at, at + 4, _RESTORERS[0]), (at, old[: len(code)])
        raise Unsupported(
            "no code in the process makes a system call that could be borrowed, and no room for it was found",
            hint="report the program: this was not met yet",
        )


def _stable_code(region: Region) -> bool:
    """Code that stays what it is: of a file or the vdso, not written by the program itself."""
    mapping = region.mapping
    return mapping.perms.startswith("r-x") and (region.inode != 0 or mapping.path == "[vdso]")


def _may_call(tid: int) -> TraceError | None:
    """Whether a system call of this thread would be an ordinary one, or why not. Raises Gone."""
    facts = procfs.status(tid)
    if facts.get("Seccomp", "0") != "0" and not _suspend_seccomp(tid):
        return Denied(
            f"thread {tid} is under a seccomp filter, which could kill it for the calls that mapping memory needs",
            hint="run as root (CAP_SYS_ADMIN can suspend the filter meanwhile), or start the program under fentry",
        )
    if "shstk" in facts.get("x86_Thread_features", "").split():
        return Unsupported(
            f"thread {tid} has a hardware shadow stack, which a restored frame would not agree with",
            hint="start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        )
    if ptrace.redirects_syscalls(tid):
        return Unsupported(f"thread {tid} handles its own system calls (syscall user dispatch)")
    return None


def _suspend_seccomp(tid: int) -> bool:
    """Suspend the filter of a stopped thread until it is let go; False if that is not permitted."""
    try:
        ptrace.request(ptrace.SETOPTIONS, tid, 0, ptrace.O_TRACESYSGOOD | ptrace.O_SUSPEND_SECCOMP)
    except PermissionError:
        return False
    except OSError as error:
        if error.errno == errno.EINVAL:  # a kernel without CONFIG_CHECKPOINT_RESTORE
            return False
        raise
    return True


def _places(sp: int, xstate: int) -> tuple[int, int, int]:
    """Where things go below `sp`: FP state of `xstate` bytes, strings, frame (the lowest)."""
    fp = (sp - _RED_ZONE - xstate) & -64  # XRSTOR wants 64
    strings = fp - _STRINGS
    return fp, strings, (strings - _FRAME) & -16


def _home(sp: int, bottom: int, regions: list[Region]) -> str:
    """What `sp` points into: "stack" (of the first thread, or a thread's own), "memory", or "" (no room to `bottom`).

    Anything else than a stack may hold somebody's data below `sp`, such as a coroutine's neighbour. The bytes
    are put back in either case, so it matters only if we are killed meanwhile.
    """
    for index, region in enumerate(regions):
        mapping = region.mapping
        if not mapping.start <= sp < mapping.end:
            continue
        if not mapping.perms.startswith("rw") or bottom < mapping.start:
            return ""
        guarded = index > 0 and regions[index - 1].mapping.perms.startswith("---")
        guarded = guarded and regions[index - 1].mapping.end == mapping.start and not region.inode
        return "stack" if guarded or mapping.path == "[stack]" else "memory"
    return ""


# -- the frame --------------------------------------------------------------------------------------
def _frame(regs: dict[str, int], mask: int, fp: int, restorer: int) -> bytes:
    """Build struct rt_sigframe: what rt_sigreturn makes of it is exactly `regs` and `mask`."""
    general = "r8 r9 r10 r11 r12 r13 r14 r15 rdi rsi rbp rbx rdx rax rcx rsp rip eflags".split()  # noqa: SIM905  # a list of 18 quoted names is harder to compare with struct sigcontext
    return b"".join(
        (
            struct.pack("<QQQ", restorer, _UC_FLAGS, 0),
            struct.pack("<QiIQ", 0, _BAD_ALTSTACK, 0, 0),
            struct.pack("<18Q", *(regs[name] for name in general)),
            struct.pack("<4H", regs["cs"], regs["gs"] & 0xFFFF, regs["fs"] & 0xFFFF, regs["ss"]),
            struct.pack("<4Q", 0, 0, 0, 0),
            struct.pack("<Q64x", fp),
            struct.pack("<Q", mask),
            bytes(128),
        )
    )


def _xstate_image(tid: int) -> bytes:
    """The thread's FP and vector state, in the form that a signal frame has: with magic and end mark.

    It ends with the last component in use: a larger size than the thread's own would be taken for damage.
    """
    raw = ptrace.regset(tid, ptrace.NT_X86_XSTATE, _XSTATE_ROOM)
    (used,) = struct.unpack_from("<Q", raw, 512)  # XSTATE_BV
    parts = _xstate_parts()
    size = max([_XSTATE_LEGACY, *(sum(parts.get(bit, (0, 0))) for bit in range(2, 63) if used >> bit & 1)])
    if size > len(raw):
        raise EngineBug(f"FP state of {len(raw)} bytes where components {used:#x} need {size}")
    image = bytearray(raw[:size])
    struct.pack_into("<IIQI28x", image, _SW_RESERVED, _XSTATE_MAGIC1, size + 4, used | 3, size)
    return bytes(image) + struct.pack("<I", _XSTATE_MAGIC2)


#: void cpuid(u32 leaf, u32 subleaf, u32 out[4]):
#: push %rbx; mov %edi,%eax; mov %esi,%ecx; mov %rdx,%r8; cpuid; mov %eax,(%r8); mov %ebx,4(%r8);
#: mov %ecx,8(%r8); mov %edx,12(%r8); pop %rbx; ret
_CPUID: Final = bytes.fromhex("53 89f8 89f1 4989d0 0fa2 418900 41895804 41894808 4189500c 5b c3")


@functools.cache
def _xstate_parts() -> dict[int, tuple[int, int]]:
    """Offset and size of each XSAVE component in the standard format, from CPUID leaf 0DH.

    Raises: Unsupported where the machine forbids code in memory that is writable.
    """
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError as error:
        raise Unsupported(
            f"cannot ask the processor for its register layout: {error.strerror}",
            hint="allow this process executable memory (SELinux: execmem)",
        ) from None
    page.write(_CPUID)
    first = ctypes.c_char.from_buffer(page)
    cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(ctypes.addressof(first))
    out = (ctypes.c_uint32 * 4)()
    cpuid(0xD, 0, ctypes.addressof(out))
    supported = out[0] | out[3] << 32
    parts = {}
    for bit in range(2, 63):
        if supported >> bit & 1:
            cpuid(0xD, bit, ctypes.addressof(out))
            parts[bit] = (out[1], out[0])
    del first, cpuid
    page.close()
    return parts
