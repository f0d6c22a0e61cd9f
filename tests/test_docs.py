"""The documentation is true: links lead somewhere, named files exist, examples run.

* every relative link of every page leads to a file;
* every path in backticks that looks like one of ours exists;
* ``>>>`` examples in docstrings of the package give what they say;
* a fenced block marked ``console`` is a session: each ``$`` line is run, in one directory per page, with
  .venv's programs on PATH; what it prints must match the lines below it, where ``...`` alone on a
  line stands for any lines, ``...`` inside a line for any text, any number, decimal or hexadecimal, for any
  other, and ftrace's mark before a duration (``+`` from 10 us on, ...) belongs to that number;
* ``>>>`` examples of a page give what they say, in the directory that its sessions have left.
"""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fentry

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(r"`((?:src|tests|docs|benchmarks|changes)/[\w./-]+)`")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    missing = [to for to in LINK.findall(text) if "://" not in to and not (page.parent / to).exists()]
    missing += [to for to in PATH.findall(text) if not (ROOT / to).exists()]
    assert missing == []


def test_pages_without_links_to_them_are_lost() -> None:
    linked = {(page.parent / to).resolve() for page in PAGES for to in LINK.findall(page.read_text())}
    assert [name(p) for p in ROOT.glob("docs/*.md") if p.resolve() not in linked] == []


def all_modules() -> list[str]:
    return ["fentry", *(m.name for m in pkgutil.walk_packages(fentry.__path__, "fentry."))]


@pytest.mark.parametrize("module", all_modules())
def test_examples_of_docstrings(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if module.endswith(".__main__"):
        return  # importing it runs the command line
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert failed == 0


# -- console sessions -------------------------------------------------------------------------------
def sessions(text: str) -> list[tuple[str, list[str]]]:
    """(command, expected lines) of every ``console`` block."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif found:
                found[-1][1].append(line)
    return found


def pattern(expected: list[str]) -> str:
    """Regular expression for `expected`: lines of ``...``, text of ``...``, digits for digits."""
    parts = []
    for line in expected:
        if line.strip() == "...":
            parts.append(r"(?:[^\n]*\n)*?")
        else:
            text = re.escape(line.rstrip()).replace(re.escape("..."), r"[^\n]*")
            text = re.sub(r"\b(?:0x)?[0-9a-f]*[0-9][0-9a-f]*\b|\d+", r"(?:0x)?[0-9a-f]+", text)
            text = re.sub(r"(?:\\ )+", r"[ ]+", text)
            text = re.sub(r"(?:\[ \]\+(?:\\[+!#*@$]|!|@))?\[ \]\+(?=\S+\[ \]\+us\[ \]\+\\\|)", r"[ +!#*@$]+", text)
            parts.append(text + r"[ ]*\n")
    return r"\A" + "".join(parts) + r"\Z"


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.live] if sessions(page.read_text()) else []) for page in PAGES],
    ids=name,
)
def test_sessions_and_examples_of_pages(page: Path, tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(
        ROOT / "tests" / "programs", tmp_path / "tests" / "programs", ignore=shutil.ignore_patterns("__pycache__")
    )
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "120",
        "NO_COLOR": "1",
    }
    for command, expected in sessions(page.read_text()):
        if command.split()[0].endswith("gcc"):
            tool(command.split()[0])
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120
        )
        printed = "".join(line.rstrip() + "\n" for line in (done.stdout + done.stderr).splitlines())
        assert re.match(pattern(expected), printed), (
            f"$ {command}\n{printed}\n-- is not what {name(page)} says:\n{expected}"
        )
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_sessions_can_fail() -> None:
    ((command, expected), (_, nothing)) = sessions("```console\n$ echo hi\nhi 12 there\n...\nend ... x\n$ true\n```\n")
    assert command == "echo hi"
    assert nothing == []
    assert re.match(pattern(expected), "hi 7 there\nend of it x\n")
    assert re.match(pattern(expected), "hi 7 there\nmore\nand more\nend  x\n")
    assert not re.match(pattern(expected), "hi there\nend of it x\n")
    assert not re.match(pattern(expected), "hi 7 there\nend of it\n")
    assert not re.match(pattern(nothing), "something\n")
    timed = pattern([" 0)   6.316 us    |  f();", " 0) + 16.316 us   |  fun4();", "  a0f: 0x7f f"])
    assert re.match(timed, " 1) ! 116.316 us  |  f();\n 0)   9.316 us    |  fun4();\n  7: 0xab f\n")
    assert not re.match(timed, " 1) ! 116.316 us  |  f();\n 0)   9.316 us    |  run4();\n  7: 0xab f\n")
    assert not re.match(timed, " 1) ! 116.316 us  |  f();\n 0)   9.316 ms    |  fun4();\n  7: 0xab f\n")
