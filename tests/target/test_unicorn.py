"""Programs in the emulated machine do what they do elsewhere, and its clock, code and errors are exact.

Witness for output and exit status: qemu-riscv64. Witness for counts: arithmetic on hand-written loops.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import struct
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unicorn import Uc, unicorn_const

from fentry.errors import AskedWrong, BadImage, Fault, Gone, OutOfReach, TraceError, Unsupported
from fentry.target import Stop
from fentry.target.guestspace import Space
from fentry.target.unicorn import load

PROGRAMS = Path(__file__).parent / "programs"
GCC = "riscv64-linux-gnu-gcc"
ASM_FLAGS = ("-nostdlib", "-nostartfiles", "-static", "-Wl,--build-id=none")


@pytest.fixture
def assemble(tmp_path, tool):
    """Give a function that makes a program from assembly text."""

    def make(text, *flags, name="program"):
        source = tmp_path / f"{name}.S"
        source.write_text(f"    .globl _start\n_start:\n{text}\n")
        result = tmp_path / name
        subprocess.run([tool(GCC), *ASM_FLAGS, *flags, source, "-o", result], check=True)
        return result

    return make


def run(path, *args, stdin=b"", env=(), **options):
    """(how it ended, output, errors, the target) of a whole run."""
    out, err = io.BytesIO(), io.BytesIO()
    with load(path, [str(path), *map(str, args)], env, stdin=stdin, stdout=out, stderr=err, **options) as target:
        stop = target.run()
    return stop, out.getvalue(), err.getvalue(), target


def symbol(path, name):
    with Path(path).open("rb") as stream:
        return ELFFile(stream).get_section_by_name(".symtab").get_symbol_by_name(name)[0]["st_value"]


EXIT = "    li a7, 93\n    ecall\n"


# -- programs ---------------------------------------------------------------------------------------
def agree(path, tool, *args, stdin=b""):
    """The emulated run and qemu's have one output and one exit status."""
    command = [tool("qemu-riscv64"), path, *map(str, args)]
    witness = subprocess.run(command, input=stdin, capture_output=True, check=False)
    stop, out, err, _ = run(path, *args, stdin=stdin)
    assert (stop.kind, stop.status) == ("exited", witness.returncode)
    assert out.decode() == witness.stdout.decode()
    assert err.decode() == witness.stderr.decode()
    assert out


@pytest.mark.parametrize("scene", ["files", "memory", "jumps", "times"])
def test_system_calls_as_elsewhere(build, tool, tmp_path, scene):
    path = build(PROGRAMS / "abi.c", cc=GCC, kind="static", flags=("-w",))
    agree(path, tool, tmp_path, scene, stdin=b"a line\n")


@pytest.mark.parametrize(("opt", "flags"), [("-O0", ()), ("-O3", ("-fpatchable-function-entry=8",)), ("-O2", ("-pg",))])
def test_calls_as_elsewhere(build, tool, tmp_path, monkeypatch, opt, flags):
    monkeypatch.chdir(tmp_path)  # -pg leaves gmon.out where it runs
    agree(build("calls.c", cc=GCC, kind="static", opt=opt, flags=flags), tool)


@pytest.mark.parametrize("scene", ["throw", "rethrow", "nested", "longjmp", "backtrace", "altstack", "coroutines"])
def test_unwinding_as_elsewhere(build, tool, scene):
    agree(build("throw.cpp", cc=GCC, kind="static"), tool, scene)


def test_bare_metal_program(build):
    path = build("bare.c", cc=GCC, kind="bare")
    stop, out, _, target = run(path)
    assert stop.kind == "exited"
    assert stop.status == 0
    assert out.decode().startswith("bare:")
    assert out.decode().endswith("bare: bye\n")
    assert target.words == ""


def test_position_independent_program(build):
    flags = ("-nostdlib", "-nostartfiles", "-ffreestanding", "-Wl,--no-dynamic-linker")
    path = build(PROGRAMS / "poll.c", cc=GCC, kind="static-pie", flags=flags)
    with load(path) as target:
        (module,) = target.modules()
        assert module.bias > 0
        assert target.run(100).kind == "stopped"
        assert struct.unpack("<q", target.read(symbol(path, "given") + module.bias, 8)) == (41,)
        assert module.start <= target.regs(1)["pc"] < module.end


def test_arguments_and_environment(assemble):
    # the first byte of argv[1] less that of env[0], as the exit status
    code = "    ld a0, 16(sp)\n    lbu a0, 0(a0)\n    ld a1, 32(sp)\n    lbu a1, 0(a1)\n    sub a0, a0, a1\n"
    path = assemble(code + EXIT)
    with load(path, ["x", "f"], {"A": "1"}) as target:
        assert target.run() == Stop("exited", ord("f") - ord("A"), 1, target.regs(1)["pc"])
    with load(path, [b"x", b"\xff"], ["\udc80=1"]) as target:
        assert target.run().status == 0xFF - 0x80


# -- streams --------------------------------------------------------------------------------------------
ECHO = """
1:  li a0, 0
    la a1, buffer
    li a2, 16
    li a7, 63
    ecall
    blez a0, 2f
    mv a2, a0
    li a0, 1
    li a7, 64
    ecall
    j 1b
2:  li a7, 93
    ecall
    .bss
buffer: .zero 16
"""


def test_streams_may_be_bytes_objects_or_descriptors(assemble):
    path = assemble(ECHO)
    text = bytes(range(256)) * 5
    assert run(path, stdin=text)[1] == text
    assert run(path, stdin=io.BytesIO(text))[1] == text
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    os.write(write_in, text)
    os.close(write_in)
    with load(path, stdin=read_in, stdout=write_out) as target:
        assert target.run().status == 0
    os.close(write_out)
    assert os.read(read_out, 1 << 16) == text
    os.close(read_out)
    os.close(read_in)
    with pytest.raises(AskedWrong, match="standard output"):
        load(path, stdout=object())


def test_a_pipe_without_reader_kills(assemble):
    read_out, write_out = os.pipe()
    os.close(read_out)
    with load(assemble(ECHO), stdin=b"x", stdout=write_out) as target:
        stop = target.run()
    os.close(write_out)
    assert (stop.kind, stop.status) == ("signalled", signal.SIGPIPE)


def test_files_of_the_program_are_closed(build, tmp_path):
    path = build(PROGRAMS / "abi.c", cc=GCC, kind="static", flags=("-w",))
    before = {p.name for p in Path("/proc/self/fd").iterdir()}
    for _ in range(3):
        run(path, tmp_path, "files")
    assert {p.name for p in Path("/proc/self/fd").iterdir()} == before


# -- clock ----------------------------------------------------------------------------------------------
LOOP = "    li a1, 1000\n1:  addi a1, a1, -1\n    bnez a1, 1b\n    li a0, 0\n" + EXIT
LOOP_COUNT = 1 + 2 * 1000 + 1 + 2


@pytest.mark.parametrize("march", ["rv64gc", "rv64g"])
def test_clock_counts_every_instruction(assemble, march):
    path = assemble(LOOP, f"-march={march}")
    with load(path) as target:
        assert target.run().status == 0
        assert (target.retired, target.overhead, target.clock) == (LOOP_COUNT, 0, LOOP_COUNT)


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_slices_change_nothing(assemble, every):
    seen = []
    with load(assemble(LOOP)) as target:
        target.resume()
        stop = target.wait(on_slice=lambda: seen.append(target.retired), every=every)
        assert (stop.kind, target.retired) == ("exited", LOOP_COUNT)
    assert seen[:-1] == list(range(every, LOOP_COUNT, every))[: len(seen) - 1]
    assert seen[-1] == LOOP_COUNT


def test_budget_is_exact(assemble):
    with load(assemble(LOOP)) as target:
        for n in (0, 1, 2, 100):
            before = target.retired
            assert target.run(n).kind == "stopped"
            assert target.retired == before + n
        assert target.run(10**9).kind == "exited"
        with pytest.raises(Gone) as gone:
            target.resume()
        assert gone.value.status == 0
        assert target.wait().kind == "exited"


def test_arena_is_overhead_and_the_program_can_read_both(assemble):
    # calls what a1 points to, twice, then reads the clock and the overhead from the page at a0
    code = "    mv s0, a0\n    mv s1, a1\n    jalr s1\n    jalr s1\n    ld a0, 0(s0)\n    ld a1, 8(s0)\n    ebreak\n"
    with load(assemble(code)) as target:
        at = target.allocator.map(4096, "r-x", near=target.regs(1)["pc"], reach=1 << 30)
        target.write(at, bytes.fromhex("13000000 13000000 67800000"))  # nop; nop; ret
        target.set_arena((at - 8, at - 4), (at, at + 12))
        target.set_regs(1, {"a0": target.clock_at, "a1": at})
        stop = target.run()
        regs = target.regs(1)
        assert (stop.kind, stop.pc) == ("trap", regs["pc"])
        assert regs["a0"] == 5  # its own load included
        assert regs["a1"] == 6
        assert (target.retired, target.overhead) == (6, 6)
        with pytest.raises(AskedWrong, match="65 ranges"):
            target.set_arena(*[(0, 1)] * 65)


def test_time_register_and_sleep(assemble):
    text = """
    rdtime s0
    la a0, nap
    li a1, 0
    li a7, 101
    ecall
    rdtime s1
    sub s1, s1, s0
    ebreak
    .balign 8
nap: .dword 2, 5
"""
    with load(assemble(text)) as target:
        assert target.run().kind == "trap"
        assert target.clock - target.retired == 2 * 10**9 + 5
        before = target.regs(1)
        assert before["s0"] == 1
        assert before["s1"] == 2 * 10**9 + 5 + 6  # auipc addi li li ecall rdtime


def test_two_runs_are_one(build, tmp_path):
    path = build(PROGRAMS / "abi.c", cc=GCC, kind="static", flags=("-w",))
    seen = [run(path, tmp_path, "times", "memory", env={"VIRTUAL": "1"}, stdin=b"x\n") for _ in range(2)]
    (stop, out, err, target), (_, out2, err2, target2) = seen
    assert (out, err, target.clock, target.retired) == (out2, err2, target2.clock, target2.retired)
    assert b"slept 1\n" in err
    assert b"cpu 1\n" in err
    assert b"too much 1\n" in err
    assert b"today 1600000003\n" in err
    assert target.clock - target.retired == 3_500_000_000
    assert stop.status == 3


# -- code -----------------------------------------------------------------------------------------------
def test_patched_code_takes_effect_wherever_it_is_in_its_block(assemble):
    # a block of 4 x 4 bytes that begins on one page and ends on the next
    code = "    j 1f\n    .balign 4096\n    .space 4096 - 8\n"
    code += "1:  addi a0, a0, 1\n    addi a1, a1, 1\n    addi a2, a2, 1\n    j 1b\n"
    path = assemble(code, "-march=rv64g")
    with load(path) as target:
        target.run(1 + 4 * 50)
        start = target.regs(1)["pc"]
        assert start % 4096 == 4096 - 8
        for i, name in enumerate(("a0", "a1", "a2")):
            at = start + 4 * i
            (word,) = struct.unpack("<I", target.read(at, 4))
            target.write(at, struct.pack("<I", word + (4 << 20)))  # addi by 5
            target.code_sync.sync(at, 4)
            before = target.regs(1)
            target.run(4 * 10)
            after = target.regs(1)
            changes = [after[n] - before[n] for n in ("a0", "a1", "a2")]
            assert changes == [50 if j <= i else 10 for j in range(3)], name
        with pytest.raises(Fault):
            target.code_sync.sync(start + (1 << 30), 4)


def test_program_that_writes_its_own_code(assemble):
    # maps a page, writes "li a0, 7; ret" into it, makes it executable, calls it, rewrites it, calls again
    path = assemble(
        """
    li a0, 0
    li a1, 4096
    li a2, 7
    li a3, 0x22
    li a4, -1
    li a5, 0
    li a7, 222
    ecall
    mv s0, a0
    li t0, 0x00700513
    sw t0, 0(s0)
    li t0, 0x00008067
    sw t0, 4(s0)
    fence.i
    jalr s0
    mv s1, a0
    li t0, 0x02300513
    sw t0, 0(s0)
    fence.i
    jalr s0
    add a0, a0, s1
"""
        + EXIT
    )
    assert run(path)[0].status == 7 + 35


# -- ends -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("    ld a0, 8(zero)\n", signal.SIGSEGV, "load of 8 bytes at 0x8 from 0x"),
        ("    la a0, _start\n    sb a0, 0(a0)\n", signal.SIGSEGV, "the page does not allow it"),
        ("    li a0, 0x5000\n    jr a0\n", signal.SIGSEGV, "at 0x5000 from 0x5000: nothing is mapped there"),
        ("    jr sp\n", signal.SIGSEGV, "the page does not allow it"),
        ("    .word 0xffffffff\n", signal.SIGILL, "illegal instruction at 0x"),
        ("    nop\n    .hword 0\n", signal.SIGILL, "illegal instruction at 0x"),
        ("    csrw mscratch, zero\n", signal.SIGILL, "illegal instruction at 0x"),
        ("    li sp, 0x100000\n    call 1f\n1:  sd ra, 0(sp)\n", signal.SIGSEGV, "store of 8 bytes at 0x100000"),
    ],
)
@pytest.mark.parametrize("march", ["rv64gc", "rv64g"])
def test_faults_end_as_on_linux(assemble, text, status, words, march):
    stop, _, _, target = run(assemble("    nop\n" + text, f"-march={march}"))
    assert (stop.kind, stop.status) == ("signalled", status)
    assert words in target.words


def test_the_instruction_that_faults_does_not_retire(assemble):
    for text in ("    ld a0, 8(zero)\n", "    .word 0xffffffff\n", "    li a0, 0x5000\n    jr a0\n"):
        target = run(assemble("    .option norvc\n    nop\n    nop\n" + text))[3]
        assert target.retired == 2 + 2 * ("jr" in text)  # li 0x5000 is one lui


def test_breakpoints_stop_once_and_kill_when_nobody_cares(assemble):
    path = assemble("    nop\n    .option norvc\n    ebreak\n    .option rvc\n    c.ebreak\n    li a0, 5\n" + EXIT)
    with load(path) as target:
        stop = target.run()
        assert (stop.kind, stop.status, target.retired) == ("trap", signal.SIGTRAP, 1)
        target.set_regs(1, {"pc": stop.pc + 4})
        again = target.run()
        assert (again.kind, again.pc, target.retired) == ("trap", stop.pc + 4, 1)
        target.set_regs(1, {"pc": again.pc + 2})
        assert target.run().status == 5
    with load(path) as target:
        target.run()
        assert (target.run().kind, target.words) == ("signalled", f"breakpoint instruction at {stop.pc:#x}")


@pytest.mark.parametrize(("scene", "status"), [("abort", signal.SIGABRT), ("null", signal.SIGSEGV)])
def test_program_that_kills_itself(build, tmp_path, scene, status):
    stop, _, _, target = run(build(PROGRAMS / "abi.c", cc=GCC, kind="static", flags=("-w",)), tmp_path, scene)
    assert (stop.kind, stop.status) == ("signalled", status)
    assert target.words


@pytest.mark.parametrize(
    ("number", "args", "words"),
    [
        (220, (), r"system call 220 \(clone\) at 0x[0-9a-f]+ is not emulated"),
        (4242, (), r"system call 4242 \(no Linux call\)"),
        (103, (0, "sp", 0), r"setitimer\(0\)"),
        (98, ("sp", 0, 1, 0), "waits for ever"),
        (101, ("sp", 0), "sleeps for ever"),
        (129, (0, 19), "stops itself"),
    ],
)
def test_what_is_not_emulated_is_one_clear_error(assemble, number, args, words):
    path = assemble("    ecall\n")
    with load(path) as target:
        sp = target.regs(1)["sp"]
        target.set_regs(1, {f"a{i}": sp if arg == "sp" else arg for i, arg in enumerate(args)} | {"a7": number})
        # the word at sp is argc: 1. As a futex it has the expected value; as a time it shall be very long
        if number == 101:
            target.write(sp, struct.pack("<qq", 1 << 62, 0))
        with pytest.raises(Unsupported, match=words):
            target.run()
        assert target.regs(1)["pc"] == symbol(path, "_start") + 4 * (number == 129)


def test_calls_that_older_kernels_lack(assemble):
    for number in (293, 435, 59):  # rseq, clone3, pipe2
        assert run(assemble(f"    li a7, {number}\n    ecall\n    neg a0, a0\n{EXIT}"))[0].status == 38


@pytest.mark.parametrize(("size", "refused"), [(1 << 20, 0), (3 << 20, 1), (1 << 60, 1), ((1 << 63) + 4096, 1)])
def test_memory_has_a_limit(assemble, size, refused):
    path = assemble("    ecall\n    srli a0, a0, 63\n" + EXIT)
    with load(path, ram=2 << 20) as target:
        target.set_regs(1, dict(zip(("a0", "a1", "a2", "a3", "a5", "a7"), (0, size, 3, 0x22, 0, 222), strict=True)))
        assert target.run().status == refused


def test_mappings_and_descriptors_have_limits(assemble):
    # maps single pages of alternating protection, then copies descriptor 0, until each is refused; the errors summed
    loop = """
    li s0, 0
1:  li a0, 0
    li a1, 4096
    xori s0, s0, 1
    mv a2, s0
    li a3, 0x22
    li a7, 222
    ecall
    bgez a0, 1b
    mv s1, a0
2:  li a0, 0
    li a7, 23
    ecall
    bgez a0, 2b
    add a0, a0, s1
    neg a0, a0
"""
    assert run(assemble(loop + EXIT))[0].status == errno.ENOMEM + errno.EMFILE


# -- interruptions ------------------------------------------------------------------------------------------
def test_ctrl_c_loses_nothing(build, tmp_path):
    path = build(PROGRAMS / "abi.c", cc=GCC, kind="static", flags=("-w",))
    whole = run(path, tmp_path, "memory", stdin=b"x")
    out = io.BytesIO()
    target = load(path, [str(path), str(tmp_path), "memory"], stdin=b"x", stdout=out, stderr=io.BytesIO())
    times, stop = 0, None
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        while stop is None:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.004)
                target.resume()
                stop = target.wait(every=100_000)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                times += 1
            except Gone:  # interrupted just when the end was known
                stop = target.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert times > 5
    assert (stop.kind, stop.status, out.getvalue()) == (whole[0].kind, whole[0].status, whole[1])
    assert target.retired == whole[3].retired
    target.close()


def test_stop_from_a_slice(assemble):
    with load(assemble("1:  j 1b\n")) as target:
        target.resume()
        assert target.wait(on_slice=target.stop, every=1000).kind == "stopped"
        assert target.retired == 1000
        with pytest.raises(AskedWrong, match="resume it first"):
            target.wait()
        for bad in (0, -1):
            target.resume()
            with pytest.raises(AskedWrong):
                target.wait(every=bad)


def test_steps_are_one_instruction(assemble):
    with load(assemble(LOOP, "-march=rv64gc")) as target:
        for n in range(1, 50):
            target.stepper.step(1)
            assert target.retired == n
    with load(assemble(EXIT)) as target:
        target.stepper.step(1)
        with pytest.raises(Gone):
            target.stepper.step(1)


# -- board ----------------------------------------------------------------------------------------------------
BARE = ("-Wl,-Ttext=0x80000000", "-mcmodel=medany")


@pytest.mark.parametrize(("value", "status"), [(0x5555, 0), (0x3333 | 9 << 16, 9), (0x7777, 0)])
def test_finisher(assemble, value, status):
    path = assemble(f"    li t0, 0x100000\n    li t1, {value}\n    sw t1, 0(t0)\n    j .\n", *BARE)
    stop, _, _, _ = run(path)
    assert (stop.kind, stop.status) == ("exited", status)


def test_serial_port_echoes(assemble):
    path = assemble(
        """
    li s0, 0x10000000
1:  lbu t0, 5(s0)
    andi t1, t0, 1
    beqz t1, 3f
    lbu a0, 0(s0)
2:  lbu t0, 5(s0)
    andi t0, t0, 0x20
    beqz t0, 2b
    sb a0, 0(s0)
    j 1b
3:  li t0, 0x100000
    li t1, 0x5555
    sw t1, 0(t0)
    j .
""",
        *BARE,
    )
    assert run(path, stdin=b"over the wire\n...")[1] == b"over the wire\n..."


def test_traps_go_to_the_vector(assemble):
    # cause and pc of: ecall, illegal instruction, load fault; summed up into the exit status
    path = assemble(
        """
    la t0, handler
    csrw mtvec, t0
    li s1, 0
    .option norvc
    ecall
    .word 0xffffffff
    ld a0, 0(zero)
    ebreak
    slli s1, s1, 16
    li t1, 0x3333
    or t1, t1, s1
    li t0, 0x100000
    sw t1, 0(t0)
    j .
    .option rvc
    .balign 4
handler:
    .option norvc
    csrr t0, mcause
    add s1, s1, t0
    csrr t0, mepc
    addi t0, t0, 4
    csrw mepc, t0
    csrr t0, mstatus
    srli t0, t0, 11
    andi t0, t0, 3
    add s1, s1, t0
    mret
""",
        *BARE,
    )
    with load(path) as target:
        stop = target.run()
        assert stop.kind == "trap"
        stop = target.run()  # nobody handled the breakpoint: it goes to the program's vector
        assert (stop.kind, stop.status) == ("exited", (11 + 2 + 5 + 3) + 4 * 3)


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("    ecall\n", signal.SIGILL, "no trap vector"),
        ("    wfi\n", signal.SIGABRT, "waits for an interrupt"),
        ("    li t0, 0x5000\n    csrw mtvec, t0\n    ecall\n", signal.SIGSEGV, "the trap handler itself traps"),
    ],
)
def test_boards_that_hang_end(assemble, text, status, words):
    stop, _, _, target = run(assemble(text, *BARE))
    assert (stop.kind, stop.status) == ("signalled", status)
    assert words in target.words


def test_board_or_linux_is_told_by_rule_or_by_word(assemble):
    path = assemble("    li a0, 4\n" + EXIT, *BARE)
    assert run(path)[0].kind == "signalled"
    assert run(path, abi="linux")[0].status == 4
    low = assemble("    li t0, 0x100000\n    li t1, 0x5555\n    sw t1, 0(t0)\n    j .\n", name="low")
    assert run(low)[0].status == signal.SIGSEGV
    assert run(low, abi="bare", ram=1 << 20)[0].kind == "exited"
    with load(path, ram=1 << 20) as target:
        ram = [m for m in target.mappings() if m.path == "[ram]"]
        assert max(m.end for m in ram) == 0x80000000 + (1 << 20)


# -- what cannot be loaded ----------------------------------------------------------------------------------
def test_not_for_this_machine(build, tool, tmp_path):
    with pytest.raises(AskedWrong, match="ELF machine 62"):
        load(build("calls.c"))
    with pytest.raises(Unsupported, match="dynamically linked"):
        load(build("calls.c", cc=GCC))
    with pytest.raises(BadImage, match="not an executable"):
        load(build("calls.c", cc=GCC, kind="object"))
    path = build("calls.c", cc=GCC, kind="static")
    with pytest.raises(AskedWrong, match="x86_64 was asked for"):
        load(path, arch="x86_64")
    with pytest.raises(AskedWrong, match="abi"):
        load(path, abi="windows")
    with pytest.raises(AskedWrong, match="zero byte"):
        load(path, ["a\0b"])
    with pytest.raises(Unsupported, match="too long"):
        load(path, ["a" * (3 << 20)])
    with pytest.raises(BadImage, match="cannot be read"):
        load(tmp_path / "nothing")
    with pytest.raises(BadImage):
        load(tmp_path)
    (tmp_path / "text").write_text("no program")
    with pytest.raises(BadImage):
        load(tmp_path / "text")


def test_truncated_program(build, tmp_path):
    whole = build("calls.c", cc=GCC, kind="static").read_bytes()
    for size in (0, 3, 16, 63, 64, 100, 400, 5000, len(whole) // 2):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(BadImage):
            load(tmp_path / "cut")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 63 + 56 * 3), st.integers(0, 255)), min_size=1, max_size=6))
def test_hostile_headers_end_in_one_error_or_run(tmp_path_factory, changes):
    path = _tiny(tmp_path_factory)
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at] = value
    bad = path.with_name("bad")
    bad.write_bytes(data)
    try:
        target = load(bad, stdin=b"", stdout=io.BytesIO(), stderr=io.BytesIO(), ram=1 << 20)
    except TraceError:
        return
    with target:
        with contextlib.suppress(TraceError):
            target.run(10_000)
        maps = target.mappings()
        assert all(a.end <= b.start for a, b in zip(maps, maps[1:], strict=False))


def _tiny(factory):
    home = factory.getbasetemp() / "tiny"
    home.mkdir(exist_ok=True)
    path = home / "tiny"
    if not path.exists():
        (home / "tiny.S").write_text("    .globl _start\n_start:\n" + LOOP + "    .data\n    .dword 1\n")
        subprocess.run([GCC, *ASM_FLAGS, home / "tiny.S", "-o", path], check=True)
    return path


# -- memory ---------------------------------------------------------------------------------------------------
def test_allocator_refuses(assemble):
    with load(assemble(LOOP)) as target:
        pc = target.regs(1)["pc"]
        for wrong in (lambda: target.allocator.map(0, "rw-"), lambda: target.allocator.map(4096, "rw-", name="gold")):
            with pytest.raises(AskedWrong):
                wrong()
        with pytest.raises(AskedWrong, match="not mapped by this allocator"):
            target.allocator.unmap(pc & -4096, 4096)
        with pytest.raises(OutOfReach):
            target.allocator.map(1 << 32, "rw-", near=pc, reach=1 << 20)
        with pytest.raises(Unsupported, match="too large"):
            target.allocator.map(1 << 37, "rw-", name="noreserve")
        big = target.allocator.map(1 << 35, "rw-", name="noreserve")
        target.write(big + (1 << 34), b"far")
        assert target.read(big + (1 << 34), 4) == b"far\0"


def test_heap_keeps_its_room(assemble):
    # brk grows by 512 MiB in steps although something was mapped near the program before
    text = """
    li a0, 0
    li a7, 214
    ecall
    mv s0, a0
    li s1, 64
1:  li t0, 1<<23
    add s0, s0, t0
    mv a0, s0
    ecall
    bne a0, s0, 2f
    sb s1, -1(a0)
    addi s1, s1, -1
    bnez s1, 1b
2:  mv a0, s1
"""
    with load(assemble(text + EXIT)) as target:
        target.allocator.map(1 << 20, "r-x", near=target.regs(1)["pc"], reach=(1 << 31) - (1 << 12))
        assert target.run().status == 0
        heap = [m for m in target.mappings() if m.path == "[heap]"]
        assert sum(m.size for m in heap) == 64 << 23
        assert len(heap) < 20  # pieces are joined


def test_views_outlive_the_target(assemble):
    target = load(assemble(LOOP))
    at, view = target.shared.share(8192, "ring")
    target.write(at, b"kept")
    target.close()
    del target
    gc.collect()
    assert bytes(view[:4]) == b"kept"


PAGES = 12
STEPS = st.tuples(
    st.sampled_from("mupjw"), st.integers(0, PAGES - 1), st.integers(1, 4), st.sampled_from(["r--", "rw-", "r-x"])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_space_agrees_with_a_page_table(steps):
    """Whatever is mapped, cut, protected and joined: a page table, the regions and the emulator say the same."""
    uc = Uc(unicorn_const.UC_ARCH_RISCV, unicorn_const.UC_MODE_RISCV64)
    base, page = 0x10000, 4096
    space = Space(uc, low=base, high=base + PAGES * page)
    model = {}
    for count, (what, first, n, perms) in enumerate(steps):
        pages = range(first, min(first + n, PAGES))
        at, size = base + first * page, len(pages) * page
        if what == "m":
            if any(p in model for p in pages):
                with pytest.raises(AskedWrong):
                    space.map(at, size, perms)
            else:
                space.map(at, size, perms)
                model.update({p: [perms, b"\0"] for p in pages})
        elif what == "u":
            space.unmap(at, size)
            for p in pages:
                model.pop(p, None)
        elif what == "p":
            if all(p in model for p in pages):
                space.protect(at, size, perms)
                for p in pages:
                    model[p][0] = perms
            else:
                with pytest.raises(Fault):
                    space.protect(at, size, perms)
        elif what == "j":
            space.join(at, at + size)
        else:
            for p in pages:
                if p in model:
                    model[p][1] = bytes([count + 1])
                    space.write(base + p * page, model[p][1])
        table = {}
        for region in space:
            for p in range((region.start - base) // page, (region.end - base) // page):
                assert p not in table
                table[p] = [region.perms, space.read(base + p * page, 1)]
        assert table == model
        seen = {}
        for low, high, flags in uc.mem_regions():
            for p in range((low - base) // page, (high + 1 - base) // page):
                perms = "".join(c if flags & b else "-" for c, b in zip("rwx", (1, 2, 4), strict=True))
                seen[p] = [perms, bytes(uc.mem_read(base + p * page, 1))]
        assert seen == model
    space.release()
