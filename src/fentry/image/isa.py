"""What finding sleds needs to know of an instruction set: data only, one row per ELF machine.

This is not the place of an architecture: nothing here decodes, verifies or writes code. A row says which
bytes may lie between a recorded address and a function label (nops), which may lie between a label and
its sled (landing pads), what a call and a PLT stub look like, and three relocation numbers. The folder in
``arch`` looks at every address found with these tables again, and its word is final.

A pattern is matched on 8 bytes read as a little-endian number, which holds for every machine listed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

#: A signed number scattered over an instruction: (lowest bit there, width, lowest bit in the number)
Scatter = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A call or jump whose target is pc + constant, or lies in a slot at pc + constant."""

    mask: int
    value: int
    size: int  #: bytes of it that must be in the file
    numbers: tuple[Scatter, ...]  #: summed up they are the distance
    origin: int = 0  #: the distance counts from the start of the instruction plus this
    through: bool = False  #: the target is in a slot there
    prefixes: tuple[bytes, ...] = ()  #: bytes before it that belong to it if present, longest first

    def distances(self, words: U64) -> U64:
        """Distances from the start of the instruction, modulo 2**64, of matching words."""
        total = np.full(len(words), self.origin, np.uint64)
        for scatter in self.numbers:
            number, width = np.zeros(len(words), np.uint64), 0
            for low, bits, to in scatter:
                field = (words >> np.uint64(low)) & np.uint64((1 << bits) - 1)
                number |= field << np.uint64(to)
                width = max(width, to + bits)
            sign = np.uint64(1 << (width - 1))
            total += (number ^ sign) - sign
        return total


@dataclass(frozen=True, slots=True)
class Isa:
    """One row."""

    step: int  #: instructions start at multiples of this
    nops: tuple[bytes, ...]  #: longest first
    pads: tuple[tuple[int, int, int], ...]  #: (mask, value, size) of landing pads
    relative: int  #: relocation: load bias + addend
    words: tuple[int, ...]  #: relocations: address of a symbol + addend, one pointer wide
    calls: tuple[Transfer, ...] = ()
    stubs: tuple[Transfer, ...] = ()  #: the jump of a PLT entry
    call_relocations: tuple[tuple[int, bytes], ...] = ()  #: kind, opcode bytes between call and relocated field

    def pad(self, code: bytes) -> int:
        """Size of a landing pad at the start of `code`, or 0."""
        word = int.from_bytes(code[:8], "little")
        return next((size for mask, value, size in self.pads if word & mask == value and len(code) >= size), 0)

    def stub_slot(self, code: bytes, at: int) -> int:
        """The slot that `code` (8 bytes at address `at`) jumps through if it is the jump of a PLT entry, or -1."""
        if len(code) == 8:
            word = np.array([int.from_bytes(code, "little")], np.uint64)
            for stub in self.stubs:
                if int(word[0]) & stub.mask == stub.value:
                    return (at + int(stub.distances(word)[0])) % (1 << 64)
        return -1

    def all_nops(self, code: bytes) -> bool:
        """Whether `code` is nothing but whole nops."""
        at = 0
        while at < len(code):
            nop = next((nop for nop in self.nops if code.startswith(nop, at)), b"")
            if not nop:
                return False
            at += len(nop)
        return True


# "Recommended Multi-Byte Sequence of NOP", Intel SDM volume 2B, table 4-12; compilers also put 66 (and 2e)
# prefixes before the last of them up to 15 bytes.
_LONG = bytes.fromhex("0f1f840000000000")
_I386_NOPS = (
    *(b"\x66" * n + b"\x2e" + _LONG for n in range(6, 0, -1)),
    *(b"\x66" * n + _LONG for n in range(6, 0, -1)),
    *(
        bytes.fromhex(text)
        for text in (
            "0f1f840000000000",
            "0f1f8000000000",
            "660f1f440000",
            "0f1f440000",
            "0f1f4008",
            "0f1f4000",
            "0f1f00",
            "6690",
            "90",
        )
    ),
)
_REL32 = (((8, 32, 0),),)
_CALL_REL32 = Transfer(mask=0xFF, value=0xE8, size=5, numbers=_REL32, origin=5, prefixes=(b"\x67",))
_I386_PADS = ((0xFFFFFFFF, 0xFA1E0FF3, 4), (0xFFFFFFFF, 0xFB1E0FF3, 4))  # endbr64, endbr32

#: By e_machine. Relocation numbers are those of each psABI.
ISAS: dict[int, Isa] = {
    62: Isa(
        step=1,
        nops=_I386_NOPS,
        pads=_I386_PADS,
        relative=8,
        words=(1,),
        calls=(
            # The linker turns a call through the GOT into 67 e8 when the target is near; a 0x67 before
            # e8 is that prefix, for no prologue instruction ends in that byte.
            _CALL_REL32,
            Transfer(mask=0xFFFF, value=0x15FF, size=6, numbers=(((16, 32, 0),),), origin=6, through=True),
        ),
        stubs=(
            Transfer(
                mask=0xFFFF,
                value=0x25FF,
                size=6,
                numbers=(((16, 32, 0),),),
                origin=6,
                through=True,
                prefixes=(b"\xf3\x0f\x1e\xfa\xf2", b"\xf3\x0f\x1e\xfa", b"\xf2"),
            ),
        ),
        call_relocations=(
            (2, b"\xe8"),  # PC32
            (4, b"\xe8"),  # PLT32
            (9, b"\xff\x15"),  # GOTPCREL
            (41, b"\xff\x15"),  # GOTPCRELX
        ),
    ),
    3: Isa(
        step=1,
        nops=_I386_NOPS,
        pads=_I386_PADS,
        relative=8,
        words=(1,),
        calls=(_CALL_REL32,),
        call_relocations=((2, b"\xe8"), (4, b"\xe8")),
    ),
    243: Isa(
        step=2,
        nops=(b"\x13\x00\x00\x00", b"\x01\x00"),
        pads=((0xFFF, 0x017, 4),),  # lpad: auipc x0
        relative=3,
        words=(2, 1),
        calls=(
            # jal ra; auipc ra + jalr ra,(ra): unprivileged ISA 2.5
            Transfer(mask=0xFFF, value=0x0EF, size=4, numbers=(((21, 10, 1), (20, 1, 11), (12, 8, 12), (31, 1, 20)),)),
            Transfer(
                mask=0x000FFFFF_00000FFF,
                value=0x000080E7_00000097,
                size=8,
                numbers=(((12, 20, 12),), ((52, 12, 0),)),
            ),
        ),
        stubs=(
            # auipc t3 + l[wd] t3,(t3): psABI "Procedure Linkage Table"
            Transfer(
                mask=0x000FEFFF_00000FFF,
                value=0x000E2E03_00000E17,
                size=8,
                numbers=(((12, 20, 12),), ((52, 12, 0),)),
                through=True,
            ),
        ),
        call_relocations=((17, b""), (18, b""), (19, b"")),  # JAL, CALL, CALL_PLT
    ),
    183: Isa(
        step=4,
        nops=(b"\x1f\x20\x03\xd5",),
        pads=((0xFFFFFF3F, 0xD503241F, 4),),  # bti and its kinds
        relative=1027,
        words=(257,),
    ),
}
