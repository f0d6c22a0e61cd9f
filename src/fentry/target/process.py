"""Target: a live process of this machine, by ptrace, without an agent in it.

The scheme is *inject, let go*: every thread is stopped only while something is changed, and nobody is attached
in between. So the process runs at full speed, a debugger may attach, and our death means nothing to it.

* :mod:`fentry.target.halt` stops all threads and lets them go, unnoticed;
* :mod:`fentry.target.inject` makes a stopped thread run system calls, safely even if we are killed meanwhile;
* :mod:`fentry.target.room` maps and shares memory with them;
* :mod:`fentry.target.launch` starts a program stopped at its entry point.

All calls must come from the thread that called :func:`attach`, :func:`spawn` or the last :meth:`ProcessTarget.stop`:
the kernel lets no other thread of this process use ptrace on the target. Reading and writing memory, ``mappings``
and ``modules`` are free of this, also while the target runs.

Synchronising code takes nothing but a stopped process: a thread comes back from the kernel through an instruction
that serialises (IRET; SDM volume 3, 9.1.3 and 9.3), so it sees whatever was written before.
"""

from __future__ import annotations

import contextlib
import os
import platform
import select
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

import numpy as np

from fentry.errors import AskedWrong, Denied, EngineBug, Gone, TargetRefused, TraceError, Unsupported
from fentry.target import Mapping as Range
from fentry.target import Module, Stop, Target, halt, launch, procfs, ptrace, seccomp
from fentry.target.inject import Injector
from fentry.target.memory import Memory
from fentry.target.procfs import Identity
from fentry.target.ptrace import Event
from fentry.target.room import ProcessAllocator, ProcessShared

_PAGE = 4096
_MAP_STEP = 1 << 30  #: bytes of address space whose page map is read at once: 2 MiB
_ELF_MACHINE = 62  #: of the instruction set whose registers and frames ptrace.py and inject.py know
_BY_EXEC = "replaced its program by exec"
_STEP_PATIENCE = 1.0  #: seconds until a stepped system call is taken for one that waits
_TRAP = 1 << signal.SIGTRAP - 1
#: signals that an instruction causes itself; blocking them would make the kernel reset their handlers
_SYNCHRONOUS = (signal.SIGTRAP, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS)
_ASYNCHRONOUS = ptrace.ALL_SIGNALS & ~sum(1 << number - 1 for number in _SYNCHRONOUS)


def _thread_exists(pid: int, tid: int) -> bool:
    return os.path.exists(f"/proc/{pid}/task/{tid}")  # noqa: PTH110 - twenty times a second for each ring


class ProcessTarget(Target):
    """A live process. Made by :func:`spawn` or :func:`attach`, stopped.

    Args:
        pid: process id.
        held: stops of the threads that are held already.
        child: whether it is our child: then :meth:`wait` tells its exit status.
        identity: what it was before it was stopped; None if that cannot have changed.
    """

    kind = "process"
    system_calls = True
    allocator: ProcessAllocator
    shared: ProcessShared
    stepper: ProcessTarget
    code_sync: ProcessTarget

    def __init__(self, pid: int, held: dict[int, Event], *, child: bool, identity: Identity | None = None) -> None:
        self.pid = pid
        self.arch = platform.machine()
        self._held = held
        self._child = child
        self._owner = threading.get_native_id()
        self._closed = False
        self._last: Stop | None = None
        self._status: int | None = None
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(pid)
            self._memory = Memory(self._tid(), lambda: next(iter(self._held), 0))
            self._identity = procfs.identity(self._tid())
            if identity is not None and identity != self._identity:
                raise Gone(f"process {pid} {_BY_EXEC} while it was being attached to")
        except BaseException as error:
            halt.release(held)
            if self._pidfd >= 0:
                os.close(self._pidfd)
            if isinstance(error, ProcessLookupError):
                raise Gone(f"process {pid} is gone") from None
            raise
        self._injector = Injector(self._memory, self._held)
        self.allocator = ProcessAllocator(self._injector, self._check_held, self._tid)
        self.shared = ProcessShared(self._injector, self._check_held, self._tid)
        self.stepper = self.code_sync = self

    def __enter__(self) -> ProcessTarget:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- memory -----------------------------------------------------------------------------------
    def read(self, at: int, size: int) -> bytes:
        """Read exactly `size` bytes. Raises Fault, Gone."""
        self._check_open()
        return self._memory.read(at, size)

    def write(self, at: int, data: bytes) -> None:
        """Write `data`, through page protection (code included). Raises Fault, Gone."""
        self._check_open()
        self._memory.write(at, data)

    def write_many(self, writes: Iterable[tuple[int, bytes]]) -> None:
        """Write many small pieces into the stopped process, a page at a time. Pieces must not overlap.

        Raises: Fault, Gone.
        """
        self._check_held()
        self._memory.write_many(writes)

    def sync(self, at: int, size: int) -> None:  # where does not matter: every thread is stopped
        """Make written code seen by every thread (ability: CodeSync); they must all be stopped."""
        self._check_held()

    def mappings(self) -> list[Range]:
        """All mapped ranges in address order. Raises Gone."""
        return [region.mapping for region in procfs.regions(self._tid())]

    def touched(self, start: int, end: int) -> list[tuple[int, int]]:
        """Page ranges inside [start, end) that are backed by something, by the page map (proc(5)). Raises Gone."""
        found: list[tuple[int, int]] = []
        with open(f"/proc/{self._tid()}/pagemap", "rb", buffering=0) as table:  # noqa: PTH123 - a device, not a file
            for at in range(start & -_PAGE, end, _MAP_STEP):
                pages = (min(at + _MAP_STEP, end) - at + _PAGE - 1) // _PAGE
                words = np.frombuffer(os.pread(table.fileno(), pages * 8, at // _PAGE * 8), "<u8")
                there = np.flatnonzero(words >> np.uint64(62))  # bit 63: present, bit 62: swapped
                runs = np.split(there, np.flatnonzero(np.diff(there) != 1) + 1) if len(there) else []
                found += [(at + int(run[0]) * _PAGE, at + (int(run[-1]) + 1) * _PAGE) for run in runs]
        return [(max(low, start), min(high, end)) for low, high in found]

    def modules(self) -> list[Module]:
        """Loaded images, the program itself first, the vdso included. Raises Gone."""
        return procfs.modules(self._tid(), self._memory.read)

    def relatives(self, name: str) -> list[Target]:
        """Other processes that inherited the region shared as `name`, stopped; also after this one has ended."""
        inode = self.shared.inodes.get(name)
        found: list[Target] = []
        for entry in os.listdir("/proc") if inode else []:  # noqa: PTH208 - names are all that is wanted
            if not entry.isdigit() or int(entry) in (self.pid, os.getpid()):
                continue
            try:
                regions = procfs.regions(int(entry))
                if any(r.inode == inode and f"memfd:{name}" in r.mapping.path for r in regions):
                    found.append(attach(int(entry)))
            except (TraceError, OSError):
                continue  # it ended meanwhile, or is not ours to look at
        return found

    @property
    def alive(self) -> Callable[[int, int], bool] | None:
        """Tells whether a thread exists, by the numbers that it knows itself by; None in another pid namespace."""
        try:
            spaces = procfs.status(self.pid).get("NSpid", "").split()
        except (TraceError, OSError):
            return None
        return _thread_exists if len(spaces) == 1 else None

    # -- threads ----------------------------------------------------------------------------------
    def threads(self) -> list[int]:
        """Thread ids, the first one first; while stopped, those that are held. Raises Gone."""
        self._check_open()
        if not self._held:
            return procfs.tids(self.pid)
        return sorted(self._held, key=lambda tid: (tid != self.pid, tid))

    def comm(self, tid: int) -> str:
        """Name of a thread. Raises Gone."""
        return procfs.comm(tid)

    def regs(self, tid: int) -> dict[str, int]:
        """Registers of a stopped thread, by name (``ptrace.REGS``), unsigned.

        A thread in an interrupted system call has its number in ``orig_rax`` (else 2**64-1), and in ``rax`` what
        makes the kernel restart it.
        """
        self._check_thread(tid)
        try:
            return ptrace.regs(tid)
        except ProcessLookupError:
            raise Gone(f"thread {tid} was killed") from None

    def set_regs(self, tid: int, regs: dict[str, int]) -> None:
        """Write the named registers of a stopped thread; others stay.

        If the thread is in a system call that will restart (see :meth:`regs`), the kernel takes 2 from ``rip`` first:
        set ``orig_rax`` to -1 as well to prevent it.
        """
        self._check_thread(tid)
        if unknown := [name for name in regs if name not in ptrace.REGS]:
            raise AskedWrong(f"no register {unknown[0]!r}", hint="registers: " + " ".join(ptrace.REGS))
        try:
            ptrace.set_regs(tid, ptrace.regs(tid) | regs)
        except ProcessLookupError:
            raise Gone(f"thread {tid} was killed") from None

    def syscall(self, nr: int, *args: int) -> int:
        """Run a system call in one of the stopped threads; gives its result.

        It must not block, nor change registers, signals or threads.

        Raises: TargetRefused with the errno's name if it fails; Gone, Denied.
        """
        self._check_held()
        result = self._injector.syscall(nr, *args)
        if -4095 <= result < 0:
            raise TargetRefused(f"system call {nr} in process {self.pid} failed: {os.strerror(-result)} ({-result})")
        return result

    def step(self, tid: int) -> None:
        """Execute one instruction of one thread; a system call is one instruction (ability: Stepper).

        Signals stay pending, except those that the instruction itself causes. If we are killed within these few
        microseconds the trap reaches the program, for which it is deadly; so prefer to move threads by registers.

        Raises: Gone; TargetRefused (it waits in a system call, or took a fault); Unsupported (SIGTRAP is ignored).
        """
        self._check_thread(tid)
        if int(procfs.status(tid)["SigIgn"], 16) & _TRAP:
            raise Unsupported(f"thread {tid} cannot be stepped: the program ignores SIGTRAP, which stepping would undo")
        try:
            mask = ptrace.sigmask(tid)
            if mask & _TRAP:
                ptrace.set_sigmask(tid, mask & ~_TRAP)
            trouble = self._step(tid, mask)
            if ptrace.sigmask(tid) != mask:
                ptrace.set_sigmask(tid, mask)
        except ProcessLookupError:
            raise self._thread_gone(tid) from None
        if trouble:
            raise TargetRefused(f"thread {tid} cannot be stepped at {self.regs(tid)['rip']:#x}: it {trouble}")

    def _step(self, tid: int, mask: int) -> str:
        """Step, and come to a stop in the kernel's signal code; gives what went wrong, or ""."""
        forward = 0
        while True:
            ptrace.request(ptrace.SINGLESTEP, tid, 0, forward)
            trouble = ""
            try:
                event = halt.await_event(tid, "execute one instruction", _STEP_PATIENCE)
            except TargetRefused:
                ptrace.interrupt(tid)
                event = self._without_trap(tid, halt.settle(tid))
                trouble = "waits in a system call"
            if event.kind == "gone":
                raise self._thread_gone(tid)
            if trouble:
                return trouble
            forward = event.signal if event.kind == "signal" else 0
            if forward in _SYNCHRONOUS:
                ptrace.interrupt(tid)
                trap = forward == signal.SIGTRAP
                ptrace.request(ptrace.CONT, tid, 0, 0 if trap else forward)
                if halt.settle(tid).kind == "gone":
                    raise self._thread_gone(tid)
                return "" if trap else f"took signal {forward}"
            if forward:  # blocked now, it goes back to the queue it came from (kernel/signal.c ptrace_signal)
                ptrace.set_sigmask(tid, (mask | _ASYNCHRONOUS) & ~_TRAP)

    def _without_trap(self, tid: int, event: Event) -> Event:
        """Take away the trap of a stepped system call that was interrupted: it is pending, and would be deadly."""
        if event.kind == "stop" and int(procfs.status(tid)["SigPnd"], 16) & _TRAP:
            ptrace.request(ptrace.CONT, tid)
            event = halt.await_event(tid, "take its trap")
            if event.kind != "gone":
                ptrace.interrupt(tid)
                ptrace.request(ptrace.CONT, tid)
                event = halt.settle(tid)
        return event

    def forbids(self, numbers: Iterable[int]) -> str:
        """Why a stopped thread may not make all of these system calls (seccomp), or "". Raises Gone."""
        self._check_held()
        numbers = list(numbers)
        for tid in self.threads():
            if why := seccomp.forbidden(tid, numbers):
                return f"thread {tid}: {why}"
        return ""

    # -- run control ------------------------------------------------------------------------------
    def stop(self) -> None:
        """Stop every thread. Idempotent. Raises Gone (ended, or another program by exec), Denied, TargetRefused."""
        if self._held:
            self._check_owner()
            return
        self._check_open()
        self._check_alive()
        self._owner = threading.get_native_id()
        try:
            halt.halt(self.pid, self._held, ptrace.O_TRACESYSGOOD)
            self._check_alive()
        except BaseException as error:
            self._release()
            if isinstance(error, Gone) and error.status is not None:
                self._note(error.status)
            raise

    def resume(self) -> None:
        """Let go of every thread: all run on, nobody is attached. Does not wait; does nothing if they run."""
        if not self._held:
            return
        self._check_owner()
        try:
            self._injector.finish()
        except Gone:
            pass  # releasing reaps what was killed
        finally:
            self._release()

    def wait(self, timeout: float | None = None) -> Stop | None:
        """Wait until the process, which must have been resumed, has ended.

        Args:
            timeout: seconds, or None for as long as it takes.

        Returns: how it ended, or None when the time is up. ``status`` is -1 if it is not our child.
        """
        if self._held:
            raise EngineBug(f"waiting for process {self.pid}, which is stopped")
        if self._last is None:
            self._check_open()
            if not self._ended(timeout):
                return None
            self._reap()
        return self._last

    def kill(self) -> None:
        """Kill the process, and reap it if it is our child. Never raises for one that is gone."""
        try:
            if self._pidfd >= 0 and self._last is None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._injector.forget()
        self._release()
        if self._child and self._last is None and self._pidfd >= 0:
            self._ended(None)
            self._reap()

    def close(self) -> None:
        """Let go for good; the process runs on. Idempotent, never raises for a process that is gone."""
        if self._closed:
            return
        try:
            self.resume()
        except TraceError:
            self._release()
        self._closed = True
        self._memory.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = -1

    # -- within -----------------------------------------------------------------------------------
    def _tid(self) -> int:
        """A thread whose /proc entry has memory: the first one, unless it has ended before the others."""
        self._check_open()
        if self._held:
            return self.pid if self.pid in self._held else next(iter(self._held))
        for tid in procfs.tids(self.pid):
            if procfs.state(tid) not in ("", "Z", "X"):
                return tid
        raise Gone(f"process {self.pid} is gone")

    def _check_owner(self) -> None:
        if threading.get_native_id() != self._owner:
            raise EngineBug(
                f"process {self.pid} was stopped by thread {self._owner} of fentry, and is used from another",
                hint="ptrace works from one thread only: do all of it there",
            )

    def _check_open(self) -> None:
        if self._closed:
            raise Gone(f"process {self.pid} was let go for good")

    def _check_held(self) -> None:
        self._check_open()
        if not self._held:
            raise EngineBug(f"process {self.pid} must be stopped for this")
        self._check_owner()

    def _check_thread(self, tid: int) -> None:
        self._check_held()
        if tid not in self._held:
            raise AskedWrong(f"process {self.pid} has no thread {tid}")
        if tid == self._injector.tid:
            self._injector.finish()

    def _check_alive(self) -> None:
        """Raise Gone unless this is still the process, and the program, that we know."""
        if self._last is None and self._ended(0):
            self._reap()
        if self._last is not None:
            raise Gone(f"process {self.pid} has ended", status=self._status)
        if self._memory.gone(0) or procfs.identity(self._tid()) != self._identity:
            raise Gone(f"process {self.pid} {_BY_EXEC}", hint="attach again")

    def _ended(self, timeout: float | None) -> bool:
        """Whether the process ends within `timeout` seconds."""
        waiter = select.poll()
        waiter.register(self._pidfd, select.POLLIN)
        return bool(waiter.poll(None if timeout is None else timeout * 1000))

    def _reap(self) -> None:
        """Note how the process ended; takes the exit status of a child."""
        status = -1
        if self._child:
            with contextlib.suppress(ChildProcessError):
                _, status = os.waitpid(self.pid, 0)
        self._note(status)

    def _note(self, status: int) -> None:
        """Note that the process ended with this wait status, -1 if it is unknown."""
        if self._last is not None:
            return
        self._status = status if status >= 0 else None
        if status >= 0 and os.WIFSIGNALED(status):
            self._last = Stop("signalled", os.WTERMSIG(status), self.pid)
        else:
            self._last = Stop("exited", os.WEXITSTATUS(status) if status >= 0 else -1, self.pid)

    def _release(self) -> None:
        """Let go of every thread; notes the end of the process if it ended in our hands."""
        status = halt.release(self._held).get(self.pid)
        if status is not None:
            self._note(status)

    def _thread_gone(self, tid: int) -> Gone:
        self._held.pop(tid, None)
        return Gone(f"thread {tid} was killed")


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    stdin: launch.Stream = None,
    stdout: launch.Stream = None,
    stderr: launch.Stream = None,
) -> ProcessTarget:
    """Start a program; give it stopped at its entry point, its libraries mapped and nothing of it run.

    Args:
        argv: program (looked up in PATH unless it has a slash) and arguments.
        env: its environment; ours if None.
        cwd: directory to start in; ours if None.
        stdin: a descriptor, an open file, or None for ours.
        stdout: likewise.
        stderr: likewise.

    Raises: AskedWrong (no such file, not executable, no program), Unsupported (another machine's), Denied (setuid;
        tracing not permitted), Gone (it ended while its loader ran; the loader has said why).
    """
    _check_host()
    pid, held = launch.launch(argv, env=env, cwd=cwd, streams=(stdin, stdout, stderr))
    try:
        return ProcessTarget(pid, held, child=True)
    except BaseException:
        launch.end(pid)
        raise


def attach(pid: int) -> ProcessTarget:
    """Stop every thread of a running process and give it.

    Raises: AskedWrong (no such process, a thread's id), Gone (it ended or replaced its program meanwhile), Denied
        (whose process, which rule), Unsupported (kernel thread, 32-bit), TargetRefused (it cannot be stopped).
    """
    _check_host()
    try:
        facts = procfs.status(pid)
    except Gone:
        raise AskedWrong(f"no process {pid}", hint="ps -e lists them") from None
    if facts.get("Tgid", str(pid)) != str(pid):
        raise AskedWrong(f"{pid} is a thread of process {facts['Tgid']}", hint=f"give {facts['Tgid']}")
    if pid == os.getpid() or procfs.is_kernel_thread(pid):
        raise halt.refusal(pid, pid)
    alive = [tid for tid in procfs.tids(pid) if procfs.state(tid) not in ("", "Z", "X")]
    if not alive:
        raise Gone(f"process {pid} has ended (its parent has not taken note yet)")
    try:
        before = procfs.identity(alive[0])
        kind = launch.elf_kind(f"/proc/{alive[0]}/exe")
    except Denied:
        raise halt.refusal(pid, alive[0]) from None
    # empty: it ended just now, which halting it will tell, or its file may be run but not read
    if kind and kind != launch.elf_kind("/proc/self/exe"):
        raise Unsupported(
            f"process {pid} runs a program of another machine or word size (ELF {kind.hex()})",
            hint="only native 64-bit programs can be traced live",
        )
    held: dict[int, Event] = {}
    try:
        halt.halt(pid, held, ptrace.O_TRACESYSGOOD)
    except BaseException:
        halt.release(held)
        raise
    return ProcessTarget(pid, held, child=False, identity=before)


def _check_host() -> None:
    if int.from_bytes(launch.elf_kind("/proc/self/exe")[2:], "little") != _ELF_MACHINE:
        raise Unsupported(
            f"live processes are not supported on {platform.machine()} yet",
            hint="fentry doctor lists what works here",
        )
