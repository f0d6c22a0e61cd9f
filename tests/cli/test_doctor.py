"""``fentry doctor``: each condition that can fail, simulated; and this machine as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property

import pytest

from fentry.cli import doctor
from fentry.cli.doctor import Check, Host
from tests.cli.conftest import fentry


class Fake(Host):
    """A machine where everything works, without asking any."""

    machine = Host.machine
    uid = 1000
    hwcap2 = 2
    address_limit = -1
    files: dict[str, str] = {
        "/proc/sys/vm/overcommit_memory": "0",
        "/proc/self/status": "Name:\tx\nCapEff:\t0000000000000000\nSeccomp:\t0\n",
        "/proc/cpuinfo": "processor : 0\nflags : fpu tsc constant_tsc nonstop_tsc\n",
        "/sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc",
    }

    def text(self, path: str) -> str:
        return self.files.get(path, "")

    def trace(self) -> str:
        return ""

    def write_code(self) -> str:
        return ""

    def share(self) -> str:
        return ""

    def reserve(self, size: int) -> str:
        return ""

    def wipe(self) -> str:
        return ""

    def emulate(self) -> str:
        return ""

    def compile(self) -> dict[str, str]:
        return {self.machine: ""}


def refusing(what: str, why: str) -> Host:
    """A machine where one attempt fails."""
    return type("Refusing", (Fake,), {what: lambda self, *_: why})()


def having(path: str, text: str) -> Host:
    """A machine where one file of the kernel's says something else."""
    return type("Having", (Fake,), {"files": {**Fake.files, path: text}})()


def test_a_machine_where_everything_works() -> None:
    checks = list(doctor.examine(Fake()))
    assert {c.verdict for c in checks} == {"ok"}
    assert doctor.works(checks)


YAMA = "/proc/sys/kernel/yama/ptrace_scope"
STATUS = "/proc/self/status"


@pytest.mark.parametrize(
    ("host", "check", "verdict", "found", "todo", "live"),
    [
        (refusing("trace", "seccomp says no"), doctor.ptrace, "no", "seccomp says no", "cap-add=SYS_PTRACE", False),
        (having(YAMA, "1"), doctor.attach, "limited", "scope is 1", "ptrace_scope=0", True),
        (having(YAMA, "2"), doctor.attach, "no", "scope is 2", "root", True),
        (having(YAMA, "3"), doctor.attach, "no", "next boot", "boot", True),
        (refusing("write_code", "EIO"), doctor.code, "no", "EIO", "proc_mem.force_override", False),
        (refusing("share", "EPERM"), doctor.shared, "no", "EPERM", "memfd", False),
        (refusing("reserve", "ENOMEM"), doctor.reservation, "no", "overcommit_memory 0", "overcommit_memory=1", True),
        (refusing("wipe", "EINVAL"), doctor.wipe, "no", "EINVAL", "Linux 4.14", False),
        (having("/proc/cpuinfo", "flags : tsc"), doctor.clock, "limited", "constant_tsc", "--clock order", True),
        (refusing("emulate", "ImportError"), doctor.emulator, "no", "ImportError", "pip install", True),
        (
            having(STATUS, "Name:\tx\nCapEff:\t0\nx86_Thread_features:\tshstk\n"),
            doctor.shadow_stack,
            "limited",
            "on for programs",
            "GLIBC_TUNABLES",
            True,
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_condition_that_fails(
    host: Host, check: Callable[[Host], Check], verdict: str, found: str, todo: str, live: bool
) -> None:
    result = check(host)
    assert result.verdict == verdict
    assert found in result.found
    assert todo in result.todo
    assert doctor.works(list(doctor.examine(host))) is live


def test_no_segment_base_for_programs() -> None:
    class Old(Fake):
        hwcap2 = 0

    check = doctor.segment(Old())
    if Old().arch is None or not Old().arch.dialect.segment_register:
        assert check is None
    else:
        assert check is not None
        assert (check.verdict, check.needed) == ("no", True)
        assert "5.9" in check.todo


def test_limited_address_space_is_named() -> None:
    class Small(Fake):
        address_limit = 1 << 32

        def reserve(self, size: int) -> str:
            return "ENOMEM"

    check = doctor.reservation(Small())
    assert "RLIMIT_AS 4.0 GiB" in check.found
    assert "ulimit -v unlimited" in check.todo


def test_filtered_system_calls() -> None:
    filtered = having(STATUS, "Name:\tx\nCapEff:\t0\nSeccomp:\t2\n")
    assert doctor.seccomp(filtered).verdict == "ok"
    stuck = type("Stuck", (type(filtered),), {"trace": lambda self: "EPERM"})()
    assert doctor.seccomp(stuck).verdict == "limited"
    assert "seccomp=unconfined" in doctor.seccomp(stuck).todo


def test_capability_beats_yama() -> None:
    able = type(
        "Able",
        (Fake,),
        {"files": {**Fake.files, YAMA: "2", STATUS: f"CapEff:\t{1 << 19:016x}\n"}},
    )()
    assert doctor.attach(able).verdict == "ok"


def test_unknown_machine() -> None:
    class Strange(Fake):
        machine = "m68k"

        @cached_property
        def arch(self) -> None:
            return None

    checks = list(doctor.examine(Strange()))
    assert not doctor.works(checks)
    assert "emulator" in checks[0].todo


def test_a_compiler_without_a_target() -> None:
    class Poor(Fake):
        def compile(self) -> dict[str, str]:
            return {self.machine: "", "other": "no such target"}

    assert doctor.compiler(Poor()).verdict == "limited"
    lame = type("Lame", (Fake,), {"compile": lambda self: {self.machine: "no such target"}})()
    assert doctor.compiler(lame).verdict == "no"


def test_text_names_what_to_do() -> None:
    checks = [Check("one", "ok", "fine"), Check("two", "no", "bad", "do this", needed=True)]
    assert list(doctor.lines(checks, colour=False)) == [
        "ok      one: fine\n",
        "no      two: bad\n",
        "          do this\n",
        "\nLive programs cannot be traced here; see what says no.\n",
    ]
    assert "\x1b[" in "".join(doctor.lines(checks, colour=True))


@pytest.mark.live
def test_this_machine() -> None:
    done = fentry("doctor", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, rows
    assert {row["verdict"] for row in rows if row["needed"]} == {"ok"}
    assert {"start and trace", "attach", "write to code", "clock"} <= {
        row["check" if "check" in row else "name"] for row in rows
    }


@pytest.mark.live
def test_this_machine_with_little_address_space() -> None:
    done = fentry("doctor", preexec_fn=_little)
    assert b"no      stack mirror: " in done.stdout
    assert done.returncode == 0


def _little() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
