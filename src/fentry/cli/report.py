"""``fentry report``: a trace as text, JSON, folded stacks, Chrome's format or Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

import click

from fentry.cli import options, show
from fentry.errors import AskedWrong

if TYPE_CHECKING:
    import pyarrow as pa

    from fentry.export import Exporter
    from fentry.record.store import Trace

#: rows turned into Python objects at a time
_ROWS = 1 << 14
FORMATS = ("ftrace", "folded", "chrome", "parquet")


@click.command(context_settings=options.SETTINGS)
@click.option("-i", "--input", "directory", default="fentry.data", metavar="DIR", help="The trace [fentry.data].")
@click.option("--json", "as_json", is_flag=True, help="A JSON object per call (or per event, where only entries are).")
@click.option("--format", "form", type=click.Choice(FORMATS), default="ftrace", help="What to write [ftrace].")
@click.option("-o", "--output", metavar="FILE", help="Where to; a directory for chrome and parquet.")
@click.option(
    "--weight",
    type=click.Choice(["self_ns", "calls", "total"]),
    help="folded: what the numbers are [self_ns; calls if there are no times].",
)
@click.option("--abstime", is_flag=True, help="ftrace: show the time of each line.")
@click.option("--proc/--no-proc", default=None, help="ftrace: show the thread of each line [if there are several].")
@click.option("--tail", is_flag=True, help="ftrace: name the function after each closing brace.")
def report(directory: str, output: str | None, form: str, as_json: bool, **style: Any) -> int:
    """Print a trace.

    Text is what the kernel's function and function_graph tracers print; the column of CPUs holds the number of the
    thread. JSON is one object per line: of a graph each call when it ended, thread by thread, where (tid, parent_row)
    names the row of the caller; of a function trace each call with its caller.

    \b
    fentry report | less
    fentry report -i slow.data --abstime --proc
    fentry report --json | jq -r 'select(.duration_ns > 1e6).function'
    fentry report --format folded -o out.self_ns.folded
    fentry report --format chrome -o out.chrome        # chunk-0001.json ...: each loads alone
    fentry report --format parquet -o out.parquet      # events, calls, functions, threads, meta

    Exit status: 0; 1 for a trace that cannot be read; 2 for a request that cannot be right.
    """  # noqa: D301  # \b keeps click from joining the lines
    if as_json and form != "ftrace":
        raise AskedWrong(f"both --json and --format {form}", hint="give one of them")
    if style["weight"] and form != "folded":
        raise AskedWrong("--weight is for --format folded")
    from fentry.record.store import Trace

    trace = Trace.open(directory)
    if form in ("chrome", "parquet"):
        _to_directory(trace, form, output or f"{directory.rstrip('/')}.{form}")
    else:
        out = show.to_file(output) if output else show.output()
        try:
            with show.Progress(f"reading {directory}", enabled=bool(output)):
                if as_json:
                    show.write_rows(rows(trace), out)
                else:
                    _to_text(trace, form, out, style)
            out.flush()
        finally:
            if output:
                out.close()
    for damage in trace.damage:
        show.say(f"fentry: {directory}: {damage}")
    if trace.lost:
        show.say(f"fentry: {directory}: {show.count(trace.lost, 'event')} lost while recording")
    return 0


def _to_directory(trace: Trace, form: str, path: str) -> None:
    from fentry.export import export

    exporter: Exporter
    if form == "chrome":
        from fentry.export.chrome import Chrome

        exporter = Chrome(path)
    else:
        from fentry.export.parquet import Parquet

        exporter = Parquet(path)
    total = trace.count()
    with show.Progress(f"writing {path}") as progress:
        export(trace, exporter, lambda done: progress(f"writing {path}: {100 * done // max(total, 1)} %"))
    show.say(f"fentry: {show.count(total, 'event')} in {path}")


def _to_text(trace: Trace, form: str, out: TextIO, style: dict[str, Any]) -> None:
    from fentry.export import export
    from fentry.export.folded import Folded
    from fentry.export.ftrace import FunctionText, GraphText

    exporter: Exporter
    if form == "folded":
        timed = trace.meta.clock.timed and trace.meta.clock.ns_per_tick
        weight = style["weight"] or ("self_ns" if timed else "calls")
        show.say(f"fentry: weight {weight}")
        exporter = Folded(out, weight)
    elif trace.marks.returning.any():
        retval = any(op.get("retval") for op in trace.meta.ops)
        exporter = GraphText(out, retval=retval, abstime=style["abstime"], proc=style["proc"], tail=style["tail"])
    else:
        exporter = FunctionText(out)
    export(trace, exporter)


def rows(trace: Trace) -> Iterator[dict[str, Any]]:
    """Rows of ``--json``: calls where returns are recorded, else entries."""
    return _calls(trace) if trace.marks.returning.any() else _entries(trace)


def _calls(trace: Trace) -> Iterator[dict[str, Any]]:
    from fentry.record.calls import iter_calls
    from fentry.record.stack import Flag

    sites, meta = trace.meta.sites, trace.meta
    timed = meta.clock.timed
    spelled: dict[int, list[str]] = {}
    for call in _objects(iter_calls(trace)):
        flags = call["flags"]
        if flags not in spelled:
            spelled[flags] = [(f.name or "").lower() for f in Flag if f & flags]
        site = sites[call["site"]]
        yield {
            "function": site.name,
            "module": site.module,
            "ns": call["ns"],
            "duration_ns": call["dur"] if timed else None,
            "self_ns": call["own"] if timed else None,
            "depth": call["depth"],
            "pid": call["pid"],
            "tid": call["tid"],
            "comm": meta.comm(call["tid"]),
            "row": call["row"],
            "parent_row": call["parent_row"],
            "retval": call["retval"],
            "flags": spelled[flags],
        }


def _entries(trace: Trace) -> Iterator[dict[str, Any]]:
    import pyarrow.compute as pc

    from fentry.record.layout import Kind

    sites, meta = trace.meta.sites, trace.meta
    for batch in trace.events():
        kind = batch.column("kind").to_numpy()
        entered = batch.filter((kind == Kind.ENTRY) | (kind == Kind.TAIL) | (kind == Kind.PLAIN))
        for start in range(0, entered.num_rows, _ROWS):
            part = entered.slice(start, _ROWS)
            callers = trace.symbolize(pc.fill_null(part.column("payload"), 0).to_numpy()).to_pylist()
            for event, caller in zip(part.to_pylist(), callers, strict=True):
                site = sites[event["site"]]
                yield {
                    "function": site.name,
                    "module": site.module,
                    "ns": event["ns"],
                    "caller": caller if event["payload"] else None,
                    "pid": event["pid"],
                    "tid": event["tid"],
                    "comm": meta.comm(event["tid"]),
                    "seq": event["seq"],
                    "lost": event["lost"],
                }


def _objects(tables: Iterator[pa.Table]) -> Iterator[dict[str, Any]]:
    """Rows of tables as Python objects, a few at a time."""
    for table in tables:
        for start in range(0, table.num_rows, _ROWS):
            yield from table.slice(start, _ROWS).to_pylist()
