"""The Python front: three ways in, one thing out."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import fentry
from tests.cli.conftest import line, running


@pytest.mark.live
def test_spawn(say: str) -> None:
    with fentry.spawn([say, "kill", "15"], stderr=subprocess.DEVNULL, retval=True) as tracing:
        assert tracing.wait() == -signal.SIGTERM
    assert tracing.exit == -signal.SIGTERM
    assert tracing.lost == 0
    calls = tracing.calls().to_pylist()
    assert [(c["function"], c["module"], c["depth"]) for c in calls] == [
        ("main", "say", 0),
        ("turn_twice", "say", 1),
        ("turn", "say", 2),
        ("turn", "say", 2),
    ]
    assert [c["retval"] for c in calls[1:]] == [1, 91, 1]
    assert [calls[c["parent_row"]]["function"] for c in calls[1:]] == ["main", "turn_twice", "turn_twice"]
    assert {row["function"]: row["hits"] for row in tracing.stat()} == {"main": 1, "turn_twice": 1, "turn": 2}
    assert tracing.events().num_rows == 7  # main has no exit


@pytest.mark.live
def test_leaving_the_block_waits(say: str, tmp_path: Path) -> None:
    with fentry.spawn(
        ["sh", "-c", f"exec {say} exit 9"], functions=["libc.so.6:malloc"], directory=tmp_path / "t"
    ) as one:
        pass
    assert one.exit == 9
    assert fentry.load(tmp_path / "t").meta.target.argv[0] == "sh"


@pytest.mark.live
def test_temporary_directory_goes_with_the_tracing(say: str) -> None:
    with fentry.spawn([say]) as tracing:
        pass
    place = tracing.trace.path
    assert place.exists()
    del tracing
    gc.collect()
    assert not place.exists()


@pytest.mark.live
def test_stop_lets_the_program_go_on(say: str, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as out, fentry.spawn([say, "spin"], stdout=out, tracer="profile") as tracing:
        assert tracing.wait(0.05) is None
        tracing.stop()
        assert tracing.stopped
        assert tracing.stat() == tracing.stat()
        assert "fentry." not in Path(f"/proc/{tracing.pid}/maps").read_text()
        os.kill(tracing.pid, signal.SIGINT)
        assert tracing.wait() == 6


@pytest.mark.live
def test_an_exception_leaves_the_program_running(say: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        (tmp_path / "out").open("w") as out,
        fentry.spawn([say, "spin"], stdout=out) as tracing,
    ):
        pid = tracing.pid
        raise ZeroDivisionError
    assert "fentry." not in Path(f"/proc/{pid}/maps").read_text()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.live
def test_attach_while_it_runs(say: str) -> None:
    with running(say, "spin") as program:
        assert line(program.stdout) == "ready"
        with fentry.attach(program.pid, functions=["turn*"]) as tracing:
            seen = 0
            for _ in range(600):
                tracing.wait(0.05)
                seen = tracing.events().num_rows  # of a trace that grows
                if seen > 100:
                    break
            assert seen > 100
        assert tracing.exit is None
        assert tracing.events().num_rows >= seen
        assert program.poll() is None


@pytest.mark.live
def test_profile(say: str) -> None:
    with fentry.spawn([say, "kill", "0"], stderr=subprocess.DEVNULL, tracer="profile", times=False) as tracing:
        assert tracing.wait() == 0
    assert {r["function"]: (r["hits"], r["total_ns"]) for r in tracing.stat()} == {
        "main": (1, None),
        "turn_twice": (1, None),
        "turn": (2, None),
    }
    with pytest.raises(fentry.AskedWrong, match="no events"):
        tracing.events()


def test_emulate(build: Callable[..., Path]) -> None:
    path = build("calls.c", cc="riscv64-linux-gnu-gcc", kind="static", flags=("-fpatchable-function-entry=4",))
    printed: list[bytes] = []

    class Out:
        def write(self, data: bytes) -> int:
            printed.append(bytes(data))
            return len(data)

    seen = []
    for _ in range(2):
        with fentry.emulate(path, "2", functions=["fib", "mix"], stdout=Out(), env={}) as tracing:
            tracing.wait()
        text = b"".join(printed).decode()
        printed.clear()
        checksum = text.rstrip().rpartition("checksum ")[2]
        assert tracing.exit == int(checksum[-2:], 16) & 63
        seen.append([(c["function"], c["depth"], c["ts"], c["dur"]) for c in tracing.calls().to_pylist()])
    assert seen[0] == seen[1]
    assert len(seen[0]) > 10


def test_functions(say: str) -> None:
    rows = {row["function"]: row for row in fentry.functions(say)}
    assert rows["turn"]["reason"] is None
    assert rows["_start"]["form"] is None
    assert "first instruction" in rows["_start"]["reason"]
    with pytest.raises(fentry.BadImage):
        fentry.functions("/etc/passwd")


@pytest.mark.live
@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda say: fentry.spawn([say], nosuch=1), fentry.AskedWrong, "no option 'nosuch'"),
        (lambda say: fentry.spawn([say], functions="turn"), fentry.AskedWrong, "a list of globs"),
        (lambda say: fentry.spawn([say], tracer="nosuch"), fentry.AskedWrong, "no tracer"),
        (lambda say: fentry.spawn([say], functions=["nosuch"]), fentry.NothingMatched, "nosuch"),
        (lambda say: fentry.spawn(["/nosuch"]), fentry.AskedWrong, "No such file"),
        (lambda say: fentry.attach(1 << 22 | 1), fentry.AskedWrong, "no process"),
        (lambda say: fentry.emulate("/etc/passwd"), fentry.BadImage, "passwd"),
        (lambda say: fentry.spawn([say], clock="sundial"), fentry.AskedWrong, "no clock"),
    ],
    ids=range(8),
)
def test_requests_that_cannot_be(
    call: Callable[[str], fentry.Tracing], error: type[Exception], says: str, say: str
) -> None:
    children = Path("/proc/thread-self/children").read_text()
    with pytest.raises(error, match=says), call(say):
        pass
    assert Path("/proc/thread-self/children").read_text() == children, "a program is left behind"


def test_used_wrongly(say: str) -> None:
    tracing = fentry.spawn([say])
    with pytest.raises(fentry.AskedWrong, match="has not begun"):
        tracing.calls()
    with pytest.raises(fentry.BadTrace):
        fentry.load("/etc")


def test_names() -> None:
    assert sorted(fentry.__all__) == fentry.__all__ or sorted(fentry.__all__) == sorted(set(fentry.__all__))
    assert len(fentry.__all__) <= 16


def test_an_emulated_program_goes_on_untraced(build: Callable[..., Path]) -> None:
    path = build("calls.c", cc="riscv64-linux-gnu-gcc", kind="static", flags=("-fpatchable-function-entry=4",))
    with fentry.emulate(path, "200", functions=["fib"], stdout=_Nowhere()) as tracing:
        assert tracing.wait(0) is None
        assert not tracing.stopped
        tracing.stop()
        events = tracing.events().num_rows
        assert tracing.wait() is not None
    assert tracing.events().num_rows == events


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)
