"""``fentry stat``: hits and times of each function, added up in the target, or from a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

import click

from fentry.cli import options, show, traced
from fentry.errors import AskedWrong

if TYPE_CHECKING:
    from fentry.tracers.session import Row

COLUMNS = ("function", "module", "hits", "total_ns", "self_ns", "min_ns", "max_ns")
SORTS = ("total", "self", "hits", "avg", "min", "max", "function")


@click.command(context_settings=options.PROGRAM_SETTINGS)
@click.option("-i", "--input", "directory", metavar="DIR", help="Count what is in this trace [fentry.data].")
@click.option("--hits", is_flag=True, help="Count only: cheapest, works with any clock.")
@click.option("--sort", type=click.Choice(SORTS), help="Largest first [total; hits where nothing is timed].")
@click.option("--json", "as_json", is_flag=True, help="A JSON object per function; times null where not known.")
@click.option("-o", "--output", metavar="FILE", help="Where to [stdout; stderr for a program that is run].")
@options.what_to_trace
@options.what_runs
def stat(directory: str | None, hits: bool, sort: str | None, as_json: bool, output: str | None, **given: Any) -> int:
    """Show hits and times of each function.

    With a program or --pid, functions are counted in the target: no events are written, however long it runs. Otherwise
    a trace is read. Time is the outermost calls' where a function calls itself; self is without traced
    callees. The table goes to stderr where standard output is the program's.

    \b
    fentry stat -- ./program its arguments
    fentry stat --hits -l 'libc.so.6:*' -- ls -l
    fentry stat --pid 1234 --duration 10 --sort self
    fentry stat -i fentry.data --json | jq .function

    Exit status: the program's; otherwise 0, 1 for a trace that cannot be read, 2 for a request that cannot be right.
    """  # noqa: D301  # \b keeps click from joining the lines
    if not given["argv"] and not given["pid"]:
        if hits or any(given[name] for name in ("wanted", "unwanted", "emulate", "clock", "duration")):
            raise AskedWrong("options for tracing, but nothing to trace", hint="fentry stat -- PROG ARGS, or --pid N")
        rows = of_trace(directory or "fentry.data")
        _write(rows, sort, as_json, output, to_stderr=False)
        return 0
    if directory is not None:
        raise AskedWrong("both a trace to read and something to trace", hint="give one of them")
    asked = options.asked(given)
    sink = show.to_file(output) if output else None  # refused before anything runs
    if sink is not None:
        sink.close()
    with traced.Signals() as signals, traced.traced(asked, directory=None, tracer="profile", times=not hits) as run:
        traced.wait(run, asked, signals)
        counted = run.session.rows()
        if not asked.quiet:
            traced.remark(run)
    timed = not hits and run.session.engine.clock != "order"
    _write([of_counters(row, timed=timed) for row in counted], sort, as_json, output, to_stderr=run.started)
    return run.status()


def of_trace(directory: str) -> list[dict[str, Any]]:
    """Rows from a trace."""
    from fentry.record.stat import stat as count
    from fentry.record.store import Trace

    with show.Progress(f"reading {directory}"):
        trace = Trace.open(directory)
        rows = count(trace)
    for damage in trace.damage:
        show.say(f"fentry: {directory}: {damage}")
    if trace.lost:
        show.say(f"fentry: {directory}: {show.count(trace.lost, 'event')} lost while recording, so hits are too few")
    return rows


def of_counters(row: Row, *, timed: bool) -> dict[str, Any]:
    """Turn counters into a row; times are None where none were taken."""
    out = asdict(row)
    return out if timed else out | dict.fromkeys(COLUMNS[3:])


def _write(rows: list[dict[str, Any]], sort: str | None, as_json: bool, output: str | None, *, to_stderr: bool) -> None:
    rows = ordered(rows, sort)
    if output:
        with show.to_file(output) as out:
            _print(rows, as_json, out)
    elif to_stderr:
        import io

        text = io.StringIO()
        _print(rows, as_json, text)
        show.say(text.getvalue().removesuffix("\n"))
    else:
        _print(rows, as_json, show.output())


def _print(rows: Sequence[dict[str, Any]], as_json: bool, out: TextIO) -> None:
    if as_json:
        show.write_rows(({name: row[name] for name in COLUMNS} for row in rows), out)
    else:
        out.writelines(table(rows))


def ordered(rows: list[dict[str, Any]], sort: str | None) -> list[dict[str, Any]]:
    """Order rows: largest first, functions by name."""
    if sort is None:
        sort = "total" if any(row["total_ns"] is not None for row in rows) else "hits"
    if sort == "function":
        return sorted(rows, key=lambda r: (r["function"], r["module"]))

    def value(row: dict[str, Any]) -> float:
        if sort == "avg":
            return (row["total_ns"] or 0) / row["hits"] if row["hits"] else 0.0
        return float(row[sort if sort == "hits" else f"{sort}_ns"] or 0)

    return sorted(rows, key=lambda r: (-value(r), -r["hits"], r["function"], r["module"]))


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines as in the kernel's trace_stat, with more columns. Source: kernel/trace/ftrace.c ``function_stat_show``."""
    if not rows:
        return ["  no function was called\n"]
    modules = {row["module"] for row in rows}
    names = [f"{r['function']} [{r['module']}]" if len(modules) > 1 else r["function"] for r in rows]
    width = min(max([30, *map(len, names)]), 60)
    timed = any(row["total_ns"] is not None for row in rows)
    titles = ("Time", "Self", "Avg", "Min", "Max") if timed else ()
    out = [
        f"  {'Function':<{width}}  {'Hit':>10}" + "".join(f"  {t:>14}" for t in titles) + "\n",
        f"  {'--------':<{width}}  {'---':>10}" + "".join(f"  {'-' * len(t):>14}" for t in titles) + "\n",
    ]
    for row, name in zip(rows, names, strict=True):
        line = f"  {name:<{width}}  {row['hits']:>10}"
        if timed:
            times = [row["total_ns"], row["self_ns"], _average(row), row["min_ns"], row["max_ns"]]
            line += "".join(f"  {'-' if t is None else f'{t / 1000:.3f} us':>14}" for t in times)
        out.append(line + "\n")
    return out


def _average(row: dict[str, Any]) -> float | None:
    return None if row["total_ns"] is None else row["total_ns"] / max(row["hits"], 1)
