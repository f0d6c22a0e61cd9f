"""What every test may use: compiled programs, the abilities of this machine, and skips with reasons.

A skip says what is missing and, for a tool, which Debian package has it. Under ``CI=true`` a missing
tool is a failure: there, everything that the tests need was installed by ``./dev test``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.programs import build as builder
from tests.programs.many import many as build_many

CI = os.environ.get("CI") == "true"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="every cell of the build matrices, every step and thousands of cycles: hours",
    )
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what is printed now")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "matrix: a cell of a build matrix that only --full runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cells marked `matrix` unless asked for all; pytest's last line says how many were deselected."""
    if config.getoption("full"):
        return
    left_out = [item for item in items if item.get_closest_marker("matrix")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("matrix")]


def unavailable(reason: str) -> NoReturn:
    """Skip with `reason`; fail instead where everything must be there."""
    if CI:
        pytest.fail(f"on CI nothing may be missing: {reason}", pytrace=False)
    pytest.skip(reason)


def _or_unavailable(make: Callable[..., Path], *args: Any, **kwargs: Any) -> Path:
    try:
        return make(*args, **kwargs)
    except builder.Missing as missing:
        unavailable(str(missing))


@pytest.fixture(scope="session")
def build() -> Callable[..., Path]:
    """`tests.programs.build.build`, but a compiler that is not installed skips the test."""
    return lambda *args, **kwargs: _or_unavailable(builder.build, *args, **kwargs)


@pytest.fixture(scope="session")
def many() -> Callable[..., Path]:
    """`tests.programs.many.many`, but a compiler that is not installed skips the test."""
    return lambda *args, **kwargs: _or_unavailable(build_many, *args, **kwargs)


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Path of a program by name; one that is not installed skips the test."""

    def find(name: str) -> str:
        try:
            return builder.find_tool(name)
        except builder.Missing as missing:
            unavailable(str(missing))

    return find


@cache
def _cannot_trace() -> str:
    """Why a child cannot be traced on this machine, or an empty string; found out by doing it."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    ptrace.restype = ctypes.c_long
    seize = 0x4206  # PTRACE_SEIZE, include/uapi/linux/ptrace.h
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        refused = ptrace(seize, child.pid, None, None) != 0
        why = os.strerror(ctypes.get_errno())
        child.kill()
    return f"ptrace of a child is refused here: {why}" if refused else ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `live` need ptrace; where it is refused, say so with the kernel's own reason."""
    if item.get_closest_marker("live") and _cannot_trace():
        unavailable(_cannot_trace())
