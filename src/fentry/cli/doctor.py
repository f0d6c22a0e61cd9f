"""``fentry doctor``: what this machine allows, found out by doing it, and what to do about the rest.

Each check is a function of a :class:`Host`, the one place that asks this machine; tests give them hosts that answer
otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fentry.cli import options, show
from fentry.errors import TraceError

if TYPE_CHECKING:
    from fentry.arch import Arch
    from fentry.target.process import ProcessTarget

_AT_HWCAP2 = 26  # include/uapi/linux/auxvec.h
_HWCAP2_FSGSBASE = 1 << 1  # arch/x86/include/uapi/asm/hwcap2.h
_CAP_SYS_PTRACE = 19  # include/uapi/linux/capability.h


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        name: what was looked at.
        verdict: "ok", "limited" or "no".
        found: what there is, in a few words.
        todo: what to do about it; "" if nothing needs doing.
        needed: live tracing does not work without it.
    """

    name: str
    verdict: str
    found: str
    todo: str = ""
    needed: bool = False


class Host:
    """This machine, as far as checks ask."""

    machine = platform.machine()

    def text(self, path: str) -> str:
        """Text of a small file of the kernel's, "" if it cannot be read."""
        try:
            return Path(path).read_text(errors="replace").strip()
        except OSError:
            return ""

    @property
    def uid(self) -> int:
        """Effective user id."""
        return os.geteuid()

    @cached_property
    def status(self) -> dict[str, str]:
        """Fields of /proc/self/status."""
        rows = (line.partition(":") for line in self.text("/proc/self/status").splitlines())
        return {name: value.strip() for name, _, value in rows}

    @cached_property
    def flags(self) -> frozenset[str]:
        """Flags of the first CPU."""
        for line in self.text("/proc/cpuinfo").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(value.split())
        return frozenset()

    @property
    def hwcap2(self) -> int:
        """What the kernel tells programs of the CPU."""
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.restype = ctypes.c_ulong
        return int(getauxval(ctypes.c_ulong(_AT_HWCAP2)))

    @property
    def address_limit(self) -> int:
        """RLIMIT_AS in bytes, -1 for none."""
        return resource.getrlimit(resource.RLIMIT_AS)[0]

    @cached_property
    def arch(self) -> Arch | None:
        """This machine's instruction set, None if it is not known here."""
        from fentry.arch import load

        try:
            return load(self.machine)
        except TraceError:
            return None

    # -- attempts: each gives "" or what went wrong ------------------------------------------------------
    @cached_property
    def child(self) -> ProcessTarget | TraceError:
        """A program of ours, started and held before its first instruction; or why that cannot be."""
        import shutil
        import sys

        from fentry.target.process import spawn

        try:
            return spawn([shutil.which("true") or sys.executable])
        except TraceError as error:
            return error

    def trace(self) -> str:
        """Start a program and stop it."""
        return self.child.message if isinstance(self.child, TraceError) else ""

    def write_code(self) -> str:
        """Write to memory that the child may not write itself."""

        def attempt(child: ProcessTarget) -> None:
            at = next(m.start for m in child.mappings() if m.perms.startswith("r-x"))
            child.write(at, child.read(at, 16))

        return self._attempt(attempt)

    def share(self) -> str:
        """Map shared memory in both."""
        return self._attempt(lambda child: child.shared.share(1 << 20, "fentry.doctor"))

    def reserve(self, size: int) -> str:
        """Reserve address space in the child."""
        return self._attempt(lambda child: child.allocator.map(size, "rw-", name="noreserve"))

    def wipe(self) -> str:
        """Map memory that a forked child finds empty."""
        return self._attempt(lambda child: child.allocator.map(4096, "rw-", name="wipeonfork"))

    def emulate(self) -> str:
        """Load the emulator."""
        try:
            import unicorn  # noqa: F401  # that it can be imported is the question
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def compile(self) -> dict[str, str]:
        """Compile a program for each architecture: {name: "" or what went wrong}."""
        from fentry.arch import all_archs
        from fentry.program.compile import compile_text

        found = {}
        for arch in all_archs():
            try:
                compile_text(arch, 'target triple = "TRIPLE"\ndefine void @nothing() { ret void }\n')
                found[arch.name] = ""
            except Exception as error:
                found[arch.name] = str(error).splitlines()[0]
        return found

    def _attempt(self, what: Callable[[ProcessTarget], object]) -> str:
        if isinstance(self.child, TraceError):
            return "not tried: no program can be traced"
        try:
            what(self.child)
        except TraceError as error:
            return error.message
        return ""

    def close(self) -> None:
        """Let go of the child."""
        child = self.__dict__.get("child")
        if child is not None and not isinstance(child, TraceError):
            with contextlib.suppress(TraceError):
                child.kill()
            child.close()


# -- checks -----------------------------------------------------------------------------------------------
def machine(host: Host) -> Check:
    """The instruction set."""
    if host.arch is None:
        return Check("machine", "no", f"{host.machine} is not known", "trace in the emulator: fentry --emulate", True)
    return Check("machine", "ok", f"{host.machine}, {os.uname().release}", needed=True)


def ptrace(host: Host) -> Check:
    """Programs that we start."""
    why = host.trace()
    if not why:
        return Check("start and trace", "ok", "a program of ours can be traced", needed=True)
    todo = "allow ptrace: in a container --cap-add=SYS_PTRACE (and a seccomp profile that lets it through)"
    return Check("start and trace", "no", why, todo, True)


def attach(host: Host) -> Check:
    """Processes that run already: Yama, capabilities."""
    scope = host.text("/proc/sys/kernel/yama/ptrace_scope")
    able = bool(int(host.status.get("CapEff", "0"), 16) >> _CAP_SYS_PTRACE & 1)
    lower = "sysctl kernel.yama.ptrace_scope=0, or run as root"
    if scope == "3":
        return Check("attach", "no", "kernel.yama.ptrace_scope is 3: off until the next boot", "boot without it")
    if able:
        return Check("attach", "ok", "any process (CAP_SYS_PTRACE)")
    if scope == "2":
        return Check("attach", "no", "kernel.yama.ptrace_scope is 2: CAP_SYS_PTRACE only", lower)
    if scope == "1":
        return Check("attach", "limited", "kernel.yama.ptrace_scope is 1: only programs that fentry starts", lower)
    return Check("attach", "ok", f"processes of uid {host.uid}", "" if host.uid == 0 else "others' as root")


def code(host: Host) -> Check:
    """Writing to code."""
    why = host.write_code()
    if not why:
        return Check("write to code", "ok", "through /proc/PID/mem", needed=True)
    forced = [w for w in host.text("/proc/cmdline").split() if w.startswith("proc_mem.force_override=")]
    said = f" ({forced[0]})" if forced else ""
    todo = "boot with proc_mem.force_override=always, or ptrace; a security module may forbid it, too"
    return Check("write to code", "no", f"{why}{said}", todo, True)


def shared(host: Host) -> Check:
    """Shared memory: rings and the undo journal."""
    why = host.share()
    return Check(
        "shared memory", "no" if why else "ok", why or "memfd", "mount /proc, allow memfd_create" * bool(why), True
    )


def segment(host: Host) -> Check | None:
    """How a thread finds its context."""
    if host.arch is None or not host.arch.dialect.segment_register:
        return None
    if host.hwcap2 & _HWCAP2_FSGSBASE:
        return Check("FSGSBASE", "ok", "threads set their own segment base", needed=True)
    return Check(
        "FSGSBASE", "no", "the kernel keeps it from programs", "Linux 5.9 or newer, booted without nofsgsbase", True
    )


def reservation(host: Host) -> Check:
    """The mirror of the stacks (return hooks)."""
    window = host.arch.dialect.stack_window if host.arch is not None else None
    size = window[1] if window else 1 << 43
    mode = host.text("/proc/sys/vm/overcommit_memory")
    limit = "" if host.address_limit < 0 else f", RLIMIT_AS {show.size(host.address_limit)}"
    found = f"vm.overcommit_memory {mode or '?'}{limit}"
    why = host.reserve(size)
    if not why:
        return Check("stack mirror", "ok", f"{show.size(size)} can be reserved; {found}")
    todo = "trace entries only (-p function), or: "
    todo += "ulimit -v unlimited" if limit else "sysctl vm.overcommit_memory=1"
    return Check("stack mirror", "no", f"{why}; {found}", todo)


def wipe(host: Host) -> Check:
    """Forked children."""
    why = host.wipe()
    return Check(
        "MADV_WIPEONFORK", "no" if why else "ok", why or "forked children start anew", "Linux 4.14" * bool(why), True
    )


def seccomp(host: Host) -> Check:
    """Filters on ourselves."""
    mode = host.status.get("Seccomp", "0")
    if mode == "0":
        return Check("seccomp", "ok", "no filter")
    working = not host.trace()
    todo = "" if working else "run with another profile (docker: --security-opt seccomp=unconfined)"
    return Check("seccomp", "ok" if working else "limited", f"mode {mode}: system calls are filtered", todo)


def clock(host: Host) -> Check:
    """The time stamp counter."""
    source = host.text("/sys/devices/system/clocksource/clocksource0/current_clocksource") or "unknown"
    if not host.flags & {"tsc", "constant_tsc", "nonstop_tsc"}:
        return Check("clock", "ok", f"the machine's counter; clocksource {source}")
    steady = {"constant_tsc", "nonstop_tsc"} <= host.flags
    if steady:
        return Check("clock", "ok", f"tsc is invariant; clocksource {source}")
    missing = ", ".join(sorted({"constant_tsc", "nonstop_tsc"} - host.flags))
    return Check(
        "clock",
        "limited",
        f"tsc without {missing}: durations may be wrong by the CPU's frequency; clocksource {source}",
        "use --clock order where only the sequence matters, or fix the frequency (performance governor)",
    )


def shadow_stack(host: Host) -> Check:
    """Shadow stacks in hardware."""
    if "shstk" in host.status.get("x86_Thread_features", ""):
        return Check(
            "shadow stack",
            "limited",
            "on for programs: exceptions through hooked frames are not tested",
            "GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        )
    able = "user_shstk" in host.flags
    return Check("shadow stack", "ok", "the CPU has it, off" if able else "none")


def emulator(host: Host) -> Check:
    """Programs of other machines."""
    why = host.emulate()
    todo = "pip install unicorn (2.1.2 or newer)" if why else ""
    return Check("emulator", "no" if why else "ok", why or "programs of other machines run in it", todo)


def compiler(host: Host) -> Check:
    """Code generation."""
    found = host.compile()
    bad = {name: why for name, why in found.items() if why}
    if not bad:
        return Check("code generation", "ok", ", ".join(sorted(found)), needed=True)
    mine = host.machine in bad
    said = "; ".join(f"{name}: {why}" for name, why in bad.items())
    return Check("code generation", "no" if mine else "limited", said, "pip install --force-reinstall llvmlite", True)


CHECKS: tuple[Callable[[Host], Check | None], ...] = (
    machine,
    ptrace,
    attach,
    code,
    shared,
    segment,
    reservation,
    wipe,
    seccomp,
    clock,
    shadow_stack,
    emulator,
    compiler,
)


def examine(host: Host) -> Iterator[Check]:
    """Run every check that this machine has an answer to."""
    for check in CHECKS:
        found = check(host)
        if found is not None:
            yield found


def works(checks: list[Check]) -> bool:
    """Tell whether live tracing works."""
    return not any(check.needed and check.verdict == "no" for check in checks)


@click.command(context_settings=options.SETTINGS)
@click.option("--json", "as_json", is_flag=True, help="A JSON object per check.")
def doctor(as_json: bool) -> int:
    """Say what this machine allows, and what to do about the rest.

    Everything is tried on a program started for it, nothing else is touched.

    \b
    fentry doctor
    fentry doctor --json | jq -r 'select(.verdict != "ok")'

    Exit status: 0 if live programs can be traced, 1 if not.
    """  # noqa: D301  # \b keeps click from joining the lines
    host = Host()
    try:
        with show.Progress("examining this machine"):
            checks = list(examine(host))
    finally:
        host.close()
    out = show.output()
    if as_json:
        show.write_rows(map(asdict, checks), out)
    else:
        colour = out.isatty() and "NO_COLOR" not in os.environ
        out.writelines(lines(checks, colour=colour))
    return 0 if works(checks) else 1


def lines(checks: list[Check], *, colour: bool) -> Iterator[str]:
    """The report as text."""
    tint = {"ok": "green", "limited": "yellow", "no": "red"}
    for check in checks:
        word = f"{check.verdict:<8}"
        yield f"{click.style(word, tint[check.verdict]) if colour else word}{check.name}: {check.found}\n"
        if check.todo:
            yield f"          {check.todo}\n"
    yield "\n" + (
        "Live programs can be traced.\n"
        if works(checks)
        else "Live programs cannot be traced here; see what says no.\n"
    )
