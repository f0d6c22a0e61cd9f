"""What fentry says itself: words on stderr, progress on a terminal, rows of JSON, endings.

Standard output belongs to the traced program, or to the verb whose one job is to print there; everything else goes to
stderr, and a stderr that is closed or full never disturbs what is being traced.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from fentry.errors import AskedWrong, CannotHere, TraceError

if TYPE_CHECKING:
    from rich.live import Live

#: seconds that anything may take before a terminal is told what is going on
PATIENCE = 2.0


def say(text: str) -> None:
    """Write a line to stderr; a stderr that cannot be written to is no reason to fail."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


def complain(message: str, hint: str = "") -> None:
    """Say what went wrong, and what to try."""
    say(f"fentry: {message}")
    if hint:
        say(f"  try: {hint}")


def complain_of(error: TraceError) -> None:
    """Say what an error of ours says."""
    complain(error.message, error.hint)


def output() -> TextIO:
    """Give standard output for what a verb prints. Raises AskedWrong if it is closed.

    A reader that goes away ends us as it ends any other program, without a word (SIGPIPE).
    """
    if sys.stdout is None:
        raise AskedWrong("standard output is closed", hint="name a file with -o")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # names of functions are whatever bytes the file has
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    return sys.stdout


def to_file(path: str) -> TextIO:
    """Open a file for what a verb prints. Raises AskedWrong."""
    try:
        return Path(path).open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise AskedWrong(f"cannot write to {path}: {error.strerror}", hint="name another file with -o") from None


def failed(error: OSError) -> CannotHere:
    """Turn an operating system's refusal into words."""
    where = os.fsdecode(error.filename) if error.filename else ""
    if not where and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        where = "cannot write"  # a stream without a name: standard output
    return CannotHere(f"{where}: {error.strerror}" if where else str(error.strerror or error))


def write_rows(rows: Iterable[Mapping[str, Any]], out: TextIO) -> None:
    """Write rows as JSON, one object a line: what jq, DuckDB, polars and pandas read."""
    out.writelines(json.dumps(row) + "\n" for row in rows)


def size(nbytes: int) -> str:
    """Bytes for a person: "1.5 MiB"."""
    value, unit = float(nbytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if unit != "bytes" else f"{nbytes} bytes"


def count(number: int, what: str) -> str:
    """A number with its noun: "1 event", "12,345 events"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def terminal() -> bool:
    """Tell whether somebody reads stderr as it is written."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """One line on a terminal about what is taking long; gone when it is done, silent elsewhere.

        with Progress("reading symbols") as progress:
            progress("hooking 20,000 functions")

    Nothing is shown, and nothing imported, in the first two seconds.
    """

    def __init__(self, text: str, *, enabled: bool = True) -> None:
        self._text = text
        self._begun = time.monotonic()
        self._live: Live | None = None
        self._lock = threading.Lock()
        self._done = False
        self._timer: threading.Timer | None = None
        if enabled and terminal():
            self._timer = threading.Timer(PATIENCE, self._show)
            self._timer.daemon = True

    def __call__(self, text: str) -> None:
        """Change what is said."""
        self._text = text

    def __enter__(self) -> Progress:
        if self._timer is not None:
            self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._timer is None:
            return
        self._timer.cancel()
        with self._lock:
            self._done = True
            if self._live is not None:
                self._live.stop()

    def _show(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        spinner = Spinner("dots", style="cyan")

        def line() -> Spinner:
            spinner.text = Text(f"fentry: {self._text} ({time.monotonic() - self._begun:.0f} s)")
            return spinner

        with self._lock:
            if self._done:
                return
            self._live = Live(
                console=Console(stderr=True),
                get_renderable=line,
                refresh_per_second=8,
                transient=True,
                redirect_stdout=False,  # standard output is the traced program's, or a pipe's
                redirect_stderr=False,
            )
            self._live.start()


def end_by_signal(number: int) -> int:
    """End this process as the program ended: by the same signal, without a second core file.

    Returns: the status a shell would show, in case the signal did not end us.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler to reset
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    return 128 + number
