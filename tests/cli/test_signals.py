"""Signals: whose they are, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import FENTRY, PATIENCE, environment, fentry, line, run, running

pytestmark = pytest.mark.live


class Terminal:
    """A session on a terminal of its own, with one command in the foreground."""

    def __init__(self, *words: str, cwd: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(cwd)
                os.execve(words[0], list(words), environment(TERM="xterm"))
            finally:
                os._exit(127)
        self.seen = b""

    def until(self, text: bytes) -> None:
        """Read what is printed until `text` comes."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{text!r} did not come; seen: {self.seen!r}"
            try:
                self.seen += os.read(self.fd, 4096)
            except OSError:  # the other side is closed
                raise AssertionError(f"{text!r} did not come; seen: {self.seen!r}") from None

    def press(self, key: bytes) -> None:
        os.write(self.fd, key)

    def end(self, pressing: bytes = b"") -> int:
        """Wait for the command, pressing a key again and again; gives its exit status, or minus its signal."""
        deadline = time.monotonic() + PATIENCE
        done, pressed = 0, 0.0
        while not done:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if pressing and time.monotonic() >= pressed + 0.1:
                os.write(self.fd, pressing)
                pressed = time.monotonic()
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:  # nobody holds the other side any more
                    done, status = os.waitpid(self.pid, 0)
            assert time.monotonic() < deadline, self.seen
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_first_interrupt_is_the_programs(say: str, tmp_path: Path) -> None:
    terminal = Terminal(FENTRY, "record", say, "spin", cwd=tmp_path)
    terminal.until(b"ready")
    terminal.press(b"\x03")
    assert terminal.end() == 6, terminal.seen
    assert b"interrupted" in terminal.seen
    assert fentry("report", cwd=tmp_path).stdout.count(b"turn_twice") >= 100


def test_second_interrupt_is_ours(say: str, tmp_path: Path) -> None:
    """A program that ignores Ctrl-C goes on without us."""
    terminal = Terminal(FENTRY, "record", say, "stubborn", cwd=tmp_path)
    terminal.until(b"ready")
    (program,) = children(terminal.pid)
    try:
        assert terminal.end(pressing=b"\x03") == -signal.SIGINT, terminal.seen
        assert f"process {program} goes on without fentry".encode() in terminal.seen
        assert "fentry." not in Path(f"/proc/{program}/maps").read_text()
    finally:
        os.kill(program, signal.SIGKILL)
    assert fentry("report", cwd=tmp_path).stdout.count(b"turn_twice") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminated_leaves_the_program(say: str, tmp_path: Path, number: signal.Signals) -> None:
    with running(FENTRY, "record", say, "spin", cwd=tmp_path) as tracer:
        assert line(tracer.stdout) == "ready"
        tracer.send_signal(number)
        said = line(tracer.stderr)
        assert said.endswith("goes on without fentry")
        program = int(said.split()[2])
        try:
            assert tracer.wait(PATIENCE) == -number
            assert "fentry." not in Path(f"/proc/{program}/maps").read_text()
        finally:
            os.kill(program, signal.SIGKILL)
    assert fentry("report", cwd=tmp_path).stdout.count(b"turn_twice") > 0


def test_ignored_signals_stay_ignored(say: str, tmp_path: Path) -> None:
    """As under nohup: a hangup is neither ours nor the program's."""
    with running("nohup", FENTRY, "record", say, "spin", cwd=tmp_path) as tracer:
        assert line(tracer.stdout) == "ready"
        tracer.send_signal(signal.SIGHUP)
        (child,) = children(tracer.pid)
        os.kill(child, signal.SIGHUP)
        os.kill(child, signal.SIGINT)
        assert tracer.wait(PATIENCE) == 6


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("verb", [["record", "-o", "t.data"], ["stat", "-o", "t.txt"], ["-o", "t.txt"]], ids=str)
def test_interrupt_detaches(say: str, tmp_path: Path, verb: list[str]) -> None:
    with running(say, "spin") as program:
        assert line(program.stdout) == "ready"
        before = Path(f"/proc/{program.pid}/maps").read_text()
        with running(FENTRY, *verb, "--pid", str(program.pid), cwd=tmp_path) as tracer:
            wait_for(lambda: "fentry.rings" in Path(f"/proc/{program.pid}/maps").read_text(), tracer)
            tracer.send_signal(signal.SIGINT)
            assert tracer.wait(PATIENCE) == 0
        assert Path(f"/proc/{program.pid}/maps").read_text() == before
        assert program.poll() is None
        program.send_signal(signal.SIGINT)
        assert program.wait(PATIENCE) == 6


def test_duration_ends_the_tracing_only(say: str, tmp_path: Path) -> None:
    done = fentry("record", "-q", "--duration", "50ms", "sh", "-c", "sleep 0.4; exit 4", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (4, b"")
    with running(say, "spin") as program:
        assert line(program.stdout) == "ready"
        done = fentry("stat", "--pid", str(program.pid), "--duration", "0.1", "--json")
        assert done.returncode == 0
        assert b'"function": "turn"' in done.stdout
        assert program.poll() is None


def test_program_that_is_killed_under_us(say: str, tmp_path: Path) -> None:
    with running(FENTRY, "record", "-q", say, "spin", cwd=tmp_path) as tracer:
        assert line(tracer.stdout) == "ready"
        (child,) = children(tracer.pid)
        os.kill(child, signal.SIGKILL)
        assert tracer.wait(PATIENCE) == -signal.SIGKILL
    assert fentry("report", cwd=tmp_path).returncode == 0


def test_recover(say: str, tmp_path: Path) -> None:
    """A killed tracer is cleaned up after, in the program and in the children it forked; a living one is not."""
    with running(say, "fork") as program:
        assert line(program.stdout) == "ready"
        pid = program.pid
        before = text_of(pid)
        with running(FENTRY, "record", "--pid", str(pid), cwd=tmp_path) as tracer:
            wait_for(lambda: text_of(pid) != before, tracer)
            refused = fentry("recover", str(pid))
            assert (refused.returncode, refused.stdout) == (1, b"")
            assert f"is being traced by process {tracer.pid}".encode() in refused.stderr
            child = int(line(program.stdout))
            assert text_of(child) != before
        try:
            done = fentry("recover", str(pid))
            assert done.returncode == 0, done.stderr
            assert done.stdout.decode().count(" restored, ") == 2
            for number in (pid, child):
                assert text_of(number) == before
                assert "fentry." not in Path(f"/proc/{number}/maps").read_text()
            again = fentry("recover", "--json", str(pid))
            assert (again.returncode, again.stdout) == (1, b"")
            assert program.poll() is None
        finally:
            os.kill(child, signal.SIGKILL)


def text_of(pid: int) -> bytes:
    """The program's own code, as it is in memory."""
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        exe = str(Path(f"/proc/{pid}/exe").readlink())
        for mapping in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if " r-xp " in mapping and mapping.endswith(exe):
                low, high = (int(word, 16) for word in mapping.split()[0].split("-"))
                memory.seek(low)
                return memory.read(high - low)
    raise AssertionError("no text")


def wait_for(what: object, tracer: subprocess.Popen[bytes]) -> None:
    """Look until it is so, or the tracer has ended."""
    assert callable(what)
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert tracer.poll() is None, tracer.stderr and tracer.stderr.read()
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)


def test_another_users_process(say: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    script = (
        "import os, sys\n"
        # modules may lie where only root may read
        "import locale, fentry.tracers.session, fentry.target.process, fentry.cli.record, fentry.cli.traced\n"
        "fentry.tracers.all_tracers()\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from fentry.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    with running(say, "spin") as program:
        assert line(program.stdout) == "ready"
        done = run(sys.executable, "-c", script, "record", "--pid", str(program.pid))
        assert done.returncode == 1
        assert f"fentry: process {program.pid} belongs to uid 0, this is uid 65534\n  try: " in done.stderr.decode()
        assert program.poll() is None


def test_progress_line_on_a_terminal() -> None:
    """Shown when something takes long, gone when it is done; nothing at all elsewhere."""
    script = (
        "import sys\nfrom fentry.cli import show\nshow.PATIENCE = 0.01\n"
        "with show.Progress('looking') as progress:\n    progress('hooking'); progress._timer.join()\n"
        "print('done', file=sys.stderr)\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script], stderr=theirs, stdout=subprocess.PIPE, env=environment(TERM="xterm")
    ) as program:
        os.close(theirs)
        assert program.stdout is not None
        assert program.stdout.read() == b""
    seen = b""
    with contextlib.suppress(OSError):
        while more := os.read(ours, 4096):
            seen += more
    os.close(ours)
    assert b"fentry: hooking (" in seen
    erased = seen.rpartition(b"fentry: hooking (")[2]
    assert b"\x1b[2K" in erased
    assert erased.endswith(b"done\r\n")
    silent = run(sys.executable, "-c", script.replace("progress._timer.join()", "pass"))
    assert (silent.stdout, silent.stderr) == (b"", b"done\n")
