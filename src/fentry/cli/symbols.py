"""``fentry symbols``: let a debugger see through the hooks of a process that is traced."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from pathlib import Path

import click

from fentry.cli import options, show
from fentry.errors import AskedWrong, TargetRefused


@click.command(context_settings=options.SETTINGS)
@click.option("-o", "--output", metavar="FILE", help="Write here; else fentry-PID.elf in $XDG_RUNTIME_DIR or /tmp.")
@click.argument("pid", type=click.IntRange(1))
def symbols(pid: int, output: str | None) -> int:
    """Write a symbol file of the hooks in process PID, for gdb.

    While a process is traced, hooked functions return through fentry's code, of which a debugger knows nothing: its
    backtraces lose callers there. With this file they are whole; each hook is one frame more, fentry:FUNCTION.
    The process is not stopped, and gdb may hold it already. The file holds for the functions that are traced now.

    \b
    fentry symbols 1234
    gdb -p 1234 -ex "add-symbol-file $(fentry symbols 1234)"

    Exit status: 0; 1 if there is nothing to see through; 2 for a PID that cannot be.
    """  # noqa: D301  # \b keeps click from joining the lines
    from fentry.arch import load
    from fentry.engine import symbolfile
    from fentry.target.onlooker import Onlooker

    with Onlooker(pid) as process, show.Progress("reading symbols"):
        tables, places = symbolfile.read(process, process.arch)
        if not tables:
            raise TargetRefused(
                f"process {pid} has no return hooks",
                hint="a debugger sees whatever there is: only function_graph and profile hook returns",
            )
        data = symbolfile.encode(tables, symbolfile.names(process.modules(), places), load(process.arch).elf_machine)
    path = output if output is not None else _default(pid)
    _write(path, data, replace=output is None)
    show.output().write(path + "\n")
    hooks = show.count(sum(len(table.slots) for table in tables), "hook")
    show.say(f"fentry: {hooks}; in gdb: add-symbol-file {shlex.quote(path)}")
    return 0


def _default(pid: int) -> str:
    return str(Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp") / f"fentry-{pid}.elf")


def _write(path: str, data: bytes, *, replace: bool) -> None:
    """Write a file that only its owner can read. Raises AskedWrong.

    Args:
        path: where to.
        data: what.
        replace: put a new file in the place of what is there. The default's name can be guessed and /tmp is
            everybody's, so that what is there is never opened.
    """
    try:
        if not replace:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:  # noqa: PTH123 - of a descriptor
                file.write(data)
            return
        with tempfile.NamedTemporaryFile(dir=Path(path).parent, prefix="fentry-", delete=False) as file:  # mode 0600
            try:
                file.write(data)
                file.flush()
                Path(file.name).replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    Path(file.name).unlink()
                raise
    except OSError as error:
        raise AskedWrong(f"cannot write to {path}: {error.strerror}", hint="name another file with -o") from None
