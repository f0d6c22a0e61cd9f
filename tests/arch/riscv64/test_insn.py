"""The reader against LLVM over the whole space it claims, in both directions."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fentry.arch.riscv64 import facts, insn
from fentry.errors import AskedWrong
from tests.arch.riscv64 import llvm

needs_llvm = pytest.mark.skipif(not llvm.MC, reason="llvm-mc is not installed (Debian: llvm)")


def as_llvm_writes_it(text: str) -> str:
    """Undo the differences of spelling, none of meaning, that insn's docstring lists."""
    name, _, operands = text.partition(" ")
    if name in ("c.slli", "c.srli", "c.srai") and operands.endswith(", 0"):
        return f"{name}64 {operands[:-3]}"
    if name == "fence":  # an empty set of accesses
        return re.sub(r"\b0\b", "unknown", text)
    return text


def same_csr(ours: str, theirs: str) -> bool:
    """LLVM names the csr of a csr access, we number it; `test_text_assembles` checks that number."""
    if ours == "csrrw zero, 3072, zero":
        return theirs == "unimp"
    a, b = ours.replace(",", "").split(), theirs.replace(",", "").split()
    return (a[:2], a[3:]) == (b[:2], b[3:]) and (not b[2].isdigit() or a[2] == b[2])


@needs_llvm
def test_every_encoding_of_16_bits():
    words = [w for w in range(1 << 16) if w & 3 != 3]
    wrong = {}
    for word, theirs in zip(words, llvm.disassemble(words, 2), strict=True):
        one = insn.decode_word(word, 2)
        ours = as_llvm_writes_it(one.text) if one else None
        if ours == theirs:
            continue
        if theirs == "c.unimp":
            assert word == 0
        elif theirs and theirs.startswith("c.lui") and theirs.endswith(" 0"):
            assert ours is None  # reserved
        elif theirs and theirs.startswith("c.lui zero, "):
            assert ours == f"c.lui zero, {int(theirs.split(', ')[1]) & 0xFFFFF}"  # only for x0 LLVM prints a sign
        else:
            wrong[hex(word)] = theirs, ours
    assert not wrong


@needs_llvm
def test_every_opcode_and_function_code_of_32_bits():
    rnd = random.Random(4)
    words = []
    for opcode in range(32):
        if opcode & 7 == 7:
            continue  # longer than 32 bits
        # where rs2 is part of the opcode all of it is tried
        all_rs2 = opcode in (0b00011, 0b00100, 0b00110, 0b01011, 0b01100, 0b01110, 0b10100, 0b11100)
        for funct in range(1 << 10):
            for rs2 in range(32) if all_rs2 else (rnd.randrange(32),):
                rd, rs1 = (0, 0) if rnd.random() < 0.2 else (rnd.randrange(32), rnd.randrange(32))
                funct7, funct3 = funct >> 3, funct & 7
                words.append(funct7 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode << 2 | 3)
    wrong = {}
    for word, theirs in zip(words, llvm.disassemble(words, 4), strict=True):
        one = insn.decode_word(word, 4)
        ours = as_llvm_writes_it(one.text) if one else None
        if ours == theirs or (ours and theirs and one.name.startswith("csrr") and same_csr(ours, theirs)):
            continue
        if one and one.name in ("fcvt.d.s", "fcvt.d.w", "fcvt.d.wu"):
            assert theirs is None
            assert one.fields["rm"]
        elif theirs in ("uret", "dret"):
            assert ours is None
        else:
            wrong[hex(word)] = theirs, ours
    assert not wrong


def samples(pattern, rnd):
    """Yield field values of a line: each field's edges with the others random, then all random."""

    def any_of(field):
        top = 1 << (field.high - field.low)
        return field.get(sum((v & m) << at for at, m, v in spread(field, rnd.randrange(top) << field.low)))

    def spread(field, raw):
        return [(at, mask, raw >> to) for at, mask, to in field.parts]

    def legal(values):
        return all(values[f.name] not in never for f, never in pattern.never)

    rows = []
    for field in pattern.fields:
        unit = 1 << field.low
        low = (-(1 << (field.high - 1)) if field.signed else 0) + field.base
        high = (1 << (field.high - 1 if field.signed else field.high)) - unit + field.base
        edges = {low, high, field.base, low + unit, high - unit}
        rows += [{f.name: any_of(f) for f in pattern.fields} | {field.name: edge} for edge in edges]
    rows += [{f.name: any_of(f) for f in pattern.fields} for _ in range(12)]
    return [row for row in rows if legal(row)]


@needs_llvm
@pytest.mark.parametrize("table", [insn.HALVES, insn.WORDS], ids=["16 bits", "32 bits"])
def test_text_assembles(table):
    """encode, decode and text agree with LLVM's assembler and disassembler on every line."""
    rnd = random.Random(9)
    lines = []
    for pattern in table:
        rows = samples(pattern, rnd) if pattern.fields else [{}]
        assert rows, pattern.name
        for fields in rows:
            word = pattern.encode(**fields)
            one = insn.decode_word(word, table.size)
            assert one is not None, (pattern.name, fields)
            assert (one.name, one.fields) == (pattern.name, fields)
            lines.append((word, one))
    # the withdrawn and the exact: see the module's list of differences
    lines = [(w, o) for w, o in lines if not (o.name in ("fcvt.d.s", "fcvt.d.w", "fcvt.d.wu") and o.fields["rm"])]
    texts = [as_llvm_writes_it(o.text) for _, o in lines]
    lines = [line for line, text in zip(lines, texts, strict=True) if "unknown" not in text]
    texts = [text for text in texts if "unknown" not in text]
    got = llvm.assemble(texts, short=table.size == 2)
    assert [(t, w) for t, (w, _), g in zip(texts, lines, got, strict=True) if g != w] == []


def test_text_of_a_few():
    """The spelling people see; the immediates are the boundary cases of each scattered field."""
    for code, text in {
        "97020cf7": "auipc t0, 1011904",
        "e78202eb": "jalr t0, -336(t0)",
        "0525": "c.addiw a0, 1",
        "0290": "c.ebreak",
        "233c11fe": "sd ra, -8(sp)",
        "2f26a506": "amoadd.w.aqrl a2, a0, (a0)",
        "0f00f00f": "fence iorw, iorw",
        "73250030": "csrrs a0, 768, zero",
        "5375b502": "fadd.d fa0, fa0, fa1, dyn",
        "13000080": "addi zero, zero, -2048",
        "e30e00fe": "beq zero, zero, -4",
    }.items():
        one = insn.decode(bytes.fromhex(code))
        assert one is not None, text
        assert one.text == text


@pytest.mark.parametrize(
    ("code", "size"),
    [
        ("", 0),
        ("13", 0),
        ("1300", 0),
        ("130000", 0),
        ("13000000", 4),
        ("0100", 2),
        ("0000", 0),
        ("ffffffff", 0),
        ("1f000000000000", 0),  # 48 bits
        ("57000000", 4),  # vector: known length, unknown instruction
        ("0b000000", 4),  # custom-0
    ],
)
def test_length(code, size):
    assert insn.length(bytes.fromhex(code)) == size


@given(st.binary(max_size=8))
def test_any_bytes(code):
    """Whatever the bytes: no exception, and what decodes encodes to the same bytes."""
    one = insn.decode(code)
    if one is not None:
        assert code.startswith(insn.encode(one.name, **one.fields))
        assert one.length == insn.length(code)
        assert one.text.startswith(one.name)
    assert insn.verdict(code).kind in ("rejected", "slot", "simulate")
    assert (insn.verdict(code).kind == "rejected") == bool(insn.verdict(code).reason)


VERDICTS = {  # the kernel's table: Linux 6.12 arch/riscv/kernel/probes/decode-insn.c
    "rejected": "73000000 73001000 0290 0f00f00f 0f100000 73250030 73001050 73002010 0000 57000000",
    "simulate": "ef000000 67800000 17050000 63000000 e3f000fe 01a0 8280 8290 01c1 01e1",
    "slot": "13000000 0100 0525 1305a502 0565 2e85 0a95 2330b500 2f26a506 5375b502 93152500",
}


@pytest.mark.parametrize(("kind", "code"), [(k, c) for k, codes in VERDICTS.items() for c in codes.split()])
def test_verdict(kind, code):
    assert insn.verdict(bytes.fromhex(code)).kind == kind


def kernel_verdict(word, size):
    """The kernel's masks, as it tries them; the words it names are in 4.4's table of the same source."""
    if size == 4:
        if word & 0x7F in (0x73, 0x0F):
            return "rejected"
        masks = [(0x7F, 0x6F), (0x707F, 0x67), (0x7F, 0x17)] + [(0x707F, f << 12 | 0x63) for f in (0, 1, 4, 5, 6, 7)]
    else:
        if word == 0x9002:
            return "rejected"
        if word & 0xF07F in (0x8002, 0x9002):
            return "simulate" if word & 0xF80 else None  # c.jr with rd = 0 is reserved
        masks = [(0xE003, 0xA001), (0xE003, 0xC001), (0xE003, 0xE001)]
    return "simulate" if any(word & mask == match for mask, match in masks) else "slot"


def test_verdicts_of_all_16_bits_are_the_kernels():
    for word in range(1, 1 << 16):
        if word & 3 != 3 and insn.decode_word(word, 2) is not None:
            assert insn.verdict(word.to_bytes(2, "little")).kind == kernel_verdict(word, 2), hex(word)


@given(st.integers(0, (1 << 32) - 1).map(lambda w: w | 3))
def test_verdicts_of_32_bits_are_the_kernels(word):
    if insn.decode_word(word, 4) is not None and insn.length(word.to_bytes(4, "little")) == 4:
        assert insn.verdict(word.to_bytes(4, "little")).kind == kernel_verdict(word, 4)


def test_branches_and_targets():
    def one(code):
        return insn.decode(bytes.fromhex(code))

    assert one("e30e00fe").target(0) == (1 << 64) - 4  # beq zero, zero, -4
    assert one("fdbf").target(0x1000) == 0xFFE  # c.j -2
    assert one("e78202eb").target(0x1000) is None
    assert one("e78202eb").branch
    assert one("17050000").pc_relative
    assert not one("17050000").branch
    assert one("8290").links  # c.jalr ra
    assert not one("8280").links  # ret
    assert not one("8280").pc_relative
    assert not one("13000000").pc_relative


def test_encode_refuses():
    for name, fields in [
        ("addi", {"rd": 1, "rs1": 1, "imm": 2048}),
        ("addi", {"rd": 32, "rs1": 1, "imm": 0}),
        ("addi", {"rd": 1, "imm": 0}),
        ("addi", {"rd": 1, "rs1": 1, "imm": 0, "aq": 1}),
        ("beq", {"rs1": 1, "rs2": 2, "imm": 3}),
        ("lui", {"rd": 1, "imm": 0x1800}),
        ("c.addi4spn", {"rd": 8, "uimm": 0}),
        ("c.ld", {"rd": 7, "rs1": 8, "uimm": 8}),
        ("fadd.s", {"fd": 1, "fs1": 1, "fs2": 1, "rm": 5}),
    ]:
        with pytest.raises(AskedWrong, match=name):
            insn.encode(name, **fields)


def test_facts_are_consistent():
    assert len(facts.X) == len(set(facts.X)) == 32
    assert len(facts.F) == len(set(facts.F)) == 32
    assert len(facts.REGS) == 32
    assert len({facts.PARENT, facts.RESUME, facts.DIRECT}) == 3
    assert not set(facts.SLOT_CLOBBERS) & {*facts.ARGS, facts.STATIC_CHAIN, *facts.CALLEE_SAVED, facts.PARENT}
