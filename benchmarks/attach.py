"""How long it takes to hook many functions of a process that runs, and for how long it is stopped meanwhile."""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Limit, Result, Table

ABOUT = """\
A program of so many functions runs and waits for input. *Seconds*: from the pid to the last function hooked (ELF,
verdicts, generated code, patches), without the start of the interpreter, which *all* includes; *busy*: processor time
of the same. *Stopped*: all the time in which the program could not run, in milliseconds. *Cold*: no caches of ours.
Medians; each run is a process of its own."""

FORMS = {"sled": ("-fpatchable-function-entry=5",), "entry-jump": ()}
TRACERS = ("function", "function_graph")
SECONDS, STOPPED_MS = 2.0, 200.0


def once(path: Path, tracer: str, cache: Path, *, profile: bool = False) -> dict[str, Any]:
    """Attach in a fresh process with its own cache directory; what it measured."""
    child = subprocess.Popen([path, "1", "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdout.readline()
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            done = subprocess.run(
                [sys.executable, "-m", __name__, str(child.pid), tracer, scratch, "profile" if profile else ""],
                env=os.environ | {"XDG_CACHE_HOME": str(cache)},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
        all_of_it = time.monotonic() - begun
    finally:
        words = child.communicate("\n")[0]
    assert child.returncode == 0, f"the program was harmed: {child.returncode}, {words}"
    return dict(json.loads(done.stdout)) | {"all": all_of_it}


def attach(pid: int, tracer: str, scratch: Path, *, profile: bool) -> dict[str, Any]:
    """Hook every ``fn_*`` of a process and let go again; runs in a process of its own."""
    from fentry.target import process
    from fentry.tracers.session import Plan, Session

    watch = cProfile.Profile() if profile else None
    if watch is not None:
        watch.enable()
    begun, busy = time.perf_counter(), time.process_time()
    target = process.attach(pid)
    plan = Plan(tracer=tracer, wanted=["fn_*"])
    session = Session(target, plan, directory=scratch / "trace", started=False)
    with session:
        session.start()
        seconds, busy = time.perf_counter() - begun, time.process_time() - busy
        if watch is not None:
            watch.disable()
        stops = list(session.engine.stops)
        begun = time.perf_counter()
        outcome = session.finish()
        detach = time.perf_counter() - begun
    assert outcome.restored is not None
    assert not outcome.restored.strange
    result = {
        "seconds": seconds,
        "busy": busy,
        "stops_ms": [ns / 1e6 for ns in stops],
        "stopped_ms": sum(stops) / 1e6,
        "detach": detach,
        "sites": len(session.sites),
    }
    if watch is not None:
        result["profile"] = _hottest(watch)
    return result


def _hottest(watch: cProfile.Profile) -> list[tuple[str, float, float]]:
    """The twelve functions with most time of their own: (name, own seconds, seconds with callees)."""
    rows = []
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]]
    stats = pstats.Stats(watch).stats  # type: ignore[attr-defined]  # typeshed does not know it
    for (file, _line, function), (_, _, own, total, _) in stats.items():
        place = Path(file)
        where = f"{place.parent.name}/{place.stem}." if place.suffix == ".py" else ""
        rows.append((where + function, own, total))
    return sorted(rows, key=lambda row: -row[1])[:12]


def run(*, quick: bool = False) -> Result:
    """Measure; one page."""
    from tests.programs.many import many

    rounds = 1 if quick else 3
    result = Result("attach", ABOUT, notes=[f"{rounds} rounds"])
    table = Table(
        "Attach",
        (
            "functions, form, tracer",
            "cache",
            "hooked",
            "seconds",
            "busy, s",
            "all",
            "stopped, ms",
            "longest, ms",
            "detach, s",
        ),
    )
    result.tables.append(table)
    with tempfile.TemporaryDirectory() as scratch:
        for count in (1000, 20_000):
            for form, flags in FORMS.items():
                path = many(count, flags=flags)
                for tracer in TRACERS:
                    name = f"{count:,} {form} {tracer}"
                    seen: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
                    for _ in range(rounds):
                        cache = Path(scratch) / "cache"
                        shutil.rmtree(cache, ignore_errors=True)
                        cache.mkdir(mode=0o700)
                        for runs in seen.values():
                            runs.append(once(path, tracer, cache))
                    for state, runs in seen.items():
                        _row(result, table, name, state, runs, judged=count == 20_000)
                    if count == 20_000 and (form, tracer) == ("entry-jump", "function_graph"):
                        hot = Table(
                            f"Where time goes: {name}, warm, under a profiler", ("function", "own, s", "in all, s")
                        )
                        hot.rows += once(path, tracer, cache, profile=True)["profile"]
    result.tables.append(hot)
    if any(float(row[4] or 0) < 0.75 * float(row[3] or 0) for row in table.rows if row[2] == 20_000):
        result.notes.append(
            "others used the processors meanwhile: where seconds exceed busy by far, ask again in peace"
        )
    return result


def _row(result: Result, table: Table, name: str, state: str, runs: list[dict[str, Any]], *, judged: bool) -> None:
    def median(key: str) -> float:
        return statistics.median(run[key] for run in runs)

    longest = statistics.median(max(run["stops_ms"]) for run in runs)
    table.rows.append(
        (
            name,
            state,
            runs[0]["sites"],
            median("seconds"),
            median("busy"),
            median("all"),
            median("stopped_ms"),
            longest,
            median("detach"),
        )
    )
    if judged:
        result.limits.append(Limit(f"{name}, {state}", median("seconds"), SECONDS, "s"))
        result.limits.append(Limit(f"{name}, {state}: stopped", median("stopped_ms"), STOPPED_MS, "ms"))


if __name__ == "__main__":
    print(json.dumps(attach(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), profile=bool(sys.argv[4]))))
