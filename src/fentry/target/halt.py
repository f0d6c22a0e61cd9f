r"""Stopping every thread of a process and letting go of it, so that it does not notice.

How a thread comes to rest::

    running, or in a system call --SEIZE, INTERRUPT--> "stop"        this is where we want it
                                 \-> "signal" X: was just about to take X
                                        INTERRUPT, CONT with X -> X is delivered as it would have been
                                        (handler entered, ignored, group stop, death), then "stop"

So no signal is ever held, dropped or put in another order by us: it is either still pending in the kernel
or delivered. At a "stop" the thread is inside the kernel's signal code: when it is let go with unchanged
registers, an interrupted system call restarts by the kernel's own rules.

A few calls are not restarted by the kernel but end with EINTR when a thread was stopped (signal(7),
"Interruption of system calls ... by stop signals"): epoll_wait and relatives, semop, sigtimedwait, sockets
with a timeout. A program without signal handlers need not expect that, so at the stop we turn this EINTR
into the kernel's own "restart unless a handler runs" (:func:`_forgive`). Such a call starts its timeout
anew. If the tracer is killed between the stop and that correction, the program does see EINTR.

Sources: ptrace(2) (group-stop, PTRACE_SEIZE); Linux ``kernel/signal.c`` get_signal and ptrace_stop ("any trap
clears pending STOP trap"), ``arch/x86/kernel/signal.c`` arch_do_signal_or_restart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path
from typing import Final

from fentry.errors import Denied, Gone, TargetRefused, TraceError, Unsupported
from fentry.target import procfs, ptrace
from fentry.target.ptrace import Event

PATIENCE: Final = 10.0  #: seconds a thread may take to stop; a healthy one needs microseconds

_UNINTERRUPTIBLE: Final = "it waits for a device, for its vfork child, or in a frozen cgroup: try again later"
_EINTR: Final = -errno.EINTR & ptrace.WORD
_RESTART_NO_HANDLER: Final = -514 & ptrace.WORD  #: ERESTARTNOHAND (include/linux/errno.h)

#: system calls that answer EINTR to a mere stop and have then done nothing, so that starting them again is right
#: (numbers: arch/x86/entry/syscalls/syscall_64.tbl)
_NOTHING_DONE: Final = {
    0: "read",
    1: "write",
    19: "readv",
    20: "writev",
    43: "accept",
    44: "sendto",
    45: "recvfrom",
    46: "sendmsg",
    47: "recvmsg",
    65: "semop",
    128: "rt_sigtimedwait",
    208: "io_getevents",
    220: "semtimedop",
    232: "epoll_wait",
    281: "epoll_pwait",
    288: "accept4",
    299: "recvmmsg",
    333: "io_pgetevents",
    426: "io_uring_enter",
    441: "epoll_pwait2",
}


def await_event(tid: int, wanted: str, patience: float = PATIENCE) -> Event:
    """Wait for the next Event of a traced thread.

    Args:
        tid: the thread.
        wanted: what it should do, for the message: "stop", ...
        patience: seconds until it is refused.

    Raises: TargetRefused when they have passed.
    """
    deadline = 0.0
    turns = 0
    while True:
        event = ptrace.poll(tid)
        if event is not None:
            return event
        turns += 1
        if turns < 40:
            os.sched_yield()
            continue
        now = time.monotonic()
        deadline = deadline or now + patience
        letter = procfs.state(tid)
        if letter in ("", "Z", "X"):  # the first thread ends long before its process: waitpid stays silent
            return ptrace.poll(tid) or Event("gone")
        if now > deadline:
            raise TargetRefused(
                f"thread {tid} did not {wanted} within {patience:g} s (state {letter})",
                hint=_UNINTERRUPTIBLE,
            )
        time.sleep(min(0.002, 0.00002 * turns))


def settle(tid: int, patience: float = PATIENCE) -> Event:
    """Bring a seized and interrupted thread to a "stop", or find it "gone". Raises TargetRefused."""
    while True:
        event = await_event(tid, "stop", patience)
        if event.kind in ("stop", "gone"):
            return event
        forward = event.signal if event.kind == "signal" else 0
        try:
            ptrace.interrupt(tid)
            ptrace.request(ptrace.CONT, tid, 0, forward)
        except ProcessLookupError:
            continue  # killed meanwhile: the next event says so


def halt(pid: int, held: dict[int, Event], options: int) -> None:
    """Stop every thread of `pid`, those too that are created meanwhile.

    Args:
        pid: process id.
        held: thread id to the "stop" it is in; threads already in it are left as they are, the others added.
        options: PTRACE_O_* to seize with.

    Raises: Gone, Denied, TargetRefused, Unsupported; `held` then says what must be released.
    """
    if not held:
        _await_interruptible(pid)
    ended: set[int] = set()
    status = -1
    while True:
        fresh = [tid for tid in procfs.tids(pid) if tid not in held and tid not in ended]
        if not fresh:
            break
        seized = []
        for tid in fresh:
            if _seize(pid, tid, options):
                seized.append(tid)
            else:
                ended.add(tid)
        troubles: list[TraceError] = []
        for tid in seized:
            try:
                event = settle(tid, 0.2 if troubles else PATIENCE)
            except TraceError as trouble:  # settle the rest nevertheless: they must be let go
                troubles.append(trouble)
                ended.add(tid)
                continue
            if event.kind == "gone":
                ended.add(tid)
                status = event.status if tid == pid else status
                continue
            held[tid] = event
            _forgive(tid, event)
        if troubles:
            raise troubles[0]
    if not held:
        raise Gone(f"process {pid} is gone", status=status if status >= 0 else None)


def _await_interruptible(pid: int) -> None:
    """Refuse, before anything is done, a process that could not be stopped.

    A seized thread that does not stop cannot be let go either, except by the end of its tracer.
    """
    deadline = time.monotonic() + PATIENCE
    for tid in procfs.tids(pid):
        while procfs.state(tid) == "D":
            if time.monotonic() > deadline:
                raise TargetRefused(f"thread {tid} of process {pid} cannot be stopped (state D)", hint=_UNINTERRUPTIBLE)
            time.sleep(0.001)


def _seize(pid: int, tid: int, options: int) -> bool:
    """Seize and interrupt one thread; False if it has ended."""
    try:
        ptrace.seize(tid, options)
    except ProcessLookupError:
        return False
    except PermissionError:
        if procfs.state(tid) in ("", "Z", "X"):
            return False
        raise refusal(pid, tid) from None
    with contextlib.suppress(ProcessLookupError):  # dying in our hands: waiting for it takes note of that
        ptrace.interrupt(tid)
    return True


def _forgive(tid: int, event: Event) -> None:
    """Undo the EINTR that only our stop caused; see the module's text."""
    if event.signal != signal.SIGTRAP:
        return  # a group stop: that EINTR is the program's own
    try:
        regs = ptrace.regs(tid)
        if regs["rax"] == _EINTR and regs["orig_rax"] in _NOTHING_DONE:
            ptrace.set_regs(tid, regs | {"rax": _RESTART_NO_HANDLER})
    except ProcessLookupError:
        return


def release(held: dict[int, Event]) -> dict[int, int]:
    """Let go of every thread in `held` and empty it. Never raises.

    Threads that were killed meanwhile are reaped, the first one last, since its end is that of the process.

    Returns: wait status by thread id of those that were.
    """
    ended = {}
    for tid in reversed(list(held)):
        try:
            ptrace.request(ptrace.DETACH, tid)
        except OSError:
            try:
                event = await_event(tid, "end", 1.0)
            except TargetRefused:
                continue
            if event.kind == "gone" and event.status >= 0:
                ended[tid] = event.status
    held.clear()
    return ended


def refusal(pid: int, tid: int) -> TraceError:
    """Say which rule keeps us from tracing `pid`; the kernel says EPERM to all of them."""
    try:
        facts = procfs.status(tid)
        if procfs.is_kernel_thread(tid):
            return Unsupported(
                f"process {pid} ({facts['Name']}) is a kernel thread",
                hint="only programs can be traced this way",
            )
        owners = {int(uid) for uid in facts["Uid"].split()}
    except Gone as gone:
        return gone
    if tid in procfs.tids(os.getpid()):
        return Denied(f"process {pid} is this process", hint="trace it from another one")
    tracer = int(facts.get("TracerPid", "0"))
    if tracer:
        return Denied(
            f"process {pid} is already traced by process {tracer} ({_name(tracer)})",
            hint="a process can have one tracer: end that one first",
        )
    us = os.geteuid()
    if us and owners != {us}:
        who = "/".join(str(uid) for uid in sorted(owners))
        return Denied(
            f"process {pid} belongs to uid {who}, this is uid {us}",
            hint="run as that user, as root, or with the capability CAP_SYS_PTRACE",
        )
    scope = yama_scope()
    if scope == 3:
        return Denied(
            f"process {pid}: tracing is switched off until the next boot (kernel.yama.ptrace_scope is 3)",
            hint="boot without it, or trace in the emulator",
        )
    if scope == 2:
        return Denied(
            f"process {pid}: only CAP_SYS_PTRACE may trace (kernel.yama.ptrace_scope is 2)",
            hint="run as root, or: sysctl kernel.yama.ptrace_scope=0",
        )
    if scope == 1 and us:
        return Denied(
            f"process {pid} is no child of this one (kernel.yama.ptrace_scope is 1)",
            hint="sysctl kernel.yama.ptrace_scope=0, or run as root, or start the program under fentry",
        )
    return Denied(
        f"process {pid} may not be traced: it has more privileges than this process, made itself undumpable "
        "(prctl PR_SET_DUMPABLE), or is in another user namespace",
        hint="run as root with CAP_SYS_PTRACE in its user namespace (in a container: --cap-add=SYS_PTRACE)",
    )


def yama_scope() -> int:
    """Value of kernel.yama.ptrace_scope; 0 where there is no Yama."""
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        return 0


def _name(pid: int) -> str:
    try:
        return procfs.comm(pid)
    except TraceError:
        return "?"
