"""Each example prints what is saved beside it: NAME.out is a session, compared as those of the pages are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import ROOT, pattern, sessions

pytestmark = pytest.mark.live

EXAMPLES = sorted(ROOT.glob("examples/*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tool, tmp_path: Path) -> None:
    saved = example.with_suffix(".out").read_text()
    for folder in ("examples", "tests/programs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = sessions(f"```console\n{saved}```\n")
    assert any(example.name in command for command, _ in commands)
    for command, expected in commands:
        if command.split()[0].endswith("gcc"):
            tool(command.split()[0])
        done = subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=60
        )
        printed = done.stdout + done.stderr
        assert re.match(pattern(expected), printed), f"$ {command}\n{printed}\n-- is not what is saved:\n{expected}"


def test_nothing_is_left_over() -> None:
    assert {p.stem for p in EXAMPLES} == {p.stem for p in ROOT.glob("examples/*.out")}
