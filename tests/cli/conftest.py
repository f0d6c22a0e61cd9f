"""What tests of the command line share: the command itself, and programs to run under it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
#: the command as it is installed: next to the interpreter that runs the tests
FENTRY = str(Path(sys.executable).with_name("fentry"))
PATIENCE = 60


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with a file of tests/golden, or rewrite that file."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("update_golden", default=False):
            path.write_text(text)
        assert path.exists(), f"no {path.name}: run pytest tests/cli --update-golden, then read it"
        assert text == path.read_text()

    return compare


def environment(**more: str) -> dict[str, str]:
    """Ours, without what would change what is printed."""
    env = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100", "TERM": "dumb", **more}
    env.pop("FENTRY_DEBUG", None)
    return env


def run(*words: str, **how: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end."""
    how.setdefault("timeout", PATIENCE)
    how.setdefault("env", environment())
    if "stdin" not in how and "input" not in how:
        how["stdin"] = subprocess.DEVNULL
    return subprocess.run(words, capture_output=True, check=False, **how)


def fentry(*words: str, **how: Any) -> subprocess.CompletedProcess[bytes]:
    """Run fentry to its end."""
    return run(FENTRY, *words, **how)


@contextlib.contextmanager
def running(*words: str, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program while it runs; killed at the end if it still does."""
    how.setdefault("env", environment())
    program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, **how)
    try:
        yield program
    finally:
        program.kill()
        program.communicate(timeout=PATIENCE)


def line(stream: IO[bytes] | None) -> str:
    """The next line that a program prints."""
    assert stream is not None
    return stream.readline().decode().rstrip("\n")


@pytest.fixture(scope="session")
def say(build: Callable[..., Path]) -> str:
    """Path of say.c, built."""
    return str(build(HERE / "say.c"))
