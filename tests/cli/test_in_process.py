"""The command line called as a function, again and again in one process."""

from __future__ import annotations

import signal
import sys

from fentry.cli import main


def test_verbs_do_not_hide_what_main_needs(capsys) -> None:
    """Importing the verb `list` sets an attribute of its package that is called like the built-in type."""
    before = signal.getsignal(signal.SIGPIPE)
    for _ in range(2):
        assert main(["list", "--json", sys.executable, "main"]) in (0, 2)
    assert main(["--help"]) == 0
    assert "record" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGPIPE) == before, "a caller must not die of a pipe because it called us"
