"""The traced program does not know: same output, same status, whatever it is and however it is traced."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import FENTRY, environment, fentry, run

pytestmark = pytest.mark.live

WAYS = {
    "graph": ["-q", "-o", "graph.txt"],
    "record": ["record", "-q"],
    "function": ["record", "-q", "-p", "function", "--clock", "order"],
    "stat": ["stat", "-q", "-o", "stat.txt"],
    "hits": ["stat", "-q", "--hits", "--json", "-o", "stat.txt"],
}
BYTES = random.Random(1).randbytes(100_000)
SQL = """\
CREATE TABLE t (n INTEGER, s TEXT);
WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 500) INSERT INTO t SELECT n, hex(n * n) FROM c;
SELECT count(*), sum(n), max(s) FROM t;
SELECT nosuch FROM t;
"""


ENDS = [
    ["cat"],
    ["exit", "9"],
    ["kill", str(int(signal.SIGSEGV))],
    ["kill", str(int(signal.SIGTERM))],
    ["kill", str(int(signal.SIGKILL))],
    ["kill", str(int(signal.SIGPIPE))],
    ["args", "-x", "--help", "--", "record", "a b", "", "ü", "--json"],
]


@pytest.mark.parametrize(
    ("way", "words"),
    [*(("graph", words) for words in ENDS), *((way, ENDS[0]) for way in WAYS), ("stat", ENDS[2]), ("record", ENDS[-1])],
    ids=str,
)
def test_own_program(say: str, way: str, words: list[str], tmp_path: Path) -> None:
    given = BYTES if words == ["cat"] else b""
    plain = run(say, *words, input=given)
    traced = fentry(*WAYS[way], say, *words, input=given, cwd=tmp_path)
    assert (traced.returncode, traced.stdout, traced.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert list(tmp_path.glob("core*")) == []


@pytest.mark.parametrize("way", ["record", "stat"])
@pytest.mark.parametrize(
    ("words", "functions", "given"),
    [
        (["sqlite3", ":memory:"], "libsqlite3.so*:sqlite3*", SQL.encode()),
        (["xz", "-9", "-c"], "liblzma.so*:*", BYTES),
        (["/usr/bin/python3", "-c", "import json; print(json.dumps(list(range(50)))); raise SystemExit(3)"], "*", b""),
    ],
    ids=["sqlite3", "xz", "python3"],
)
def test_debian_program(
    tool: Callable[[str], str], way: str, words: list[str], functions: str, given: bytes, tmp_path: Path
) -> None:
    tool(words[0])
    env = environment(PYTHONHASHSEED="0", LC_ALL="C.UTF-8")
    plain = run(*words, input=given, cwd=tmp_path, env=env)
    traced = fentry(*WAYS[way], "-l", functions, "--", *words, input=given, cwd=tmp_path, env=env)
    notes, other = [], []
    for line in traced.stderr.splitlines(keepends=True):
        (notes if line.startswith(b"fentry: ") else other).append(line)
    assert (traced.returncode, traced.stdout, b"".join(other)) == (plain.returncode, plain.stdout, plain.stderr), notes
    if way == "record":
        rows = fentry("stat", "--json", cwd=tmp_path)
        assert rows.stdout.count(b"\n") > 10, rows.stderr


def test_environment_directory_and_descriptors(say: str, tmp_path: Path) -> None:
    """What a shell hands to a program arrives: working directory, environment, further descriptors, umask."""
    script = 'pwd; echo "$MINE"; cat <&7; umask; ulimit -c'
    (tmp_path / "seven").write_text("from seven\n")
    env = environment(MINE="here")

    def under(*prefix: str) -> subprocess.CompletedProcess[bytes]:
        words = (*prefix, "sh", "-c", script)
        return run("sh", "-c", '"$@" 7<seven', "sh", *words, cwd=tmp_path, env=env, umask=0o27)

    plain = under()
    traced = under(FENTRY, "-q", "-o", "graph.txt", "--")
    assert traced.stdout == plain.stdout
    assert b"from seven" in traced.stdout


def test_graph_is_the_calls(say: str) -> None:
    """The form without a verb: what is printed is what happened, once per call."""
    done = fentry(say, "cat", input=b"abc")
    text = done.stderr.decode()
    assert done.stdout == b"abc"
    assert text.count("turn_twice() {") == 3
    assert text.count(" turn();") == 6
    assert " main() {" in text


def test_lines_are_limited(say: str) -> None:
    done = fentry("--lines", "10", say, "cat", input=bytes(1000))
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 4 + 10 + 1
    assert lines[-1].startswith("# about 3,9")
    assert "--lines 0" in lines[-1]
    whole = fentry("--lines", "0", say, "cat", input=bytes(1000)).stderr.decode().splitlines()
    said = int(lines[-1].split()[2].replace(",", ""))
    assert len(whole) - 4 == 10 + said
