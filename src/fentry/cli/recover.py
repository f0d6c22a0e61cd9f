"""``fentry recover``: put a process right whose tracer was killed, and the children it forked meanwhile."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fentry.cli import options, show
from fentry.errors import Denied, Gone, TraceError

if TYPE_CHECKING:
    from fentry.engine.restore import Report


@dataclass(frozen=True, slots=True)
class Journal:
    """Where a process has an undo journal mapped."""

    pid: int
    start: int
    file: tuple[int, int]  #: device and inode: the same for everybody who shares it


@click.command(context_settings=options.SETTINGS)
@click.option("--json", "as_json", is_flag=True, help="A JSON object per process.")
@click.argument("pid", type=click.IntRange(1))
def recover(pid: int, as_json: bool) -> int:
    """Take everything of fentry's out of process PID.

    For a process whose fentry was killed. What was changed is in the process's own memory; so are the changes in
    children that it forked while it was traced, and they are put right, too. A process that is being traced is left
    alone: end that fentry with Ctrl-C or SIGTERM, and it cleans up itself.

    \b
    fentry recover 1234

    Exit status: 0; 1 if something could not be put back, or there was nothing; 2 for a PID that cannot be.
    """  # noqa: D301  # \b keeps click from joining the lines
    from fentry.engine import restore
    from fentry.target.process import attach

    journals = find_journals()
    ours = next((j for j in journals if j.pid == pid), None)
    sharing = [j for j in journals if ours is not None and j.file == ours.file and j.pid != pid]
    if ours is not None:
        _check_nobody_traces(ours, sharing)
    children = [j.pid for j in sharing if ours is not None and j.start == ours.start]
    worst = 0
    rows: list[dict[str, Any]] = []
    for number in (pid, *children):
        try:
            with attach(number) as target, show.Progress(f"restoring process {number}"):
                report = restore.recover(target)
        except TraceError as error:
            if number == pid:
                raise
            if not isinstance(error, Gone):  # a child that has ended needs nothing
                show.complain_of(error)
                worst = 1
            continue
        rows.append(_row(number, report))
        worst = max(worst, int(bool(report.strange)))
    out = show.output()
    if as_json:
        show.write_rows(rows, out)
    else:
        for row in rows:
            out.write(_line(row))
    return worst


def find_journals() -> list[Journal]:
    """Find every process that has an undo journal mapped and that we may look at."""
    from fentry.engine.journal import NAME
    from fentry.target import procfs

    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            # most processes have none: look at the text before it is parsed
            if f"memfd:{NAME}" not in Path(entry.path, "maps").read_text("utf-8", "surrogateescape"):
                continue
            regions = procfs.regions(int(entry.name))
        except (OSError, Gone, Denied):
            continue
        found += [
            Journal(int(entry.name), r.mapping.start, (r.device, r.inode))
            for r in regions
            if f"memfd:{NAME}" in r.mapping.path and r.mapping.offset == 0
        ]
    return found


def _check_nobody_traces(journal: Journal, sharing: list[Journal]) -> None:
    """Refuse a process that a living fentry works on. Raises Denied.

    A forked child has its parent's journal at the same address; a tracer has mapped it wherever there was room.
    """
    for other in sharing:
        if other.start != journal.start:
            raise Denied(
                f"process {journal.pid} is being traced by process {other.pid}",
                hint=f"kill -TERM {other.pid} detaches it and cleans up; recover is for tracers that were killed",
            )


def _row(pid: int, report: Report) -> dict[str, Any]:
    return {
        "pid": pid,
        "sites": report.sites,
        "frames": report.frames,
        "strange": [{"address": s.at, "found": s.found.hex(), "message": s.message} for s in report.strange],
        "left_mapped": report.left_mapped or None,
    }


def _line(row: dict[str, Any]) -> str:
    text = (
        f"process {row['pid']}: {show.count(row['sites'], 'place')} restored, "
        f"{show.count(row['frames'], 'frame')} in flight put right\n"
    )
    for strange in row["strange"]:
        text += f"  left as it is: {strange['message']}\n"
    if row["left_mapped"]:
        text += f"  some of fentry's memory stays mapped: {row['left_mapped']}\n"
    return text
