"""Writer and relocator of x86_64: jumps and calls, sleds, and instructions moved out of an entry-jump window."""

from __future__ import annotations

import re
import struct

from iced_x86 import BlockEncoder, Decoder, FlowControl, Instruction

from fentry.arch import Displaced, Refusal, Sled
from fentry.arch.x86_64 import facts
from fentry.arch.x86_64.insn import Window, landing_pad
from fentry.errors import AskedWrong, EngineBug, OutOfReach, Rejected

_NOP = re.compile(facts.NOP, re.DOTALL)
#: call rel32, or one of the shapes that call *sym@GOTPCREL(%rip) takes: as assembled, and relaxed by the linker to
#: addr32 call rel32 (GNU ld, lld and gold)
_MCOUNT_CALL = re.compile(rb"\xe8.{4}|\xff\x15.{4}|\x67\xe8.{4}", re.DOTALL)
#: nops of 5 and more bytes as clang writes them in a patchable entry: displacement 8 or 512, where alignment fill has 0
#: (LLVM X86MCInstLower.cpp, emitNop; seen with clang 14)
_CLANG_SLED = re.compile(rb"[\x2e\x66]{0,10}\x0f\x1f(?:\x44\x00\x08|\x84\x00\x00\x02\x00\x00)")
_LAST_FLOW = frozenset({FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH, FlowControl.RETURN})
_BRANCH_REACH = 2**31 - 32  #: bytes; 32 are more than any branch with its expansion takes


def rel32(opcode: bytes, at: int, to: int) -> bytes:
    """Encode `opcode` at `at` followed by the 32-bit distance from its end to `to`. Raises OutOfReach."""
    distance = to - (at + len(opcode) + 4)
    if not -(2**31) <= distance < 2**31:
        raise OutOfReach(at, to, 2**31)
    return opcode + struct.pack("<i", distance)


def nops(size: int) -> bytes:
    """Fill `size` bytes with as few nops as there can be."""
    longest = len(facts.NOPS) - 1
    return facts.NOPS[longest] * (size // longest) + facts.NOPS[size % longest]


# -- sleds --------------------------------------------------------------------------------------------------


def sled_at(code: bytes, hint: str) -> Sled | Refusal | None:
    """Recognise a sled at the start of `code`, behind a landing pad if there is one.

    Args:
        code: up to 32 bytes from where a sled may begin.
        hint: where the idea comes from.

            * "patchable": listed in ``__patchable_function_entries``; any nops will do. `code` begins at the function's
              label, or at the recorded address if no nops stand before the label.
            * "fentry": a recorded or relocated call to ``__fentry__``, before the prologue.
            * "mcount" or "nop": the same to ``mcount``, behind the prologue, or the nop in its place (a caller who
              knows that the nop stands before the prologue says "fentry"). The return address is at 8(%rbp) there and
              not on top of the stack, so the form "mcount" has no return hooks; all argument registers are live.
            * "scan": a guess: only what a compiler emits as patchable entry counts.

    Returns: the Sled, a Refusal (there is one, but it cannot be used) or None. The patched bytes begin behind the
        landing pad. ``resume`` passes over the whole run of nops that `code` shows.
    Raises: AskedWrong for another hint.
    """
    code = code[landing_pad(code) :]
    if hint in ("fentry", "mcount", "nop"):
        return _mcount_at(code, "fentry" if hint == "fentry" else "mcount")
    if hint not in ("patchable", "scan"):
        raise AskedWrong(f"no sled hint {hint!r}", hint="one of: patchable fentry mcount nop scan")
    ends = _nop_ends(code)
    run = ends[-1] if ends else 0
    size = next((end for end in ends if end >= facts.BRANCH_SIZE), 0)
    if hint == "scan":
        gcc = code.startswith(b"\x90" * facts.BRANCH_SIZE)
        if not (gcc or code.startswith(facts.NOPS[facts.BRANCH_SIZE]) or _CLANG_SLED.match(code)):
            return None
    elif not ends:
        return None
    elif not size:
        return Refusal(f"sled of {run} bytes is shorter than a 5-byte call")
    return Sled("sled", size, code[:size], run, facts.LINK)


def _nop_ends(code: bytes) -> list[int]:
    """Offsets at which the nops at the start of `code` end."""
    ends = []
    pos = 0
    while match := _NOP.match(code, pos):
        pos = match.end()
        ends.append(pos)
    return ends


def _mcount_at(code: bytes, form: str) -> Sled | None:
    """Recognise a call to mcount or the nop in its place (-mnop-mcount)."""
    match = _MCOUNT_CALL.match(code)
    if match is None:
        match = _NOP.match(code)
        if match is None or match.end() < facts.BRANCH_SIZE:
            return None
    return Sled(form, match.end(), match[0], match.end(), facts.LINK)


def arm(site: int, sled: Sled, slot: int, *, balanced: bool) -> bytes:
    """Encode what replaces the sled at `site`: a call of `slot`, or a jump.

    It is a jump for an entry jump (its displaced bytes are executed elsewhere and nothing returns here) and for a slot
    that hooks the return (balanced: the slot finds the parent's return address on top of the stack).

    A call is as long as the sled (prefixes that mean nothing to it make it so) and returns to the sled's end, which is
    the start of an instruction whether or not the sled is armed when the slot returns.

    Returns: exactly ``sled.size`` bytes. A jump is filled up with nops, and an entry jump with what was there: nothing
        executes it, and the fewer bytes change the better.
    Raises: OutOfReach; Rejected for a return hook on a call behind the prologue.
    """
    if balanced and sled.form == "mcount":
        raise Rejected("returns cannot be hooked at a call behind the prologue", at=site)
    if sled.size < facts.BRANCH_SIZE or len(sled.idle) != sled.size:
        raise EngineBug(f"sled of {sled.size} bytes ({sled.idle.hex(' ')}) cannot hold a 5-byte branch")
    rest = sled.size - facts.BRANCH_SIZE
    if not (sled.moved or balanced):
        return rel32(facts.NO_MEANING * rest + facts.CALL, site, slot)
    head = rel32(facts.JUMP, site, slot)
    return head + (sled.idle[facts.BRANCH_SIZE :] if sled.moved else nops(rest))


# -- moved instructions ---------------------------------------------------------------------------------------


def displace(sled: Sled, at: int, to: int, resume: int) -> Displaced:
    """Rewrite ``sled.idle`` (from `at`) to run at `to` and go on at `resume`.

    Bytes that do not depend on their place are copied as they are. A rip-relative operand gets a new distance; a short
    branch becomes a near one (loop and jrcxz become three instructions); a branch to `at` itself, a loop inside the
    window, leads to `to`. No jump back follows an instruction that never goes on.

    Returns: the code, and in ``moves`` each instruction's old and new offset, with the window's end last if execution
        can go on there (its new offset is that of the jump back).
    Raises: Rejected if an operand is out of reach, OutOfReach if `resume` is.
    """
    if isinstance(sled, Window):
        steps, relative, falls = sled.steps, sled.relative, sled.falls
    else:
        steps, relative, falls = _survey(sled.idle, at)
    if relative:
        out, moves = _move(sled.idle, steps, at, to)
        end = len(sled.idle)
    else:
        end = len(sled.idle)
        out, moves = sled.idle, [(step, step) for step in steps]
    if not falls:
        return Displaced(out, tuple(moves))
    moves.append((end, len(out)))
    return Displaced(out + rel32(facts.JUMP, to + len(out), resume), tuple(moves))


def _survey(idle: bytes, at: int) -> tuple[tuple[int, ...], bool, bool]:
    """Decode a window again: (offset of each instruction, pc-relative, goes on behind it)."""
    steps = []
    relative = False
    pos = 0
    for insn in Decoder(64, idle, ip=at):
        if insn.is_invalid:
            raise Rejected("invalid instruction in the window", at=at + pos)
        steps.append(pos)
        flow = insn.flow_control
        relative = relative or insn.is_ip_rel_memory_operand or _is_relative_branch(insn, flow)
        pos += insn.len
        if flow in _LAST_FLOW:
            return tuple(steps), relative, False
    return tuple(steps), relative, True


def _is_relative_branch(insn: Instruction, flow: int) -> bool:
    return flow in (
        FlowControl.UNCONDITIONAL_BRANCH,
        FlowControl.CONDITIONAL_BRANCH,
        FlowControl.CALL,
        FlowControl.XBEGIN_XABORT_XEND,
    ) and bool(insn.near_branch_target or insn.is_jcx_short or insn.is_loop)


def _move(idle: bytes, steps: tuple[int, ...], at: int, to: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Re-encode the instructions of a window one by one."""
    decoder = Decoder(64, idle, ip=at)
    out = bytearray()
    moves = []
    for step in steps:
        insn = decoder.decode()
        here = to + len(out)
        moves.append((step, len(out)))
        raw = idle[step : step + insn.len]
        if insn.is_ip_rel_memory_operand:
            place = decoder.get_constant_offsets(insn).displacement_offset
            # The stored displacement counts from the instruction's end, wherever in it the displacement stands.
            (distance,) = struct.unpack_from("<i", raw, place)
            distance += at + step - here
            if not -(2**31) <= distance < 2**31:
                raise Rejected("pc-relative operand is out of reach of the moved instruction", at=at + step)
            out += raw[:place] + struct.pack("<i", distance) + raw[place + 4 :]
        elif _is_relative_branch(insn, insn.flow_control):
            out += _move_branch(insn, at, here, to)
        else:
            out += raw
    return bytes(out), moves


def _move_branch(insn: Instruction, at: int, here: int, start: int) -> bytes:
    """Encode a direct branch to run at `here`; one to `at` leads to `start`."""
    if insn.near_branch_target == at:
        insn.near_branch64 = start
    elif insn.is_jmp_short or insn.is_jcc_short:
        insn.as_near_branch()  # always, so that the size does not depend on the distance
    if abs(insn.near_branch_target - here) >= _BRANCH_REACH:
        # BlockEncoder would jump through memory that it appends, and the next instruction would follow that.
        raise Rejected("branch target is out of reach of the moved instruction", at=insn.ip)
    block = BlockEncoder(64)
    block.add(insn)
    try:
        return bytes(block.encode(here))
    except ValueError as why:
        raise Rejected(f"branch cannot be moved ({why})", at=insn.ip) from why
