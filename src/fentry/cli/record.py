"""``fentry record``: trace a program or a process into a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fentry.cli import options, show, traced
from fentry.errors import AskedWrong


@click.command(context_settings=options.PROGRAM_SETTINGS)
@click.option("-p", "--tracer", default="function_graph", metavar="TRACER", help="function_graph, function, nop.")
@options.what_to_trace
@options.what_to_record
@click.option("-o", "--output", "directory", default="fentry.data", metavar="DIR", help="The trace [fentry.data].")
@click.option(
    "--policy",
    type=click.Choice(["block", "drop", "overwrite"]),
    help="What a full ring does: block the thread (default for a program), drop events (default for --pid), or "
    "overwrite the oldest.",
)
@options.what_runs
def record(tracer: str, directory: str, **given: Any) -> int:
    """Record the calls of a program, or of a running process.

    The program's input, output and exit status are its own. Ctrl-C goes to the program; pressed twice it lets it go on
    without fentry. With --pid, Ctrl-C ends the tracing only. A trace that is already in DIR becomes DIR.old.

    \b
    fentry record ./program its arguments
    fentry record -l 'libsqlite3*:sqlite3_*' -- sqlite3 my.db "select 1"
    fentry record -p function -l 'json_*' -n '*_free' -- ./program
    fentry record --threshold 100us --retval -o slow.data -- ./program
    fentry record --pid 1234 --duration 5

    Exit status: the program's; 0 with --pid; 1 if tracing failed; 2 if the request cannot be right.
    """  # noqa: D301  # \b keeps click from joining the lines
    asked = options.asked(given)
    check_writes_events(tracer)
    with (
        traced.Signals() as signals,
        traced.traced(asked, directory=Path(directory), tracer=tracer) as run,
    ):
        traced.wait(run, asked, signals)
        if not asked.quiet:
            report(run, directory)
    return run.status()


def check_writes_events(name: str) -> None:
    """Refuse tracers that add up instead of writing events. Raises AskedWrong."""
    from fentry.tracers import load

    if not load(name).events:
        raise AskedWrong(f"tracer {name} writes no events to record", hint="fentry stat -- PROG ARGS")


def report(run: traced.Run, directory: str) -> None:
    """Say what was recorded."""
    outcome = run.outcome
    if outcome is None:
        return
    traced.remark(run)
    if run.error is None:
        where = "" if directory == "fentry.data" else f" -i {directory}"
        records = show.count(outcome.events, "record")
        functions = show.count(len(run.session.sites), "function")
        show.say(f"fentry: {records} of {functions} in {directory}; look at it: fentry report{where}")
