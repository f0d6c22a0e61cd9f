"""Attach to programs at work, trace them for a while, let go: they never answer wrong, and nothing of us stays."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fentry.record.layout import Policy
from fentry.record.store import Trace
from fentry.target.process import attach
from fentry.tracers.session import Outcome, Plan, Session
from tests.live.tracing import PATIENCE, TRACERS, Watch, anatomy, bases, calls_by_name

pytestmark = pytest.mark.live


class Visit:
    """One session with a running process; afterwards `outcome` and `counts` are known."""

    def __init__(self, pid: int, directory: Path, tracer: str, wanted: list[str], **plan: object) -> None:
        self.pid = pid
        self.directory = directory / "trace"
        self.plan = Plan(tracer=tracer, wanted=wanted, **plan)  # type: ignore[arg-type]  # fields by name
        self.outcome = Outcome()
        self.counts: dict[str, int] = {}

    @contextlib.contextmanager
    def under_way(self) -> Iterator[Session]:
        target = attach(self.pid)
        watch = Watch(target)
        with Session(target, self.plan, directory=self.directory, started=False) as session:
            session.start()
            yield session
            self.outcome = session.finish()
            for row in session.rows():
                self.counts[row.function] = self.counts.get(row.function, 0) + row.hits
        if session.tracer.events:
            self.counts = calls_by_name(Trace.open(self.directory))
        assert watch.looks > 0
        assert watch.writable_code == []
        assert self.outcome.restored is not None
        assert self.outcome.restored.strange == []
        assert self.outcome.restored.left_mapped == ""


class Server:
    """``server.c``, which does what it is told, one line at a time."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        assert self.answer() == "ready"

    def answer(self) -> str:
        return self.process.stdout.readline().rstrip("\n")

    def do(self, command: str) -> str:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


SERVERS = {"jump": (), "sled": ("-fpatchable-function-entry=16",), "fentry": ("-pg", "-mfentry")}


@pytest.fixture(params=SERVERS)
def server(build, request, tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.chdir(tmp_path)  # gprof's programs write gmon.out
    server = Server(build("server.c", flags=SERVERS[request.param]))
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize("tracer", TRACERS)
def test_every_call_while_attached(server, tmp_path, tracer: str) -> None:
    before, registers, text = anatomy(server.pid), bases(server.pid), server.do("text")
    said = [server.do("work 5000")]
    visit = Visit(server.pid, tmp_path, tracer, ["step", "inner"], policy=Policy.BLOCK)
    with visit.under_way():
        said.append(server.do("work 5000"))
        assert server.do("text") != text, "nothing was patched"
    assert visit.counts == {"step": 5000, "inner": 5000}
    assert visit.outcome.lost == 0
    assert server.do("text") == text
    said.append(server.do("work 5000"))
    assert anatomy(server.pid) == before
    assert bases(server.pid) == registers
    assert server.do("quit") == "quit"
    assert server.process.wait(PATIENCE) == 7
    # another one like it, left alone
    untouched = Server(server.program)
    try:
        assert [untouched.do("work 5000") for _ in said] == said
    finally:
        untouched.close()


def test_again_and_again_while_threads_are_inside(server, tmp_path) -> None:
    """Nine visits to three threads that never leave the traced functions; each lets go of frames in flight."""
    text = server.do("text")
    assert server.do("spin 3") == "spin 3"
    before, registers = anatomy(server.pid), bases(server.pid)
    for number in range(9):
        visit = Visit(server.pid, tmp_path, TRACERS[number % 3], ["*"])
        with visit.under_way() as session:
            assert session.wait(0.02) is None
        assert visit.counts["step"] > 0
        assert anatomy(server.pid) == before
        assert bases(server.pid) == registers
    assert server.do("still").startswith("still ")
    assert server.do("text") == text
    assert server.do("quit") == "quit"


def test_a_process_forks_while_it_is_traced(server, tmp_path) -> None:
    """The child's calls are its own; it ends as it would have."""
    plain = server.do("fork")
    visit = Visit(server.pid, tmp_path, "function_graph", ["step", "inner"], policy=Policy.BLOCK)
    with visit.under_way():
        assert server.do("fork") == plain
        assert server.do("work 10").startswith("work 10 ")
    traced = Trace.open(visit.directory)
    (child,) = {thread.pid for thread in traced.threads} - {server.pid}
    assert calls_by_name(traced, pid=child) == {"step": 100, "inner": 100}
    assert calls_by_name(traced, pid=server.pid) == {"step": 10, "inner": 10}
    assert server.do("quit") == "quit"


@contextlib.contextmanager
def redis(tool, directory: Path) -> Iterator[tuple[int, int]]:
    """A redis-server on a port of this machine alone: (its process, the port)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(directory), "--daemonize", "no"]
    process = subprocess.Popen([tool("redis-server"), *words], stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if "Ready to accept connections" in line:
                break
        else:
            pytest.fail("redis-server did not start")
        yield process.pid, port
        process.terminate()
        process.stdout.read()
        assert process.wait(PATIENCE) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


class Client(threading.Thread):
    """Talks to redis all the time and checks each answer."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.wrong: list[bytes] = []
        self.asked = 0
        self._enough = threading.Event()
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)

    def run(self) -> None:
        with self._socket, self._socket.makefile("rb") as answers:
            while not self._enough.is_set() and not self.wrong:
                self.asked += 1
                value = b"%d" % self.asked * 20
                self._socket.sendall(b"INCR n\r\nSET key %b\r\nGET key\r\nLPUSH l %b\r\nLPOP l\r\n" % (value, value))
                bulk = b"$%d\r\n%b\r\n" % (len(value), value)
                want = b":%d\r\n+OK\r\n%b:1\r\n%b" % (self.asked, bulk, bulk)
                got = answers.read(len(want))
                if got != want:
                    self.wrong.append(got)

    def enough(self) -> None:
        self._enough.set()
        self.join(PATIENCE)
        assert not self.is_alive(), "redis does not answer any more"


def test_redis_under_load(tool, tmp_path) -> None:
    """All of redis, its C library and its allocator, one visit after the other, while a benchmark loads it."""
    load = tool("redis-benchmark")
    with redis(tool, tmp_path) as (pid, port):
        client = Client(port)
        client.start()
        words = [
            "-h",
            "127.0.0.1",
            "-p",
            str(port),
            "-q",
            "-c",
            "20",
            "-P",
            "4",
            "-t",
            "set,get,incr,lpush,lpop,sadd,zadd",
        ]
        benchmark = subprocess.Popen([load, *words, "-n", "10000", "-l"], stdout=subprocess.DEVNULL)
        try:
            before, registers = anatomy(pid), bases(pid)
            for tracer in (*TRACERS, "function_graph"):
                asked = client.asked
                visit = Visit(pid, tmp_path, tracer, ["*", "libc.so.6:*", "libjemalloc*:*"])
                with visit.under_way() as session:
                    assert session.wait(0.5) is None
                    assert client.wrong == []
                assert client.asked > asked
                assert sum(visit.counts.values()) > 1000
                after = anatomy(pid)
                assert after.code == before.code
                assert after.threads == before.threads
                assert bases(pid) == registers
            assert benchmark.poll() is None, "the load ended early"
        finally:
            benchmark.kill()
            benchmark.wait()
            client.enough()
        assert client.wrong == []
