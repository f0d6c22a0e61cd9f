"""An emulated RV64GC machine to run slots in, and a program that writes down what it saw.

Nothing here depends on traps: a run ends at the address it was told to stop at.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

import unicorn
from unicorn import riscv_const as names

from fentry.arch.riscv64 import facts, insn

X = facts.NUMBER
GPRS = facts.X[1:]
U64 = (1 << 64) - 1
PAGE = 4096

LOG = 0x7F00_0000  #: word 0: where the next entry goes
STACK, STACK_SIZE = 0x6000_0000, 0x10_0000
SHADOW = 0x9_0000_0000  #: shadow of STACK
OFF = SHADOW - STACK
STOP = 0x5000_0000  #: runs end here


def words(*items: bytes) -> bytes:
    return b"".join(items)


def i(name: str, **fields: int | str) -> bytes:
    """One instruction, registers by name."""
    return insn.encode(name, **{k: X[v] if isinstance(v, str) else v for k, v in fields.items()})


def li(register: str, value: int) -> bytes:
    """A constant of 31 bits."""
    low = (value & 0xFFF) - ((value & 0x800) << 1)
    return i("lui", rd=register, imm=value - low) + i("addi", rd=register, rs1=register, imm=low)


def witness(ident: int, *, scramble: tuple[str, ...] = ("t1", "ra")) -> bytes:
    """A program: appends (mark, its sp, the word at 8(sp), ident) to the log, preserves all but `scramble`."""
    return words(
        i("addi", rd="sp", rs1="sp", imm=-32),
        i("sd", rs2="a0", rs1="sp", imm=0),
        i("sd", rs2="a1", rs1="sp", imm=8),
        i("lui", rd="a0", imm=LOG),
        i("ld", rd="a1", rs1="a0", imm=0),
        i("sd", rs2="ra", rs1="a1", imm=0),
        i("addi", rd="t1", rs1="sp", imm=32),
        i("sd", rs2="t1", rs1="a1", imm=8),
        i("ld", rd="t1", rs1="sp", imm=40),
        i("sd", rs2="t1", rs1="a1", imm=16),
        i("addi", rd="t1", rs1="zero", imm=ident),
        i("sd", rs2="t1", rs1="a1", imm=24),
        i("addi", rd="a1", rs1="a1", imm=32),
        i("sd", rs2="a1", rs1="a0", imm=0),
        i("ld", rd="a0", rs1="sp", imm=0),
        i("ld", rd="a1", rs1="sp", imm=8),
        i("addi", rd="sp", rs1="sp", imm=32),
        i("addi", rd="t1", rs1="ra", imm=0),
        *(i("addi", rd=r, rs1="zero", imm=-1) for r in scramble if r != "t1"),
        i("jalr", rd="zero", rs1="t1", imm=0),
    )


WITNESS = len(witness(0)) // 4  #: instructions of one


@dataclass(frozen=True)
class Seen:
    mark: int
    sp: int
    parent: int
    ident: int


class Machine:
    """Memory, registers by name, and a count of the instructions run."""

    def __init__(self) -> None:
        self.uc = unicorn.Uc(getattr(unicorn, facts.UNICORN_ARCH), getattr(unicorn, facts.UNICORN_MODE))
        self.mapped: set[int] = set()
        self.steps: list[int] = []
        self.map(LOG, 0x10_0000)
        self.map(STACK, STACK_SIZE + PAGE)
        self.map(SHADOW, STACK_SIZE + PAGE)
        self.map(STOP, PAGE)
        self.uc.mem_write(LOG, struct.pack("<Q", LOG + 8))
        self.uc.reg_write(names.UC_RISCV_REG_MSTATUS, 0x6000)  # FS = dirty: floating point is on
        self.uc.hook_add(unicorn.UC_HOOK_CODE, lambda _uc, at, _size, _user: self.steps.append(at))

    def map(self, at: int, size: int) -> None:
        for page in range(at & -PAGE, at + size, PAGE):
            if page not in self.mapped:
                self.uc.mem_map(page, PAGE)
                self.mapped.add(page)

    def write(self, at: int, data: bytes) -> None:
        self.map(at, len(data))
        self.uc.mem_write(at, data)

    def word(self, at: int) -> int:
        return struct.unpack("<Q", self.uc.mem_read(at, 8))[0]

    def __getitem__(self, register: str) -> int:
        return self.uc.reg_read(getattr(names, facts.UNICORN_REGS[register]))

    def __setitem__(self, register: str, value: int) -> None:
        self.uc.reg_write(getattr(names, facts.UNICORN_REGS[register]), value & U64)

    def randomise(self, seed: int) -> dict[str, int]:
        """Fill every register but sp; floating-point ones too."""
        rnd = random.Random(seed)
        for register in (*GPRS, *facts.F):
            if register != "sp":
                self[register] = rnd.randrange(1 << 64)
        return self.registers()

    def registers(self) -> dict[str, int]:
        return {r: self[r] for r in (*GPRS, *facts.F)}

    def run(self, at: int, until: int = STOP, limit: int = 1_000_000) -> int:
        """Run to `until`; gives the number of instructions."""
        self.steps.clear()
        self.uc.emu_start(at, until, count=limit)
        assert self["pc"] == until, f"stopped at {self['pc']:#x} after {len(self.steps)} instructions"
        return len(self.steps)

    def log(self) -> list[Seen]:
        end = self.word(LOG)
        data = bytes(self.uc.mem_read(LOG + 8, end - LOG - 8))
        return [Seen(*row) for row in struct.iter_unpack("<4Q", data)]
