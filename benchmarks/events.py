"""What a traced call costs: every tracer on every form, hand-written code, and other tools, side by side.

All programs are started first and wait. Then, round after round and each time in another order, each is told to call
its hot function some hundred thousand times and says how long that took: whatever the machine does meanwhile hits all
alike. Each program is there several times, because a process keeps the addresses it was given, lucky or not: one of
thirty was seen to pay twice for the cheapest hook, from its first call to its last. At the end the rings are asked
whether each of those calls was recorded.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.programs import FORMS, HERE, RING, Plain, Running, Traced, hot
from benchmarks.report import Limit, Result, Table

ABOUT = """\
Nanoseconds per call of one hot function, in all and added by tracing: medians over processes of medians over rounds,
programs interleaved, processor time of the thread. Rings hold {ring} bytes per thread, of ours and of the hand-written
code. The hand-written code (`floor.S`) does the least that can be called the same: a record is time and address, 16
bytes, in a ring of the thread."""

#: name -> tracer, plan, records per call; in the order of the table
OURS: dict[str, tuple[str, dict[str, object], int]] = {
    "nop": ("nop", {}, 0),
    "profile --hits": ("profile", {"times": False}, 0),
    "profile": ("profile", {}, 0),
    "function, order": ("function", {"clock": "order"}, 1),
    "function, order, no parent": ("function", {"clock": "order", "parent": False}, 1),
    "function, no parent": ("function", {"parent": False}, 1),
    "function": ("function", {}, 2),
    "function_graph, order": ("function_graph", {"clock": "order"}, 2),
    "function_graph": ("function_graph", {}, 2),
    "function_graph, retval": ("function_graph", {"retval": True}, 3),
}
FLOOR = {
    "off": "sled, idle",
    "nothing": "call; ret",
    "count": "count",
    "order": "record, no clock",
    "entry": "record",
    "pair": "entry and exit",
    "pair-order": "entry and exit, no clock",
}
#: ours -> the hand-written code that does the same
PEER = {
    "nop": "nothing",
    "profile --hits": "count",
    "function, order": "order",
    "function, order, no parent": "order",
    "function, no parent": "entry",
    "function_graph": "pair",
    "function_graph, order": "pair-order",
}
#: calls that hot.c makes before it looks at the clock
WARM = 20_000
#: what is also run in two threads at once
TWICE = (("sled", "function, no parent"), ("sled", "function_graph"), ("sled", "profile --hits"))


@dataclass(slots=True)
class Variant:
    """One line of the table."""

    program: Running
    calls: int
    threads: int = 1
    before: str = ""  #: a command to give first
    times: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """One round."""
        if self.before:
            self.program.ask(self.before)
        self.times.append(self.program.measure(self.calls, self.threads))

    @property
    def median(self) -> float:
        """Nanoseconds per call."""
        return statistics.median(self.times)


def run(*, quick: bool = False) -> Result:
    """Measure; one page."""
    processes, rounds, calls = (1, 3, 200_000) if quick else (5, 9, 500_000)
    every: list[dict[tuple[str, str], Variant]] = []
    others: list[Callable[[], str]] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        for number in range(processes):
            variants: dict[tuple[str, str], Variant] = {}
            place = Path(scratch) / str(number)
            place.mkdir()
            _start_ours(variants, stack, place, calls)
            _start_floor(variants, stack, place, calls)
            _start_others(variants, stack, place, calls // 5, others)
            every.append(variants)
        order = [variant for variants in every for variant in variants.values()]
        shuffle = random.Random(1)
        for _ in range(rounds):
            shuffle.shuffle(order)
            for variant in order:
                variant.measure()
        stack.close()
        notes = [check() for check in others]
    for variants in every:
        _check(variants)
    medians = {key: statistics.median(variants[key].median for variants in every) for key in every[0]}
    notes.insert(0, f"{processes} processes of each kind, {rounds} rounds of {calls:,} calls")
    return _result(medians, sorted(set(notes)))


def _check(variants: dict[tuple[str, str], Variant]) -> None:
    """What was measured must have happened: every call of every round was recorded, or counted."""
    made: dict[Traced, tuple[str, int]] = {}
    for (form, name), v in variants.items():
        if isinstance(v.program, Traced):
            _, before = made.get(v.program, ("", 0))
            made[v.program] = (name, before + v.threads * len(v.times) * (v.calls + WARM))
            assert v.program.session.outcome.lost == 0, f"{form}, {name}: events were lost"
    for program, (name, calls) in made.items():
        tracer, _, records = OURS[name]
        assert program.recorded == records * calls, f"{name}: {program.recorded} records of {calls} calls"
        assert tracer != "profile" or program.hits == calls, f"{name}: {program.hits} hits of {calls} calls"


def _start_ours(variants: dict[tuple[str, str], Variant], stack: ExitStack, scratch: Path, calls: int) -> None:
    for form, flags in FORMS.items():
        path = hot(*flags)
        variants[form, "idle"] = Variant(stack.enter_context(Plain(path, scratch)), calls)
        for n, (name, (tracer, plan, _)) in enumerate(OURS.items()):
            program = stack.enter_context(Traced(path, scratch / f"{form}-{n}", tracer, **plan))
            variants[form, name] = Variant(program, calls)
            if (form, name) in TWICE:
                variants["two threads", name] = Variant(program, calls, threads=2)


def _start_floor(variants: dict[tuple[str, str], Variant], stack: ExitStack, scratch: Path, calls: int) -> None:
    path = hot(*FORMS["sled"], more=(HERE / "floor.c", HERE / "floor.S"))
    program = stack.enter_context(Plain(path, scratch))
    for name in FLOOR:
        variants["floor", name] = Variant(program, calls, before=f"hook {name}")
    for name in ("off", "entry", "pair"):
        variants["floor, two threads", name] = Variant(program, calls, threads=2, before=f"hook {name}")


def _start_others(
    variants: dict[tuple[str, str], Variant],
    stack: ExitStack,
    scratch: Path,
    calls: int,
    checks: list[Callable[[], str]],
) -> None:
    # both of its own hooks are empty: what the compiler's way costs before anything is recorded
    instrument = (
        "-finstrument-functions",
        "-finstrument-functions-exclude-function-list=loop,timed,main,now,pin,second",
    )
    variants["other", "gcc -finstrument-functions, empty hooks"] = Variant(
        stack.enter_context(Plain(hot(*instrument, more=(HERE / "empty.c",)), scratch)), calls
    )
    if shutil.which("uftrace") is None:
        return
    for name, flags, how in (
        ("uftrace, -pg", ("-pg",), ()),
        ("uftrace, -pg -mfentry", ("-pg", "-mfentry"), ()),
        ("uftrace, patchable, -P callee", ("-fpatchable-function-entry=5",), ("-P", "^callee$")),
    ):
        path = hot(*flags)
        data = scratch / f"uftrace-{len(checks)}"
        program = Plain(path, scratch, "uftrace", "record", "--no-libcall", "--no-event", *how, "-d", str(data))
        stack.enter_context(program)
        variant = variants["other", name] = Variant(program, calls)
        checks.append(lambda name=name, data=data, variant=variant: _uftrace_kept(name, data, variant))  # type: ignore[misc]  # defaults bind


def _uftrace_kept(name: str, data: Path, variant: Variant) -> str:
    """How much of what was called uftrace has recorded: entry and exit are 16 bytes each."""
    size = sum(p.stat().st_size for p in data.glob("*.dat"))
    wanted = 32 * len(variant.times) * (variant.calls + WARM)
    return f"{name}: recorded {100 * size / wanted:.0f} % of the calls that it was measured with"


def _result(ns: dict[tuple[str, str], float], notes: list[str]) -> Result:
    result = Result("events", ABOUT.format(ring=f"{RING:,}"), notes=notes)
    # untraced is the build without any sled: what is added is measured from there
    bare = ns["entry-jump", "idle"]
    table = Table("Hand-written", ("what", "ns per call", "added"))
    for name, about in FLOOR.items():
        table.rows.append((about, ns["floor", name], ns["floor", name] - bare))
    result.tables.append(table)
    table = Table("fentry", ("tracer", *(f"{form}{more}" for form in FORMS for more in ("", ", added")), "to floor"))
    table.rows.append(("not traced", *(x for form in FORMS for x in (ns[form, "idle"], ns[form, "idle"] - bare)), None))
    for name in OURS:
        cells = [x for form in FORMS for x in (ns[form, name], ns[form, name] - bare)]
        peer = PEER.get(name)
        table.rows.append((name, *cells, ns["sled", name] / ns["floor", peer] if peer else None))
    result.tables.append(table)
    table = Table("Other tools, entry and exit", ("what", "ns per call", "added", "to function_graph (added)"))
    graph = ns["sled", "function_graph"] - bare
    for (group, name), value in ns.items():
        if group == "other":
            table.rows.append((name, value, value - bare, (value - bare) / graph))
    result.tables.append(table)
    table = Table("Two threads at once", ("what", "one thread", "two threads", "change, %"))
    for group, single in (("floor, two threads", "floor"), ("two threads", "sled")):
        for (which, name), value in ns.items():
            if which == group:
                one = ns[single, name]
                table.rows.append((f"{single}: {FLOOR.get(name, name)}", one, value, 100 * (value / one - 1)))
    result.tables.append(table)
    worst = max(ns["two threads", name] / ns["sled", name] - 1 for _, name in TWICE)
    result.limits = [
        *(
            Limit(f"entry event to hand-written, {form}", ns[form, "function, no parent"] / ns["floor", "entry"], 1.3)
            for form in FORMS
        ),
        *(
            Limit(f"entry and exit to hand-written, {form}", ns[form, "function_graph"] / ns["floor", "pair"], 1.3)
            for form in FORMS
        ),
        *(
            Limit(f"entry event, order clock, {form}, added", ns[form, "function, order"] - bare, 4.0, "ns")
            for form in FORMS
        ),
        *(Limit(f"hits, {form}, added", ns[form, "profile --hits"] - bare, 3.0, "ns") for form in FORMS),
        Limit("second thread changes a call by", 100 * worst, 10.0, "%"),
        Limit("idle sled (five nops), added", ns["sled", "idle"] - bare, 0.5, "ns"),
    ]
    peers = [value - bare for (group, name), value in ns.items() if group == "other" and name.startswith("uftrace")]
    if peers:
        result.limits.append(Limit("uftrace (its best) to function_graph, added", min(peers) / graph, 3.0, least=True))
    return result
