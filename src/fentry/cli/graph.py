"""``fentry PROG ARGS``: run a program, then print the graph of its calls. No configuration.

The trace goes to a temporary directory and from there to stderr (standard output is the program's), or to a file with
``-o``. What is printed is limited, so what is recorded is, too: when far more is recorded than will be
shown, tracing ends and the program goes on at full speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from fentry.cli import VERBS, near, options, show, traced
from fentry.errors import AskedWrong, TraceError

if TYPE_CHECKING:
    from fentry.record.store import Trace

#: lines printed unless told otherwise
LINES = 10_000
#: records after which tracing ends, where the number of lines is limited: 256 MiB
ENOUGH = 1 << 24


@click.command(context_settings=options.PROGRAM_SETTINGS)
@options.what_to_trace
@options.what_to_record
@click.option("-o", "--output", metavar="FILE", help="Write the graph here instead of to stderr.")
@click.option(
    "--lines", type=click.IntRange(0), metavar="N", help=f"Print at most N lines, 0: all [{LINES:,}; with -o: all]."
)
@options.what_runs
def graph(output: str | None, lines: int | None, **given: Any) -> int:
    """Run a program and print the graph of its own functions."""
    if given["argv"]:
        _check_order(given["argv"][0])
    asked = options.asked(given)
    if lines is None:
        lines = 0 if output else LINES
    sink = show.to_file(output) if output else None
    try:
        with tempfile.TemporaryDirectory(prefix="fentry-") as scratch:
            directory = Path(scratch) / "trace"
            run = _trace(asked, directory, limited=bool(lines))
            if run.outcome is not None:
                _print(directory, sink or (_Stderr() if run.started else show.output()), lines, run, where=output or "")
    finally:
        if sink is not None:
            sink.close()
    return run.status()


def _trace(asked: options.Asked, directory: Path, *, limited: bool) -> traced.Run:
    """Record what the program does."""
    try:
        with (
            traced.Signals() as signals,
            traced.traced(asked, directory=directory, tracer="function_graph") as run,
        ):
            session = run.session
            traced.wait(run, asked, signals, enough=lambda: limited and session.records > ENOUGH)
            if not asked.quiet:
                traced.remark(run)
    except TraceError as error:
        if asked.argv and (verb := near(asked.argv[0])) and traced.find(asked.argv[0]) == asked.argv[0]:
            error.hint = f"fentry {verb} --help, if that was meant"
        raise
    return run


def _check_order(program: str) -> None:
    """Refuse ``fentry -l x record ...``: it would run a program called record. Raises AskedWrong."""
    import sys

    if program in VERBS and "--" not in sys.argv[1:]:
        raise AskedWrong(
            f"options come after the verb: fentry {program} ...",
            hint=f"to run a program of that name: fentry OPTIONS -- {program}",
        )


class _Stderr:
    """Stderr as a place for text; one that cannot be written to is no reason to fail."""

    def write(self, text: str) -> int:
        """Write `text`."""
        if text:
            show.say(text.removesuffix("\n"))
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


class _FullError(Exception):
    """As many lines as were asked for are written."""


class _Lines:
    """Passes on a number of lines, then raises _FullError."""

    def __init__(self, out: TextIO | _Stderr, limit: int) -> None:
        self._out = out
        self._left = limit
        self.written = 0

    def write(self, text: str) -> int:
        """Write `text`, as far as there is room."""
        lines = text.count("\n")
        if self.written + lines > self._left:
            keep = text.splitlines(keepends=True)[: self._left - self.written]
            self._out.write("".join(keep))
            self.written = self._left
            raise _FullError
        self._out.write(text)
        self.written += lines
        return len(text)

    def flush(self) -> None:
        """Pass it on."""
        self._out.flush()


def _print(directory: Path, out: TextIO | _Stderr, lines: int, run: traced.Run, *, where: str) -> None:
    """Print the graph of a finished run."""
    from fentry.export.ftrace import GraphText
    from fentry.record.store import Trace

    trace = Trace.open(directory)
    with show.Progress("printing", enabled=bool(where)):
        full = render(trace, lambda to: GraphText(to, retval=run.session.plan.retval), out, lines)
    if full:
        more = max(lines_of(trace) - lines, 1)
        out.write(
            f"# about {show.count(more, 'more line')}; all of them: fentry --lines 0 -o FILE ..., or fentry record\n"
        )
    if run.why == "enough":
        out.write(
            f"# tracing ended after {show.count(trace.count(), 'event')}, the program went on without; "
            "all of it: fentry --lines 0 -o FILE ..., or fentry record\n"
        )
    for damage in trace.damage:
        show.say(f"fentry: {damage}")


def render(trace: Trace, exporter: Callable[[Any], Any], out: TextIO | _Stderr, lines: int) -> bool:
    """Print a trace; tell whether there was more than `lines` (0: no limit)."""
    from fentry.export import export

    if not lines:
        export(trace, exporter(out))
        return False
    try:
        # the legend is no part of what was asked for
        export(trace, exporter(_Lines(out, lines + _LEGEND)))
    except _FullError:
        return True
    return False


_LEGEND = 4  #: lines before the first of a graph


def lines_of(trace: Trace) -> int:
    """About how many lines a graph has: an entry and the exit right after it share one."""
    import numpy as np

    from fentry.record.layout import Kind

    total = 0
    for thread in trace.threads:
        for batch in trace.events_of(thread):
            kind = batch.column("kind").to_numpy()
            site = batch.column("site").to_numpy()
            leaf = (kind[:-1] == Kind.ENTRY) & (kind[1:] == Kind.EXIT) & (site[:-1] == site[1:])
            # the brace of a call by jump is printed with its caller's
            total += len(kind) - int(np.count_nonzero(leaf)) + int(np.count_nonzero(kind == Kind.TAIL))
    return total
