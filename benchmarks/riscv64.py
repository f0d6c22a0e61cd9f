"""Guest instructions per event on riscv64: counted by the emulator, exact, the same on every machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from benchmarks.report import Limit, Result, Table
from fentry.target import unicorn
from fentry.tracers.session import Plan, Session
from tests.programs.build import build

ABOUT = """\
Instructions that the guest retires for one traced call, all inclusive: the two of the patched sled, the slot, and the
programs. *Each* is the difference between a long and a short run, divided by the calls between them; *first* is what
the first calls cost on top (a ring is claimed). Virtual time counts only the program's own instructions."""

#: name -> tracer, plan, and whether it is entry and exit
TRACERS: dict[str, tuple[str, dict[str, object], bool]] = {
    "nop": ("nop", {}, False),
    "profile --hits": ("profile", {"times": False}, False),
    "profile": ("profile", {}, True),
    "function, order": ("function", {"clock": "order"}, False),
    "function, no parent": ("function", {"parent": False}, False),
    "function": ("function", {}, False),
    "function_graph, order": ("function_graph", {"clock": "order"}, True),
    "function_graph": ("function_graph", {}, True),
    "function_graph, retval": ("function_graph", {"retval": True}, True),
}
#: instruction set -> sled that its compiler can make
SETS = {"rv64gc": "-fpatchable-function-entry=4", "rv64g": "-fpatchable-function-entry=2"}
ENTRY, BOTH = 50, 110
#: what the patched sled itself executes (auipc, jalr), inside the program and so not counted as overhead
SLED = 2


def overhead(path: Path, calls: int, tracer: str, plan: dict[str, object], directory: Path) -> int:
    """Instructions outside the program's own code of one run that calls `callee` so often."""
    sink = os.open(os.devnull, os.O_RDWR)
    try:
        target = unicorn.load(path, [str(path), str(calls)], stdin=sink, stdout=sink, stderr=sink)
        session = Session(
            target,
            Plan(tracer=tracer, wanted=["callee"], **plan),  # type: ignore[arg-type]  # fields by name
            directory=directory,
            argv=[str(path)],
        )
        with session:
            session.start()
            stop = session.wait()
            session.finish()
            assert stop is not None
            assert (stop.kind, stop.status) == ("exited", 0), stop
            assert session.outcome.lost == 0
            return target.overhead
    finally:
        os.close(sink)


def run(*, quick: bool = False) -> Result:
    """Measure; one page."""
    short, long = 100, 10_100 if quick else 200_100
    result = Result("riscv64", ABOUT, notes=[f"runs of {short:,} and {long:,} calls"])
    table = Table("Instructions per traced call", ("tracer", *(f"{s}, {w}" for s in SETS for w in ("each", "first"))))
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (march, sled) in enumerate(SETS.items()):
            path = build(
                Path(__file__).parent / "callee.c",
                cc="riscv64-linux-gnu-gcc",
                flags=(sled, f"-march={march}", "-mabi=lp64d"),
                kind="static",
            )
            for name, (tracer, plan, _) in TRACERS.items():
                at = Path(scratch) / f"{number}-{len(rows)}-{name.replace(', ', '-').replace(' ', '-')}"
                few, much = (overhead(path, n, tracer, plan, at.with_suffix(f".{n}")) for n in (short, long))
                each = (much - few) / (long - short)
                rows.setdefault(name, []).extend((each + SLED, few - each * short))
    for name, cells in rows.items():
        table.rows.append((name, *cells))
        both = TRACERS[name][2]
        for march, each in zip(SETS, cells[::2], strict=True):
            limit = BOTH if both else ENTRY
            what = "entry and exit" if both else "entry"
            result.limits.append(Limit(f"{name}, {march}: {what}", each, limit, "instructions"))
    result.tables.append(table)
    return result
