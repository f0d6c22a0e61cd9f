"""A debugger beside us: gdb attaches to a process that is traced, because nobody is attached to it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fentry.cli import main
from tests.live.test_attach import Server, Visit
from tests.live.tracing import PATIENCE

pytestmark = pytest.mark.live

#: a frame of a backtrace: its function, or "??" where gdb knows no name
FRAME = re.compile(r"^#\d+\s+(?:0x[0-9a-f]+ in )?(\S+) \(", re.MULTILINE)
HOOK = "fentry:"


def debug(gdb: str, pid: int, *commands: str, symbols: Path | None = None) -> str:
    """What gdb prints."""
    words = [gdb, "-nx", "-batch", "-p", str(pid)]
    for command in ([f"add-symbol-file {symbols}"] if symbols else []) + list(commands):
        words += ["-ex", command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=True)
    return done.stdout


def backtrace(gdb: str, pid: int, symbols: Path | None = None) -> list[str]:
    """Function names at a breakpoint in inner(), innermost first."""
    said = debug(gdb, pid, "break inner", "continue", "bt", "delete", "detach", symbols=symbols)
    return FRAME.findall(said.split("Breakpoint 1, ", 1)[1])


def see_through(pid: int, tmp_path: Path) -> Path:
    """The symbol file of a process."""
    path = tmp_path / "hooks.elf"
    assert main(["symbols", "-o", str(path), str(pid)]) == 0
    return path


@pytest.fixture(params=["-O0", "-O2"])
def server(build, request):
    server = Server(build("server.c", opt=request.param, flags=("-fpatchable-function-entry=16",)))
    assert server.do("spin 1") == "spin 1"
    yield server
    server.close()


def test_a_breakpoint_and_a_tracer_leave_each_other_alone(server, tool, tmp_path) -> None:
    visit = Visit(server.pid, tmp_path, "function_graph", ["*"])
    with visit.under_way():
        assert [name for name in backtrace(tool("gdb"), server.pid) if name != "??"][:2] == ["inner", "step"]
    assert visit.counts["step"] > 0
    assert server.do("still").startswith("still ")
    assert server.do("quit") == "quit"


def test_gdb_names_the_same_callers(server, tool, tmp_path) -> None:
    """With a symbol file every frame of the program is there, and behind each hooked one its hook."""
    plain = backtrace(tool("gdb"), server.pid)
    assert plain[:3] == ["inner", "step", "spinner"], "an untraced backtrace must be whole"
    # gdb stops at the first byte of inner(), which has not gone through its hook yet; spinner() was entered before
    hooked = ["inner", "step", f"{HOOK}step", *plain[2:]]
    with Visit(server.pid, tmp_path, "function_graph", ["*"]).under_way():
        blind = backtrace(tool("gdb"), server.pid)
        assert "??" in blind, "the symbol file would make no difference"
        assert backtrace(tool("gdb"), server.pid, see_through(server.pid, tmp_path)) == hooked
        # the tracer does not mind that somebody looked
        assert backtrace(tool("gdb"), server.pid, see_through(server.pid, tmp_path)) == hooked
    assert server.do("still").startswith("still ")
    assert server.do("quit") == "quit"


@pytest.mark.parametrize("flags", [("-fpatchable-function-entry=16",), ()], ids=["sled", "entry-jump"])
@pytest.mark.parametrize("opt", ["-O0", "-O2"])
def test_recursion_in_every_thread(build, tool, tmp_path, opt, flags) -> None:
    """Threads that wait deep in hooked frames; some functions hooked, or all."""
    depth, threads = 5, 3
    program = build("nested.c", opt=opt, flags=flags)
    process = subprocess.Popen([program, str(threads), str(depth)], stdin=-1, stdout=-1, text=True)
    calls = ["bottom", *["down", "across"] * depth, "down", "thread"]
    try:
        assert process.stdout.readline() == "begun\n"
        visit = Visit(process.pid, tmp_path, "function_graph", calls)
        with visit.under_way() as session:
            hooked = {site.name for site in session.sites}
            assert {"down", "across"} <= hooked
            print("\n", end="", file=process.stdin, flush=True)
            assert process.stdout.readline() == "ready\n"
            said = debug(
                tool("gdb"), process.pid, "thread apply all bt", "detach", symbols=see_through(process.pid, tmp_path)
            )
            stacks = [FRAME.findall(part) for part in re.split(r"^Thread \d+ ", said, flags=re.MULTILINE)[1:]]
        waiting = [stack[stack.index("bottom") :] for stack in stacks if "bottom" in stack]
        expected = [name for call in calls for name in ((call, f"{HOOK}{call}") if call in hooked else (call,))]
        # behind them is the C library's
        assert waiting == [[*expected, "start_thread", *waiting[0][len(expected) + 1 :]]] * threads
        assert len(stacks) == threads + 1
        assert not any("??" in stack for stack in stacks)
        # every frame that gdb walked is left again, now untraced
        assert process.communicate(timeout=PATIENCE)[0] == f"{threads * (2 * depth + 2)}\n"
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_a_symbol_file_is_an_elf_file_of_ours_alone(server, tool, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = tmp_path / f"fentry-{server.pid}.elf"
    path.symlink_to(tmp_path / "elsewhere")
    with Visit(server.pid, tmp_path, "function_graph", ["step", "inner"]).under_way():
        assert main(["symbols", str(server.pid)]) == 0
        out, err = capsys.readouterr()
        assert out == f"{path}\n"
        assert f"add-symbol-file {path}" in err
        assert path.stat().st_mode & 0o7777 == 0o600
        assert not path.is_symlink()
        assert not (tmp_path / "elsewhere").exists()
        read = subprocess.run([tool("readelf"), "-W", "-S", "-s", path], capture_output=True, text=True, check=True)
        assert not read.stderr, read.stderr
        assert re.findall(rf"FUNC +LOCAL +DEFAULT +\d+ {HOOK}(\w+)$", read.stdout, re.MULTILINE) == ["inner", "step"]
        frames = subprocess.run(
            [tool("readelf"), "--debug-dump=frames", path], capture_output=True, text=True, check=True
        )
        assert not frames.stderr, frames.stderr
        assert len(re.findall(r"^[0-9a-f]+ .* FDE ", frames.stdout, re.MULTILINE)) == 2
    assert main(["symbols", str(server.pid)]) == 1
    assert "holds nothing of fentry's" in capsys.readouterr().err
    assert server.do("quit") == "quit"
