"""Bad input, and processes that are not what they seem: one clear error, and a target that did not notice."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fentry.errors import AskedWrong, Gone, TraceError
from fentry.record.store import Trace
from fentry.target import seccomp
from fentry.target.process import attach
from fentry.tracers.session import Plan
from tests.cli.conftest import FENTRY, fentry, run
from tests.conftest import unavailable
from tests.safety.checked import Picture, picture, visit

pytestmark = pytest.mark.live

PROGRAMS = Path(__file__).parent / "programs"
NOBODY = 65534
SMALL = ("--threads", "8", "--buffer-size", "64K")


class Odd:
    """A running ``odd`` (or whatever answers a line with "right")."""

    def __init__(self, *words: str | Path) -> None:
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pid = self.process.pid
        assert self.process.stdout.readline() == b"ready\n", f"it ended with {self.process.wait()}"

    def right(self) -> bool:
        self.process.stdin.write(b"x\n")
        return self.process.stdout.readline() == b"right\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def odd(build) -> Iterator[Callable[..., Odd]]:
    running: list[Odd] = []

    def start(mode: str = "plain") -> Odd:
        running.append(Odd(build(PROGRAMS / "odd.c", opt="-O1", flags=("-Wextra",)), mode))
        return running[-1]

    yield start
    for one in running:
        one.end()


def refused(done: subprocess.CompletedProcess[bytes], status: int, *words: str) -> None:
    """One error of one or two lines, with these words in it, and this exit status."""
    said = done.stderr.decode()
    lines = said.splitlines()
    assert done.returncode == status, said
    assert 1 <= len(lines) <= 2, said
    assert lines[0].startswith("fentry: "), said
    assert "bug of fentry" not in said
    assert len(lines) == 1 or lines[1].startswith("  try: "), said
    for word in words:
        assert word in said
    assert done.stdout == b""


def untouched(program: Odd, before: Picture) -> None:
    assert program.right()
    assert before.differs(picture(program.pid)) == ""


# -- files ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("at", [0, 16, 63, 64, 200, 900, 4096])
def test_truncated_program(build, tmp_path, at: int) -> None:
    path = tmp_path / "program"
    path.write_bytes(build("calls.c").read_bytes()[:at])
    path.chmod(0o755)
    for verb in (("record", "--"), ("list",)):
        done = fentry(*verb, str(path), cwd=tmp_path)
        refused(done, done.returncode)
        assert done.returncode in (1, 2)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (18, b"\xb7\x00"),  # e_machine: arm64
        (18, b"\xff\xff"),
        (4, b"\x01"),  # 32 bit
        (5, b"\x02"),  # big-endian
        (32, b"\xff" * 8),  # e_phoff
        (54, b"\xff\xff"),  # e_phentsize
        (56, b"\xff\xff"),  # e_phnum
    ],
)
def test_hostile_program(build, tmp_path, offset: int, value: bytes) -> None:
    data = bytearray(build("calls.c").read_bytes())
    data[offset : offset + len(value)] = value
    path = tmp_path / "program"
    path.write_bytes(data)
    path.chmod(0o755)
    done = fentry("record", "--", str(path), cwd=tmp_path)
    refused(done, done.returncode)
    assert done.returncode in (1, 2)


def test_program_without_names(build, tool, tmp_path) -> None:
    """No symbols and no unwind tables: nothing is known of its functions, so nothing of it can be traced."""
    path = tmp_path / "bare"
    shutil.copy(build("calls.c"), path)
    remove = [f"--remove-section={name}" for name in (".eh_frame", ".eh_frame_hdr")]
    subprocess.run([tool("objcopy"), "--strip-all", *remove, path], check=True)
    refused(fentry("record", "--", str(path), cwd=tmp_path), 2, "no functions of its own that can be traced", "not run")


# -- processes ----------------------------------------------------------------------------------------------
def test_no_such_process() -> None:
    refused(fentry("record", "--pid", str(2**22 + 1)), 2, "no process")


def test_kernel_thread_and_ourselves() -> None:
    if Path("/proc/2/comm").exists() and Path("/proc/2/comm").read_text() == "kthreadd\n":
        refused(fentry("record", "--pid", "2"), 1, "kernel thread")
    with pytest.raises(TraceError):
        attach(os.getpid())


def test_process_of_another_user(odd, tmp_path) -> None:
    if os.geteuid() or not shutil.which("setpriv"):
        unavailable("only root can be another user; setpriv (Debian: util-linux) is needed")
    program = odd()
    before = picture(program.pid)
    words = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", FENTRY)
    done = run(*words, "record", "--pid", str(program.pid), cwd=tmp_path)
    if done.returncode == 126:
        unavailable("nobody may not run the interpreter of these tests")
    refused(done, 1, "belongs to uid 0", str(NOBODY))
    untouched(program, before)


@pytest.mark.parametrize("pattern", ["nosuch*", "[", "libnosuch.so*:f", "", ":", "lib:"])
def test_filter_that_matches_nothing(odd, tmp_path, pattern: str) -> None:
    program = odd()
    before = picture(program.pid)
    refused(fentry("record", "-l", pattern, "--pid", str(program.pid), cwd=tmp_path), 2)
    untouched(program, before)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("no-room", "RLIMIT_AS"),
        ("no-descriptor", "RLIMIT_NOFILE"),
        ("strict", "seccomp"),
    ],
)
@pytest.mark.parametrize("tracer", ["function", "function_graph"])
def test_process_that_has_no_room(odd, tmp_path, tracer: str, mode: str, words: str) -> None:
    program = odd(mode)
    before = picture(program.pid)
    refused(fentry("record", "-p", tracer, *SMALL, "--pid", str(program.pid), cwd=tmp_path), 1, words)
    untouched(program, before)


@pytest.mark.parametrize("mode", ["little-room", "locked"])
def test_process_without_room_for_a_shadow_stack(odd, tmp_path, mode: str) -> None:
    """Entries are recorded, and it says why returns are not."""
    program = odd(mode)
    before = picture(program.pid)
    with subprocess.Popen(
        [FENTRY, "record", *SMALL, "--pid", str(program.pid)], cwd=tmp_path, stderr=subprocess.PIPE
    ) as tracer:
        until_traced(program.pid, before, tracer)
        for _ in range(10):
            assert program.right()
        tracer.send_signal(signal.SIGINT)
        said = tracer.stderr.read().decode()
        assert tracer.wait() == 0, said
    assert "returns are not hooked" in said
    assert "Traceback" not in said
    assert sum(batch.num_rows for batch in Trace.open(tmp_path / "fentry.data").events()) > 0
    untouched(program, before)


def until_traced(pid: int, before: Picture, tracer: subprocess.Popen[bytes]) -> None:
    """Wait until the program's own code has been changed."""
    start, code = next(iter(before.code.items()))
    deadline = time.monotonic() + 30
    while picture(pid).code[start] == code:
        assert tracer.poll() is None, tracer.stderr and tracer.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)  # between two looks


def test_process_that_is_held_by_a_debugger(odd, tmp_path) -> None:
    program = odd()
    before = picture(program.pid)
    with attach(program.pid) as target:
        target.resume()
        target.stop()
        refused(fentry("record", "--pid", str(program.pid), cwd=tmp_path), 1, f"{os.getpid()}")
    untouched(program, before)


def test_process_that_another_fentry_traces(odd, tmp_path) -> None:
    program = odd()
    before = picture(program.pid)
    with subprocess.Popen(
        [FENTRY, "record", *SMALL, "--pid", str(program.pid)], cwd=tmp_path, stderr=subprocess.PIPE
    ) as tracer:
        until_traced(program.pid, before, tracer)
        deadline = time.monotonic() + 30
        while b"TracerPid:\t0\n" not in Path(f"/proc/{program.pid}/status").read_bytes():
            assert time.monotonic() < deadline
        refused(fentry("record", "-o", "other", "--pid", str(program.pid), cwd=tmp_path), 1)
        assert program.right()
        tracer.send_signal(signal.SIGINT)
        assert tracer.wait() == 0, tracer.stderr.read()
    untouched(program, before)


def test_process_that_ends_while_it_is_attached_to(tmp_path) -> None:
    """Whenever that is: the error is one of ours."""
    outcomes = set()
    for i in range(25):
        with subprocess.Popen(["sleep", f"{i * 0.0004:.4f}"]) as program:
            try:
                visit(program.pid, Plan(tracer="function", wanted=("libc.so.6:nanosleep",)), tmp_path / "trace", 0)
                outcomes.add("traced")
            except (Gone, AskedWrong) as error:
                outcomes.add(type(error).__name__)
            program.kill()
    assert outcomes


def test_process_that_execs_while_it_is_attached_to(tmp_path) -> None:
    script = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); done; exec sh -c 'exec sleep 60'"
    for _ in range(12):
        program = subprocess.Popen(["sh", "-c", script])
        try:
            with contextlib.suppress(TraceError):
                visit(program.pid, Plan(tracer="function"), tmp_path / "trace", 0)
            assert program.poll() is None, f"it ended with {program.returncode}"
        finally:
            program.kill()
            program.wait()


def test_process_that_execs_while_it_is_traced(build, tmp_path) -> None:
    program = subprocess.Popen([build("server.c")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        assert program.stdout.readline() == "ready\n"
        before = picture(program.pid)
        with subprocess.Popen(
            [FENTRY, "record", *SMALL, "--pid", str(program.pid)], cwd=tmp_path, stderr=subprocess.PIPE
        ) as tracer:
            until_traced(program.pid, before, tracer)
            program.stdin.write("work 100\nexec\nwork 100\n")
            assert program.stdout.readline().startswith("work 100")
            assert program.stdout.readline() == "ready\n"
            tracer.send_signal(signal.SIGINT)
            said = tracer.stderr.read().decode()
            tracer.wait()
        assert "Traceback" not in said
        assert "bug of fentry" not in said
        assert program.stdout.readline().startswith("work 100")
        assert "fentry." not in Path(f"/proc/{program.pid}/maps").read_text()
    finally:
        program.kill()
        program.wait()
        program.stdin.close()
        program.stdout.close()


# -- resources ------------------------------------------------------------------------------------------------
def test_ring_larger_than_memory(odd, tmp_path) -> None:
    program = odd()
    before = picture(program.pid)
    for size in ("64G", "1024T"):
        refused(fentry("record", "--buffer-size", size, "--pid", str(program.pid), cwd=tmp_path), 2)
    untouched(program, before)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system with room for 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = run("mount", "-t", "tmpfs", "-o", "size=512k", "none", str(disk))
    if done.returncode:
        unavailable(f"a small file system cannot be mounted here: {done.stderr.decode().strip()}")
    yield disk
    assert run("umount", str(disk)).returncode == 0


def test_disk_that_is_full(odd, small_disk: Path) -> None:
    """Tracing ends with one error, the process goes on, and what was written can be read."""
    program = odd()
    before = picture(program.pid)
    trace = small_disk / "trace"
    words = [FENTRY, "record", "--clock", "order", *SMALL, "-o", str(trace), "--pid", str(program.pid)]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as tracer:
        until_traced(program.pid, before, tracer)
        deadline = time.monotonic() + 60
        while tracer.poll() is None:
            assert program.right()
            assert time.monotonic() < deadline, "it records on, although nothing can be written"
        said = tracer.stderr.read().decode()
    assert tracer.returncode == 1, said
    assert "Traceback" not in said
    assert "bug of fentry" not in said
    untouched(program, before)
    assert sum(batch.num_rows for batch in Trace.open(trace).events()) > 0


# -- filters of system calls ------------------------------------------------------------------------------------
ALLOW, KILL = 0x7FFF0000, 0x80000000


@pytest.mark.parametrize(
    ("program", "nr", "result"),
    [
        ([(0x06, 0, 0, ALLOW)], 39, ALLOW),
        ([(0x20, 0, 0, 0), (0x15, 0, 1, 39), (0x06, 0, 0, ALLOW), (0x06, 0, 0, KILL)], 39, ALLOW),
        ([(0x20, 0, 0, 0), (0x15, 0, 1, 39), (0x06, 0, 0, ALLOW), (0x06, 0, 0, KILL)], 40, KILL),
        ([(0x20, 0, 0, 4), (0x15, 1, 0, 0xC000003E), (0x06, 0, 0, KILL), (0x06, 0, 0, ALLOW)], 1, ALLOW),
        ([(0x20, 0, 0, 0), (0x35, 0, 1, 100), (0x06, 0, 0, KILL), (0x05, 0, 0, 0), (0x06, 0, 0, ALLOW)], 99, ALLOW),
        ([(0x00, 0, 0, 7), (0x07, 0, 0, 0), (0x04, 0, 0, 5), (0x0C, 0, 0, 0), (0x16, 0, 0, 0)], 0, 19),
        ([(0x00, 0, 0, 9), (0x02, 0, 0, 3), (0x00, 0, 0, 0), (0x60, 0, 0, 3), (0x16, 0, 0, 0)], 0, 9),
        ([(0x20, 0, 0, 0)], 0, KILL),  # it runs off its end
        ([(0x20, 0, 0, 400)], 0, KILL),
    ],
)
def test_filters_are_run_as_the_kernel_runs_them(program, nr: int, result: int) -> None:
    assert seccomp.run(program, nr) == result
