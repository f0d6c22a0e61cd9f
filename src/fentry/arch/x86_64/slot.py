"""Slots on x86_64: the little piece of code per site that calls the programs and goes on.

Register story. The psABI leaves r11 free at a function entry, and much more at an exit; but gcc's -fipa-ra (on from
-O1, off only with -pg or patchable entries) lets a caller keep values in any register that a *known* callee does not
touch. So everything is preserved but the flags, at entry and at exit. A program preserves everything but r11; the slot
keeps that on the stack. The 128 bytes below rsp are ours: at a function's first instruction its red zone is still
unused, and between its `ret` and the caller's next instruction it is dead.

In all slots, with S the address of the caller's return slot, a program's own return address lies at S - 16
(armed by a call: S - 24), the saved r11 above it.

Entry only, armed by a call (a sled, or a call of fentry/mcount):

    [rsp] = resume, [rsp+8] = parent
        push r11
        call program ...          ; mark = the return address of each
        pop  r11
        ret                       ; to the resume address: paired with the site's call

Entry only, armed by a jump: the same with `jmp body` for `ret`, and [rsp] = parent.

With return hook, always armed by a jump (architecture D9, balanced):

    [rsp] = parent
        mov  [rsp-8], r11
        mov  r11, rsp             ; is this stack mirrored?
        shr  r11, log2(size)
        cmp  r11, low >> log2(size)
        jne  plain
        movabs r11, off + size
        mov  r11d, [rsp+r11]      ; second plane: the hook that was put into this return slot last
        cmp  r11d, [rsp]
        je   tail                 ; it is still there: we were tail-called by a hooked function
        movabs r11, off - 8
        pop  [rsp+r11]            ; the return address moves to its shadow slot
        movabs r11, off + size - 8
        mov  dword [rsp+r11], low half of hook
        lea  rsp, [rsp-16]        ; [rsp] = r11
        call entry program ...
        pop  r11
        lea  rsp, [rsp+8]
        call body                 ; pushes into the very slot that was popped: stack arguments have not moved
    hook:
        push rax                  ; programs at an exit find the return value above the saved r11
        push r11
        call exit program ...
        lea  rsp, [rsp+16]
        movabs r11, off - 8
        push [rsp+r11]            ; the return address comes back
        mov  r11, [rsp-8]         ; where it was pushed
        ret                       ; predicted: the call that made it was never unpaired
    tail, plain:
        lea  rsp, [rsp-8]
        call entry program ...
        pop  r11
        jmp  body
    pad:                          ; an exception passes: rax = exception, rsp = as at the hook
        lea  rsp, [rsp-16]
        call unwound program ...
        lea  rsp, [rsp+16]
        movabs r11, off - 8
        push [rsp+r11]
        sub  rsp, 8
        mov  rdi, rax
        movabs r11, _Unwind_Resume
        call r11

The return address on the stack is never dereferenced: a coroutine's first frame may hold anything there. Half an
address is compared; should a caller's address ever agree with a stale hook by chance, one exit event is missing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt

from fentry.arch import ReturnPlane, Sled, SlotLayout, SlotPlan, SlotShape, UnwindInfo
from fentry.errors import EngineBug, OutOfReach, Unsupported

_JE = b"\x0f\x84"
_JNE = b"\x0f\x85"
_POP_SHADOW = bytes.fromhex("428f041c")  # pop qword [rsp+r11]
_PUSH_SHADOW = bytes.fromhex("42ff341c")  # push qword [rsp+r11]
_LOAD_HOOK = bytes.fromhex("468b1c1c")  # mov r11d, [rsp+r11]
_SAME_HOOK = bytes.fromhex("443b1c24")  # cmp r11d, [rsp]
_STORE_HOOK = bytes.fromhex("42c7041c")  # mov dword [rsp+r11], imm32
_RDI_RAX = bytes.fromhex("4889c7")

#: forms whose site is a jump even without a return hook
JUMP_FORMS = frozenset({"entry-jump"})


def _rel(opcode: bytes, at: int, to: int) -> bytes:
    """Encode `opcode` followed by a rel32 from its end to `to`."""
    disp = to - (at + len(opcode) + 4)
    if not -(1 << 31) <= disp < 1 << 31:
        raise OutOfReach(at, to, 1 << 31)
    return opcode + struct.pack("<i", disp)


def _movabs(value: int) -> bytes:
    """Movabs r11, value."""
    return b"\x49\xbb" + struct.pack("<Q", value & (1 << 64) - 1)


_SAVE = bytes.fromhex("4c895c24f8")  # mov [rsp-8], r11
_RELOAD = bytes.fromhex("4c8b5c24f8")  # mov r11, [rsp-8]
_PUSH, _POP = bytes.fromhex("4153"), bytes.fromhex("415b")  # push r11; pop r11
_DOWN16, _DOWN8 = bytes.fromhex("488d6424f0"), bytes.fromhex("488d6424f8")  # lea rsp, [rsp-16]; [rsp-8]
_UP8, _UP16 = bytes.fromhex("488d642408"), bytes.fromhex("488d642410")  # lea rsp, [rsp+8]; [rsp+16]
_WINDOW = 3 + 4 + 4  # mov r11, rsp; shr r11, n; cmp r11, n
_OFF = 10  # movabs r11, imm64


@cache
def slot_layout(shape: SlotShape) -> SlotLayout:
    """Layout of slots of this shape; offsets do not depend on addresses."""
    e, x = shape.entry, shape.exit
    if x and shape.form == "mcount":
        raise Unsupported(
            "a call of mcount sits behind the prologue: its return address cannot be hooked",
            hint="build with -mfentry or -fpatchable-function-entry, or trace entries only (-p function)",
        )
    if not x:
        marks = tuple(2 + 5 * (i + 1) for i in range(e))
        end = 2 + 5 * e + 2 + (5 if shape.form in JUMP_FORMS else 1)
        return SlotLayout(stride=max(16, 1 << (end - 1).bit_length()), entry_marks=marks)

    def calls(at: int, count: int) -> tuple[int, ...]:
        return tuple(at + 5 * (i + 1) for i in range(count))

    at = len(_SAVE) + _WINDOW + 6 + _OFF + 4 + 4 + 6 + _OFF + 4 + _OFF + 8 + len(_DOWN16)
    entry = calls(at, e)
    call = at + 5 * e + len(_POP) + len(_UP8)
    hook = call + 5
    at = hook + 1 + len(_PUSH)
    exits = calls(at, x)
    at += 5 * x + len(_UP16) + _OFF + 4 + len(_RELOAD) + 1
    tails = calls(at + len(_DOWN8), e)
    at += len(_DOWN8) + 5 * e + len(_POP) + 5
    plains = calls(at + len(_DOWN8), e)
    at += len(_DOWN8) + 5 * e + len(_POP) + 5
    pad = at
    unwound = calls(at + len(_DOWN16), x)
    end = at + len(_DOWN16) + 5 * x + len(_UP16) + _OFF + 4 + 4 + 3 + 10 + 3
    return SlotLayout(
        stride=1 << (end - 1).bit_length(),
        entry_marks=entry,
        exit_marks=exits,
        tail_marks=tails,
        plain_marks=plains,
        unwound_marks=unwound,
        hook=hook,
        pad=pad,
        call=call,
    )


def _tail_at(shape: SlotShape) -> int:
    """Offset of the code for tail calls."""
    layout = slot_layout(shape)
    return layout.hook + 3 + 5 * shape.exit + len(_UP16) + _OFF + 4 + len(_RELOAD) + 1


def slot(plan: SlotPlan) -> bytes:
    """Emit one slot; see the module's register story."""
    shape = SlotShape(len(plan.entry), len(plan.exit), plan.sled.form)
    layout = slot_layout(shape)
    out = bytearray()

    def calls(programs: Sequence[int]) -> None:
        for program in programs:
            out.extend(_rel(b"\xe8", plan.at + len(out), program))

    def jump(opcode: bytes, to: int) -> None:
        out.extend(_rel(opcode, plan.at + len(out), to))

    def reached(what: str, offset: int) -> None:
        if len(out) != offset:
            raise EngineBug(f"slot layout: {what} at {len(out)}, not {offset}")

    if not plan.exit:
        out += _PUSH
        calls(plan.entry)
        out += _POP
        if plan.sled.form in JUMP_FORMS:
            jump(b"\xe9", plan.body)
        else:
            out.append(0xC3)
        return bytes(out).ljust(layout.stride, b"\xcc")

    plane = plan.plane
    if plane is None or plane.size & (plane.size - 1) or plane.low % plane.size or plane.low // plane.size > 127:
        raise EngineBug("a return plane mirrors a naturally aligned power-of-two window of stacks")
    load_off = _movabs(plane.off - 8)
    aside = len(_DOWN8) + 5 * shape.entry + len(_POP) + 5
    tail = _tail_at(shape)
    out += _SAVE
    out += bytes.fromhex("4989e3")  # mov r11,rsp
    out += bytes.fromhex("49c1eb") + bytes([plane.size.bit_length() - 1])  # shr r11, n
    out += bytes.fromhex("4983fb") + bytes([plane.low // plane.size])  # cmp r11, window
    jump(_JNE, plan.at + tail + aside)
    out += _movabs(plane.off + plane.size) + _LOAD_HOOK + _SAME_HOOK
    jump(_JE, plan.at + tail)
    out += load_off + _POP_SHADOW
    out += _movabs(plane.off + plane.size - 8) + _STORE_HOOK
    out += struct.pack("<I", (plan.at + layout.hook) & 0xFFFFFFFF) + _DOWN16
    calls(plan.entry)
    out += _POP + _UP8
    jump(b"\xe8", plan.body)
    reached("hook", layout.hook)
    out += b"\x50" + _PUSH
    calls(plan.exit)
    out += _UP16 + load_off + _PUSH_SHADOW + _RELOAD + b"\xc3"
    reached("tail", tail)
    for programs in (plan.tail, plan.plain):
        out += _DOWN8
        calls(plan.entry if programs is None else programs)
        out += _POP
        jump(b"\xe9", plan.body)
    reached("pad", layout.pad)
    if plan.resume_unwind:
        out += _DOWN16
        calls(plan.unwound)
        out += _UP16 + load_off + _PUSH_SHADOW + bytes.fromhex("4883ec08") + _RDI_RAX
        out += _movabs(plan.resume_unwind) + bytes.fromhex("41ffd3")
    if len(out) > layout.stride:
        raise EngineBug(f"slot of {len(out)} bytes is larger than its stride {layout.stride}")
    return bytes(out).ljust(layout.stride, b"\xcc")


def slots(plan: SlotPlan, sites: Sequence[tuple[int, Sled]], bodies: Sequence[int]) -> bytes:
    """Emit a table of slots, one behind the other: the first is copied, and what depends on the place is filled in."""
    shape = SlotShape(len(plan.entry), len(plan.exit), plan.sled.form)
    layout = slot_layout(shape)
    count = len(bodies)
    first = slot(replace(plan, body=bodies[0]))
    table = np.tile(np.frombuffer(first, np.uint8), (count, 1))
    moved = np.arange(count, dtype=np.int64) * layout.stride
    to = np.array(bodies, dtype=np.int64)

    def fill(offset: int, values: npt.NDArray[np.int64]) -> None:
        if count and (int(values.min()) < -(1 << 31) or int(values.max()) >= 1 << 31):
            worst = int(np.argmax(np.abs(values)))
            raise OutOfReach(plan.at + worst * layout.stride + offset, int(to[worst]), 1 << 31)
        table[:, offset : offset + 4] = values.astype("<i4").view(np.uint8).reshape(count, 4)

    marks = layout.entry_marks + layout.exit_marks + layout.tail_marks + layout.plain_marks
    if plan.resume_unwind:
        marks += layout.unwound_marks
    for mark in marks:  # programs stay where they are
        fill(mark - 4, int.from_bytes(first[mark - 4 : mark], "little", signed=True) - moved)
    jumps: list[int] = []  # displacements of jumps to the body
    if shape.exit:
        tail = _tail_at(shape)
        aside = len(_DOWN8) + 5 * shape.entry + len(_POP) + 5
        jumps = [layout.call + 1, tail + aside - 4, tail + 2 * aside - 4]
        at = layout.call - len(_UP8) - len(_POP) - 5 * shape.entry - len(_DOWN16) - 4
        hooks = ((plan.at + layout.hook + moved) & 0xFFFFFFFF).astype("<u4")
        table[:, at : at + 4] = hooks.view(np.uint8).reshape(count, 4)
    elif shape.form in JUMP_FORMS:
        jumps = [2 + 5 * shape.entry + 2 + 1]
    for offset in jumps:
        fill(offset, to - (plan.at + moved + offset + 4))
    out = table.tobytes()
    site, sled = sites[-1]
    last = slot(replace(plan, at=plan.at + int(moved[-1]), site=site, sled=sled, body=bodies[-1]))
    if out[-layout.stride :] != last:
        raise EngineBug("a table of slots is not what its slots are one by one")
    return out


def return_consts(plane: ReturnPlane, slots: int, size: int) -> bytes:  # noqa: ARG001 - the contract's signature
    """Slots of this architecture carry their constants as immediates."""
    return b""


# ---- call frame information ------------------------------------------------------------------------

_RSP, _RA = 7, 16  # DWARF numbers (psABI figure 3.36)


def _uleb(n: int) -> bytes:
    out = bytearray()
    while True:
        byte = n & 0x7F
        n >>= 7
        if not n:
            out.append(byte)
            return bytes(out)
        out.append(byte | 0x80)


def _in_frame(off: int, size: int) -> bytes:
    """DW_CFA ops: CFA = rsp + size, return address saved at CFA + off - 8 (an expression: CFA is pushed first)."""
    expr = b"\x0e" + struct.pack("<Q", (off - 8) & (1 << 64) - 1) + b"\x22"  # const8u, plus
    return bytes([0x0C, _RSP, size]) + bytes([0x10, _RA, len(expr)]) + expr


def _plain_frame(size: int) -> bytes:
    """DW_CFA ops: CFA = rsp + size, return address at CFA - 8."""
    return bytes([0x0C, _RSP]) + _uleb(size) + bytes([0x80 | _RA, 1])


def _advance(delta: int) -> bytes:
    return bytes([0x40 | delta]) if delta < 0x40 else b"\x02" + bytes([delta])


def frame_info(shape: SlotShape, slots: Sequence[int], at: int, unwind: UnwindInfo) -> bytes:
    """Build ``.eh_frame_hdr`` + ``.eh_frame`` for slots with return hooks.

    One FDE per slot, all alike but for the address. With a personality (``__gcc_personality_v0``), one call-site
    record sends every exception that passes the body's call to the slot's landing pad: without it libgcc
    aborts in its second phase, because the hook's frame and its caller have the same CFA.

    Layout: hdr (12 bytes + 8 per slot), LSDA, CIE, FDEs, terminator. Encodings: DW_EH_PE_absptr for
    the addresses in CIE and FDE, sdata4 relative to the header in its table.
    """
    plane = unwind.plane
    if plane is None or not shape.exit or not slots:
        return b""
    layout = slot_layout(shape)
    count = len(slots)
    hdr_size = 12 + 8 * count
    with_pad = bool(unwind.personality)
    # LSDA: no LPStart (= FDE start), no type table, call-site offsets as uleb128
    sites = _uleb(layout.call) + _uleb(5) + _uleb(layout.pad) + _uleb(0)
    # a call site covers [call, hook): the unwinder looks up (return address - 1)
    lsda = b"\xff\xff\x01" + _uleb(len(sites)) + sites
    lsda = lsda.ljust((len(lsda) + 7) & -8, b"\0")
    lsda_at = at + ((hdr_size + 7) & -8)
    cie_at = lsda_at + len(lsda)

    augmentation = b"zPLR\0" if with_pad else b"zR\0"
    data = b"\x00" + struct.pack("<Q", unwind.personality) + b"\x00\x00" if with_pad else b"\x00"
    body = b"\x01" + augmentation + _uleb(1) + b"\x78" + _uleb(_RA) + _uleb(len(data)) + data
    body += _plain_frame(8)
    cie = struct.pack("<II", 0, 0) + body
    cie = cie.ljust((len(cie) + 7) & -8, b"\0")
    cie = struct.pack("<I", len(cie) - 4) + cie[4:]

    # rows: what the stack looks like from each of these offsets on
    tail = _tail_at(shape)
    entered = layout.call - len(_POP) - len(_UP8) - 5 * shape.entry
    pushing = layout.hook
    popping = layout.exit_marks[-1]
    rows = [
        (entered - len(_DOWN16) - _OFF - 8, _in_frame(plane.off, 0)),
        (entered, _in_frame(plane.off, 16)),
        (layout.call - len(_UP8), _in_frame(plane.off, 8)),
        (layout.call, _in_frame(plane.off, 0)),
        (pushing + 1, _in_frame(plane.off, 8)),
        (pushing + 1 + len(_PUSH), _in_frame(plane.off, 16)),
        (popping + len(_UP16), _in_frame(plane.off, 0)),
        (popping + len(_UP16) + _OFF + 4, _plain_frame(8)),
    ]
    for begin in (tail, tail + (layout.pad - tail) // 2):
        rows += [(begin + len(_DOWN8), _plain_frame(16)), (begin + len(_DOWN8) + 5 * shape.entry + 2, _plain_frame(8))]
    rows += [
        (layout.pad, _in_frame(plane.off, 0)),
        (layout.pad + len(_DOWN16), _in_frame(plane.off, 16)),
        (layout.unwound_marks[-1] + len(_UP16), _in_frame(plane.off, 0)),
        (layout.unwound_marks[-1] + len(_UP16) + _OFF + 4, _plain_frame(8)),
        (layout.unwound_marks[-1] + len(_UP16) + _OFF + 8, _plain_frame(16)),
    ]
    ops = b""
    before, now = 0, _plain_frame(8)
    for offset, row in rows:
        # where only the distance to the CFA changes, DW_CFA_def_cfa_offset is enough
        change = row if row[3:] != now[3:] else bytes([0x0E, row[2]])
        ops += _advance(offset - before) + change
        before, now = offset, row
    aug = _uleb(8) + struct.pack("<Q", lsda_at) if with_pad else _uleb(0)
    fde_size = (8 + 16 + len(aug) + len(ops) + 7) & -8
    first = cie_at + len(cie)

    fdes = bytearray()
    table = bytearray()
    for i, slot_at in enumerate(sorted(slots)):
        fde_at = first + i * fde_size
        head = struct.pack("<IIQQ", fde_size - 4, fde_at + 4 - cie_at, slot_at, layout.stride)
        fdes += (head + aug + ops).ljust(fde_size, b"\0")
        table += struct.pack("<ii", slot_at - at, fde_at - at)
    # version 1, eh_frame_ptr absptr? no: sdata4|pcrel, count udata4, table sdata4|datarel
    hdr = b"\x01\x1b\x03\x3b" + struct.pack("<iI", cie_at - (at + 4), count) + bytes(table)
    return hdr.ljust((hdr_size + 7) & -8, b"\0") + lsda + cie + bytes(fdes) + b"\0\0\0\0"


# ---- signal frames -----------------------------------------------------------------------------------

#: struct rt_sigframe (arch/x86/include/asm/sigframe.h), in words: pretcode; ucontext: flags link ss_sp ss_flags
#: ss_size; sigcontext: r8-r15 di si bp bx dx ax cx sp ip flags {cs gs fs ss}
_RIP = 1 + 5 + 16
_USER_CS, _USER_DS = 0x33, 0x2B


def saved_pcs(stack: bytes) -> list[tuple[int, int]]:
    """Find signal frames by what the kernel always writes: selectors, flags, a null uc_link."""
    words = np.frombuffer(stack, dtype=np.uint64)
    if len(words) < _RIP + 3:
        return []
    selectors = words[_RIP + 2 :]
    flags = words[_RIP + 1 : -1]
    link = words[2 : len(words) - _RIP]
    found = (
        ((selectors & np.uint64(0xFFFF)) == _USER_CS)
        & np.isin(selectors >> np.uint64(48), (0, _USER_DS))
        & (flags < np.uint64(1 << 22))
        & ((flags & np.uint64(2)) != 0)
        & (link == 0)
    )
    return [(8 * (int(i) + _RIP), int(words[int(i) + _RIP])) for i in np.flatnonzero(found)]
