"""Unmodified programs that people run, visited while they work: their output is what it is without us."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fentry.errors import Gone
from fentry.target.process import attach, spawn

pytestmark = pytest.mark.live

SQL = """
create table t(a integer primary key, b text);
with recursive n(i) as (values(1) union all select i + 1 from n where i < 200000)
insert into t select i, hex(i * 7919) from n;
select count(*), sum(length(b)), min(b), max(b) from t;
select substr(b, 1, 2), count(*) from t group by 1 order by 1;
"""

PYTHON = """
import hashlib, queue, threading, time
jobs, done = queue.Queue(), queue.Queue()
def work():
    while True:
        n = jobs.get()
        time.sleep(0.0005)
        done.put((n, hashlib.sha256(str(n).encode() * 1000).hexdigest()))
for _ in range(8):
    threading.Thread(target=work, daemon=True).start()
for n in range(1500):
    jobs.put(n)
for n, digest in sorted(done.get() for _ in range(1500)):
    print(n, digest)
"""


def visit(target) -> None:
    """What a tracer does at a stop."""
    at = target.allocator.map(1 << 16, "r-x", near=target.modules()[0].start, reach=2**31 - 2**20)
    target.write(at, bytes(range(256)))
    shared, view = target.shared.share(1 << 16, "visit")
    view[0] = 1
    target.allocator.unmap(shared, 1 << 16)
    target.allocator.unmap(at, 1 << 16)


@pytest.mark.parametrize(
    ("program", "arguments", "script"),
    [("sqlite3", [], SQL), ("python3", ["-c", PYTHON], "")],
    ids=["sqlite3", "python3"],
)
def test_a_program_visited_all_the_time(tool, tmp_path, program: str, arguments: list[str], script: str) -> None:
    # not what PATH has first: that may be a script which execs another one
    argv = [sys.executable if program == "python3" else tool(program), *arguments]
    (tmp_path / "in").write_text(script)
    with (tmp_path / "in").open() as stdin:
        want = subprocess.run(argv, stdin=stdin, capture_output=True, check=True).stdout
    visits = 0
    with (tmp_path / "in").open() as stdin, (tmp_path / "out").open("wb") as stdout:
        target = spawn(argv, stdin=stdin, stdout=stdout)
    with target:
        while True:
            visit(target)
            target.resume()
            visits += 1
            end = target.wait(0.01)
            if end is not None:
                break
            try:
                target.stop()
            except Gone:
                end = target.wait()
                break
    assert (end.kind, end.status) == ("exited", 0)
    assert visits > 3
    assert (tmp_path / "out").read_bytes() == want


def test_redis_answers_while_it_is_visited(tool, tmp_path) -> None:
    path = tmp_path / "socket"
    server = subprocess.Popen(
        [tool("redis-server"), "--port", "0", "--unixsocket", path, "--save", "", "--dir", tmp_path],
        stdout=subprocess.DEVNULL,
    )
    with socket.socket(socket.AF_UNIX) as client, server:
        deadline = time.monotonic() + 20
        while client.connect_ex(str(path)):
            assert time.monotonic() < deadline, "redis does not start"
            time.sleep(0.01)
        with client.makefile("rb") as answers:
            for number in range(60):
                with attach(server.pid) as target:
                    client.sendall(b"INCR counter\r\n")  # it comes while every thread is stopped
                    visit(target)
                assert answers.readline() == b":%d\r\n" % (number + 1)
        client.sendall(b"SHUTDOWN NOSAVE\r\n")
        assert server.wait(20) == 0


def test_sleep_sleeps_its_time_however_often_it_is_stopped(tool) -> None:
    """The remaining time survives: a restart from the beginning would never end."""
    process = subprocess.Popen([tool("sleep"), "0.5"])
    started = time.monotonic()
    stops = 0
    while process.poll() is None:
        assert time.monotonic() < started + 20, f"still asleep after {stops} stops"
        fresh = not Path(f"/proc/{process.pid}/syscall").read_text().startswith(("230", "219", "35"))
        if fresh:
            continue
        try:
            target = attach(process.pid)
        except Gone:
            break
        with target:
            assert target.syscall(39) == process.pid
        stops += 1
    assert process.wait() == 0
    assert stops > 5
