"""Emit slots: what an armed site calls, which calls the programs and lets the body go on.

What a program is to a slot: a function that preserves every register but ra and t1, touches no floating-point or
vector register, knows its site by its own return address (the *mark*) and finds the parent at 8(sp), sp being what
it was called with. That word is ``sp - 8`` of the function's entry: at entry, at exit, in every form. An exit program
may also change whatever is dead at a return: t0-t6 and a2-a7.
(LLVM's preserve_mostcc on riscv64 keeps all but ra, t1, t2 and t3; the dialect reserves t2 and t3, which carry a
static chain or an argument of clang's fastcc at a function's entry. t0 it keeps, and slots rely on that.)

Slots use base instructions only (4 bytes each, RV64I), so they run with and without compressed instructions, and
every call and jump is an auipc pair, so the layout does not depend on distances. One routine emits and measures:
a layout is the emission of a made-up plan, so the two cannot disagree.

Register story, form "sled" (8-byte t0 form)
    on entry    t0 = site + 8, ra = parent, everything else the function's: a0-a7, fa0-fa7, t2 (static chain),
                t2-t6 (fastcc), s-registers, gp, tp
    spilled     ra at 8(sp) of a 16-byte frame; sp stays 16-aligned
    on resume   ra = parent, t0 = site + 8, t1 changed; all else as on entry.
                Where returns are hooked t0 is changed, too, and ra is the hook
Forms "mcount" and "sled16" (called with link in ra)
    on entry    ra = resume; parent in a0 (mcount), or at -8(sp) already (sled16)
    spilled     ra at 0(sp)
    on resume   ra = resume, t1 changed; all else as on entry

Return slots (form "sled") decide, in this order:
    tail    ra points into the slots: this function was reached by a jump from one whose return is hooked, in the
            same frame. It must not be hooked twice; the true parent is in the shadow slot of this very frame.
    plain   sp lies outside the mirrored stacks: there is no shadow slot.
    hooked  the parent goes to the shadow slot of sp, and the body is *called* by `jalr ra, (t0)`, which in the ISA's
            hint table is pop-then-push: call and return stay paired. The hook is the next instruction.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from fentry.arch import ReturnPlane, Sled, SlotLayout, SlotPlan, SlotShape
from fentry.arch.riscv64 import code, facts
from fentry.arch.riscv64.insn import encode
from fentry.errors import AskedWrong, EngineBug, Unsupported

X: Final = facts.NUMBER
FRAME: Final = 16

# offsets in the return constants
OFF, LOW, SIZE, SLOTS, SLOTS_SIZE = range(0, 40, 8)
_ONE_SET: Final = 40  # bytes


def return_consts(plane: ReturnPlane, slots: int, size: int) -> bytes:
    """Give what return slots read: five little-endian words (off, low - 16, size, slots, slots' size), twice.

    By the time a slot compares it, sp is 16 below what it was at the function's entry.

    A slot reads all five with the 12-bit offsets of one auipc. Where they would straddle the end of what that auipc
    reaches, the second copy does not, so no slot needs an instruction more and nothing need be aligned.

    Args:
        plane: the parallel shadow stack.
        slots: lowest address of all slots with return hooks.
        size: bytes from there to the end of the last one.
    """
    words = (plane.off, plane.low - FRAME, plane.size, slots, size)
    return 2 * b"".join((word & (1 << 64) - 1).to_bytes(8, "little") for word in words)


class _Emitter:
    """A slot in the making: instructions in order, marks noted, forward branches filled in at the end."""

    def __init__(self, plan: SlotPlan) -> None:
        self.plan = plan
        self.code = bytearray()
        self._branches: list[tuple[int, str, str, str, str]] = []
        self._labels: dict[str, int] = {}

    def put(self, name: str, **fields: int | str) -> None:
        """Append an instruction; registers by name."""
        numbers = {k: X[v] if isinstance(v, str) else v for k, v in fields.items()}
        self.code += encode(name, **numbers)

    def load(self, register: str, imm: int, base: str) -> None:
        self.put("ld", rd=register, rs1=base, imm=imm)

    def store(self, register: str, imm: int, base: str) -> None:
        self.put("sd", rs2=register, rs1=base, imm=imm)

    def move_sp(self, by: int) -> None:
        self.put("addi", rd="sp", rs1="sp", imm=by)

    def consts(self, register: str) -> int:
        """Point `register` near a whole set of return constants: 1 instruction; gives the offset of the set."""
        for at in (self.plan.consts, self.plan.consts + _ONE_SET):
            high, low = code.split(self.here, at)
            if low + _ONE_SET - 8 < 0x800:
                self.put("auipc", rd=register, imm=high)
                return low
        raise EngineBug(f"no return constants in reach of a slot at {self.plan.at:#x}")

    def pair(self, to: int, base: str, link: str) -> None:
        self.code += code.pair(self.here, to, base, link)

    def calls(self, programs: tuple[int, ...]) -> tuple[int, ...]:
        """Call each program; gives the marks."""
        marks = []
        for program in programs:
            self.code += code.call(self.here, program)
            marks.append(len(self.code))
        return tuple(marks)

    def branch(self, name: str, rs1: str, rs2: str, label: str) -> None:
        self._branches.append((len(self.code), name, rs1, rs2, label))
        self.put("ebreak")  # replaced in finish()

    def label(self, name: str) -> None:
        self._labels[name] = len(self.code)

    @property
    def here(self) -> int:
        return self.plan.at + len(self.code)

    def finish(self) -> bytes:
        """Fill in the branches; fill up with zeros, which are defined to trap, to a power of two.

        A program turns its mark into the number of its slot by a shift.
        """
        for at, name, rs1, rs2, label in self._branches:
            word = encode(name, rs1=X[rs1], rs2=X[rs2], imm=self._labels[label] - at)
            self.code[at : at + 4] = word
        return bytes(self.code).ljust(1 << (len(self.code) - 1).bit_length(), b"\0")


def slot_layout(shape: SlotShape) -> SlotLayout:
    """Give the layout of slots of `shape`. Raises Unsupported if the form cannot do that."""
    if shape.exit and shape.form == code.MCOUNT:
        raise Unsupported(
            "a return cannot be hooked from an mcount call: the parent's address is already in the caller's frame",
            hint="build with -fpatchable-function-entry=4, or trace entries only",
        )
    if shape.exit and shape.form == code.SLED16:
        raise Unsupported(
            "a return cannot be hooked from the 16-byte sled: it reloads ra from below the stack pointer",
            hint="build with -fpatchable-function-entry=4, or trace entries only",
        )
    if shape.form not in _FORMS:
        raise Unsupported(f"riscv64 has no slots for a {shape.form!r}")
    return _measure(shape)


@cache
def _measure(shape: SlotShape) -> SlotLayout:
    sled = Sled(shape.form, 8, b"", 8)
    plan = SlotPlan(0, 0, sled, body=0, entry=(0,) * shape.entry, exit=(0,) * shape.exit)
    return _emit(plan)[1]


def slot(plan: SlotPlan) -> bytes:
    """Emit a slot, exactly ``slot_layout(...).stride`` bytes.

    There is no landing pad (``layout.pad`` is -1), so ``plan.resume_unwind`` and ``plan.unwound`` say nothing here.
    Raises: OutOfReach if a program, the constants or the body is too far from the slot; Unsupported as
    :func:`slot_layout`; EngineBug for a misplaced slot.
    """
    layout = slot_layout(SlotShape(len(plan.entry), len(plan.exit), plan.sled.form))
    if plan.at % 4:
        raise EngineBug(f"slot at {plan.at:#x} is not aligned to 4")
    if plan.sled.form == code.SLED and plan.sled.resume != code.PAIR:
        raise EngineBug(f"a {plan.sled.form} resumes at {code.PAIR}, where its call links, not at {plan.sled.resume}")
    if not plan.exit and plan.sled.form == code.SLED and plan.body != plan.site + plan.sled.resume:
        raise EngineBug("a slot that resumes through t0 cannot go on elsewhere than behind its site")
    if plan.exit and not plan.consts:
        raise EngineBug("a slot with exit programs needs its return constants")
    for other in (plan.tail, plan.plain):
        if other is not None and len(other) != len(plan.entry):
            raise EngineBug("a slot's tail and plain programs are as many as its entry programs, or its layout differs")
    try:
        emitted = _emit(plan)[0]
    except AskedWrong as e:  # a field that does not fit here is this module's mistake, not the caller's
        raise EngineBug(f"slot at {plan.at:#x}: {e.message}") from e
    if len(emitted) != layout.stride:
        raise EngineBug(f"slot at {plan.at:#x} is {len(emitted)} bytes, its layout says {layout.stride}")
    return emitted


def _emit(plan: SlotPlan) -> tuple[bytes, SlotLayout]:
    return _emit_hooked(plan) if plan.exit else _FORMS[plan.sled.form](plan)


def _emit_sled(plan: SlotPlan) -> tuple[bytes, SlotLayout]:
    """Entry programs only: 5 instructions and 2 for each program."""
    e = _Emitter(plan)
    e.move_sp(-FRAME)
    e.store("ra", 8, "sp")
    marks = e.calls(plan.entry)
    e.load("ra", 8, "sp")
    e.move_sp(FRAME)
    e.put("jalr", rd="zero", rs1="t0", imm=0)
    emitted = e.finish()
    return emitted, SlotLayout(len(emitted), marks)


def _emit_linked(plan: SlotPlan) -> tuple[bytes, SlotLayout]:
    """Entry programs of a site that called with link in ra: 5 instructions (mcount 6) and 2 for each program."""
    e = _Emitter(plan)
    e.move_sp(-FRAME)
    e.store("ra", 0, "sp")
    if plan.sled.form == code.MCOUNT:
        e.store("a0", 8, "sp")  # the 16-byte sled has stored the parent in this very word
    marks = e.calls(plan.entry)
    e.load("ra", 0, "sp")
    e.move_sp(FRAME)
    e.put("jalr", rd="zero", rs1="ra", imm=0)
    emitted = e.finish()
    return emitted, SlotLayout(len(emitted), marks)


_FORMS: Final = {code.SLED: _emit_sled, code.MCOUNT: _emit_linked, code.SLED16: _emit_linked}


def _emit_hooked(plan: SlotPlan) -> tuple[bytes, SlotLayout]:
    """Entry and exit programs: 18 instructions at entry, 9 at exit, and 2 for each program.

    ra is free between its store and the programs, which makes three registers for the checks.
    """
    e = _Emitter(plan)
    e.move_sp(-FRAME)
    e.store("ra", 8, "sp")
    at = e.consts("t1")
    e.load("t0", at + SLOTS, "t1")
    e.put("sub", rd="ra", rs1="ra", rs2="t0")
    e.load("t0", at + SLOTS_SIZE, "t1")
    e.branch("bltu", "ra", "t0", "tail")
    e.load("ra", at + LOW, "t1")
    e.put("sub", rd="ra", rs1="sp", rs2="ra")
    e.load("t0", at + SIZE, "t1")
    e.branch("bgeu", "ra", "t0", "plain")
    e.load("t0", at + OFF, "t1")
    e.put("add", rd="t0", rs1="t0", rs2="sp")
    e.load("ra", 8, "sp")
    e.store("ra", FRAME, "t0")  # the shadow slot of the entry sp
    entry = e.calls(plan.entry)
    e.move_sp(FRAME)
    e.pair(plan.body, "t0", "ra")
    hook = len(e.code)

    e.move_sp(-FRAME)
    high, low = code.split(e.here, plan.consts + OFF)
    e.put("auipc", rd="t1", imm=high)
    e.load("t1", low, "t1")
    e.put("add", rd="t1", rs1="t1", rs2="sp")
    e.load("ra", FRAME, "t1")
    e.store("ra", 8, "sp")
    exits = e.calls(plan.exit)
    e.load("ra", 8, "sp")
    e.move_sp(FRAME)
    e.put("jalr", rd="zero", rs1="ra", imm=0)

    e.label("tail")
    e.load("ra", 8, "sp")  # the hook this frame returns to already: to 0(sp), the true parent takes its place
    e.store("ra", 0, "sp")
    e.load("t0", at + OFF, "t1")
    e.put("add", rd="t0", rs1="t0", rs2="sp")
    e.load("t0", FRAME, "t0")
    e.store("t0", 8, "sp")
    tail = e.calls(plan.entry if plan.tail is None else plan.tail)
    e.load("ra", 0, "sp")
    e.move_sp(FRAME)
    e.pair(plan.body, "t0", "zero")

    e.label("plain")
    plain = e.calls(plan.entry if plan.plain is None else plan.plain)
    e.load("ra", 8, "sp")
    e.move_sp(FRAME)
    e.pair(plan.body, "t0", "zero")

    emitted = e.finish()
    return emitted, SlotLayout(
        len(emitted), entry, exit_marks=exits, tail_marks=tail, plain_marks=plain, hook=hook, call=hook - 4
    )
