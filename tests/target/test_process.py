"""Live processes: starting, attaching, stopping, memory, what is refused; and everything as before in the end."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from fentry.errors import AskedWrong, Denied, EngineBug, Fault, Gone, OutOfReach, TargetRefused, Unsupported
from fentry.target import Stop, halt, procfs, ptrace
from fentry.target.memory import Memory
from fentry.target.process import ProcessTarget, attach, spawn
from fentry.testing.target import Probe, check_target
from tests.target.steady import die_at

pytestmark = pytest.mark.live

LIVE = Path(__file__).parent / "live"
NOBODY = 65534
#: what /proc/PID/status tells of a thread that nobody but itself may change
STATE = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "TracerPid")


def settled(condition, what: str) -> None:
    """Wait until `condition` holds; it is about the kernel's bookkeeping, so soon."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def picture(pid: int) -> dict:
    """What must be the same after a visit: mappings, code, threads and their signal state."""
    code = {}
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for region in procfs.regions(pid):
            if region.mapping.perms.startswith("r-x") and region.mapping.path != "[vsyscall]":
                code[region.mapping.start] = os.pread(memory.fileno(), region.mapping.size, region.mapping.start)
    threads = {
        tid: {name: value for name, value in procfs.status(tid).items() if name in STATE} for tid in procfs.tids(pid)
    }
    return {"maps": Path(f"/proc/{pid}/maps").read_text(), "code": code, "threads": threads}


@pytest.fixture
def running():
    """Start programs that are killed in the end."""
    all_of_them = []

    def start(*argv, **kwargs) -> subprocess.Popen:
        kwargs = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} | kwargs
        all_of_them.append(subprocess.Popen([os.fspath(word) for word in argv], **kwargs))
        return all_of_them[-1]

    yield start
    for one in all_of_them:
        one.kill()
        one.wait()
        for stream in (one.stdin, one.stdout, one.stderr):
            if stream:
                stream.close()


@pytest.fixture
def live(build):
    """Build a program of ``live/``."""
    return lambda name, **kwargs: build(LIVE / name, opt="-O1", flags=("-Wextra", "-Wl,-z,now"), **kwargs)


def echoes(process: subprocess.Popen, byte: bytes = b"a") -> bool:
    """Whether an echoing program answers."""
    process.stdin.write(byte)
    process.stdin.flush()
    return process.stdout.read(1) == byte


def spawned(argv, **kwargs) -> tuple[bytes, Stop]:
    """Run a program through spawn to its end; gives what it wrote and how it ended."""
    reader, writer = os.pipe()
    with spawn(argv, stdout=writer, **kwargs) as target:
        os.close(writer)
        target.resume()
        with os.fdopen(reader, "rb") as file:
            output = file.read()
        return output, target.wait()


# -- starting -------------------------------------------------------------------------------------------
def test_spawn_passes_everything_through(tmp_path) -> None:
    (tmp_path / "in").write_bytes(b"from a file")
    with (tmp_path / "in").open("rb") as file:
        output, end = spawned(
            ["sh", "-c", 'cat; echo " $WORD $PWD"; exit 7'],
            stdin=file,
            cwd=tmp_path,
            env={"WORD": "x", "PATH": os.environ["PATH"]},
        )
    assert output == f"from a file x {tmp_path}\n".encode()
    assert end.kind == "exited"
    assert end.status == 7


def test_spawn_gives_descriptors_and_signals_as_a_shell_does() -> None:
    script = (
        "ls -l /proc/self/fd | sed -n 's/.* \\([0-9]* ->\\)/\\1/p' | grep -v /proc/; grep -E 'Sig' /proc/self/status"
    )
    with Path(os.devnull).open() as inherited:
        os.set_inheritable(inherited.fileno(), True)
        plain = subprocess.run(["sh", "-c", script], close_fds=False, capture_output=True, check=True).stdout
        ours, _ = spawned(["sh", "-c", script])

    def neutral(text: bytes) -> bytes:
        return re.sub(rb"(pipe|socket):\[\d+\]", b"pipe", text)

    assert neutral(ours).count(b"/dev/null") >= 1
    assert re.sub(rb"^[02] -> .*\n", b"", neutral(ours), flags=re.MULTILINE) == re.sub(
        rb"^[02] -> .*\n", b"", neutral(plain), flags=re.MULTILINE
    )


@pytest.mark.parametrize("kind", ["pie", "exec", "static", "static-pie"])
def test_spawn_stops_at_the_entry_point(build, kind: str) -> None:
    program = build("calls.c", kind=kind)
    plain = subprocess.run([program], capture_output=True, check=False)
    reader, writer = os.pipe()
    with spawn([program], stdout=writer) as target:
        os.close(writer)
        main = target.modules()[0]
        header = program.read_bytes()[:64]
        entry = int.from_bytes(header[24:32], "little") + main.bias
        assert target.regs(target.pid)["rip"] == entry
        assert main.main
        assert main.file == str(program)
        names = [module.name for module in target.modules()]
        assert ("libc.so.6" in names) == (not kind.startswith("static"))
        assert "[vdso]" in names
        size = next(m.size for m in target.mappings() if m.start <= entry < m.end)
        start = next(m.start for m in target.mappings() if m.start <= entry < m.end)
        offset = next(m.offset for m in target.mappings() if m.start <= entry < m.end)
        text = program.read_bytes()[offset : offset + size]
        assert target.read(start, len(text)) == text, "the breakpoint is still there"
        target.resume()
        with os.fdopen(reader, "rb") as file:
            assert file.read() == plain.stdout
        end = target.wait()
    assert end.status == (plain.returncode if plain.returncode >= 0 else -plain.returncode)


def test_spawn_tells_of_death_by_signal() -> None:
    _, end = spawned(["sh", "-c", "kill -11 $$"])
    assert (end.kind, end.status) == ("signalled", 11)


def test_spawn_of_what_cannot_run(build, tmp_path) -> None:
    script = tmp_path / "script"
    script.write_text("echo hello\n")
    with pytest.raises(AskedWrong, match="not executable"):
        spawn([script])
    script.chmod(0o755)
    with pytest.raises(AskedWrong, match="not a program that this machine knows"):
        spawn([script])
    with pytest.raises(AskedWrong, match="No such file"):
        spawn([tmp_path / "absent"])
    with pytest.raises(AskedWrong, match="not found in PATH"):
        spawn(["no-such-program-anywhere"])
    with pytest.raises(AskedWrong, match="not a file"):
        spawn([tmp_path])
    with pytest.raises(AskedWrong, match="directory .*No such file"):
        spawn(["true"], cwd=tmp_path / "absent")
    with pytest.raises(AskedWrong, match="NUL"):
        spawn(["echo", "a\0b"])
    with pytest.raises(AskedWrong, match="no program"):
        spawn([])
    program = bytearray(build(LIVE / "echo.c").read_bytes())
    foreign = tmp_path / "foreign"
    foreign.write_bytes(program[:18] + b"\xf3\x00" + program[20:])
    foreign.chmod(0o755)
    with pytest.raises(Unsupported, match=r"ELF machine 243.*"):
        spawn([foreign])
    homeless = tmp_path / "homeless"
    homeless.write_bytes(program.replace(b"/lib64/ld-linux-x86-64.so.2", b"/lib64/ld-xxxxx-x86-64.so.2"))
    homeless.chmod(0o755)
    with pytest.raises(AskedWrong, match="loader is missing"):
        spawn([homeless])
    truncated = tmp_path / "truncated"
    truncated.write_bytes(program[:64])
    truncated.chmod(0o755)
    with pytest.raises((AskedWrong, Gone)):
        spawn([truncated])


def children() -> set[str]:
    """Process ids of this thread's children, zombies included (other tests may have left some to the collector)."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_spawn_leaves_no_child_behind_when_it_fails(tmp_path) -> None:
    script = tmp_path / "script"
    script.write_text("echo hello\n")
    script.chmod(0o755)
    before = children()
    with pytest.raises(AskedWrong):
        spawn([script])
    assert children() == before


def test_spawn_of_a_program_whose_library_is_missing(build, tmp_path) -> None:
    program = tmp_path / "program"
    program.write_bytes(build(LIVE / "echo.c").read_bytes().replace(b"libc.so.6", b"libX.so.6"))
    program.chmod(0o755)
    with (tmp_path / "err").open("wb") as err, pytest.raises(Gone, match="before it reached its entry point") as caught:
        spawn([program], stderr=err)
    assert os.waitstatus_to_exitcode(caught.value.status) == 127
    assert b"libX.so.6" in (tmp_path / "err").read_bytes()


def test_spawn_of_a_setuid_program() -> None:
    su = Path("/usr/bin/su")
    if not su.exists():
        pytest.skip("no /usr/bin/su here")
    if os.geteuid():
        with pytest.raises(Denied, match="setuid"):
            spawn([su])
    else:
        assert as_nobody(lambda: spawn([su])).startswith("Denied: cannot trace /usr/bin/su from its start")
        output, end = spawned([su, "--version"])  # for root it changes nothing
        assert (output[:2], end.status) == (b"su", 0)


def test_a_program_whose_tracer_dies_while_it_is_started_never_began(tmp_path) -> None:
    """Until the entry point is reached the program dies with its tracer, at whatever step that is."""
    witness = tmp_path / "witness"

    def start() -> None:
        with spawn(["touch", witness]) as target:
            target.resume()
            target.wait()

    step = 1
    while die_at(start, step, after=False):
        settled(lambda: not children_of_the_dead(), "a child is left waiting")
        step += 1
    assert witness.exists()
    assert step > 8


def children_of_the_dead() -> list[int]:
    """Processes that run `touch`, or wait to do so, as orphans of this session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                fields = procfs.stat(int(entry.name))
            except Gone:
                continue
            if (
                int(fields[3]) == os.getsid(0)
                and fields[0] != "Z"
                and int(fields[2]) == os.getpgid(0)
                and fields[1] == "1"
            ):
                found.append(int(entry.name))
    return found


# -- attaching ------------------------------------------------------------------------------------------
def test_attach_leaves_no_trace(running, live) -> None:
    process = running(live("crowd.c"), "still", "64")
    assert echoes(process)
    calls = Path(f"/proc/{process.pid}/task")
    settled(lambda: all((t / "syscall").read_text()[:2] in ("34", "0 ") for t in calls.iterdir()), "not all are asleep")
    before = picture(process.pid)
    with attach(process.pid) as target:
        assert target.threads()[0] == process.pid
        assert len(target.threads()) == 65
        assert target.comm(process.pid) == procfs.comm(process.pid)
        registers = {tid: target.regs(tid) for tid in target.threads()}
        at = target.allocator.map(4096, "rw-")
        shared, _ = target.shared.share(8192, "test")
        target.allocator.unmap(at, 4096)
        target.allocator.unmap(shared, 8192)
        assert {tid: target.regs(tid) for tid in target.threads()} == registers
    assert picture(process.pid) == before
    assert echoes(process)


def test_attach_while_threads_come_and_go(running, live) -> None:
    process = running(live("crowd.c"), "churn", "4")
    assert echoes(process)
    target = attach(process.pid)
    for _ in range(40):
        listed = {int(entry.name) for entry in Path(f"/proc/{process.pid}/task").iterdir()}
        stopped = [tid for tid in listed if procfs.state(tid) == "t"]
        assert sorted(stopped) == sorted(target.threads())
        assert not [tid for tid in listed if procfs.state(tid) in "RSD"]
        assert target.syscall(39) == process.pid
        target.resume()
        assert echoes(process)
        target.stop()
    target.close()
    assert echoes(process)


def test_attach_after_the_first_thread_has_ended(running, live) -> None:
    process = running(live("crowd.c"), "orphans", "2")
    assert echoes(process)
    settled(lambda: procfs.state(process.pid) == "Z", "the first thread goes on")
    with attach(process.pid) as target:
        assert process.pid not in target.threads()
        assert target.modules()[0].main
        assert target.syscall(39) == process.pid
        at = target.allocator.map(4096, "rw-", near=target.modules()[0].start, reach=1 << 31)
        target.write(at, b"hello")
        assert target.read(at, 5) == b"hello"
        target.allocator.unmap(at, 4096)
    assert echoes(process)


def test_attach_to_a_stopped_process(running, live) -> None:
    process = running(live("crowd.c"), "still", "3")
    assert echoes(process)
    process.send_signal(signal.SIGSTOP)
    settled(lambda: procfs.state(process.pid) == "T", "not stopped")
    with attach(process.pid) as target:
        assert target.syscall(39) == process.pid
    settled(lambda: {procfs.state(tid) for tid in procfs.tids(process.pid)} == {"T"}, "no longer stopped")
    process.send_signal(signal.SIGCONT)
    assert echoes(process)


def test_signals_arrive_once_and_in_order(running, live) -> None:
    """Signals sent while we hold the process, and while calls are injected, wait in the kernel."""
    process = running(live("signals.c"))
    assert process.stdout.readline() == b"ready\n"
    libc = ctypes.CDLL(None, use_errno=True)
    want = []
    for round_ in range(5):
        with attach(process.pid) as target:
            for value in range(8):
                number = 3 - value % 4
                assert libc.sigqueue(process.pid, signal.SIGRTMIN + number, ctypes.c_void_p(round_ * 100 + value)) == 0
                target.syscall(39)
            want = [b"%d %d\n" % (n, round_ * 100 + v) for n in range(4) for v in range(8) if 3 - v % 4 == n]
        assert [process.stdout.readline() for _ in want] == want  # the kernel's order: by number, then by time
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"end\n"


def test_attach_under_a_storm_of_signals(running, live) -> None:
    """Signals sent by another thread all the while: each one arrives, none twice."""
    process = running(live("signals.c"))
    assert process.stdout.readline() == b"ready\n"
    libc = ctypes.CDLL(None, use_errno=True)

    over = threading.Event()
    sent = 0

    def storm() -> None:
        nonlocal sent
        while not over.is_set():
            if libc.sigqueue(process.pid, signal.SIGRTMIN, ctypes.c_void_p(sent)) == 0:
                sent += 1
            else:
                time.sleep(0.001)  # the queue is full

    sender = threading.Thread(target=storm)
    sender.start()
    for _ in range(20):
        with attach(process.pid) as target:
            target.syscall(39)
            target.syscall(39)
    over.set()
    sender.join()
    assert sent > 20
    assert [process.stdout.readline() for _ in range(sent)] == [b"0 %d\n" % value for value in range(sent)]


def as_nobody(function) -> str:
    """Run `function` in a process of an ordinary user; gives "ok" or the error's class and text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            function()
            text = "ok"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


root = pytest.mark.skipif(os.geteuid() != 0, reason="plays two users, so it needs root")


@root
def test_attach_as_an_ordinary_user(running) -> None:
    others = running("sleep", "60")
    text = as_nobody(lambda: attach(others.pid))
    assert text.startswith(f"Denied: process {others.pid} belongs to uid 0, this is uid {NOBODY}")
    assert procfs.state(others.pid) == "S"
    own = running("sleep", "60", user=NOBODY, group=NOBODY, extra_groups=[])

    def visit() -> None:
        with attach(own.pid) as target:
            assert target.syscall(39) == own.pid
            assert target.modules()[0].name == "sleep"
            at, view = target.shared.share(4096, "mine")
            view[0] = 7
            assert target.read(at, 1) == b"\x07"

    assert as_nobody(visit) == "ok"
    assert procfs.state(own.pid) == "S"
    text = as_nobody(lambda: attach(own.pid).shared.reopen("mine"))
    assert text.startswith("Denied: not permitted to open"), text


@root
def test_attach_under_a_seccomp_filter(running, live) -> None:
    """The privileged suspend the filter; others are refused before anything is done."""
    program = live("echo.c")
    process = running(program, "filter")
    assert echoes(process)
    with attach(process.pid) as target:
        assert target.syscall(39) == process.pid
        target.allocator.map(4096, "rw-")
    assert echoes(process)
    public = Path("/var/tmp") / f"echo-{os.getpid()}"
    try:
        public.write_bytes(program.read_bytes())
        public.chmod(0o755)
        own = running(public, "filter", user=NOBODY, group=NOBODY, extra_groups=[])
        assert echoes(own)
        text = as_nobody(lambda: attach(own.pid).syscall(39))
        assert text.startswith("Denied: thread"), text
        assert "seccomp" in text
        assert echoes(own)
    finally:
        public.unlink()


def test_attach_to_what_is_traced_already(running) -> None:
    process = running("sleep", "60")
    with attach(process.pid):
        other = os.fork()
        if other == 0:
            try:
                attach(process.pid)
            except Denied as error:
                os._exit(0 if f"already traced by process {os.getppid()}" in str(error) else 1)
            finally:
                os._exit(2)
        assert os.waitpid(other, 0)[1] == 0
    assert procfs.status(process.pid)["TracerPid"] == "0"


def test_attach_to_what_is_none(running) -> None:
    ended = subprocess.Popen(["true"])
    settled(lambda: procfs.state(ended.pid) == "Z", "no zombie")
    with pytest.raises(Gone, match="has ended"):
        attach(ended.pid)
    ended.wait()
    with pytest.raises(AskedWrong, match="no process"):
        attach(ended.pid)
    with pytest.raises(Denied, match="this process"):
        attach(os.getpid())
    for nonsense in (0, -1, 1 << 40):
        with pytest.raises(AskedWrong, match="no process"):
            attach(nonsense)
    if procfs.state(2) and procfs.is_kernel_thread(2):
        with pytest.raises(Unsupported, match="kernel thread"):
            attach(2)


def test_attach_by_a_thread_id(running, live) -> None:
    process = running(live("crowd.c"), "still", "1")
    assert echoes(process)
    thread = procfs.tids(process.pid)[1]
    with pytest.raises(AskedWrong, match=f"thread of process {process.pid}"):
        attach(thread)


def test_attach_to_a_32_bit_process(running, tmp_path, tool) -> None:
    source, program = tmp_path / "old.S", tmp_path / "old"
    source.write_text(
        '.globl _start\n_start: mov $29, %eax\nint $0x80\njmp _start\n.section .note.GNU-stack,"",@progbits\n'
    )
    subprocess.run([tool("gcc"), "-m32", "-nostdlib", "-static", source, "-o", program], check=True)
    with pytest.raises(Unsupported, match="another machine"):
        spawn([program])
    try:
        process = running(program)
    except OSError:
        pytest.skip("this kernel runs no 32-bit programs")
    with pytest.raises(Unsupported, match="word size"):
        attach(process.pid)
    assert procfs.state(process.pid) == "S"


@pytest.mark.parametrize("again", ["same", "other"])
def test_exec_between_visits(running, live, again: str) -> None:
    program = live("echo.c")
    process = running(program, "exec", program if again == "same" else "/bin/cat")
    assert echoes(process)
    target = attach(process.pid)
    at = target.modules()[0].start
    target.resume()
    process.stdin.write(b"x")
    process.stdin.flush()
    settled(lambda: procfs.comm(process.pid) == "cat" if again == "other" else True, "no exec")
    if again == "same":
        process.wait()  # without a mode it ends at once
        with pytest.raises(Gone):
            target.stop()
    else:
        with pytest.raises(Gone, match="by exec"):
            target.stop()
        assert echoes(process)
    with pytest.raises(Gone):
        target.read(at, 4)
    target.close()
    target.close()


def test_attach_while_a_thread_cannot_be_stopped(running, live, monkeypatch) -> None:
    """A parent that waits for its vfork child cannot be stopped: refused before anything is done; later possible."""
    process = running(live("crowd.c"), "vfork", "2")
    assert echoes(process)
    settled(lambda: "D" in {procfs.state(tid) for tid in procfs.tids(process.pid)}, "nobody waits for a child")
    monkeypatch.setattr(halt, "PATIENCE", 0.05)
    with pytest.raises(TargetRefused, match="cannot be stopped"):
        attach(process.pid)
    assert {procfs.status(tid)["TracerPid"] for tid in procfs.tids(process.pid)} == {"0"}
    assert echoes(process)
    assert echoes(process, b"g")
    settled(lambda: "D" not in {procfs.state(tid) for tid in procfs.tids(process.pid)}, "it waits still")
    with attach(process.pid) as target:
        assert target.syscall(39) == process.pid
    assert echoes(process)


def test_exec_of_the_same_program_is_noticed(running, live) -> None:
    program = live("echo.c")
    process = running(program, "exec", program, "exec")
    assert echoes(process)
    with attach(process.pid) as target:
        target.resume()
        target.stop()  # the same program still
        target.resume()
        process.stdin.write(b"x")
        assert echoes(process)
        with pytest.raises(Gone, match="by exec"):
            target.stop()
    assert echoes(process)


def test_attach_while_it_execs_or_exits(running) -> None:
    """A process that replaces itself all the time, and ends in between: Gone or a good target, nothing else."""
    outcomes = set()
    for _ in range(40):
        process = running("sh", "-c", "exec sh -c 'exec sh -c \"exec true\"'")
        while True:
            try:
                with attach(process.pid) as target:
                    assert target.syscall(39) == process.pid
                outcomes.add("attached")
            except Gone:
                outcomes.add("gone")
            except AskedWrong:
                break
            if process.poll() is not None:
                break
        assert process.wait() == 0
    assert "attached" in outcomes


def test_death_in_our_hands(running) -> None:
    process = running("sleep", "60")
    target = attach(process.pid)
    process.kill()
    with pytest.raises(Gone):
        for _ in range(1000):
            target.syscall(39)
    target.close()
    process.wait()

    target = spawn(["sleep", "60"])
    os.kill(target.pid, signal.SIGKILL)
    target.resume()
    assert target.wait() == Stop("signalled", signal.SIGKILL, target.pid)
    with pytest.raises(Gone) as caught:
        target.stop()
    assert caught.value.status == signal.SIGKILL
    target.close()


def test_killing_a_stopped_process(live) -> None:
    reader, writer = os.pipe()
    target = spawn([live("crowd.c"), "still", "8"], stdin=reader)
    target.resume()
    settled(lambda: len(procfs.tids(target.pid)) == 9 or target.wait(0), "no threads")
    target.stop()
    target.kill()
    assert target.wait() == Stop("signalled", signal.SIGKILL, target.pid)
    target.close()
    os.close(reader)
    os.close(writer)


def test_use_from_another_thread_is_told(running) -> None:
    process = running("sleep", "60")
    with attach(process.pid) as target:
        caught = []

        def use() -> None:
            try:
                target.regs(process.pid)
            except EngineBug as error:
                caught.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert len(caught) == 1
        target.resume()
        with pytest.raises(EngineBug, match="must be stopped"):
            target.regs(process.pid)


# -- memory ---------------------------------------------------------------------------------------------
@pytest.fixture
def held(running):
    """A stopped process that was asleep."""
    process = running("sleep", "60")
    asleep = ("35 ", "230 ")  # nanosleep, clock_nanosleep
    settled(lambda: Path(f"/proc/{process.pid}/syscall").read_text().startswith(asleep), "it does not sleep")
    with attach(process.pid) as target:
        yield target


def test_memory_through_protection(held: ProcessTarget) -> None:
    text = next(m for m in held.mappings() if m.perms == "r-xp" and m.path.endswith("sleep"))
    whole = held.read(text.start, text.size)
    assert len(whole) == text.size
    held.write(text.start + 4090, b"across a page")
    assert held.read(text.start + 4090, 13) == b"across a page"
    held.write(text.start + 4090, whole[4090:4103])
    assert held.read(text.start, text.size) == whole
    held._memory.poke(text.start + 13, b"by words, odd place")
    assert held.read(text.start, 64) == whole[:13] + b"by words, odd place" + whole[32:64]
    held._memory.poke(text.start + 13, whole[13:32])
    assert held.read(text.start, text.size) == whole


@pytest.mark.parametrize("at", [0, 4096, 1 << 47, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1])
def test_memory_that_is_not_there(held: ProcessTarget, at: int) -> None:
    with pytest.raises(Fault):
        held.read(at, 16)
    with pytest.raises(Fault):
        held.write(at, b"x")


def test_memory_that_ends_in_the_middle(held: ProcessTarget) -> None:
    mappings = held.mappings()
    last = next(m for m, n in zip(mappings, mappings[1:], strict=False) if m.perms.startswith("r") and n.start > m.end)
    assert len(held.read(last.end - 16, 16)) == 16
    with pytest.raises(Fault):
        held.read(last.end - 16, 17)


def test_many_writes(held: ProcessTarget) -> None:
    """20,000 pieces over 1,000 pages, some across page ends, are each where they belong and nothing else changed."""
    pages = 1000
    at = held.allocator.map(pages * 4096, "r-x")
    filling = os.urandom(pages * 4096)
    held.write(at, filling)
    want = bytearray(filling)
    writes = []
    for page in range(pages - 1):
        for piece in range(20):
            offset = page * 4096 + piece * 204 + (216 if piece == 19 else 2)
            data = os.urandom(5)
            writes.append((at + offset, data))
            want[offset : offset + 5] = data
    assert any((where & 4095) > 4091 for where, _ in writes)
    held.write_many(reversed(writes))
    assert held.read(at, pages * 4096) == want
    held.write_many([])
    with pytest.raises(Fault):
        held.write_many([(at, b"x"), (8, b"y"), (16, b"z")])


# -- registers, steps, calls ----------------------------------------------------------------------------
def test_registers_by_name(held: ProcessTarget) -> None:
    before = held.regs(held.pid)
    assert set(before) == set(ptrace.REGS)
    assert before["orig_rax"] in (35, 230)
    assert before["fs_base"] != 0
    held.set_regs(held.pid, {"rbx": 2**64 - 1, "r12": -2})
    assert held.regs(held.pid) == before | {"rbx": 2**64 - 1, "r12": 2**64 - 2}
    held.set_regs(held.pid, before)
    with pytest.raises(AskedWrong, match="no register 'ebx'"):
        held.set_regs(held.pid, {"ebx": 1})
    with pytest.raises(AskedWrong, match="no thread 1"):
        held.regs(1)


def test_failed_calls_have_the_reason(held: ProcessTarget) -> None:
    with pytest.raises(TargetRefused, match="Bad file descriptor"):
        held.syscall(3, 12345)


def test_step_walks_the_program() -> None:
    """From the entry point every step lands on the next instruction, a system call included."""
    with spawn(["true"]) as target:
        tid = target.pid
        code = target.allocator.map(4096, "r-x")
        # nop; mov $39,%eax; syscall; inc %eax; jmp back to the nop
        target.write(code, bytes.fromhex("90 b827000000 0f05 ffc0 ebf4"))
        before = target.regs(tid)
        target.set_regs(tid, {"rip": code})
        offsets = []
        for _ in range(6):
            target.stepper.step(tid)
            offsets.append(target.regs(tid)["rip"] - code)
        assert offsets == [1, 6, 8, 10, 0, 1]
        assert target.regs(tid)["rax"] == tid + 1
        target.set_regs(tid, before)
        target.allocator.unmap(code, 4096)
        target.resume()
        assert target.wait() == Stop("exited", 0, tid)


def test_step_leaves_signals_pending(running, live) -> None:
    process = running(live("signals.c"))
    assert process.stdout.readline() == b"ready\n"
    with attach(process.pid) as target:
        mask = ptrace.sigmask(process.pid)
        for value in range(5):
            ctypes.CDLL(None).sigqueue(process.pid, signal.SIGRTMIN, ctypes.c_void_p(value))
        rips = set()
        for _ in range(20):
            target.step(process.pid)
            rips.add(target.regs(process.pid)["rip"])
        assert len(rips) < 12, "it left its small loop"
        assert ptrace.sigmask(process.pid) == mask
    assert sorted(process.stdout.readline() for _ in range(5)) == [b"0 %d\n" % value for value in range(5)]


def test_step_of_a_fault_and_of_a_wait(held: ProcessTarget) -> None:
    with pytest.raises(TargetRefused, match="waits in a system call"):
        held.step(held.pid)
    assert held.syscall(39) == held.pid
    before = held.regs(held.pid)
    held.resume()
    held.stop()
    assert held.regs(held.pid)["orig_rax"] in (35, 219, 230)
    assert held.regs(held.pid)["rip"] == before["rip"]


# -- room -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["pie", "exec", "static", "static-pie"])
def test_room_near_every_module(build, kind: str) -> None:
    reach = 2**31 - 2**20
    with spawn([build("calls.c", kind=kind)]) as target:
        for module in target.modules():
            at = target.allocator.map(1 << 20, "r-x", near=module.start, reach=reach)
            assert abs(at - module.start) <= reach
            assert abs(at + (1 << 20) - module.start) <= reach
            mapping = next(m for m in target.mappings() if m.start <= at < m.end)
            assert mapping.perms == "r-xp"
            brk = procfs.start_brk(target.pid)
            assert not brk <= at < brk + (1 << 30), "in the way of the heap"
        target.kill()


def test_room_is_exhausted_cleanly(held: ProcessTarget) -> None:
    main = held.modules()[0]
    with pytest.raises(OutOfReach):
        held.allocator.map(1 << 20, "r-x", near=main.start, reach=1 << 16)
    with pytest.raises(TargetRefused, match="EEXIST"):
        held.allocator.map(4096, "rw-", at=main.start)
    with pytest.raises(TargetRefused, match="ENOMEM"):
        held.allocator.map(1 << 48, "rw-")
    for perms in ("rwx", "", "q"):
        with pytest.raises(AskedWrong):
            held.allocator.map(4096, perms)
    with pytest.raises(AskedWrong):
        held.allocator.map(0, "rw-")
    with pytest.raises(AskedWrong, match="MiB are free"):
        held.shared.share(1 << 45, "much")
    with pytest.raises(AskedWrong):
        held.shared.share(4096, "")
    with pytest.raises(AskedWrong, match="no shared region"):
        held.shared.reopen("none")


def test_room_exactly_there_and_of_each_kind(held: ProcessTarget) -> None:
    first = held.allocator.map(4096, "rw-")
    held.allocator.unmap(first, 4096)
    assert held.allocator.map(100, "rw-", at=first) == first
    vast = held.allocator.map(8 << 40, "rw-", name="noreserve")
    wiped = held.allocator.map(1 << 20, "rw-", name="wipeonfork")
    flags = {}
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{held.pid}/smaps").read_text()):
        flags[int(block.split("-", 1)[0], 16)] = block.rsplit("VmFlags:", 1)[-1].split()
    assert {"nr", "dd", "nh"} <= set(flags[vast])
    assert "wf" in flags[wiped]
    for at, size in ((first, 4096), (vast, 8 << 40), (wiped, 1 << 20)):
        held.allocator.unmap(at, size)


def test_room_wiped_on_fork(running, live) -> None:
    process = running(live("echo.c"), "plain")
    assert echoes(process)
    with attach(process.pid) as target:
        plain = target.allocator.map(4096, "rw-")
        wiped = target.allocator.map(4096, "rw-", name="wipeonfork")
        shared, view = target.shared.share(4096, "both")
        view[:8] = b"ABCDEFGH"
        for at in (plain, wiped):
            target.write(at, b"12345678")
    for at, want in ((plain, b"12345678"), (wiped, bytes(8)), (shared, b"ABCDEFGH")):
        process.stdin.write(b"f" + at.to_bytes(8, "little"))
        process.stdin.flush()
        assert process.stdout.read(9) == want + b"f"


def test_shared_memory_outlives_both(running, live) -> None:
    process = running(live("echo.c"), "plain")
    assert echoes(process)
    target = attach(process.pid)
    fds = sorted(entry.name for entry in Path(f"/proc/{process.pid}/fd").iterdir())
    at, view = target.shared.share(1 << 20, "a ring")
    assert sorted(entry.name for entry in Path(f"/proc/{process.pid}/fd").iterdir()) == fds
    view[5:10] = b"hello"
    assert target.read(at + 5, 5) == b"hello"
    target.write(at + 100, b"there")
    assert bytes(view[100:105]) == b"there"
    target.close()
    assert bytes(view[5:10]) == b"hello"
    with attach(process.pid) as again:
        again.resume()
        if os.geteuid() == 0:
            place, other = again.shared.reopen("a ring")
            assert place == at
            other[0] = 9
            assert view[0] == 9
    process.kill()
    process.wait()
    assert bytes(view[100:105]) == b"there"


def test_shared_memory_cannot_be_shrunk_under_us(held: ProcessTarget) -> None:
    at, view = held.shared.share(8192, "sealed")
    mapping = next(m for m in held.mappings() if m.start == at)
    if os.geteuid():
        pytest.skip("opening a mapped file without a name needs root")
    fd = os.open(f"/proc/{held.pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
    view[8191] = 1


# -- unusual programs -----------------------------------------------------------------------------------
def test_stack_in_the_middle_of_other_memory(running, live) -> None:
    process = running(live("echo.c"), "coroutine")
    assert echoes(process)
    before = picture(process.pid)
    for _ in range(5):
        with attach(process.pid) as target:
            assert target.syscall(39) == process.pid
        assert echoes(process)
    assert picture(process.pid) == before


def test_stack_without_room(running, live) -> None:
    process = running(live("echo.c"), "tiny")
    assert echoes(process)
    with attach(process.pid) as target, pytest.raises(TargetRefused, match="too little stack"):
        target.syscall(39)
    assert echoes(process)


def test_program_that_handles_its_own_system_calls(running, live) -> None:
    process = running(live("echo.c"), "dispatch")
    process.stdin.write(b"a")
    process.stdin.flush()
    if process.stdout.read(1) != b"a":
        assert process.wait() == 77
        pytest.skip("this kernel has no syscall user dispatch (5.11)")
    with attach(process.pid) as target, pytest.raises(Unsupported, match="syscall user dispatch"):
        target.syscall(39)
    assert echoes(process)


def test_program_without_code_to_borrow(running, tmp_path, tool) -> None:
    program = tmp_path / "bare"
    subprocess.run([tool("gcc"), "-nostdlib", "-static", LIVE / "bare.S", "-o", program], check=True)
    assert b"\x0f\x05\xc3" not in program.read_bytes()
    process = running(program)
    assert echoes(process)
    before = picture(process.pid)
    for _ in range(3):
        with attach(process.pid) as target:
            at = target.allocator.map(4096, "rw-")
            target.allocator.unmap(at, 4096)
        assert echoes(process)
    assert picture(process.pid) == before


@pytest.mark.parametrize("which", ["bare", "coroutine"])
def test_a_tracer_killed_at_any_step_of_unusual_programs(running, live, tmp_path, tool, which: str) -> None:
    """Where code must be lent to the program, and where the frame lies amid other memory."""
    if which == "bare":
        subprocess.run([tool("gcc"), "-nostdlib", "-static", LIVE / "bare.S", "-o", tmp_path / "bare"], check=True)
        process = running(tmp_path / "bare")
    else:
        process = running(live("echo.c"), "coroutine")
    assert echoes(process)

    def work() -> None:
        with attach(process.pid) as target:
            target.syscall(39)
            target.allocator.unmap(target.allocator.map(4096, "rw-"), 4096)

    for after in (False, True):
        step = 1
        while die_at(work, step, after=after):
            assert echoes(process)
            step += 1
        assert step > 25
    assert echoes(process)


def test_restartable_sequence_is_aborted_as_the_kernel_would(running, live) -> None:
    process = running(live("rseq.c"))
    line = process.stdout.readline()
    if not line:
        pytest.skip("this libc registers no rseq area")
    start, end, handler = (int(word, 16) for word in line.split())
    met = 0
    for _ in range(200):
        with attach(process.pid) as target:
            before = target.regs(process.pid)
            inside = start <= before["rip"] < end
            target.syscall(39)
            assert target.regs(process.pid) == (before | {"rip": handler} if inside else before)
            met += inside
        if met >= 3:
            break
    assert met >= 3


def test_modules_of_a_replaced_file(running, live, tmp_path) -> None:
    """A file that was replaced while its program runs is not mistaken for the one that is mapped."""
    program = tmp_path / "program"
    program.write_bytes(live("echo.c").read_bytes())
    program.chmod(0o755)
    process = running(program, "plain")
    assert echoes(process)
    (tmp_path / "new").write_bytes(b"something else")
    (tmp_path / "new").rename(program)
    with attach(process.pid) as target:
        main = target.modules()[0]
        assert main.main
        assert main.path == str(program)
        assert Path(main.file).read_bytes() == live("echo.c").read_bytes()


def test_a_file_mapped_to_be_read_is_no_module() -> None:
    own = Path("/proc/self")
    with (
        (own / "exe").open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ),
        (own / "mem").open("rb", buffering=0) as memory,
    ):
        found = procfs.modules(os.getpid(), lambda at, size: os.pread(memory.fileno(), size, at))
    assert len([module for module in found if module.file == os.path.realpath("/proc/self/exe")]) == 1
    assert found[0].main


def test_a_closed_memory_file_is_not_reused() -> None:
    memory = Memory(os.getpid(), lambda: 0)
    memory.close()
    memory.close()
    with pytest.raises(Fault):
        memory.read(4096, 1)


# -- the contract ---------------------------------------------------------------------------------------
ANSWER_42 = bytes.fromhex("b82a000000 c3")  # mov $42, %eax; ret


def prober(path: Path):
    """What the conformance suite must know of ``live/poll.c``."""
    with path.open("rb") as stream:
        names = {s.name: s["st_value"] for s in ELFFile(stream).get_section_by_name(".symtab").iter_symbols()}

    def probe(target: ProcessTarget) -> Probe:
        bias = target.modules()[0].bias

        def rounds() -> int:
            return int.from_bytes(target.read(bias + names["rounds"], 8), "little")

        def observe() -> int:
            target.stop()
            before = rounds()
            target.resume()
            settled(lambda: rounds() >= before + 2, "it does not run")
            target.stop()
            return int.from_bytes(target.read(bias + names["given"], 8), "little")

        return Probe(bias + names["answer"], ANSWER_42, observe, ptrace.REGS[:15])

    return probe


@pytest.mark.parametrize("how", ["spawned", "attached"])
def test_every_rule_of_the_contract_holds(build, running, how: str) -> None:
    program = build(LIVE / "poll.c", opt="-O1")
    spawned_ones = []

    def make() -> ProcessTarget:
        if how == "attached":
            process = running(program, "tell")
            assert process.stdout.readline() == b"ready\n"
            return attach(process.pid)
        spawned_ones.append(spawn([program]))
        return spawned_ones[-1]

    results = check_target(make, prober(program))
    for target in spawned_ones:
        os.kill(target.pid, signal.SIGKILL)
        os.waitpid(target.pid, 0)
    assert len(results) >= 18
    assert [(r.name, r.reason) for r in results if r.verdict != "passed"] == []
