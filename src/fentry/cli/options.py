"""Options that several verbs share, the words people write sizes and times in, and what becomes of them: a Plan."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fentry.errors import AskedWrong

if TYPE_CHECKING:
    from fentry.tracers.session import Plan

    _ParamType = click.ParamType[int]
else:
    _ParamType = click.ParamType  # generic since click 8.2 only

F = TypeVar("F", bound=Callable[..., Any])

#: the program and its arguments: everything from the first word that is no option of ours
PROGRAM_SETTINGS: dict[str, Any] = {
    "allow_interspersed_args": False,
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9}
_SIZES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Duration(_ParamType):
    """A time with its unit: ``100us``, ``1.5ms``, ``2s``, ``1m``. Gives nanoseconds.

    Args:
        bare: unit of a number without one; "" refuses it.
    """

    name = "duration"

    def __init__(self, bare: str = "") -> None:
        self.bare = bare

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Give nanoseconds."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zµμ]*)", str(value))
        unit = (found[2] or self.bare) if found else ""
        if found is None or (unit not in _UNITS and not (unit == "" and float(found[1]) == 0)):
            self.fail(f"{value!r} is not a duration: a number with ns, us, ms, s or m", param, ctx)
        ns = float(found[1]) * _UNITS.get(unit, 1)
        if not math.isfinite(ns) or ns >= 1 << 62:
            self.fail(f"{value!r} is too long", param, ctx)
        return round(ns)


class Size(_ParamType):
    """A number of bytes: ``65536``, ``64K``, ``1M``, ``2GiB``. Gives bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Give bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,18})\s*([KMGT]?)(?:i?B)?", str(value), re.IGNORECASE)
        if found is None or int(found[1]) == 0:
            self.fail(f"{value!r} is not a size: a number with K, M or G", param, ctx)
        return int(found[1]) << _SIZES[found[2].upper()]


@dataclass(slots=True)
class Asked:
    """What a command line asks to be traced, and how.

    Attributes:
        argv: the program and its arguments; empty with `pid`.
        pid: a running process, or 0.
        duration_s: stop tracing after so many seconds; None = at the program's end.
        emulate: run the program in the emulator whatever it is.
        quiet: say nothing but errors.
        plan: fields of :class:`fentry.tracers.session.Plan`.
    """

    argv: list[str]
    pid: int = 0
    duration_s: float | None = None
    emulate: bool = False
    quiet: bool = False
    plan: dict[str, Any] = field(default_factory=dict)

    def make_plan(self, **more: Any) -> Plan:
        """Give the plan."""
        from fentry.tracers.session import Plan

        return Plan(**self.plan, **more)


def what_to_trace(command: F) -> F:
    """Options on what is traced, shared by every verb that traces."""
    for option in reversed(
        [
            click.option(
                "-l",
                "--filter",
                "wanted",
                multiple=True,
                metavar="GLOB",
                help="Trace functions that match; repeatable. LIB:GLOB names a library's. Default: the program's own.",
            ),
            click.option(
                "-n", "--notrace", "unwanted", multiple=True, metavar="GLOB", help="Leave these out; repeatable."
            ),
            click.option("--emulate", is_flag=True, help="Run the program in the emulator (foreign ones go there)."),
            click.option(
                "--clock",
                metavar="CLOCK",
                help="tsc: time [default]; mono: the same as CLOCK_MONOTONIC; order: sequence only, cheapest; icount: "
                "instructions, in the emulator [default there].",
            ),
            click.option("--buffer-size", type=Size(), metavar="SIZE", help="Ring of each thread [1M]."),
            click.option("--threads", type=click.IntRange(1, 1 << 16), metavar="N", help="How many can record [256]."),
            click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors."),
        ]
    ):
        command = option(command)
    return command


def what_to_record(command: F) -> F:
    """Options on which events are recorded of what is traced."""
    for option in reversed(
        [
            click.option("--max-depth", type=click.IntRange(0), default=0, metavar="N", help="Only calls N deep."),
            click.option(
                "--threshold", type=Duration(), default=0, metavar="TIME", help="Only calls that took so long: 100us."
            ),
            click.option("--retval", is_flag=True, help="Record return values."),
        ]
    ):
        command = option(command)
    return command


def what_runs(command: F) -> F:
    """Options on a process that runs already, and on when to stop."""
    for option in reversed(
        [
            click.option("--pid", type=click.IntRange(1), metavar="N", help="Trace a running process."),
            click.option(
                "--duration",
                type=Duration("s"),
                metavar="TIME",
                help="Stop tracing after so long (5 or 500ms); the program goes on.",
            ),
            click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[--] PROG ARGS..."),
        ]
    ):
        command = option(command)
    return command


def asked(given: dict[str, Any]) -> Asked:
    """Turn parsed options into what is asked. Raises AskedWrong for those that do not go together."""
    argv, pid = list(given.get("argv", ())), given.get("pid") or 0
    if argv and pid:
        raise AskedWrong("both --pid and a program to run", hint="give one of them")
    if not argv and not pid:
        raise AskedWrong("no program to run", hint="fentry VERB [OPTIONS] -- PROG ARGS, or --pid N")
    if pid and given.get("emulate"):
        raise AskedWrong("a running process cannot be emulated", hint="leave out --emulate")
    plan: dict[str, Any] = {
        "wanted": given.get("wanted", ()),
        "unwanted": given.get("unwanted", ()),
        "clock": given.get("clock") or "",
    }
    if given.get("policy"):
        from fentry.record.layout import Policy

        plan["policy"] = Policy[given["policy"].upper()]
    if given.get("buffer_size"):
        plan["ring_size"] = _power_of_two(max(given["buffer_size"], 4096))
    if given.get("threads"):
        plan["rings"] = _power_of_two(given["threads"])
    for option, name in (("max_depth", "depth"), ("threshold", "threshold_ns"), ("retval", "retval")):
        if given.get(option):
            plan[name] = given[option]
    duration = given.get("duration")
    return Asked(
        argv,
        pid,
        None if duration is None else duration / 1e9,
        bool(given.get("emulate")),
        bool(given.get("quiet")),
        plan,
    )


def _power_of_two(n: int) -> int:
    """The next power of two: what rings are made of."""
    return 1 << (n - 1).bit_length()
