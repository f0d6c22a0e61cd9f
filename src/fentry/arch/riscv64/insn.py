"""Read RV64GC: length, decode, text, branch targets, and what a probe may do with an instruction.

The tables are the instruction listings of the unprivileged ISA manual (RV64I, M, A, F, D, Zicsr, Zifencei, C and
the bit-manipulation sets Zba, Zbb, Zbs) in their own notation; :mod:`fentry.arch.bits` runs them both ways. Every
encoding of 16 bits, and every line and opcode of 32 bits, is checked against LLVM by ``tests/arch/riscv64``.
Where this reader differs from LLVM 14 on purpose:

* ``c.lui`` with immediate 0 is reserved by the manual; LLVM 14 prints it, we refuse it;
* all zeros is LLVM's ``c.unimp``; it is defined to be illegal, so it is no instruction here;
* shifts by 0 in the compressed set are hints on RV64: plain ``c.slli`` and so on here, ``c.slli64`` there;
* ``fcvt.d.s/w/wu`` are exact but have a rounding-mode field in the manual; LLVM 14 knows only its value 0;
* ``uret`` (an extension that was withdrawn) and ``dret`` (debug mode) are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from fentry.arch.bits import Kind, Pattern, Table
from fentry.arch.riscv64 import facts

KINDS: Final = {
    **{name: Kind(name, 5) for name in ("rd", "rs1", "rs2", "rs3", "fd", "fs1", "fs2", "fs3")},
    # three bits of a compressed instruction name x8..x15 or f8..f15
    **{f"{name}'": Kind(name, 3, base=8) for name in ("rd", "rs1", "rs2", "fd", "fs2")},
    "imm": Kind("imm", signed=True),
    "uimm": Kind("uimm"),
    "shamt": Kind("shamt"),
    "zimm": Kind("zimm", 5),
    "csr": Kind("csr", 12),
    "pred": Kind("pred", 4),
    "succ": Kind("succ", 4),
    "rm": Kind("rm", 3),
    "aq": Kind("aq", 1),
    "rl": Kind("rl", 1),
}

_INT = """
# RV64I (manual chapters "RV32I" and "RV64I", listings in "RV32/64G Instruction Set Listings")
lui    imm[31:12] rd 0110111 : rd, upper
auipc  imm[31:12] rd 0010111 : rd, upper
jal    imm[20|10:1|11|19:12] rd 1101111 : rd, imm
jalr   imm[11:0] rs1 000 rd 1100111 : rd, imm(rs1)
beq    imm[12|10:5] rs2 rs1 000 imm[4:1|11] 1100011 : rs1, rs2, imm
bne    imm[12|10:5] rs2 rs1 001 imm[4:1|11] 1100011 : rs1, rs2, imm
blt    imm[12|10:5] rs2 rs1 100 imm[4:1|11] 1100011 : rs1, rs2, imm
bge    imm[12|10:5] rs2 rs1 101 imm[4:1|11] 1100011 : rs1, rs2, imm
bltu   imm[12|10:5] rs2 rs1 110 imm[4:1|11] 1100011 : rs1, rs2, imm
bgeu   imm[12|10:5] rs2 rs1 111 imm[4:1|11] 1100011 : rs1, rs2, imm
lb     imm[11:0] rs1 000 rd 0000011 : rd, imm(rs1)
lh     imm[11:0] rs1 001 rd 0000011 : rd, imm(rs1)
lw     imm[11:0] rs1 010 rd 0000011 : rd, imm(rs1)
ld     imm[11:0] rs1 011 rd 0000011 : rd, imm(rs1)
lbu    imm[11:0] rs1 100 rd 0000011 : rd, imm(rs1)
lhu    imm[11:0] rs1 101 rd 0000011 : rd, imm(rs1)
lwu    imm[11:0] rs1 110 rd 0000011 : rd, imm(rs1)
sb     imm[11:5] rs2 rs1 000 imm[4:0] 0100011 : rs2, imm(rs1)
sh     imm[11:5] rs2 rs1 001 imm[4:0] 0100011 : rs2, imm(rs1)
sw     imm[11:5] rs2 rs1 010 imm[4:0] 0100011 : rs2, imm(rs1)
sd     imm[11:5] rs2 rs1 011 imm[4:0] 0100011 : rs2, imm(rs1)
addi   imm[11:0] rs1 000 rd 0010011 : rd, rs1, imm
slti   imm[11:0] rs1 010 rd 0010011 : rd, rs1, imm
sltiu  imm[11:0] rs1 011 rd 0010011 : rd, rs1, imm
xori   imm[11:0] rs1 100 rd 0010011 : rd, rs1, imm
ori    imm[11:0] rs1 110 rd 0010011 : rd, rs1, imm
andi   imm[11:0] rs1 111 rd 0010011 : rd, rs1, imm
slli   000000 shamt[5:0] rs1 001 rd 0010011 : rd, rs1, shamt
srli   000000 shamt[5:0] rs1 101 rd 0010011 : rd, rs1, shamt
srai   010000 shamt[5:0] rs1 101 rd 0010011 : rd, rs1, shamt
add    0000000 rs2 rs1 000 rd 0110011 : rd, rs1, rs2
sub    0100000 rs2 rs1 000 rd 0110011 : rd, rs1, rs2
sll    0000000 rs2 rs1 001 rd 0110011 : rd, rs1, rs2
slt    0000000 rs2 rs1 010 rd 0110011 : rd, rs1, rs2
sltu   0000000 rs2 rs1 011 rd 0110011 : rd, rs1, rs2
xor    0000000 rs2 rs1 100 rd 0110011 : rd, rs1, rs2
srl    0000000 rs2 rs1 101 rd 0110011 : rd, rs1, rs2
sra    0100000 rs2 rs1 101 rd 0110011 : rd, rs1, rs2
or     0000000 rs2 rs1 110 rd 0110011 : rd, rs1, rs2
and    0000000 rs2 rs1 111 rd 0110011 : rd, rs1, rs2
addiw  imm[11:0] rs1 000 rd 0011011 : rd, rs1, imm
slliw  0000000 shamt[4:0] rs1 001 rd 0011011 : rd, rs1, shamt
srliw  0000000 shamt[4:0] rs1 101 rd 0011011 : rd, rs1, shamt
sraiw  0100000 shamt[4:0] rs1 101 rd 0011011 : rd, rs1, shamt
addw   0000000 rs2 rs1 000 rd 0111011 : rd, rs1, rs2
subw   0100000 rs2 rs1 000 rd 0111011 : rd, rs1, rs2
sllw   0000000 rs2 rs1 001 rd 0111011 : rd, rs1, rs2
srlw   0000000 rs2 rs1 101 rd 0111011 : rd, rs1, rs2
sraw   0100000 rs2 rs1 101 rd 0111011 : rd, rs1, rs2
fence      0000 pred succ 00000 000 00000 0001111 : pred, succ
fence.tso  1000 0011 0011 00000 000 00000 0001111
fence.i    000000000000 00000 001 00000 0001111
ecall      000000000000 00000 000 00000 1110011
ebreak     000000000001 00000 000 00000 1110011
# Zicsr
csrrw   csr rs1 001 rd 1110011 : rd, csr, rs1
csrrs   csr rs1 010 rd 1110011 : rd, csr, rs1
csrrc   csr rs1 011 rd 1110011 : rd, csr, rs1
csrrwi  csr zimm 101 rd 1110011 : rd, csr, zimm
csrrsi  csr zimm 110 rd 1110011 : rd, csr, zimm
csrrci  csr zimm 111 rd 1110011 : rd, csr, zimm
# what a kernel or firmware uses of the privileged set
sret        0001000 00010 00000 000 00000 1110011
mret        0011000 00010 00000 000 00000 1110011
wfi         0001000 00101 00000 000 00000 1110011
sfence.vma  0001001 rs2 rs1 000 00000 1110011 : rs1, rs2
# M
mul     0000001 rs2 rs1 000 rd 0110011 : rd, rs1, rs2
mulh    0000001 rs2 rs1 001 rd 0110011 : rd, rs1, rs2
mulhsu  0000001 rs2 rs1 010 rd 0110011 : rd, rs1, rs2
mulhu   0000001 rs2 rs1 011 rd 0110011 : rd, rs1, rs2
div     0000001 rs2 rs1 100 rd 0110011 : rd, rs1, rs2
divu    0000001 rs2 rs1 101 rd 0110011 : rd, rs1, rs2
rem     0000001 rs2 rs1 110 rd 0110011 : rd, rs1, rs2
remu    0000001 rs2 rs1 111 rd 0110011 : rd, rs1, rs2
mulw    0000001 rs2 rs1 000 rd 0111011 : rd, rs1, rs2
divw    0000001 rs2 rs1 100 rd 0111011 : rd, rs1, rs2
divuw   0000001 rs2 rs1 101 rd 0111011 : rd, rs1, rs2
remw    0000001 rs2 rs1 110 rd 0111011 : rd, rs1, rs2
remuw   0000001 rs2 rs1 111 rd 0111011 : rd, rs1, rs2
# A
lr.w       00010 aq rl 00000 rs1 010 rd 0101111 : rd, (rs1)
sc.w       00011 aq rl rs2 rs1 010 rd 0101111 : rd, rs2, (rs1)
amoswap.w  00001 aq rl rs2 rs1 010 rd 0101111 : rd, rs2, (rs1)
amoadd.w   00000 aq rl rs2 rs1 010 rd 0101111 : rd, rs2, (rs1)
amoxor.w   00100 aq rl rs2 rs1 010 rd 0101111 : rd, rs2, (rs1)
amoand.w   01100 aq rl rs2 rs1 010 rd 0101111 : rd, rs2, (rs1)
amoor.w    01000 aq rl rs2 rs1 010 rd 0101111 : rd, rs2, (rs1)
amomin.w   10000 aq rl rs2 rs1 010 rd 0101111 : rd, rs2, (rs1)
amomax.w   10100 aq rl rs2 rs1 010 rd 0101111 : rd, rs2, (rs1)
amominu.w  11000 aq rl rs2 rs1 010 rd 0101111 : rd, rs2, (rs1)
amomaxu.w  11100 aq rl rs2 rs1 010 rd 0101111 : rd, rs2, (rs1)
lr.d       00010 aq rl 00000 rs1 011 rd 0101111 : rd, (rs1)
sc.d       00011 aq rl rs2 rs1 011 rd 0101111 : rd, rs2, (rs1)
amoswap.d  00001 aq rl rs2 rs1 011 rd 0101111 : rd, rs2, (rs1)
amoadd.d   00000 aq rl rs2 rs1 011 rd 0101111 : rd, rs2, (rs1)
amoxor.d   00100 aq rl rs2 rs1 011 rd 0101111 : rd, rs2, (rs1)
amoand.d   01100 aq rl rs2 rs1 011 rd 0101111 : rd, rs2, (rs1)
amoor.d    01000 aq rl rs2 rs1 011 rd 0101111 : rd, rs2, (rs1)
amomin.d   10000 aq rl rs2 rs1 011 rd 0101111 : rd, rs2, (rs1)
amomax.d   10100 aq rl rs2 rs1 011 rd 0101111 : rd, rs2, (rs1)
amominu.d  11000 aq rl rs2 rs1 011 rd 0101111 : rd, rs2, (rs1)
amomaxu.d  11100 aq rl rs2 rs1 011 rd 0101111 : rd, rs2, (rs1)
# Zba, Zbb, Zbs
add.uw     0000100 rs2 rs1 000 rd 0111011 : rd, rs1, rs2
sh1add     0010000 rs2 rs1 010 rd 0110011 : rd, rs1, rs2
sh2add     0010000 rs2 rs1 100 rd 0110011 : rd, rs1, rs2
sh3add     0010000 rs2 rs1 110 rd 0110011 : rd, rs1, rs2
sh1add.uw  0010000 rs2 rs1 010 rd 0111011 : rd, rs1, rs2
sh2add.uw  0010000 rs2 rs1 100 rd 0111011 : rd, rs1, rs2
sh3add.uw  0010000 rs2 rs1 110 rd 0111011 : rd, rs1, rs2
slli.uw    000010 shamt[5:0] rs1 001 rd 0011011 : rd, rs1, shamt
andn       0100000 rs2 rs1 111 rd 0110011 : rd, rs1, rs2
orn        0100000 rs2 rs1 110 rd 0110011 : rd, rs1, rs2
xnor       0100000 rs2 rs1 100 rd 0110011 : rd, rs1, rs2
clz        0110000 00000 rs1 001 rd 0010011 : rd, rs1
ctz        0110000 00001 rs1 001 rd 0010011 : rd, rs1
cpop       0110000 00010 rs1 001 rd 0010011 : rd, rs1
sext.b     0110000 00100 rs1 001 rd 0010011 : rd, rs1
sext.h     0110000 00101 rs1 001 rd 0010011 : rd, rs1
clzw       0110000 00000 rs1 001 rd 0011011 : rd, rs1
ctzw       0110000 00001 rs1 001 rd 0011011 : rd, rs1
cpopw      0110000 00010 rs1 001 rd 0011011 : rd, rs1
zext.h     0000100 00000 rs1 100 rd 0111011 : rd, rs1
max        0000101 rs2 rs1 110 rd 0110011 : rd, rs1, rs2
maxu       0000101 rs2 rs1 111 rd 0110011 : rd, rs1, rs2
min        0000101 rs2 rs1 100 rd 0110011 : rd, rs1, rs2
minu       0000101 rs2 rs1 101 rd 0110011 : rd, rs1, rs2
rol        0110000 rs2 rs1 001 rd 0110011 : rd, rs1, rs2
ror        0110000 rs2 rs1 101 rd 0110011 : rd, rs1, rs2
rori       011000 shamt[5:0] rs1 101 rd 0010011 : rd, rs1, shamt
rolw       0110000 rs2 rs1 001 rd 0111011 : rd, rs1, rs2
rorw       0110000 rs2 rs1 101 rd 0111011 : rd, rs1, rs2
roriw      0110000 shamt[4:0] rs1 101 rd 0011011 : rd, rs1, shamt
orc.b      0010100 00111 rs1 101 rd 0010011 : rd, rs1
rev8       0110101 11000 rs1 101 rd 0010011 : rd, rs1
bclr       0100100 rs2 rs1 001 rd 0110011 : rd, rs1, rs2
bclri      010010 shamt[5:0] rs1 001 rd 0010011 : rd, rs1, shamt
bext       0100100 rs2 rs1 101 rd 0110011 : rd, rs1, rs2
bexti      010010 shamt[5:0] rs1 101 rd 0010011 : rd, rs1, shamt
binv       0110100 rs2 rs1 001 rd 0110011 : rd, rs1, rs2
binvi      011010 shamt[5:0] rs1 001 rd 0010011 : rd, rs1, shamt
bset       0010100 rs2 rs1 001 rd 0110011 : rd, rs1, rs2
bseti      001010 shamt[5:0] rs1 001 rd 0010011 : rd, rs1, shamt
"""

# F and D are one listing with another letter and another pair of format bits (00 = S, 01 = D); 5 and 6 are no
# rounding modes. "rm?" is written only where it is not the default.
_FLOAT = """
fmadd.{p}    fs3 {f} fs2 fs1 rm fd 1000011 : fd, fs1, fs2, fs3, rm ; rm!=5,6
fmsub.{p}    fs3 {f} fs2 fs1 rm fd 1000111 : fd, fs1, fs2, fs3, rm ; rm!=5,6
fnmsub.{p}   fs3 {f} fs2 fs1 rm fd 1001011 : fd, fs1, fs2, fs3, rm ; rm!=5,6
fnmadd.{p}   fs3 {f} fs2 fs1 rm fd 1001111 : fd, fs1, fs2, fs3, rm ; rm!=5,6
fadd.{p}     00000 {f} fs2 fs1 rm fd 1010011 : fd, fs1, fs2, rm ; rm!=5,6
fsub.{p}     00001 {f} fs2 fs1 rm fd 1010011 : fd, fs1, fs2, rm ; rm!=5,6
fmul.{p}     00010 {f} fs2 fs1 rm fd 1010011 : fd, fs1, fs2, rm ; rm!=5,6
fdiv.{p}     00011 {f} fs2 fs1 rm fd 1010011 : fd, fs1, fs2, rm ; rm!=5,6
fsqrt.{p}    01011 {f} 00000 fs1 rm fd 1010011 : fd, fs1, rm ; rm!=5,6
fsgnj.{p}    00100 {f} fs2 fs1 000 fd 1010011 : fd, fs1, fs2
fsgnjn.{p}   00100 {f} fs2 fs1 001 fd 1010011 : fd, fs1, fs2
fsgnjx.{p}   00100 {f} fs2 fs1 010 fd 1010011 : fd, fs1, fs2
fmin.{p}     00101 {f} fs2 fs1 000 fd 1010011 : fd, fs1, fs2
fmax.{p}     00101 {f} fs2 fs1 001 fd 1010011 : fd, fs1, fs2
feq.{p}      10100 {f} fs2 fs1 010 rd 1010011 : rd, fs1, fs2
flt.{p}      10100 {f} fs2 fs1 001 rd 1010011 : rd, fs1, fs2
fle.{p}      10100 {f} fs2 fs1 000 rd 1010011 : rd, fs1, fs2
fclass.{p}   11100 {f} 00000 fs1 001 rd 1010011 : rd, fs1
fcvt.w.{p}   11000 {f} 00000 fs1 rm rd 1010011 : rd, fs1, rm ; rm!=5,6
fcvt.wu.{p}  11000 {f} 00001 fs1 rm rd 1010011 : rd, fs1, rm ; rm!=5,6
fcvt.l.{p}   11000 {f} 00010 fs1 rm rd 1010011 : rd, fs1, rm ; rm!=5,6
fcvt.lu.{p}  11000 {f} 00011 fs1 rm rd 1010011 : rd, fs1, rm ; rm!=5,6
fcvt.{p}.w   11010 {f} 00000 rs1 rm fd 1010011 : fd, rs1, {e} ; rm!=5,6
fcvt.{p}.wu  11010 {f} 00001 rs1 rm fd 1010011 : fd, rs1, {e} ; rm!=5,6
fcvt.{p}.l   11010 {f} 00010 rs1 rm fd 1010011 : fd, rs1, rm ; rm!=5,6
fcvt.{p}.lu  11010 {f} 00011 rs1 rm fd 1010011 : fd, rs1, rm ; rm!=5,6
fmv.x.{x}    11100 {f} 00000 fs1 000 rd 1010011 : rd, fs1
fmv.{x}.x    11110 {f} 00000 rs1 000 fd 1010011 : fd, rs1
fl{x}        imm[11:0] rs1 {w} fd 0000111 : fd, imm(rs1)
fs{x}        imm[11:5] fs2 rs1 {w} imm[4:0] 0100111 : fs2, imm(rs1)
"""
_FLOAT_PAIRS = """
fcvt.s.d  01000 00 00001 fs1 rm fd 1010011 : fd, fs1, rm ; rm!=5,6
fcvt.d.s  01000 01 00000 fs1 rm fd 1010011 : fd, fs1, rm? ; rm!=5,6
"""

_SHORT = """
# C, quadrant 0. Hints (results to x0, shifts by 0, a nop with an immediate) are instructions that do nothing.
c.addi4spn  000 uimm[5:4|9:6|2|3] rd' 00 : rd, sp, uimm ; uimm!=0
c.fld       001 uimm[5:3] rs1' uimm[7:6] fd' 00 : fd, uimm(rs1)
c.lw        010 uimm[5:3] rs1' uimm[2|6] rd' 00 : rd, uimm(rs1)
c.ld        011 uimm[5:3] rs1' uimm[7:6] rd' 00 : rd, uimm(rs1)
c.fsd       101 uimm[5:3] rs1' uimm[7:6] fs2' 00 : fs2, uimm(rs1)
c.sw        110 uimm[5:3] rs1' uimm[2|6] rs2' 00 : rs2, uimm(rs1)
c.sd        111 uimm[5:3] rs1' uimm[7:6] rs2' 00 : rs2, uimm(rs1)
# quadrant 1; rd is also the first source
c.nop       000 imm[5] 00000 imm[4:0] 01 : imm?
c.addi      000 imm[5] rd imm[4:0] 01 : rd, imm ; rd!=0
c.addiw     001 imm[5] rd imm[4:0] 01 : rd, imm ; rd!=0
c.li        010 imm[5] rd imm[4:0] 01 : rd, imm
c.addi16sp  011 imm[9] 00010 imm[4|6|8:7|5] 01 : sp, imm ; imm!=0
c.lui       011 imm[17] rd imm[16:12] 01 : rd, upper ; rd!=2 imm!=0
c.srli      100 shamt[5] 00 rd' shamt[4:0] 01 : rd, shamt
c.srai      100 shamt[5] 01 rd' shamt[4:0] 01 : rd, shamt
c.andi      100 imm[5] 10 rd' imm[4:0] 01 : rd, imm
c.sub       100 0 11 rd' 00 rs2' 01 : rd, rs2
c.xor       100 0 11 rd' 01 rs2' 01 : rd, rs2
c.or        100 0 11 rd' 10 rs2' 01 : rd, rs2
c.and       100 0 11 rd' 11 rs2' 01 : rd, rs2
c.subw      100 1 11 rd' 00 rs2' 01 : rd, rs2
c.addw      100 1 11 rd' 01 rs2' 01 : rd, rs2
c.j         101 imm[11|4|9:8|10|6|7|3:1|5] 01 : imm
c.beqz      110 imm[8|4:3] rs1' imm[7:6|2:1|5] 01 : rs1, imm
c.bnez      111 imm[8|4:3] rs1' imm[7:6|2:1|5] 01 : rs1, imm
# quadrant 2
c.slli      000 shamt[5] rd shamt[4:0] 10 : rd, shamt
c.fldsp     001 uimm[5] fd uimm[4:3|8:6] 10 : fd, uimm(sp)
c.lwsp      010 uimm[5] rd uimm[4:2|7:6] 10 : rd, uimm(sp) ; rd!=0
c.ldsp      011 uimm[5] rd uimm[4:3|8:6] 10 : rd, uimm(sp) ; rd!=0
c.jr        100 0 rs1 00000 10 : rs1 ; rs1!=0
c.mv        100 0 rd rs2 10 : rd, rs2 ; rs2!=0
c.ebreak    100 1 00000 00000 10
c.jalr      100 1 rs1 00000 10 : rs1 ; rs1!=0
c.add       100 1 rd rs2 10 : rd, rs2 ; rs2!=0
c.fsdsp     101 uimm[5:3|8:6] fs2 10 : fs2, uimm(sp)
c.swsp      110 uimm[5:2|7:6] rs2 10 : rs2, uimm(sp)
c.sdsp      111 uimm[5:3|8:6] rs2 10 : rs2, uimm(sp)
"""

WORDS: Final = Table(
    _INT
    + _FLOAT.format(p="s", f="00", w="010", x="w", e="rm")
    + _FLOAT.format(p="d", f="01", w="011", x="d", e="rm?")
    + _FLOAT_PAIRS,
    KINDS,
    4,
)
HALVES: Final = Table(_SHORT, KINDS, 2)

_BRANCHES: Final = frozenset(("beq", "bne", "blt", "bge", "bltu", "bgeu", "c.beqz", "c.bnez"))
_JUMPS: Final = frozenset(("jal", "c.j"))
_INDIRECT: Final = frozenset(("jalr", "c.jr", "c.jalr"))
_SIMULATED: Final = _BRANCHES | _JUMPS | _INDIRECT | {"auipc"}
_ROUNDING: Final = {0: "rne", 1: "rtz", 2: "rdn", 3: "rup", 4: "rmm", 7: "dyn"}
_OP_FENCE: Final = 0x0F
_OP_SYSTEM: Final = 0x73


def length(code: bytes) -> int:
    """Give the length of the instruction at the start of `code`, in bytes: 2 or 4.

    0 if `code` is cut short there, if it is all zeros or all ones (defined to be illegal, so that execution does not
    run through erased memory), or if it is of the longer encodings, of which none is ratified. An encoding of 2 or 4
    bytes that :func:`decode` does not know (vector, custom) has its length all the same.
    Source: unprivileged ISA, "Expanded Instruction-Length Encoding".
    """
    if len(code) < 2:
        return 0
    low = code[0] | code[1] << 8
    if low & 3 != 3:
        return 2 if low else 0
    return 4 if low & 0x1C != 0x1C and len(code) >= 4 else 0


@dataclass(frozen=True, slots=True)
class Insn:
    """One decoded instruction; it does not know where it is."""

    name: str  #: as LLVM writes it without aliases; ordering bits of atomics are fields
    fields: Mapping[str, int]  #: rd, rs1, imm, ...: immediates in bytes, sign-extended; registers by number
    length: int
    word: int
    pattern: Pattern

    @property
    def pc_relative(self) -> bool:
        """True if the result depends on where the instruction is, other than by falling through."""
        return self.name in _BRANCHES or self.name in _JUMPS or self.name == "auipc" or self.links

    @property
    def branch(self) -> bool:
        """True for anything that may continue elsewhere than at the next instruction, traps aside."""
        return self.name in _BRANCHES or self.name in _JUMPS or self.name in _INDIRECT

    @property
    def links(self) -> bool:
        """True for a call: it writes the address of the next instruction to a register."""
        return self.name == "c.jalr" or (self.name in ("jal", "jalr") and self.fields["rd"] != 0)

    def target(self, pc: int) -> int | None:
        """Give where a direct branch or jump at `pc` goes, or None for any other instruction."""
        if self.name in _BRANCHES or self.name in _JUMPS:
            return pc + self.fields["imm"] & (1 << 64) - 1
        return None

    @property
    def text(self) -> str:
        """The instruction as LLVM's assembler reads it: no aliases, registers by ABI name, offsets in decimal."""
        name, fields = self.name, self.fields
        if fields.get("aq") or fields.get("rl"):
            name += "." + "aq" * fields["aq"] + "rl" * fields["rl"]
        shown = [_operand(o, fields) for o in self.pattern.operands.split(", ")]
        return f"{name} {', '.join(filter(None, shown))}".rstrip()


def _operand(what: str, fields: Mapping[str, int]) -> str:
    """Write one operand of a table line."""
    if what.endswith("?"):  # only written where it says something
        return _operand(what[:-1], fields) if fields[what[:-1]] else ""
    base, bracket, register = what.partition("(")
    if bracket:
        register = register.rstrip(")")
        inside = register if register == "sp" else facts.X[fields[register]]
        return f"{fields[base] if base else ''}({inside})"
    if what == "upper":
        return str(fields["imm"] >> 12 & 0xFFFFF)
    if what == "rm":
        return _ROUNDING[fields["rm"]]
    if what in ("pred", "succ"):
        return "".join(c for c, bit in zip("iorw", (8, 4, 2, 1), strict=True) if fields[what] & bit) or "0"
    if what not in fields:
        return what  # a register the encoding implies, or no operand at all
    if what.startswith("r"):
        return facts.X[fields[what]]
    if what.startswith("f"):
        return facts.F[fields[what]]
    return str(fields[what])


def decode(code: bytes) -> Insn | None:
    """Give the instruction at the start of `code`, or None if it is not one of the sets above (or cut short)."""
    size = length(code)
    return decode_word(int.from_bytes(code[:size], "little"), size) if size else None


@lru_cache(maxsize=1 << 14)
def decode_word(word: int, size: int) -> Insn | None:
    """Give the instruction `word` of `size` bytes, or None. The cache is bounded; real code repeats itself."""
    pattern = (WORDS if size == 4 else HALVES).find(word)
    return None if pattern is None else Insn(pattern.name, pattern.decode(word), size, word, pattern)


def encode(name: str, **fields: int) -> bytes:
    """Give the bytes of the instruction `name`. Raises AskedWrong for fields that do not fit; KeyError if unknown."""
    pattern = HALVES[name] if name in HALVES else WORDS[name]
    return pattern.encode(**fields).to_bytes(pattern.size, "little")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a probe on an instruction may do with it."""

    kind: Literal["rejected", "slot", "simulate"]
    reason: str = ""  #: why not, for people


def verdict(code: bytes) -> Verdict:
    """Judge the instruction at the start of `code` as the kernel's decode table does.

    ``simulate``: it reads or writes pc, so it cannot run elsewhere. ``slot``: it runs from a slot. ``rejected``: all
    of SYSTEM and FENCE (traps, csr accesses, fence.i), c.ebreak, and, unlike the kernel, which sends anything else to
    a slot, what this reader does not know: it cannot promise that such an encoding does not use pc.
    Like the kernel it does not look for lr/sc sequences, whose reservation a probe between them breaks.
    Source: Linux 6.12 arch/riscv/kernel/probes/decode-insn.c.
    """
    insn = decode(code)
    if insn is None:
        return Verdict("rejected", "not an instruction of RV64GC" if length(code) else "not an instruction")
    if insn.length == 4 and insn.word & 0x7F == _OP_SYSTEM:
        return Verdict("rejected", f"{insn.name} traps or touches machine state")
    if insn.length == 4 and insn.word & 0x7F == _OP_FENCE:
        return Verdict("rejected", f"{insn.name} orders memory where it stands")
    if insn.name == "c.ebreak":
        return Verdict("rejected", "c.ebreak is a breakpoint already")
    return Verdict("simulate" if insn.name in _SIMULATED else "slot")
