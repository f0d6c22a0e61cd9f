# ruff: noqa: D102, SIM905 - sys_NAME is the system call NAME, described by the manual; 300 names need no quotation marks
"""Linux for one emulated thread: the system calls of a static program, from a table.

The numbers and structures are those of ``include/uapi/asm-generic`` (6.1), which every 64-bit port since
2012 uses. A call that is not in the table ends the run with one clear error: a program that is told
ENOSYS takes another path than on Linux, and its trace would be of that path.

================= ==================================================================================
calls             what they do here
================= ==================================================================================
files             read write readv writev pread64 pwrite64 lseek openat close dup dup3 fcntl ioctl
                  fstat newfstatat statx readlinkat faccessat faccessat2 getcwd chdir getdents64
                  ftruncate fsync fdatasync unlinkat mkdirat renameat renameat2 fchmod fchmodat
                  utimensat umask flock fadvise64: on the real files of this host.
                  Of ioctl only TCGETS and TIOCGWINSZ reach a terminal, the rest is ENOTTY.
                  /proc/self/exe and /proc/self/maps are the program's; the rest of /proc/self is absent.
memory            brk mmap munmap mprotect mremap madvise: private; a writable shared mapping of a file
                  is ENODEV. Beyond the ``ram`` limit: ENOMEM.
time              clock_gettime gettimeofday clock_getres nanosleep clock_nanosleep times getrusage:
                  one instruction is one nanosecond, sleeping moves the clock on. setitimer takes the
                  profiling timer (of -pg), which never fires; any other is an error.
signals           rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack kill tkill tgkill, and faults.
one thread        exit exit_group set_tid_address set_robust_list futex (WAKE wakes nobody; a WAIT that
                  would wait for ever is an error) sched_yield sched_getaffinity membarrier
who and what      getpid gettid getppid getuid geteuid getgid getegid uname sysinfo getrlimit prlimit64
                  getrandom (the same bytes in each run) prctl
refused           rseq, clone3 and pipe2 are ENOSYS, as on a kernel without them
================= ==================================================================================
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fentry.errors import Fault, Unsupported
from fentry.target.guestspace import Space
from fentry.target.linuxfiles import PAGE, Files, Stream, int32
from fentry.target.linuxmemory import STACK, STACK_TOP, Memory
from fentry.target.linuxsignal import Ended, Signals

# The names of calls 0.. in order; "-" has none. Source: include/uapi/asm-generic/unistd.h (6.1).
_NAMES = """
io_setup io_destroy io_submit io_cancel io_getevents setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr
listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr getcwd lookup_dcookie eventfd2 epoll_create1
epoll_ctl epoll_pwait dup dup3 fcntl inotify_init1 inotify_add_watch inotify_rm_watch ioctl ioprio_set ioprio_get
flock mknodat mkdirat unlinkat symlinkat linkat renameat umount2 mount pivot_root nfsservctl statfs fstatfs truncate
ftruncate fallocate faccessat chdir fchdir chroot fchmod fchmodat fchownat fchown openat close vhangup pipe2 quotactl
getdents64 lseek read write readv writev pread64 pwrite64 preadv pwritev sendfile pselect6 ppoll signalfd4 vmsplice
splice tee readlinkat newfstatat fstat sync fsync fdatasync sync_file_range timerfd_create timerfd_settime
timerfd_gettime utimensat acct capget capset personality exit exit_group waitid set_tid_address unshare futex
set_robust_list get_robust_list nanosleep getitimer setitimer kexec_load init_module delete_module timer_create
timer_gettime timer_getoverrun timer_settime timer_delete clock_settime clock_gettime clock_getres clock_nanosleep
syslog ptrace sched_setparam sched_setscheduler sched_getscheduler sched_getparam sched_setaffinity sched_getaffinity
sched_yield sched_get_priority_max sched_get_priority_min sched_rr_get_interval restart_syscall kill tkill tgkill
sigaltstack rt_sigsuspend rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigreturn
setpriority getpriority reboot setregid setgid setreuid setuid setresuid getresuid setresgid getresgid setfsuid
setfsgid times setpgid getpgid getsid setsid getgroups setgroups uname sethostname setdomainname getrlimit setrlimit
getrusage umask prctl getcpu gettimeofday settimeofday adjtimex getpid getppid getuid geteuid getgid getegid gettid
sysinfo mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr msgget msgctl msgrcv msgsnd semget
semctl semtimedop semop shmget shmctl shmat shmdt socket socketpair bind listen accept connect getsockname getpeername
sendto recvfrom setsockopt getsockopt shutdown sendmsg recvmsg readahead brk munmap mremap add_key request_key keyctl
clone execve mmap fadvise64 swapon swapoff mprotect msync mlock munlock mlockall munlockall mincore madvise
remap_file_pages mbind get_mempolicy set_mempolicy migrate_pages move_pages rt_tgsigqueueinfo perf_event_open accept4
recvmmsg - - - - - - - - - - - - - - - - wait4 prlimit64 fanotify_init fanotify_mark name_to_handle_at
open_by_handle_at clock_adjtime syncfs setns sendmmsg process_vm_readv process_vm_writev kcmp finit_module
sched_setattr sched_getattr renameat2 seccomp getrandom memfd_create bpf execveat userfaultfd membarrier mlock2
copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq kexec_file_load
""".split()
NAMES = {
    number: name
    for number, name in [
        *enumerate(_NAMES),
        *enumerate(
            "pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen fsconfig "
            "fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2 process_madvise epoll_pwait2 "
            "mount_setattr quotactl_fd landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret "
            "process_mrelease futex_waitv set_mempolicy_home_node".split(),
            424,
        ),
    ]
    if name != "-"
}

PID = 1000  #: what getpid and gettid say
_ABSENT = frozenset({"rseq", "clone3", "pipe2"})  #: a program that asks for these must live without


@dataclass(slots=True)
class Program:
    """What the loader knows of the program."""

    path: str
    entry: int
    headers: int  #: address of the program headers
    header_count: int
    end: int  #: first address after the program: the heap begins at the next page
    machine: str  #: what uname says
    hwcap: int = 0
    argv: Sequence[bytes] = ()
    env: Sequence[bytes] = ()


class Clock(Protocol):
    """The virtual clock, in nanoseconds."""

    clock: int


class LinuxAbi:
    """The kernel that one emulated program sees.

    Args:
        space: its memory.
        clock: the virtual clock; sleeping moves it on.
        signals: its signal state.
        program: what was loaded.
        streams: what descriptors 0, 1 and 2 are.
        ram: bytes of memory that it may map.
        epoch: the time of day, in seconds, at instruction 0.
    """

    def __init__(
        self,
        space: Space,
        clock: Clock,
        signals: Signals,
        program: Program,
        streams: tuple[Stream, Stream, Stream],
        *,
        ram: int,
        epoch: int,
    ) -> None:
        self._space = space
        self._clock = clock
        self._program = program
        self._epoch = epoch
        self._ram = ram
        self._drawn = 0
        self.slept = 0  #: nanoseconds of the clock that were no instructions
        self.signals = signals
        self.files = Files(
            space,
            streams,
            exe=program.path,
            pid=PID,
            now=lambda: self._now(0),
            broken_pipe=lambda: signals.send(13),  # SIGPIPE
        )
        self.memory = Memory(space, self.files, heap=-(-program.end // PAGE) * PAGE, ram=ram)
        self._calls: dict[int, Callable[..., int]] = {}
        for number, name in NAMES.items():
            for part in (self, self.files, self.memory, signals):
                handler = getattr(part, f"sys_{name}", None)
                if handler is not None:
                    self._calls[number] = handler

    # -- start and end ------------------------------------------------------------------------------
    def start(self) -> int:
        """Map the stack and fill it as execve does. Gives the stack pointer.

        Source: fs/binfmt_elf.c create_elf_tables, and the System V ABI on what lies where.
        """
        top = STACK_TOP
        self._space.map(top - STACK, STACK, "rw-", path="[stack]")
        at = top - 8
        program = self._program
        count = len(program.argv) + len(program.env)

        def push(data: bytes) -> int:
            nonlocal at
            at -= len(data)
            if at < top - STACK // 4 + 8 * count + 4096:  # the kernel allows arguments a quarter of the stack
                raise Unsupported("the arguments and the environment are too long", hint="pass fewer")
            self._space.write(at, data)
            return at

        name = push(os.fsencode(program.path) + b"\0")
        env = [push(word + b"\0") for word in program.env]
        argv = [push(word + b"\0") for word in program.argv]
        random = push(self._random(16))
        aux = [
            (16, program.hwcap),  # AT_HWCAP
            (6, PAGE),  # AT_PAGESZ
            (17, 100),  # AT_CLKTCK
            (3, program.headers),  # AT_PHDR
            (4, 56),  # AT_PHENT
            (5, program.header_count),  # AT_PHNUM
            (7, 0),  # AT_BASE
            (8, 0),  # AT_FLAGS
            (9, program.entry),  # AT_ENTRY
            (11, os.getuid()),  # AT_UID, AT_EUID, AT_GID, AT_EGID
            (12, os.geteuid()),
            (13, os.getgid()),
            (14, os.getegid()),
            (23, 0),  # AT_SECURE
            (25, random),  # AT_RANDOM
            (31, name),  # AT_EXECFN
            (0, 0),
        ]
        words = [len(argv), *argv, 0, *env, 0, *(word for pair in aux for word in pair)]
        at = (at - len(words) * 8) & -16
        self._space.write(at, struct.pack(f"<{len(words)}Q", *words))
        return at

    def close(self) -> None:
        """Close the host files that the program opened."""
        self.files.close()

    def call(self, number: int, args: tuple[int, ...], pc: int) -> int:
        """Do one system call. Gives what the result register will hold (an error as its negative number).

        Raises: Ended if it ends the program. Unsupported if it is not in the table.
        """
        handler = self._calls.get(number)
        if handler is None:
            name = NAMES.get(number, "no Linux call")
            if name in _ABSENT:
                return -errno.ENOSYS & (1 << 64) - 1
            raise Unsupported(
                f"system call {number} ({name}) at {pc:#x} is not emulated",
                hint="trace this program under an emulator that has the call, through its GDB stub",
            )
        try:
            return handler(*args) & (1 << 64) - 1
        except OSError as e:
            return -(e.errno or errno.EIO) & (1 << 64) - 1
        except Fault:
            return -errno.EFAULT & (1 << 64) - 1
        except (ValueError, OverflowError, MemoryError):  # a number that no host function takes
            return -errno.EINVAL & (1 << 64) - 1

    def _put(self, at: int, form: str, *values: int) -> int:
        self._space.write(at, struct.pack(form, *values))
        return 0

    # -- ends and threads ---------------------------------------------------------------------------
    def sys_exit(self, status: int, *_: int) -> int:
        raise Ended("exited", status & 0xFF)

    sys_exit_group = sys_exit

    def sys_set_tid_address(self, *_: int) -> int:
        return PID

    def sys_set_robust_list(self, _at: int, size: int, *_: int) -> int:
        if size != 24:
            raise OSError(errno.EINVAL, "bad size")
        return 0

    def sys_futex(self, at: int, what: int, value: int, timeout: int, *_: int) -> int:
        command = what & 0x7F & ~0x80
        if command in (1, 10):  # FUTEX_WAKE, FUTEX_WAKE_BITSET
            return 0
        if command not in (0, 9):  # FUTEX_WAIT, FUTEX_WAIT_BITSET
            raise OSError(errno.ENOSYS, "one thread only")
        (found,) = struct.unpack("<I", self._space.read(at, 4))
        if found != value & 0xFFFFFFFF:
            raise OSError(errno.EAGAIN, "changed")
        if not timeout:
            raise Unsupported(f"the program waits for ever on the futex at {at:#x}: no other thread can wake it")
        seconds, ns = struct.unpack("<qq", self._space.read(timeout, 16))
        until = seconds * 10**9 + ns
        if command == 0:
            self._sleep(until)
        else:  # an absolute time
            self._sleep(until - self._now(0 if what & 0x100 else 1))
        raise OSError(errno.ETIMEDOUT, "nobody woke it")

    def sys_sched_yield(self, *_: int) -> int:
        return 0

    def sys_sched_getaffinity(self, _pid: int, size: int, at: int, *_: int) -> int:
        if size < 8:
            raise OSError(errno.EINVAL, "bad size")
        self._put(at, "<Q", 1)
        return 8

    def sys_membarrier(self, *_: int) -> int:
        return 0

    # -- signals to itself --------------------------------------------------------------------------
    def _kill(self, pid: int, number: int) -> int:
        if int32(pid) not in (PID, 0):
            raise OSError(errno.ESRCH, "no such process")
        if not 0 <= int32(number) <= 64:
            raise OSError(errno.EINVAL, "bad signal")
        if number:
            self.signals.send(int32(number))
        return 0

    def sys_kill(self, pid: int, number: int, *_: int) -> int:
        return self._kill(pid, number)

    def sys_tkill(self, tid: int, number: int, *_: int) -> int:
        return self._kill(tid, number)

    def sys_tgkill(self, _pid: int, tid: int, number: int, *_: int) -> int:
        return self._kill(tid, number)

    # -- time ---------------------------------------------------------------------------------------
    def _now(self, which: int) -> int:
        """Nanoseconds of a clock by its number (uapi/linux/time.h)."""
        if which in (0, 5):  # REALTIME and its COARSE
            return self._epoch * 10**9 + self._clock.clock
        if which in (1, 4, 6, 7):  # MONOTONIC, RAW, COARSE, BOOTTIME
            return self._clock.clock
        if which in (2, 3):  # PROCESS_CPUTIME, THREAD_CPUTIME
            return self._clock.clock - self.slept
        raise OSError(errno.EINVAL, "no such clock")

    def _sleep(self, ns: int) -> None:
        if ns > 0:
            if self._clock.clock + ns >> 63:
                raise Unsupported("the program sleeps for ever, and nothing could wake it")
            self._clock.clock += ns
            self.slept += ns

    def sys_clock_gettime(self, which: int, at: int, *_: int) -> int:
        return self._put(at, "<qq", *divmod(self._now(which), 10**9))

    def sys_clock_getres(self, which: int, at: int, *_: int) -> int:
        self._now(which)
        return self._put(at, "<qq", 0, 1) if at else 0

    def sys_gettimeofday(self, at: int, zone: int, *_: int) -> int:
        if at:
            self._put(at, "<qq", *divmod(self._now(0) // 1000, 10**6))
        return self._put(zone, "<ii", 0, 0) if zone else 0

    def sys_setitimer(self, which: int, new: int, old: int, *_: int) -> int:
        # -pg starts the profiling timer; nothing here is sampled, so it never fires
        if which != 2 and new and any(self._space.read(new, 32)):  # ITIMER_PROF
            raise Unsupported(f"setitimer({which}): no timer fires here")
        return self._put(old, "<4q", 0, 0, 0, 0) if old else 0

    def sys_clock_nanosleep(self, which: int, flags: int, at: int, *_: int) -> int:
        seconds, ns = struct.unpack("<qq", self._space.read(at, 16))
        if seconds < 0 or not 0 <= ns < 10**9:
            raise OSError(errno.EINVAL, "bad time")
        self._sleep(seconds * 10**9 + ns - (self._now(which) if flags & 1 else 0))
        return 0

    def sys_nanosleep(self, at: int, *_: int) -> int:
        return self.sys_clock_nanosleep(1, 0, at)

    def sys_times(self, at: int, *_: int) -> int:
        ticks = self._now(2) // 10**7
        if at:
            self._put(at, "<qqqq", ticks, 0, 0, 0)
        return self._clock.clock // 10**7

    def sys_getrusage(self, _who: int, at: int, *_: int) -> int:
        return self._put(at, "<18q", *divmod(self._now(2) // 1000, 10**6), *([0] * 16))

    # -- who and what -------------------------------------------------------------------------------
    def sys_getpid(self, *_: int) -> int:
        return PID

    sys_gettid = sys_getpid

    def sys_getppid(self, *_: int) -> int:
        return 1

    def sys_getuid(self, *_: int) -> int:
        return os.getuid()

    def sys_geteuid(self, *_: int) -> int:
        return os.geteuid()

    def sys_getgid(self, *_: int) -> int:
        return os.getgid()

    def sys_getegid(self, *_: int) -> int:
        return os.getegid()

    def sys_uname(self, at: int, *_: int) -> int:
        words = ("Linux", "fentry", "6.1.0", "#1 SMP", self._program.machine, "(none)")
        self._space.write(at, b"".join(word.encode().ljust(65, b"\0") for word in words))
        return 0

    def sys_sysinfo(self, at: int, *_: int) -> int:
        up = self._clock.clock // 10**9
        return self._put(at, "<10QHxxxxxxQQIxxxx", up, 0, 0, 0, self._ram, self._ram, 0, 0, 0, 0, 1, 0, 0, 1)

    def sys_prlimit64(self, pid: int, which: int, new: int, old: int, *_: int) -> int:
        if int32(pid) not in (0, PID) or which > 15:
            raise OSError(errno.EINVAL, "no such limit")
        if new:
            self._space.read(new, 16)  # accepted, and without effect
        for_ever = (1 << 64) - 1
        limits = {3: (STACK, for_ever), 7: (1024, 1 << 20), 9: (for_ever, for_ever)}  # STACK, NOFILE, AS
        return self._put(old, "<QQ", *limits.get(which, (for_ever, for_ever))) if old else 0

    def sys_getrlimit(self, which: int, at: int, *_: int) -> int:
        return self.sys_prlimit64(0, which, 0, at)

    def sys_prctl(self, what: int, _arg: int, *_: int) -> int:
        if what == 15:  # PR_SET_NAME
            return 0
        raise OSError(errno.EINVAL, "not emulated")

    def sys_getrandom(self, at: int, size: int, *_: int) -> int:
        size = min(size, 1 << 16)
        self._space.write(at, self._random(size))
        return size

    def _random(self, size: int) -> bytes:
        """Draw the next `size` of a fixed sequence of bytes."""
        found = b""
        while len(found) < size:
            found += hashlib.sha256(b"fentry" + self._drawn.to_bytes(8, "little")).digest()
            self._drawn += 1
        return found[:size]
