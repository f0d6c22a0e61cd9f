"""The writer: vectors, reach, every sled real compilers emit, call sites, branch targets."""

import re
import shutil
import struct
import subprocess
import tomllib
from importlib import resources

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st

from fentry.arch import Refusal, Rung, Sled, load
from fentry.arch.riscv64 import ARCH, code, insn
from fentry.errors import EngineBug, OutOfReach, Rejected

VECTORS = tomllib.loads(resources.files("fentry.arch.riscv64").joinpath("vectors.toml").read_text())
GCC = "riscv64-linux-gnu-gcc"
needs_gcc = pytest.mark.skipif(not shutil.which(GCC), reason=f"{GCC} is not installed")
needs_clang = pytest.mark.skipif(not shutil.which("clang"), reason="clang is not installed")
NOP4, NOP2 = bytes.fromhex("13000000"), bytes.fromhex("0100")
SLED = Sled("sled", 8, NOP4 * 2, 8, "t0")
U64 = (1 << 64) - 1


def target(pair, at):
    """Where a pair goes, by the manual's words for auipc and jalr."""
    first, second = insn.decode(pair), insn.decode(pair[4:])
    return (at + first.fields["imm"] + second.fields["imm"]) & U64 & ~1


@pytest.mark.parametrize("kind", ["entry_call", "call"])
def test_call_vectors(kind):
    for v in VECTORS[kind]:
        at, to = int(v["at"], 16), int(v["to"], 16)
        got = getattr(code, kind)(at, to)
        assert got.hex(" ") == v["want"], v["source"]
        assert target(got, at) == to


def test_out_of_reach_vectors():
    for v in VECTORS["out_of_reach"]:
        with pytest.raises(OutOfReach) as e:
            code.entry_call(int(v["at"], 16), int(v["to"], 16))
        assert (e.value.at, e.value.to) == (int(v["at"], 16), int(v["to"], 16))


@given(st.integers(0, U64), st.integers(-(1 << 31) - 0x800, (1 << 31) - 0x801))
def test_split_restores_every_distance(at, distance):
    to = (at + distance) & U64
    high, low = code.split(at, to)
    assert (at + high + low) & U64 == to
    assert high % 4096 == 0
    assert -2048 <= low < 2048


@given(
    st.integers(0, U64),
    st.one_of(st.integers((1 << 31) - 0x800, U64 >> 1), st.integers(-(1 << 63), -(1 << 31) - 0x801)),
)
def test_split_refuses_every_other_distance(at, distance):
    with pytest.raises(OutOfReach):
        code.split(at, (at + distance) & U64)


def test_jal_reach():
    assert insn.decode(code.jal(0, (1 << 20) - 2)).target(0) == (1 << 20) - 2
    assert insn.decode(code.jal(1 << 20, 0)).target(1 << 20) == 0
    for at, to in ((0, 1 << 20), ((1 << 20) + 2, 0)):
        with pytest.raises(OutOfReach):
            code.jal(at, to)


def test_nops():
    assert [code.nops(n).hex() for n in (0, 2, 4, 6)] == ["", "0100", "13000000", "130000000100"]
    with pytest.raises(EngineBug):
        code.nops(3)


# -- sleds as bytes ---------------------------------------------------------------------------------------

BODY = bytes.fromhex("411106e4")  # c.addi sp, -16; c.sdsp ra, 8(sp)


@pytest.mark.parametrize(
    "nops",
    [
        NOP2 * 4,
        NOP4 * 2,
        NOP2 * 2 + NOP4,
        NOP4 + NOP2 * 2,
        NOP2 + NOP4 + NOP2,
        NOP4 * 3,
        NOP2 * 8,
        NOP4 * 4,
        NOP2 * 5,
        NOP2 * 4 + NOP4,
    ],
)
def test_nop_sleds(nops):
    sled = ARCH.sled_at((nops + BODY * 8)[:32], "patchable")
    assert sled == Sled("sled", 8, nops[:8], 8, "t0")
    armed = ARCH.arm(0x1000, sled, 0x9000, balanced=True)
    assert len(armed) == 8
    assert target(armed, 0x1000) == 0x9000


def test_sled_that_cannot_be_resumed():
    """Byte 8 must be an instruction also when the nops are back: a thread may still be on its way there."""
    got = ARCH.sled_at(NOP2 + NOP4 * 2 + BODY * 4, "patchable")
    assert isinstance(got, Refusal)
    assert "inside a nop" in got.reason


@pytest.mark.parametrize("nops", [NOP2, NOP2 * 3, NOP4, NOP4 + NOP2])
def test_short_sleds_are_refused(nops):
    got = ARCH.sled_at(nops + BODY * 4, "patchable")
    assert isinstance(got, Refusal)
    assert f"sled of {len(nops)} bytes is too short" in got.reason
    assert ARCH.sled_at(nops + BODY * 4, "scan") is None


def test_what_a_scan_accepts():
    for nops in (NOP2 * 4, NOP4 * 2, NOP2 * 8, NOP4 * 4):
        assert ARCH.sled_at(nops + BODY * 4, "scan").idle == nops[:8]
    for code_ in (NOP2 * 5 + BODY, NOP4 + NOP2 * 2 + BODY, NOP4 * 3 + BODY, BODY * 4, NOP2 * 16, b"", NOP2 * 4):
        assert ARCH.sled_at(code_, "scan") is None


@pytest.mark.parametrize(
    ("code_", "why"),
    [
        (code.entry_call(0x1000, 0x9000) + BODY, "armed already"),
        (code.entry_call(0x1000, 0x9000)[:4] + NOP4 + BODY, "fixed auipc t0"),
        (BODY * 4, "no nops"),
        (b"", "no nops"),
    ],
)
def test_listed_but_unusable(code_, why):
    got = ARCH.sled_at(code_, "patchable")
    assert isinstance(got, Refusal)
    assert why in got.reason


def test_millicode_call_is_no_sled():
    """-msave-restore begins functions with `call t0, __riscv_save_N`: the very bytes of an armed sled."""
    assert ARCH.sled_at(code.entry_call(0x1000, 0x9000) + BODY * 4, "scan") is None


def test_sled16():
    for v in VECTORS["sled16"]:
        at, to = int(v["at"], 16), int(v["to"], 16)
        for idle in (NOP4 * 4, NOP2 * 8):
            assert code.arm(at, code.sled16_at(idle + BODY), to).hex(" ") == v["want"], v["source"]
        armed = bytes.fromhex(v["want"])
        sled = ARCH.sled_at(armed + BODY, "patchable")
        assert sled == Sled("sled16", 16, armed, 12, "ra")
        assert ARCH.arm(at, sled, to, balanced=False) == armed
    assert code.sled16_at(NOP4 * 3 + BODY) is None
    assert code.sled16_at(armed[:8] + NOP4 + armed[12:]) is None


def test_mcount_forms():
    pair = code.call(0x1065C, 0x10534)
    for idle, size in ((pair, 8), (NOP4 * 2, 8), (NOP2 * 4, 8), (code.jal(0x1065C, 0x10534), 4)):
        sled = ARCH.sled_at(idle + BODY * 4, "mcount")
        assert sled == Sled("mcount", size, idle, size, "ra")
        armed = ARCH.arm(0x1065C, sled, 0x20000, balanced=False)
        assert len(armed) == size
        assert ARCH.branch_targets(armed, 0x1065C) == [(0x1065C, 0x20000)]
    with pytest.raises(OutOfReach):
        ARCH.arm(0x1065C, sled, 0x1065C + (1 << 20), balanced=False)
    for other in (BODY * 4, b"", code.entry_call(0, 0x1000), bytes.fromhex("8290") + BODY):
        assert isinstance(ARCH.sled_at(other, "mcount"), Refusal)


def test_arm_needs_a_known_form():
    with pytest.raises(EngineBug, match="entry-jump"):
        ARCH.arm(0, Sled("entry-jump", 8, BODY * 2, 8), 0x1000, balanced=True)


def test_landing_pad():
    assert ARCH.landing_pad(bytes.fromhex("17000000") + NOP2 * 4) == 4  # lpad 0
    assert ARCH.landing_pad(bytes.fromhex("17f0ffff")) == 4
    assert ARCH.landing_pad(bytes.fromhex("97000000")) == 0
    assert ARCH.landing_pad(b"\x17\x00") == 0


def test_rung():
    assert ARCH.rung is Rung.SLEDDED
    assert "not built yet" in ARCH.entry_window(BODY * 8, 0x1000, 32, 32).reason
    with pytest.raises(Rejected) as e:
        ARCH.displace(SLED, 0x1000, 0x2000, 0x1008)
    assert e.value.at == 0x1000
    assert load("riscv64") is ARCH


@given(st.binary(max_size=32), st.sampled_from(["patchable", "mcount", "scan"]))
def test_any_bytes(data, hint):
    got = ARCH.sled_at(data, hint)
    if isinstance(got, Sled):
        assert data.startswith(got.idle)
        assert len(got.idle) == got.size
    assert ARCH.landing_pad(data) in (0, 4)
    assert all(0 <= to <= U64 for _, to in ARCH.branch_targets(data, U64 - 64))
    assert b"".join(raw for _, raw, _ in ARCH.disassemble(data, 0x1000)) == data


# -- what compilers emit ----------------------------------------------------------------------------------

SOURCE = """
int other(int);
int leaf(int x) { return x * 3; }
int loop(int n) { int s = 0; for (int i = 0; i < n; i++) s += other(i); return s; }
double mix(double a, long b, char *c) { return a * b + (c ? other(*c) : 0); }
int other(int x) { return x > 3 ? loop(x - 3) : leaf(x); }
int main(void) { return loop(5) + (int)mix(1.5, 2, 0); }
"""


def build(tmp_path, *options, compiler=(GCC,)):
    source, output = tmp_path / "p.c", tmp_path / "p"
    source.write_text(SOURCE)
    subprocess.run([*compiler, "-o", str(output), str(source), *options], check=True, capture_output=True, text=True)
    return output


def read(output):
    """Give ({function: (address, its bytes)}, listed sled addresses, a reader of code)."""
    with output.open("rb") as f:
        elf = ELFFile(f)
        sections = [(s["sh_addr"], s.data()) for s in elf.iter_sections() if s["sh_flags"] & 4]
        symbols = {
            s.name: (s["st_value"], s["st_size"])
            for s in elf.get_section_by_name(".symtab").iter_symbols()
            if s["st_info"]["type"] == "STT_FUNC" and s["st_size"]
        }
        listed = elf.get_section_by_name("__patchable_function_entries")
        sleds = [n for (n,) in struct.iter_unpack("<Q", listed.data())] if listed else []

    def at(address, size):
        return next(d[address - a : address - a + size] for a, d in sections if a <= address < a + len(d))

    return {name: (value, at(value, size)) for name, (value, size) in symbols.items()}, sleds, at


STATIC = ("-nostdlib", "-static", "-Wl,-e,main")
NAMES = ("leaf", "loop", "mix", "other", "main")


@needs_gcc
@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize(
    ("count", "march", "idle", "kind"),
    [
        ("4", "rv64gc", "0100" * 4, Sled),
        ("2", "rv64g", "13000000" * 2, Sled),
        ("8", "rv64gc", "0100" * 4, Sled),
        ("3", "rv64gc", "", Refusal),
        ("8,4", "rv64gc", "0100" * 4, Sled),
    ],
)
def test_gcc_patchable_entries(tmp_path, level, count, march, idle, kind):
    options = (f"-fpatchable-function-entry={count}", f"-march={march}", "-mabi=lp64d", "-no-pie")
    functions, sleds, at = read(build(tmp_path, level, *options, *STATIC))
    before = 8 if count == "8,4" else 0  # four c.nop in front of the label; the listed address is theirs
    assert sorted(sleds) == sorted(functions[n][0] - before for n in NAMES)
    for name in NAMES:
        address = functions[name][0]
        got = ARCH.sled_at(at(address, 32), "patchable")
        assert isinstance(got, kind), name
        if kind is Sled:
            assert (got.idle.hex(), got.resume, got.form) == (idle, 8, "sled")


@needs_clang
@pytest.mark.parametrize(("count", "features"), [("4", "+c"), ("2", "-c")])
def test_clang_patchable_entries(tmp_path, count, features):
    source, output = tmp_path / "p.c", tmp_path / "p.o"
    source.write_text(SOURCE)
    command = ["clang", "--target=riscv64-linux-gnu", "-O2", "-c", f"-fpatchable-function-entry={count}"]
    command += [f"-march=rv64imafd{'c' if features == '+c' else ''}", "-o", str(output), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    functions, _, at = read(output)
    for name in NAMES:
        got = ARCH.sled_at(at(functions[name][0], 32), "patchable")
        assert isinstance(got, Sled), (name, got)
        assert (got.form, got.size, got.resume) == ("sled", 8, 8)


@needs_gcc
@pytest.mark.parametrize(("relax", "size"), [("-mrelax", 4), ("-mno-relax", 8)])
def test_gcc_mcount_calls(tmp_path, relax, size):
    """-pg: the call follows `mv a0, ra`; the linker's relaxation shortens it."""
    options = ("-O2", "-pg", "-fno-pie", "-no-pie", relax, *STATIC, "-Wl,--defsym=_mcount=leaf")
    if relax == "-mno-relax":
        options += ("-Wl,--no-relax",)
    functions, _, at = read(build(tmp_path, *options))
    mcount = functions["leaf"][0]
    for name in NAMES:
        address, body = functions[name]
        calls = [a for a, to in ARCH.branch_targets(body, address) if to == mcount]
        got = ARCH.sled_at(at(calls[0], 32), "mcount")
        assert isinstance(got, Sled), name
        assert (got.form, got.size, got.link) == ("mcount", size, "ra")
        assert bytes.fromhex("0685") in body[: calls[0] - address], name  # c.mv a0, ra


@needs_gcc
@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("march", ["rv64gc", "rv64g"])
def test_branch_targets_are_objdumps(tmp_path, level, march):
    output = build(tmp_path, level, f"-march={march}", "-mabi=lp64d", "-no-pie", *STATIC, "-Wl,--no-relax")
    functions, _, at = read(output)
    listing = subprocess.run(
        ["riscv64-linux-gnu-objdump", "-d", "-M", "no-aliases", str(output)], check=True, capture_output=True, text=True
    ).stdout
    pattern = r"^ *([0-9a-f]+):\t[0-9a-f ]+\t(?:c\.)?(?:j(?:al)?|b(?:eq|ne|lt|ge|ltu|geu)z?)\t(?:.*,)?([0-9a-f]+) <"
    expected = {(int(a, 16), int(b, 16)) for a, b in re.findall(pattern, listing, re.MULTILINE)}
    # a far call: objdump comments on the jalr, we name the auipc
    far = r"^ *([0-9a-f]+):\t[0-9a-f ]+\tjalr\t.* # ([0-9a-f]+) <"
    expected |= {(int(a, 16) - 4, int(b, 16)) for a, b in re.findall(far, listing, re.MULTILINE)}
    found = set()
    for name in NAMES:
        address, body = functions[name]
        found |= set(ARCH.branch_targets(body, address))
    assert found == expected
    assert len(found) > 8


def test_frame_size():
    def words(*texts):
        return b"".join(texts)

    assert ARCH.frame_size(insn.encode("c.addi", rd=2, imm=-32) + BODY) == 32
    assert ARCH.frame_size(insn.encode("c.addi16sp", imm=-128)) == 128
    assert ARCH.frame_size(words(insn.encode("lui", rd=5, imm=4096), insn.encode("addi", rd=2, rs1=2, imm=-48))) == 48
    assert ARCH.frame_size(words(bytes.fromhex("8280"), insn.encode("c.addi", rd=2, imm=-32))) == 0
    assert ARCH.frame_size(b"") == 0
