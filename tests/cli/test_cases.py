"""Runs the ``*.case`` files: what is typed, and what comes back.

A file holds cases, separated by lines of dashes::

    NAME      one line on what is shown
    REQUIRES  live sqlite3            (words: ``live`` needs ptrace, others are programs on PATH)
    STATUS    2                       (0 if left out; the name of a signal if that ends it)
    RUN       fentry list $CALLS fib  (shell; several RUN lines are run in order, in one empty directory)
    EXPECT
    what the last line prints, stdout and stderr together

Programs are built on demand: $SAY is say.c, $CALLS and $FOREIGN are tests/programs/calls.c for this machine and for
riscv64. In EXPECT a line of ``...`` stands for any lines, ``...`` in a line for any text, ``<n>`` for a number,
``<x>`` for a hexadecimal one, and any blanks for any blanks.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.conftest import FENTRY, HERE, environment, run


@dataclass
class Case:
    name: str = ""
    requires: list[str] = field(default_factory=list)
    status: str = "0"
    commands: list[str] = field(default_factory=list)
    expect: list[str] = field(default_factory=list)


def parse(text: str) -> list[Case]:
    """Read a file of cases; anything unknown is an error."""
    cases = []
    for block in re.split(r"^-{4,}\n", text, flags=re.MULTILINE):
        head, _, expect = block.partition("\nEXPECT\n")
        case = Case(expect=expect.strip("\n").splitlines())
        for line in head.strip().splitlines():
            if line.startswith("#"):
                continue
            word, _, rest = line.partition(" ")
            rest = rest.strip()
            if word == "NAME":
                case.name = rest
            elif word == "REQUIRES":
                case.requires = rest.split()
            elif word == "STATUS":
                case.status = rest
            elif word == "RUN":
                case.commands.append(rest)
            else:
                raise ValueError(f"{word!r} is no part of a case: {line}")
        if not case.name or not case.commands:
            raise ValueError(f"a case without NAME or RUN: {head!r}")
        cases.append(case)
    return cases


def pattern(expect: list[str]) -> str:
    """The regular expression for what must be printed."""
    parts = []
    for line in expect:
        if line.strip() == "...":
            parts.append(r"(?:[^\n]*\n)*?")
            continue
        text = re.escape(line.strip()).replace(re.escape("..."), r"[^\n]*")
        text = text.replace("<n>", "[0-9][0-9,.]*").replace("<x>", "[0-9a-f]+")
        parts.append(r"[ ]*" + re.sub(r"(?:\\ )+", "[ ]+", text) + r"[ ]*\n")
    return r"\A" + "".join(parts) + r"\Z"


FILES = sorted(HERE.glob("*.case"))
CASES = [
    pytest.param(case, id=f"{file.stem}: {case.name}", marks=[pytest.mark.live] if "live" in case.requires else [])
    for file in FILES
    for case in parse(file.read_text())
]


@pytest.mark.parametrize("case", CASES)
def test_case(case: Case, build: Callable[..., Path], tool: Callable[[str], str], say: str, tmp_path: Path) -> None:
    for name in case.requires:
        if name != "live":
            tool(name)
    text = "\n".join(case.commands)
    env = environment(PATH=f"{Path(FENTRY).parent}:{environment()['PATH']}", SAY=say)
    if "$CALLS" in text:
        env["CALLS"] = str(build("calls.c", flags=("-fno-ipa-icf",)))
    if "$FOREIGN" in text:
        env["FOREIGN"] = str(
            build("calls.c", cc="riscv64-linux-gnu-gcc", kind="static", flags=("-fpatchable-function-entry=4",))
        )
    for command in case.commands[:-1]:
        prepared = run("sh", "-c", command, cwd=tmp_path, env=env)
        assert prepared.returncode == 0, prepared.stderr.decode()
    done = run("sh", "-c", f"exec 2>&1; {case.commands[-1]}", cwd=tmp_path, env=env)
    printed = done.stdout.decode(errors="backslashreplace")
    status = case.status
    wanted = 128 + signal.Signals[status] if status.startswith("SIG") else int(status)
    found = done.returncode if done.returncode >= 0 else 128 - done.returncode
    assert found == wanted, printed
    text = "".join(line.rstrip() + "\n" for line in printed.splitlines())
    assert re.match(pattern(case.expect), text), f"{text}\n-- is not\n{chr(10).join(case.expect)}"


def test_there_are_cases() -> None:
    assert len(CASES) > 20


def test_a_case_can_fail() -> None:
    (case,) = parse("NAME x\nRUN echo\nEXPECT\nhi <n> there\n...\nat <x>: ... end\n")
    assert re.match(pattern(case.expect), "hi 1,200 there\nat 7f: all of it end\n")
    assert re.match(pattern(case.expect), "hi 3   there\nmore\nat 7f: end end\n")
    assert not re.match(pattern(case.expect), "hi you there\nat 7f: x end\n")
    assert not re.match(pattern(case.expect), "hi 1 there\nat 7f: x end\nmore\n")
    for wrong in ("NAME x\nRUN y\nSTATS 2\nEXPECT\n", "RUN y\nEXPECT\n", "NAME x\nEXPECT\n"):
        with pytest.raises(ValueError):
            parse(wrong)
