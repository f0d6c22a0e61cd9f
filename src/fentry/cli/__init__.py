"""The command line: one file per verb, and ``fentry PROG ARGS`` without any.

The first word decides: a verb of ours is that verb; an option, a path, or any other word begins the form without verb
(:mod:`fentry.cli.graph`); after ``--`` everything is the program's. A program's own options are never looked at.

Exit status: 2 for a request that cannot be right, 1 for anything else that failed, otherwise the traced program's.
Nothing ends in a traceback, unless FENTRY_DEBUG is set.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

import click

from fentry.cli import options, show
from fentry.errors import EngineBug, TraceError

#: verb -> what it is for; each is a file of its name, imported when it is used
VERBS = {
    "record": "trace a program or a process into a directory",
    "report": "print a trace: text as ftrace's, JSON, folded stacks, Chrome, Parquet",
    "stat": "hits and times of each function",
    "list": "functions of a program or library, and how each can be traced",
    "explain": "what tracing does to one function: bytes, trampoline, registers",
    "doctor": "what this machine allows, and what to do about the rest",
    "recover": "put a process right whose tracer was killed",
    "symbols": "let gdb see through the hooks of a process that is traced",
}
#: the form without a verb; not a word that anybody types
GRAPH = "graph"

_HELP = """\
usage: fentry [OPTIONS] PROG ARGS...       run PROG and print the graph of its calls
       fentry VERB ...

{verbs}

A PROG that is named like a verb goes after --, or is given as a path: fentry -- stat FILE.
fentry VERB --help has examples; without a verb the options are:

{options}

Exit status: the program's; 1 if tracing failed; 2 if the request cannot be right."""


class Verbs(click.Group):
    """Commands found by name in this folder."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # click's signature
        """Names of verbs."""
        return [*VERBS]  # the verb `list` is a module of this package, and hides the type once it is imported

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # click's signature
        """Give a verb."""
        return load(cmd_name) if cmd_name in VERBS or cmd_name == GRAPH else None


def load(verb: str) -> click.Command:
    """Import a verb."""
    module = importlib.import_module(f"fentry.cli.{verb}")
    command = getattr(module, verb, None) or getattr(module, f"{verb}_")  # list would hide the builtin
    assert isinstance(command, click.Command)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status, unless a signal has to end this process.

    Args:
        argv: words after the program's name; None = this process's own.
    """
    words = [*(sys.argv[1:] if argv is None else argv)]
    pipe = signal.getsignal(signal.SIGPIPE)
    try:
        return _main(words)
    finally:
        if argv is not None and pipe is not None:  # called as a function: the caller's process is as it was
            signal.signal(signal.SIGPIPE, pipe)


def _main(words: list[str]) -> int:
    """Run the command line and say what went wrong."""
    try:
        status = _run(words)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.UsageError as error:
        show.complain(error.format_message(), f"{error.ctx.command_path.strip() if error.ctx else 'fentry'} --help")
        status = error.exit_code
    except (click.exceptions.Exit, click.ClickException) as error:
        status = error.exit_code
    except KeyboardInterrupt:
        status = -2
    except BaseException as error:
        if os.environ.get("FENTRY_DEBUG") or isinstance(error, SystemExit):
            raise
        status = _failed(error)
    _silence()
    return show.end_by_signal(-status) if status < 0 else status


def _run(words: list[str]) -> int:
    """Find the verb and run it."""
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "help"):
        show.output().write(_help() + "\n")
        return 0
    if first == "--version":
        from importlib.metadata import version

        show.output().write(f"fentry {version('fentry')}\n")
        return 0
    verb = words.pop(0) if first in VERBS else GRAPH
    parent = click.Context(Verbs("fentry"), info_name="fentry")
    name = "" if verb == GRAPH else verb
    with load(verb).make_context(name, words, parent=parent) as ctx:
        result = ctx.command.invoke(ctx)
    return result if isinstance(result, int) else 0


def _help() -> str:
    verbs = "\n".join(f"  {name:<9}{text}" for name, text in VERBS.items())
    command = load(GRAPH)
    ctx = click.Context(command, info_name="fentry", max_content_width=100)
    formatter = ctx.make_formatter()
    rows = [row for p in command.params if isinstance(p, click.Option) and (row := p.get_help_record(ctx)) is not None]
    formatter.write_dl(rows)
    return _HELP.format(verbs=verbs, options=formatter.getvalue().rstrip())


def _failed(error: BaseException) -> int:
    """Say what went wrong; gives the exit status."""
    if isinstance(error, EngineBug):
        show.complain(f"this is a bug of fentry: {error.message}", error.hint or "report this message")
    elif isinstance(error, TraceError):
        show.complain_of(error)
    elif isinstance(error, OSError):
        show.complain_of(show.failed(error))
    elif isinstance(error, MemoryError):
        show.complain("out of memory", "trace fewer functions (-l), or end other programs")
    else:
        show.complain(
            f"this is a bug of fentry: {type(error).__name__}: {error}",
            "the same with FENTRY_DEBUG=1 shows where; please report that",
        )
    return error.exit_code if isinstance(error, TraceError) else 1


def _silence() -> None:
    """Keep the interpreter from complaining of a standard output that went away."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def near(word: str) -> str:
    """The verb that somebody may have meant, or ""."""
    if "/" in word:
        return ""
    found = difflib.get_close_matches(word, VERBS, 1, 0.7)
    return found[0] if found else ""


__all__ = ["GRAPH", "VERBS", "main", "near", "options"]
