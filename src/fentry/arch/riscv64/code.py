"""Write RV64 code: calls and jumps that reach 2 GiB, sleds recognised and armed, branch targets.

Two kinds of call, by the register that receives the return address. Mixing them up is the classic bug:

* at a *function's entry* ra holds the parent, so the call links in **t0** (:func:`pair` with link="t0");
* *anywhere else* (inside a slot, in a prologue that saved ra) it is an ordinary call and links in **ra**.

t0 (x5) is the ISA's second link register: `jalr t0, (t0)` pushes on the return predictor, `jr t0` pops.
"""

from __future__ import annotations

from typing import Final

from fentry.arch import Refusal, Sled
from fentry.arch.riscv64 import facts
from fentry.arch.riscv64.insn import Insn, decode, encode, length
from fentry.errors import EngineBug, OutOfReach

X: Final = facts.NUMBER
SLED: Final = "sled"
SLED16: Final = "sled16"
MCOUNT: Final = "mcount"
PAIR: Final = 8  #: bytes of auipc + jalr

# first and last word of the 16-byte form; Linux 5.12 to 6.2 arch/riscv/include/asm/ftrace.h: fe113c23, ff813083
_SAVE_RA: Final = encode("sd", rs2=X["ra"], rs1=X["sp"], imm=-8)
_LOAD_RA: Final = encode("ld", rd=X["ra"], rs1=X["sp"], imm=-8)


def distance(at: int, to: int) -> int:
    """Give `to - at` as the 64-bit signed number that pc arithmetic sees."""
    return ((to - at + (1 << 63)) & (1 << 64) - 1) - (1 << 63)


def split(at: int, to: int) -> tuple[int, int]:
    """Give (high, low) with `at + high + low == to`: auipc's and the following instruction's immediate.

    low is sign-extended by the hardware, so high is rounded up by 0x1000 when bit 11 of the distance is set.
    Raises: OutOfReach outside [-2**31 - 2**11, 2**31 - 2**11 - 1]: the rounding makes the window lopsided, and a
        distance in its last 2 KiB would silently wrap to the other end.
    """
    offset = distance(at, to)
    if not facts.PAIR_LOW <= offset <= facts.PAIR_HIGH:
        raise OutOfReach(at, to, facts.PAIR_REACH)
    high = (offset + 0x800) & ~0xFFF
    return high, offset - high


def pair(at: int, to: int, base: str, link: str) -> bytes:
    """Encode `auipc base` / `jalr link, (base)`: 8 bytes. Raises OutOfReach.

    base == link is a call that needs no other register: jalr reads its base before it writes the link.
    """
    high, low = split(at, to)
    return encode("auipc", rd=X[base], imm=high) + encode("jalr", rd=X[link], rs1=X[base], imm=low)


def call(at: int, to: int) -> bytes:
    """Encode an ordinary call, link in ra: 8 bytes. Raises OutOfReach."""
    return pair(at, to, "ra", "ra")


def entry_call(at: int, to: int) -> bytes:
    """Encode a call from a function's entry, link in t0, ra untouched: 8 bytes. Raises OutOfReach."""
    return pair(at, to, "t0", "t0")


def jump(at: int, to: int, base: str = "t0") -> bytes:
    """Encode a jump through `base`: 8 bytes. Through t0 it pops what the entry call pushed. Raises OutOfReach."""
    return pair(at, to, base, "zero")


def jal(at: int, to: int, link: str = "ra") -> bytes:
    """Encode a call (or, with link="zero", a jump) of 4 bytes. Raises OutOfReach beyond 1 MiB."""
    offset = distance(at, to)
    if not -facts.JAL_REACH <= offset < facts.JAL_REACH:
        raise OutOfReach(at, to, facts.JAL_REACH)
    return encode("jal", rd=X[link], imm=offset)


def nops(size: int) -> bytes:
    """Give `size` bytes (even) of nops, the long ones first, the way a disabled sled reads."""
    if size % 2:
        raise EngineBug(f"nops of {size} bytes: code comes in units of 2")
    return facts.NOP * (size // 4) + facts.NOP_SHORT * (size % 4 // 2)


# -- sleds ----------------------------------------------------------------------------------------------


def sled_at(code: bytes, hint: str) -> Sled | Refusal | None:
    """Recognise a sled; see :meth:`fentry.arch.Arch.sled_at` for `code`, `hint` and the result.

    ========== ========================================= ====== ==== ======
    form       idle                                      size   link resume
    ========== ========================================= ====== ==== ======
    sled       8 bytes or more of nops, of 2 or 4 bytes  8      t0   8
    mcount     `auipc ra; jalr ra` or `jal ra`, or nops  8, 4   ra   size
    sled16     `sd ra; auipc ra; jalr ra; ld ra`         16     ra   12
    ========== ========================================= ====== ==== ======

    sled: nops after the first 8 bytes stay and are run. Where a 4-byte nop straddles byte 8 (no compiler does that) the
    sled is refused: a thread that is on its way back when tracing ends would go on in the middle of that nop.
    16 bytes of nops, which kernels of 5.12 to 6.2 armed with the 16-byte form, get the 8-byte form too: it has none of
    the hazards below.

    mcount: the call stands in the prologue after `mv a0, ra`, so a0 is the parent and everything an ordinary call may
    clobber is free. The 4-byte call is what a linker's relaxation leaves; it reaches 1 MiB only. While armed, the
    program's own profiling routine is not called.

    sled16: met only where another tracer armed it already (see :func:`sled16_at`). Hazards of this form:
    the parent is parked *below* the stack pointer, so a signal on the same stack between the `sd` and the `ld`
    destroys it; a thread inside returns to byte 12, so the bytes must not become nops under it; after `auipc ra`
    a thread cannot be moved back to byte 0; and whoever redirects the resume address skips the final `ld`.
    """
    if hint == MCOUNT:
        return _mcount_at(code)
    kept = sled16_at(code)
    if kept is not None and kept.idle[:4] == _SAVE_RA:
        return kept
    total, boundary, uniform = _nops_at(code)
    if hint == "scan":
        # alignment padding is nops as well: accept only what a compiler emits for a sled, ending where it should
        good = uniform and total in (8, 16) and len(code) > total
        return Sled(SLED, PAIR, bytes(code[:PAIR]), PAIR, "t0") if good else None
    if total >= PAIR and boundary > PAIR:
        return Refusal("byte 8 of the sled is inside a nop: the body could not go on there")
    if total >= PAIR:
        return Sled(SLED, PAIR, bytes(code[:PAIR]), PAIR, "t0")
    if total:
        return Refusal(
            f"sled of {total} bytes is too short: a call takes 8 (auipc t0, jalr t0); "
            "compile with -fpatchable-function-entry=4 (2 without compressed instructions)"
        )
    first, second = decode(code), decode(code[4:])
    if first is not None and first.name == "auipc" and first.fields["rd"] == X["t0"] and second is not None:
        if second.name == "jalr" and second.fields["rd"] == second.fields["rs1"] == X["t0"]:
            return Refusal("the sled is armed already (auipc t0, jalr t0): another tracer, or one that was killed")
        if second.word == int.from_bytes(facts.NOP, "little"):
            return Refusal("sled with a fixed auipc t0 (Linux 6.16 and later): not supported yet")
    return Refusal("listed as a patchable entry, but there are no nops")


def sled16_at(code: bytes) -> Sled | None:
    """Give the 16-byte ra form at the start of `code`, armed or as 16 bytes of nops, or None."""
    idle = bytes(code[:16])
    if len(idle) == 16 and (idle in (facts.NOP * 4, facts.NOP_SHORT * 8) or _is_sled16(idle)):
        return Sled(SLED16, 16, idle, 12, "ra")
    return None


def _is_sled16(code: bytes) -> bool:
    return code[:4] == _SAVE_RA and code[12:] == _LOAD_RA and _is_pair(decode(code[4:]), decode(code[8:]), "ra")


def _is_pair(first: Insn | None, second: Insn | None, link: str) -> bool:
    """Tell whether two instructions are a call through and to `link`."""
    if first is None or second is None or first.name != "auipc" or second.name != "jalr":
        return False
    return first.fields["rd"] == second.fields["rs1"] == second.fields["rd"] == X[link]


def _nops_at(code: bytes) -> tuple[int, int, bool]:
    """Give (bytes of nops, first instruction boundary at or after byte 8, all of one kind)."""
    at = boundary = 0
    kinds: set[int] = set()
    while True:
        if code[at : at + 2] == facts.NOP_SHORT:
            size = 2
        elif code[at : at + 4] == facts.NOP:
            size = 4
        else:
            return at, boundary, len(kinds) == 1
        kinds.add(size)
        at += size
        if boundary < PAIR:
            boundary = at


def _mcount_at(code: bytes) -> Sled | Refusal:
    first, second = decode(code), decode(code[4:])
    if first is not None and first.name == "jal" and first.fields["rd"] == X["ra"]:
        return Sled(MCOUNT, 4, bytes(code[:4]), 4, "ra")
    if _is_pair(first, second, "ra") or _nops_at(code[:PAIR])[0] == PAIR:
        return Sled(MCOUNT, PAIR, bytes(code[:PAIR]), PAIR, "ra")
    if first is not None and first.name in ("auipc", "c.jalr", "jalr"):
        return Refusal("the call to mcount goes through a pointer (no-PLT code): only direct calls can be armed")
    return Refusal("no call to mcount here: expected auipc ra and jalr ra, or jal ra")


def arm(site: int, sled: Sled, slot: int) -> bytes:
    """Encode the bytes that make `sled` call `slot`: exactly ``sled.size``. Raises OutOfReach.

    Returns hooked or not, riscv64 arms with a call: the slot gives the return predictor back what the call pushed.
    """
    if sled.form == SLED:
        return entry_call(site, slot)
    if sled.form == SLED16:
        return _SAVE_RA + call(site + 4, slot) + _LOAD_RA
    if sled.form == MCOUNT:
        return jal(site, slot) if sled.size == 4 else call(site, slot)
    raise EngineBug(f"riscv64 cannot arm a {sled.form!r}")


def landing_pad(code: bytes) -> int:
    """Give 4 if `code` begins with `lpad` (Zicfilp: auipc x0, label), else 0."""
    return 4 if len(code) >= 4 and int.from_bytes(code[:4], "little") & 0xFFF == 0x017 else 0


def branch_targets(code: bytes, at: int) -> list[tuple[int, int]]:
    """Give (from, to) of each direct branch, jump and call in `code`, which is at `at`.

    `auipc` followed at once by a `jalr` through its register counts as one, `from` being the auipc: that is where a
    call site begins. What cannot be decoded is stepped over by its length, or by 2 if it has none (data in code), so
    after data a few instructions may be misread: good for "may this address be a target", no proof that it is not.
    """
    found = []
    pos = 0
    upper: tuple[int, int, int] | None = None  # register, its value, where the auipc is
    while pos < len(code) - 1:
        window = code[pos : pos + 4]
        insn = decode(window)
        if insn is None:
            pos += length(window) or 2
            upper = None
            continue
        to = insn.target(at + pos)
        if to is not None:
            found.append((at + pos, to))
        elif insn.name == "jalr" and upper is not None and insn.fields["rs1"] == upper[0]:
            found.append((upper[2], (upper[1] + insn.fields["imm"]) & (1 << 64) - 2))
        upper = None
        if insn.name == "auipc" and insn.fields["rd"]:
            upper = insn.fields["rd"], at + pos + insn.fields["imm"], at + pos
        pos += insn.length
    return found


def frame_size(code: bytes) -> int:
    """Give the bytes of stack that a function's prologue takes: its first adjustment of sp, 0 if there is none.

    Reads `code`, the function's first bytes, up to the first branch.
    """
    pos = 0
    while (insn := decode(code[pos : pos + 4])) is not None and not insn.branch:
        moves = insn.name == "c.addi16sp" or (insn.name in ("addi", "c.addi") and insn.fields["rd"] == X["sp"])
        if moves and insn.fields.get("rs1", X["sp"]) == X["sp"] and insn.fields["imm"] < 0:
            return -insn.fields["imm"]
        pos += insn.length
    return 0
