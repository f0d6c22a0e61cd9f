"""The test programs themselves: same output from every compiler, and three witnesses that agree."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import unavailable
from tests.programs import debian
from tests.programs.build import Missing
from tests.programs.counts import callgrind_counts, cyg_counts, own_counts, run_counted

Build = Callable[..., Path]

CROSS = "riscv64-linux-gnu-gcc"
NATIVE = [(cc, opt) for cc in ("gcc", "clang") for opt in ("-O0", "-O2", "-O3")]

LUA_SCRIPT = """\
local t = {}
for i = 1, 200 do t[i] = tostring(i * 7 % 13) .. "x" end
table.sort(t)
print(#t, t[1], t[200], string.rep("ab", 3), pcall(error, "boom"))
local co = coroutine.wrap(function(a) local b = coroutine.yield(a + 1) return b * 2 end)
print(co(1), co(21))
"""
LUA_OUTPUT = "200\t0x\t9x\tababab\tfalse\tboom\n2\t42\n"


def run(*command: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], input=stdin, capture_output=True, text=True, check=False)


def test_calls_prints_the_same_whoever_compiled_it(build: Build, tool: Callable[[str], str]) -> None:
    outputs = set()
    for cc, opt in [*NATIVE, (CROSS, "-O0"), (CROSS, "-O2")]:
        kind = "static" if cc == CROSS else "pie"
        prefix: Sequence[str] = [tool("qemu-riscv64")] if cc == CROSS else []
        done = run(*prefix, build("calls.c", cc=cc, opt=opt, kind=kind))
        outputs.add((done.returncode, done.stdout, done.stderr))
    assert len(outputs) == 1, outputs
    assert outputs.pop()[1].startswith("fib 610\nrounds 20\nchecksum ")


def test_three_witnesses_agree_on_calls(build: Build, tool: Callable[[str], str]) -> None:
    tool("valgrind")
    own = own_counts(run_counted([build("calls.c", flags=("-DCOUNT",))])[1])
    instrumented = build("calls.c", flags=("-finstrument-functions",), extra=("cyg.c",))
    compiler = cyg_counts(instrumented, run_counted([instrumented], "CYG_COUNTS")[1])
    callgrind = callgrind_counts([build("calls.c")])
    assert own["fib"] > 1000
    assert compiler == own
    assert {name: callgrind.get(name) for name in own} == own


@pytest.mark.parametrize(("cc", "opt"), NATIVE)
def test_every_scene_of_throw_is_deterministic(build: Build, cc: str, opt: str) -> None:
    done = run(build("throw.cpp", cc=cc, opt=opt, flags=("-rdynamic",)))
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "throw 40",
        "rethrow 6690",
        "nested 10",
        "pointer 5",
        "longjmp 997",
        "fork 5",
        "cancel 5",
        "backtrace f_walk f_walk f_walk f_walk f_walk f_walk f_walk_more ",
        "altstack c04b0a09784ef7b6",
        "coroutines 0000000000016d35",
        "signals 2000",
    ]


def test_threads_counts_what_it_says(build: Build) -> None:
    done, counts = run_counted([build("threads.c", flags=("-DCOUNT",)), "3", "1000", "4"])
    assert done.stdout.splitlines()[1] == "total 12000"
    assert own_counts(counts) == {"work": 12000, "leaf": 12000, "left": 6000, "right": 6000, "thread_main": 12}


def test_server_answers_and_its_text_is_stable(build: Build) -> None:
    commands = "work 10\ntext\ncalls\nfork\ncalls\nexec\ncalls\ntext\nquit\n"
    done = run(build("server.c"), stdin=commands)
    lines = done.stdout.splitlines()
    texts = [line for line in lines if line.startswith("text ")]
    assert done.returncode == 7
    assert " ".join(line.split()[0] for line in lines) == "ready work text calls fork calls ready calls text quit"
    assert [line for line in lines if line.startswith("calls")] == ["calls 10", "calls 10", "calls 0"]
    assert len(set(texts)) == 1
    assert len(texts) == 2


def test_many_calls_every_function(many: Build, tool: Callable[[str], str]) -> None:
    tool("valgrind")
    counts = callgrind_counts([many(1000), "3"])
    assert [counts.get(f"fn_{i:05d}") for i in range(1000)] == [3] * 1000


@pytest.mark.parametrize("cc", [CROSS, "riscv64-linux-gnu-clang"])
@pytest.mark.parametrize("march", ["rv64gc", "rv64g"])
def test_bare_image_has_no_loader_business(build: Build, cc: str, march: str) -> None:
    image = build("bare.c", cc=cc, kind="bare", flags=(f"-march={march}", "-mabi=lp64d")).read_bytes()
    assert image[:4] == b"\x7fELF"
    assert int.from_bytes(image[24:32], "little") == 0x80000000  # e_entry
    assert b".dynamic" not in image


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cc", "opt", "instrument"),
    [
        ("gcc", "-O0", "none"),
        ("gcc", "-O2", "fentry"),
        ("gcc", "-O3", "patchable"),
        ("clang", "-O2", "none"),
        ("clang", "-O3", "patchable"),
        (CROSS, "-O2", "patchable"),
        ("riscv64-linux-gnu-clang", "-O2", "patchable"),
    ],
)
def test_lua_from_debian_runs_a_script(
    cc: str, opt: str, instrument: str, tool: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # gprof's build leaves a file
    script = tmp_path / "script.lua"
    script.write_text(LUA_SCRIPT)
    try:
        lua = debian.lua(cc, opt, instrument)
    except Missing as missing:
        unavailable(str(missing))
    prefix = [tool("qemu-riscv64")] if cc.startswith("riscv64") else []
    done = run(*prefix, lua, script)
    assert (done.returncode, done.stdout, done.stderr) == (0, LUA_OUTPUT, "")
