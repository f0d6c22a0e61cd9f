"""Starting a program stopped at its entry point, when all that it needs is mapped and nothing of it has run.

The child is seized while it waits on a pipe, before exec, so that nothing it does is missed. Until it stands
at its entry point it dies with us (PTRACE_O_EXITKILL): it either runs whole or never began. The stop there is
a breakpoint written over the first instruction and taken away again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import stat
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from fentry.errors import AskedWrong, Denied, Gone, TraceError, Unsupported
from fentry.target import halt, procfs, ptrace
from fentry.target.memory import Memory
from fentry.target.ptrace import Event

Stream = int | IO[bytes] | IO[str] | None

_BREAKPOINT: Final = b"\xcc"
_STOP_SIGNALS: Final = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_STAGES: Final = {0: "prepare", 1: "change to the directory of", 2: "run"}


def resolve(program: str, env: Mapping[str, str]) -> str:
    """Find the file of `program` as a shell would, and check that it can run here.

    Raises: AskedWrong (no such file, not executable), Unsupported (another machine's), Denied (setuid).
    """
    if "/" in program:
        path = program
    else:
        path = shutil.which(program, path=env.get("PATH", os.defpath)) or ""
        if not path:
            raise AskedWrong(f"cannot run {program}: not found in PATH", hint="give the path of the program")
    try:
        info = Path(path).stat()
    except OSError as error:
        raise AskedWrong(f"cannot run {path}: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise AskedWrong(f"cannot run {path}: not a file")
    if not os.access(path, os.X_OK):
        raise AskedWrong(f"cannot run {path}: not executable", hint=f"chmod +x {path}")
    head = _head(path)
    if head[:4] == b"\x7fELF" and elf_kind(path) != (ours := elf_kind("/proc/self/exe")):
        machine = int.from_bytes(head[18:20], "little" if head[5:6] == b"\x01" else "big")
        raise Unsupported(
            f"cannot run {path}: built for another machine (ELF machine {machine}, {head[4:5].hex()} word class; "
            f"this one is {int.from_bytes(ours[2:], 'little')})",
            hint="programs of other machines run in the emulator (--emulate)",
        )
    foreign_uid = info.st_mode & stat.S_ISUID and info.st_uid != os.geteuid()
    foreign_gid = info.st_mode & stat.S_ISGID and info.st_mode & stat.S_IXGRP and info.st_gid != os.getegid()
    if head[:2] != b"#!" and (foreign_uid or foreign_gid or (os.geteuid() and _has_capabilities(path))):
        raise Denied(
            f"cannot trace {path} from its start: it is setuid, setgid or has file capabilities, "
            "and the kernel withholds them from a traced program",
            hint="start it without fentry, then attach as root",
        )
    return path


def _head(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(20)
    except OSError:  # executable but not readable is legal
        return b""


def elf_kind(path: str) -> bytes:
    """Word class, byte order and machine (4 bytes) of an ELF file; empty if it cannot be read."""
    head = _head(path)
    return head[4:6] + head[18:20]


def _has_capabilities(path: str) -> bool:
    try:
        return bool(os.getxattr(path, "security.capability"))
    except OSError:
        return False


def launch(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: str | os.PathLike[str] | None,
    streams: tuple[Stream, Stream, Stream],
) -> tuple[int, dict[int, Event]]:
    """Start a program and stop it at its entry point.

    It gets what a shell would give: our inheritable descriptors, our signal mask, the signals that this
    interpreter ignores or handles reset to their defaults, our process group.

    Args:
        argv: program and arguments; the program is looked up in PATH unless it has a slash.
        env: environment, ours if None.
        cwd: directory to start in, ours if None.
        streams: stdin, stdout, stderr: a descriptor, an open file, or None for ours.

    Returns: process id and the stop of each thread.
    Raises: AskedWrong, Unsupported, Denied, Gone (it ended before its entry point).
    """
    if not argv:
        raise AskedWrong("no program to run")
    words = [os.fspath(word) for word in argv]
    if any("\0" in word for word in words):
        raise AskedWrong("a NUL character in the command line")
    environment = dict(os.environ if env is None else env)
    path = resolve(words[0], environment)
    fds = [None if stream is None else stream if isinstance(stream, int) else stream.fileno() for stream in streams]
    go, failed, pid = _fork(path, words, environment, cwd, fds)
    try:
        try:
            ptrace.seize(pid, ptrace.O_TRACESYSGOOD | ptrace.O_TRACEEXEC | ptrace.O_EXITKILL)
        except OSError:
            raise halt.refusal(pid, pid) from None
        os.write(go, b"g")
        report = os.read(failed, 5)
        if report:
            code, stage = struct.unpack("<IB", report)
            raise _exec_error(code, stage, path, cwd)
        held = _run_to_entry(pid, path)
        ptrace.request(ptrace.SETOPTIONS, pid, 0, ptrace.O_TRACESYSGOOD)
        return pid, held
    except BaseException:
        end(pid)
        raise
    finally:
        os.close(go)
        os.close(failed)


def _fork(
    path: str,
    argv: list[str],
    env: dict[str, str],
    cwd: str | os.PathLike[str] | None,
    fds: list[int | None],
) -> tuple[int, int, int]:
    """Fork a child that execs when told; gives (pipe to write to for go, pipe that reports failure, pid)."""
    wait_for, go = os.pipe()
    failed, report = os.pipe()
    # above the standard descriptors, which the child rearranges
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (wait_for, report)]
    os.close(wait_for)
    os.close(report)
    defaults = [
        number
        for number in signal.valid_signals()
        if callable(signal.getsignal(number)) or number in (signal.SIGPIPE, signal.SIGXFSZ)
    ]  # Python itself ignores the last two
    # no signal may run a Python handler in the child
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # Python >= 3.12 warns of fork with threads; this child makes system calls only, then execs
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os.close(go)  # so that our death ends its wait
            os.close(failed)
            _child(path, argv, env, cwd, fds, high[0], high[1], defaults, mask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for fd in high:
            os.close(fd)
    return go, failed, pid


def _child(
    path: str,
    argv: list[str],
    env: dict[str, str],
    cwd: str | os.PathLike[str] | None,
    fds: list[int | None],
    go: int,
    report: int,
    defaults: Sequence[int],
    mask: Iterable[int],
) -> None:
    """What the child does; never returns."""
    stage = 0
    try:
        if not os.read(go, 1):
            return
        # the descriptors that come first may be overwritten by those that come later: copy them all, then place them
        copies = [None if fd is None else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in fds]
        for number, copy in enumerate(copies):
            if copy is not None:
                os.dup2(copy, number, inheritable=True)
        stage = 1
        if cwd is not None:
            os.chdir(cwd)
        stage = 2
        for number in defaults:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execve(path, argv, env)  # noqa: S606  # no shell is wanted: the user's words go through as they are
    except OSError as error:
        os.write(report, struct.pack("<IB", error.errno or errno.EINVAL, stage))
    except BaseException:
        os.write(report, struct.pack("<IB", errno.EINVAL, stage))
    finally:
        os._exit(127)


def _exec_error(code: int, stage: int, path: str, cwd: str | os.PathLike[str] | None) -> TraceError:
    name = os.strerror(code)
    if stage == 1:
        return AskedWrong(f"cannot change to the directory {os.fspath(cwd or '')}: {name}")
    if code == errno.ENOEXEC:
        return AskedWrong(
            f"cannot run {path}: not a program that this machine knows",
            hint="a script must begin with #! and its interpreter",
        )
    if code == errno.ENOENT:
        return AskedWrong(f"cannot run {path}: its interpreter or dynamic loader is missing")
    return AskedWrong(f"cannot {_STAGES.get(stage, 'run')} {path}: {name}")


def _run_to_entry(pid: int, path: str) -> dict[int, Event]:
    """From before exec to the entry point of the program; gives the stops of all threads."""
    event = _wait(pid)
    while event.kind != "event" or event.event != ptrace.EVENT_EXEC:
        event = _pass_on(pid, event, path)
    entry = procfs.auxv(pid).get(procfs.AT_ENTRY, 0)
    memory = Memory(pid, lambda: pid)
    try:
        first = memory.read(entry, 1)
        memory.write(entry, _BREAKPOINT)
        while True:
            event = _pass_on(pid, event, path)
            if event.kind == "signal" and event.signal == signal.SIGTRAP:
                regs = ptrace.regs(pid)
                if regs["rip"] == entry + 1:
                    break
        memory.write(entry, first)
        ptrace.set_regs(pid, regs | {"rip": entry})
        ptrace.interrupt(pid)
        ptrace.request(ptrace.CONT, pid)
        stop = halt.settle(pid)
        if stop.kind == "gone":
            raise _ended(stop, path)
        held = {pid: stop}
        halt.halt(pid, held, ptrace.O_TRACESYSGOOD)  # the loader may have started threads (LD_AUDIT)
        return held
    except ProcessLookupError:
        raise _ended(_wait(pid), path) from None
    finally:
        memory.close()


def _pass_on(pid: int, event: Event, path: str) -> Event:
    """Let the thread go on from `event` as if nobody watched, and wait for the next one."""
    if event.kind == "gone":
        raise _ended(event, path)
    if event.kind == "stop" and event.signal in _STOP_SIGNALS:
        ptrace.request(ptrace.LISTEN, pid)  # stopped by job control: so be it, until it is continued
    else:
        ptrace.request(ptrace.CONT, pid, 0, event.signal if event.kind == "signal" else 0)
    return _wait(pid)


def _wait(pid: int) -> Event:
    """Wait as long as it takes: a child before its entry point loads libraries, or is stopped by its user."""
    _, status = os.waitpid(pid, ptrace.WALL)
    return ptrace.decode(status)


def _ended(event: Event, path: str) -> Gone:
    status = event.status if event.status >= 0 else None
    if status is None:
        how = "ended"
    elif os.WIFSIGNALED(status):
        how = f"was killed by signal {os.WTERMSIG(status)}"
    else:
        how = f"exited with status {os.waitstatus_to_exitcode(status)}"
    return Gone(f"{path} {how} before it reached its entry point", status=status, hint="does it run without fentry?")


def end(pid: int) -> None:
    """Kill and reap a child that never got to run."""
    try:
        os.kill(pid, signal.SIGKILL)
        while True:
            _, status = os.waitpid(pid, ptrace.WALL)
            if not os.WIFSTOPPED(status):
                return
    except (ProcessLookupError, ChildProcessError):
        return
