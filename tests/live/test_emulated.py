"""riscv64 programs in the emulator: what they do is what qemu-riscv64 does, and two runs leave the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import unavailable
from tests.live.tracing import TRACERS, Did, Seen, calls_by_name, emulate, run
from tests.programs import debian
from tests.programs.build import CROSS as TRIPLE
from tests.programs.build import Missing
from tests.programs.counts import own_counts, run_counted

CROSS = f"{TRIPLE}-gcc"
CLANG = f"{TRIPLE}-clang"
ROUNDS = "4"
#: name -> (compiler, options); the number of nops is what -march makes of eight or sixteen bytes
BUILDS = {
    "gc-4": (CROSS, ("-march=rv64gc", "-fpatchable-function-entry=4")),
    "gc-8": (CROSS, ("-march=rv64gc", "-fpatchable-function-entry=8")),
    "g-2": (CROSS, ("-march=rv64g", "-fpatchable-function-entry=2")),
    "g-4": (CROSS, ("-march=rv64g", "-fpatchable-function-entry=4")),
    "clang-gc-4": (CLANG, ("-march=rv64gc", "-mabi=lp64d", "-fpatchable-function-entry=4")),
    "mcount": (CROSS, ("-march=rv64gc", "-pg", "-Wl,--no-relax")),
}
SCRIPT = Path(__file__).with_name("every.lua")


@pytest.fixture(scope="module")
def qemu(tool) -> str:
    return tool("qemu-riscv64")


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(
    ("name", "opt"),
    [
        pytest.param(name, opt, marks=[] if opt == "-O2" else [pytest.mark.matrix])
        for name in BUILDS
        for opt in ("-O0", "-O2")
    ],
)
def test_each_call_is_counted(build, qemu, tmp_path, tracer: str, name: str, opt: str) -> None:
    cc, flags = BUILDS[name]
    program = build("calls.c", cc=cc, opt=opt, kind="static", flags=flags)
    counting = build("calls.c", cc=cc, opt=opt, kind="static", flags=(*flags, "-DCOUNT"))
    truth = own_counts(run_counted([qemu, counting, ROUNDS])[1])
    seen = emulate([program, ROUNDS], tmp_path, tracer=tracer)
    assert seen.did == run([qemu, program, ROUNDS], cwd=tmp_path)
    assert seen.outcome.lost == 0
    elided = {n for n in truth if n.startswith("tiny_")} if cc == CLANG and opt != "-O0" else set()
    real = set(truth) - elided
    assert {n: seen.counts.get(n) for n in real} == {n: truth[n] for n in real}
    assert "fib" not in seen.unhooked


@pytest.mark.parametrize(("march", "nops"), [("rv64gc", 4), ("rv64gc", 8), ("rv64g", 2), ("rv64g", 4)])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_machine_without_an_operating_system(build, tmp_path, march: str, nops: int, tracer: str) -> None:
    flags = (f"-march={march}", "-mabi=lp64d", f"-fpatchable-function-entry={nops}")
    program = build("bare.c", cc=CROSS, kind="bare", flags=flags)
    seen = emulate([program], tmp_path, tracer=tracer)
    assert seen.did.status == 0
    lines = seen.did.stdout.decode().splitlines()
    assert (lines[0], lines[-1]) == ("bare: hello", "bare: bye")
    told = {name: int(hits, 16) for name, hits in (line.split() for line in lines[1:-2])}
    assert told["fib"] > 100
    assert {name: seen.counts.get(name) for name in told} == told
    assert seen.did == emulate_untraced(program, tmp_path)


def emulate_untraced(program: Path, directory: Path) -> Did:
    from fentry.target.unicorn import load
    from tests.live.tracing import status

    with (directory / "plain").open("wb") as out, load(program, stdout=out.fileno(), stdin=b"") as target:
        stop = target.run()
    return Did(status(stop), (directory / "plain").read_bytes())


def events(seen: Seen) -> list:
    return [batch.drop_columns(["ns"]) for batch in seen.trace.events()]


@pytest.mark.parametrize("clock", ["icount", "order"])
@pytest.mark.parametrize("tracer", ["function", "function_graph"])
def test_two_runs_leave_the_same_bytes(build, tmp_path, tracer: str, clock: str) -> None:
    """In a process whose addresses are the machine's own affair and whose clock is instructions, nothing varies."""
    program = build("calls.c", cc=CROSS, kind="static", flags=("-fpatchable-function-entry=4",))
    seen = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        seen.append(emulate([program, ROUNDS], tmp_path / name, tracer=tracer, clock=clock))
    one, two = seen
    assert one.retired == two.retired > 0
    assert one.outcome.events == two.outcome.events > 1000
    assert (one.directory / "segments.bin").read_bytes() == (two.directory / "segments.bin").read_bytes()
    # the time of day is that of the recording; everything else comes from the machine
    assert events(one) == events(two)
    assert calls_by_name(one.trace) == calls_by_name(two.trace)


@pytest.mark.parametrize(
    ("march", "opt"),
    [
        ("rv64gc", "-O0"),
        pytest.param("rv64g", "-O0", marks=pytest.mark.matrix),
        ("rv64g", "-O2"),
        pytest.param("rv64gc", "-O2", marks=pytest.mark.matrix),
        pytest.param("rv64gc", "-O3", marks=pytest.mark.matrix),
    ],
)
def test_lua(qemu, tmp_path, march: str, opt: str) -> None:
    """Coroutines, errors (longjmp), strings and the collector, every function of Lua and of its C library hooked."""
    try:
        program = debian.lua(CROSS, opt, "patchable", march=march)
        witness = debian.lua(CROSS, opt, "cyg", march=march)
    except Missing as missing:
        unavailable(str(missing))
    seen = emulate([program, SCRIPT], tmp_path)
    assert seen.did == run([qemu, program, SCRIPT])
    assert seen.outcome.lost == 0
    assert seen.counts["luaV_execute"] > 0
    if opt == "-O0":  # there compilers call what the source calls
        from tests.programs.counts import cyg_counts

        told = cyg_counts(witness, run_counted([qemu, witness, SCRIPT], "CYG_COUNTS")[1])
        assert len(told) > 250
        assert {name: seen.counts.get(name) for name in told} == told


@pytest.mark.xfail(
    strict=True,
    reason="the linker makes calls of mcount four bytes long; they reach 1 MiB, and no island is mapped so near",
)
def test_relaxed_calls_of_mcount(build, tmp_path) -> None:
    program = build("calls.c", cc=CROSS, kind="static", flags=("-pg",))
    assert emulate([program, ROUNDS], tmp_path).counts["fib"] > 1000
