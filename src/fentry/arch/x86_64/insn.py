"""Reader of x86_64: lengths, text for people, and the plan of an entry jump.

The decoder is iced-x86. What is ours is the question it does not answer: may these first bytes of a function be
overwritten by a 5-byte jump? The *window* is the whole instructions that the jump touches. It may move when

* each of its instructions can run elsewhere (no call, system call, trap, second landing pad), and
* nothing in the text can arrive at its bytes 1..4, where there will be the middle of the jump.

The second is asked of a whole text at once. A superset scan looks at *every* byte offset as if a branch began there
and keeps those whose target would hurt: NumPy does it at some 10 ns a byte, and of a large library a few thousand
*suspects* remain. Only those are decoded: from the start of their function, or, where that is unknown or far, from 15
consecutive offsets a little before, one of which is an instruction's start because no instruction is longer than 15
bytes. A suspect that lies on such a chain counts as a branch; in doubt (undecodable surroundings) it counts too.

Jump tables: every address that an instruction takes relative to rip, and every absolute table operand, is looked at as
the base of a table of 4-byte offsets or 8-byte addresses, for as long as its entries lie in the text.

What is not seen: code that is made at run time and branches into the middle of a prologue, and tables whose base is
computed by arithmetic. No compiler emits either for the first five bytes of a function.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
from iced_x86 import Code, Decoder, FlowControl, Formatter, FormatterSyntax, Instruction

from fentry.arch import Refusal, Sled
from fentry.arch.x86_64 import facts
from fentry.errors import TraceError

_NEXT = FlowControl.NEXT
_RELATIVE_FLOW = frozenset(
    {FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CONDITIONAL_BRANCH, FlowControl.XBEGIN_XABORT_XEND}
)
_LAST_FLOW = frozenset({FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH, FlowControl.RETURN})
_SYSTEM_CALLS = frozenset({Code.SYSCALL, Code.SYSENTER, Code.INT_IMM8})
_PADDING = re.compile(facts.PADDING, re.DOTALL)
#: bytes that may stand between an instruction's start and its opcode: legacy prefixes and REX
_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3" + bytes(range(0x40, 0x50)))

# Reasons. Each is one short phrase that never changes: they are shown, counted and compared.
NO_SIZE: Final = Refusal("function of unknown size")
OUTSIDE: Final = Refusal("function outside the text")
TOO_SHORT: Final = Refusal("function shorter than a 5-byte jump")
RUNS_OVER: Final = Refusal("instruction runs past the end of the function")
INVALID: Final = Refusal("invalid instruction in the window")
CALL: Final = Refusal("call in the window")
SYSTEM_CALL: Final = Refusal("system call in the window")
TRAP: Final = Refusal("trap instruction in the window")
PRIVILEGED: Final = Refusal("privileged instruction in the window")
LANDING_PAD: Final = Refusal("second landing pad in the window")
NARROW: Final = Refusal("32-bit pc-relative operand in the window")
FAR: Final = Refusal("far branch in the window")
CODE_FOLLOWS: Final = Refusal("code follows a jump or return in the window")
ENTRY_INSIDE: Final = Refusal("another function starts in the window")
BRANCH: Final = Refusal("branch into the window")
LOOP: Final = Refusal("loop back to the entry")
TABLE: Final = Refusal("jump table leads into the window")
TAKEN: Final = Refusal("address inside the window is taken")


@dataclass(frozen=True, slots=True)
class Window(Sled):
    """A planned entry jump, with what the relocator would otherwise have to decode again."""

    steps: tuple[int, ...] = ()  #: offset of each instruction to be moved
    relative: bool = False  #: one of them depends on where it is
    falls: bool = True  #: the last one goes on behind the window


def length(code: bytes) -> int:
    """Length in bytes of the instruction at the start of `code`; 0 if it is not one."""
    if not code:
        return 0
    insn = Decoder(64, code[: facts.INSN_MAX]).decode()
    return 0 if insn.is_invalid else int(insn.len)


def landing_pad(code: bytes) -> int:
    """Size of the landing pad (endbr64) at the start of `code`, or 0."""
    return len(facts.LANDING_PAD) if code.startswith(facts.LANDING_PAD) else 0


def disassemble(code: bytes, at: int) -> list[tuple[int, bytes, str]]:
    """(address, bytes, text) of each instruction, in AT&T syntax as objdump prints by default; "(bad)" is one byte."""
    formatter = Formatter(FormatterSyntax.GAS)
    formatter.branch_leading_zeros = False
    formatter.uppercase_hex = False
    formatter.rip_relative_addresses = True
    decoder = Decoder(64, code, ip=at)
    insn = Instruction()
    out = []
    pos = 0
    while pos < len(code):
        decoder.position = pos
        decoder.ip = at + pos
        decoder.decode_out(insn)
        size = 1 if insn.is_invalid else insn.len
        text = "(bad)" if insn.is_invalid else formatter.format(insn)
        out.append((at + pos, code[pos : pos + size], text))
        pos += size
    return out


def branch_targets(code: bytes, at: int) -> list[tuple[int, int]]:
    """(from, to) of every direct branch or call in straight-line decoded `code`; undecodable bytes are passed over."""
    decoder = Decoder(64, code, ip=at)
    out = []
    for insn in decoder:
        flow = insn.flow_control
        if flow in _RELATIVE_FLOW or flow == FlowControl.CALL:
            to = insn.near_branch_target
            if to:
                out.append((insn.ip, to))
    return out


# -- one window ---------------------------------------------------------------------------------------------


class _Reader:
    """One decoder over a whole text: making one per function would cost more than decoding."""

    def __init__(self, text: bytes, at: int) -> None:
        self.text = text
        self.at = at
        self._decoder = Decoder(64, text, ip=at)
        self._insn = Instruction()

    def decode(self, pos: int) -> Instruction:
        """Decode at offset `pos`; the same object is filled again by the next call."""
        self._decoder.position = pos
        self._decoder.ip = (self.at + pos) & (2**64 - 1)
        self._decoder.decode_out(self._insn)
        return self._insn

    def window(self, start: int, end: int, room: int) -> Window | Refusal:
        """Plan the window at offset `start` of a function that ends at `end`, with padding up to `room`."""
        need = start + facts.BRANCH_SIZE
        pos = start
        steps = []
        relative = False
        falls = True
        while pos < need and falls:
            if pos >= end:
                return TOO_SHORT
            insn = self.decode(pos)
            flow = insn.flow_control
            if flow != _NEXT:
                refusal = _flow_verdict(insn, flow)
                if refusal:
                    return refusal
                relative = relative or flow in _RELATIVE_FLOW
                falls = flow not in _LAST_FLOW
            elif insn.is_privileged:
                return PRIVILEGED
            elif insn.code == Code.ENDBR64:
                return LANDING_PAD
            if insn.is_ip_rel_memory_operand:
                if self._is_narrow(pos):
                    return NARROW
                relative = True
            steps.append(pos - start)
            pos += insn.len
        if pos > end:
            return RUNS_OVER
        if pos < need:
            if pos < end:
                return CODE_FOLLOWS
            while pos < need:
                pad = _PADDING.match(self.text, pos)
                if pad is None or need > room:
                    return TOO_SHORT
                pos = pad.end()
            pos = need
        size = pos - start
        return Window("entry-jump", size, self.text[start:pos], size, "", True, tuple(steps), relative, falls)

    def _is_narrow(self, pos: int) -> bool:
        """Tell whether an address-size prefix makes the operand relative to eip."""
        while self.text[pos] in _PREFIXES:
            if self.text[pos] == 0x67:
                return True
            pos += 1
        return False

    def begins(self, pos: int, known: int | None) -> bool:
        """Tell whether an instruction whose opcode is at offset `pos` can begin there in the linear code.

        Args:
            pos: offset of an opcode byte (prefixes may stand before it).
            known: offset of an instruction's start not far before `pos`, or None.
        """
        if known is not None:
            first, chains = known, 1
        else:
            first, chains = max(0, pos - 96), facts.INSN_MAX
        seen: set[int] = set()
        alive = False
        for start in range(first, min(first + chains, pos + 1)):
            here = start
            while here <= pos and here not in seen:
                seen.add(here)
                insn = self.decode(here)
                if insn.is_invalid:
                    break
                after = here + insn.len
                if after > pos:
                    alive = True
                    if all(byte in _PREFIXES for byte in self.text[here:pos]):
                        return True
                here = after
        return not alive  # nothing decodes up to here: believe the worst


def _flow_verdict(insn: Instruction, flow: int) -> Refusal | None:
    """Refuse instructions that change the flow in a way that cannot move."""
    if insn.is_invalid:
        return INVALID
    if insn.code in _SYSTEM_CALLS:
        # The kernel gives its address to signal handlers and restarts it there: libcs compare that address.
        return SYSTEM_CALL
    if flow in (FlowControl.CALL, FlowControl.INDIRECT_CALL):
        # Its return address would lie in the moved copy, where no unwinder knows a frame, and where a thread
        # that sleeps in the callee would come back to after the copy is gone.
        return CALL
    if flow in (FlowControl.INTERRUPT, FlowControl.EXCEPTION):
        return TRAP
    if insn.is_jmp_far or insn.is_jmp_far_indirect:
        return FAR
    return PRIVILEGED if insn.is_privileged else None


# -- the whole text -------------------------------------------------------------------------------------------

_Array = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]

_REL8, _REL32, _TWO_BYTE, _XBEGIN, _LEA = 1, 2, 3, 4, 5
_CALLS, _JUMPS, _ADDRESSES = 1, 2, 3  #: what a candidate does with its target


def _opcode_classes() -> _Bytes:
    table = np.zeros(256, np.uint8)
    table[0x70:0x80] = _REL8  # jcc
    table[0xE0:0xE4] = _REL8  # loopne loope loop jrcxz
    table[0xEB] = _REL8  # jmp
    table[0xE8:0xEA] = _REL32  # call, jmp
    table[0x0F] = _TWO_BYTE  # jcc rel32
    table[0xC7] = _XBEGIN
    table[0x8D] = _LEA
    return table


_CLASSES = _opcode_classes()
_CHUNK = 8 << 20


def _int32(code: _Bytes, pos: _Array) -> _Array:
    """Read the little-endian int32 at each of `pos`."""
    value = code[pos].astype(np.uint32)
    for byte in (1, 2, 3):
        value |= code[pos + byte].astype(np.uint32) << np.uint32(8 * byte)
    return value.view(np.int32).astype(np.int64)


def _candidates(text: _Bytes) -> Iterator[tuple[int, _Array, _Array]]:
    """Give (kind, opcode offsets, target offsets) of all that could be a branch or take an address, at any offset."""
    size = len(text)
    for low in range(0, size, _CHUNK):
        code = text[low : low + _CHUNK + 8]
        shut = min(_CHUNK, len(code))
        classes = _CLASSES[code[:shut]]
        found = np.flatnonzero(classes)
        kinds = classes[found]

        pos = found[kinds == _REL8]
        pos = pos[pos + 2 <= len(code)]
        yield _JUMPS, pos + low, pos + low + 2 + code[pos + 1].view(np.int8)

        pos = found[kinds == _REL32]
        pos = pos[pos + 5 <= len(code)]
        to = pos + low + 5 + _int32(code, pos + 1)
        calls = code[pos] == 0xE8
        yield _CALLS, pos[calls] + low, to[calls]
        yield _JUMPS, pos[~calls] + low, to[~calls]

        pos = found[(kinds == _TWO_BYTE) | (kinds == _XBEGIN)]
        pos = pos[pos + 6 <= len(code)]
        second = code[pos + 1]
        pos = pos[((code[pos] == 0x0F) & (second & 0xF0 == 0x80)) | ((code[pos] == 0xC7) & (second == 0xF8))]
        yield _JUMPS, pos + low, pos + low + 6 + _int32(code, pos + 2)

        pos = found[kinds == _LEA]
        pos = pos[pos + 6 <= len(code)]
        pos = pos[code[pos + 1] & 0xC7 == 0x05]
        yield _ADDRESSES, pos + low, pos + low + 6 + _int32(code, pos + 2)


def suspects(text: bytes, at: int, lo: int, hi: int) -> list[tuple[int, int]]:
    """Find what may branch into [lo, hi): (source, target) addresses, possibly bogus, in no order.

    A superset: each byte offset of `text` is taken for the start of a branch, call, xbegin or rip-relative lea.
    """
    out = []
    for _, source, target in _candidates(np.frombuffer(text, np.uint8)):
        hits = np.flatnonzero((target >= lo - at) & (target < hi - at))
        out += [(at + int(source[i]), at + int(target[i])) for i in hits]
    return out


def entry_window(code: bytes, at: int, size: int, room: int) -> Sled | Refusal:
    """Plan the entry jump of one function, seeing only that function's bytes.

    The patched bytes begin behind the landing pad: at ``at + landing_pad(code)``. See :func:`plan_entries`, which also
    sees branches and tables from elsewhere.
    """
    return plan_entries(code, at, [(at, size, room)])[0]


def plan_entries(
    text: bytes, at: int, functions: Sequence[tuple[int, int, int]], read: Callable[[int, int], bytes] | None = None
) -> list[Sled | Refusal]:
    """Plan the entry jumps of many functions of one text at once.

    Args:
        text: all code that can branch to these functions directly, best a whole executable segment.
        at: address of ``text[0]``.
        functions: (address, size, room) each; room = bytes from the address that belong to the function or to padding.
            All functions that are known should be listed, not only those to be traced: each start is a hint.
        read: gives bytes at an address of the image, for jump tables; fewer than asked or a TraceError where there are
            none. Relocated pointers in it must agree with `at`.

    Returns: for each function the Sled or a Refusal. The patched bytes begin behind the landing pad of the function, at
        ``address + landing_pad(text[address - at:])``.
    """
    reader = _Reader(text, at)
    plans: list[Sled | Refusal] = []
    starts: list[int] = []  # offset of each window, or -1
    pad = facts.LANDING_PAD
    for address, size, room in functions:
        begin = address - at
        end = begin + size
        if size <= 0:
            plan: Window | Refusal = NO_SIZE
        elif begin < 0 or end > len(text):
            plan = OUTSIDE
        else:
            start = begin + len(pad) if text.startswith(pad, begin) else begin
            plan = reader.window(start, end, min(begin + max(size, room), len(text)))
        plans.append(plan)
        starts.append(start if isinstance(plan, Window) else -1)
    planned = np.array(sorted({start for start in starts if start >= 0}), np.int64)
    if not len(planned):
        return plans
    ends: dict[int, int] = {}
    for address, size, _ in functions:
        begin = address - at
        if 0 <= begin < len(text):
            ends[begin] = max(ends.get(begin, begin), min(begin + size, len(text)))
    known = np.array(sorted(ends), np.int64)
    refused = _arrivals(reader, planned, known, ends, read)
    return [refused.get(start, plan) for start, plan in zip(starts, plans, strict=True)]


def _arrivals(
    reader: _Reader,
    planned: _Array,
    known: _Array,
    ends: dict[int, int],
    read: Callable[[int, int], bytes] | None,
) -> dict[int, Refusal]:
    """Find the windows that something arrives in: {offset of the window: why}.

    Args:
        reader: the text.
        planned: sorted offsets of the windows.
        known: sorted offsets of functions' starts.
        ends: end of the function at each of `known`.
        read: as for :func:`plan_entries`.
    """
    text = np.frombuffer(reader.text, np.uint8)
    inside = np.zeros(len(text) + facts.BRANCH_SIZE, bool)
    for offset in range(1, facts.BRANCH_SIZE):
        inside[planned + offset] = True
    at_start = np.zeros(len(text), bool)
    at_start[planned] = True
    refused: dict[int, Refusal] = {}

    def window_of(target: int) -> int:
        return int(planned[np.searchsorted(planned, target) - 1])

    def refuse(target: int, why: Refusal) -> None:
        refused.setdefault(window_of(target), why)

    # After this no two accepted windows overlap, so the nearest window before a target is the one it is inside of.
    for start in (*known[inside[known]], *planned[inside[planned]]):
        refuse(start, ENTRY_INSIDE)

    starts = known.tolist()
    bases = []
    for kind, source, target in _candidates(text):
        if kind == _ADDRESSES and read is not None:
            bases.append(target)
        within = (target >= 0) & (target < len(text))
        source, target = source[within], target[within]
        for i in np.flatnonzero(inside[target]).tolist():
            pos, to = int(source[i]), int(target[i])
            window = window_of(to)
            if window not in refused and reader.begins(pos, _known_start(starts, pos)):
                refused[window] = TAKEN if kind == _ADDRESSES else BRANCH
        if kind != _JUMPS:
            continue
        # A jump back to the entry from the same function is a loop, not a call: the patched jump would count every
        # round. From elsewhere it is a tail call, and counts.
        # A loop inside the window moves with it.
        loops = np.flatnonzero(at_start[target] & (source >= target + facts.BRANCH_SIZE))
        owner = known[np.searchsorted(known, target[loops], "right") - 1]
        for i, begin in zip(loops.tolist(), owner.tolist(), strict=True):
            pos, to = int(source[i]), int(target[i])
            if pos < ends[begin] and to not in refused and reader.begins(pos, _known_start(starts, pos)):
                refused[to] = LOOP
    if read is not None:
        for target in _table_entries(reader, text, bases, read):
            for entry in target[inside[target]].tolist():
                refuse(entry, TABLE)
    return refused


def _known_start(starts: list[int], pos: int) -> int | None:
    """Give the nearest function start at or before `pos`, if linear decoding from there is cheap."""
    i = bisect_right(starts, pos)
    return starts[i - 1] if i and pos - starts[i - 1] <= 256 else None


# -- jump tables ------------------------------------------------------------------------------------------------

_TABLE_READ = 4096  #: bytes read at a time
_TABLE_LIMIT = 1 << 18  #: bytes; no compiler's jump table is larger
#: jmp *disp32(,reg,8) and mov disp32(,reg,8),reg: tables of absolute addresses, as position-dependent code uses them
_ABSOLUTE = re.compile(rb"(?:\xff\x24|\x8b[\x04\x0c\x14\x1c\x24\x2c\x34\x3c])[\xc5-\xfd](....)", re.DOTALL)


def _table_entries(
    reader: _Reader, text: _Bytes, bases: list[_Array], read: Callable[[int, int], bytes]
) -> Iterator[_Array]:
    """Give target offsets of everything that looks like a jump table of this text."""
    at, size = reader.at, len(text)

    def fetch(address: int, count: int) -> bytes:
        """Read what there is of `count` bytes: images and targets refuse a range that is not there to its end."""
        try:
            data = read(address, count)
        except TraceError:
            data = b""
        half = count // 2
        if len(data) == count or half < 4:
            return data
        left = fetch(address, half)
        return left + fetch(address + half, count - half) if len(left) == half else left

    def run(base: int, width: int, stop: int) -> Iterator[_Array]:
        """Follow a table from `base` (an offset from `at`) to `stop`, while its entries lie in the text."""
        for part in range(base, stop, _TABLE_READ):
            want = min(_TABLE_READ, stop - part)
            data = fetch(at + part, want)
            short = len(data) < want
            data = data[: len(data) // width * width]
            if width == 4:
                entries = np.frombuffer(data, "<i4").astype(np.int64) + base
            else:
                entries = (np.frombuffer(data, "<u8") - np.uint64(at)).view(np.int64)
            wrong = np.flatnonzero((entries < 0) | (entries >= size))
            if len(wrong):
                entries = entries[: wrong[0]]
            if len(entries):
                yield entries
            if len(wrong) or short:
                return

    offsets, pointers = [], []
    for base in np.unique(np.concatenate(bases)).tolist() if bases else ():
        head = fetch(at + base, 8)
        if len(head) >= 4 and 0 <= base + int.from_bytes(head[:4], "little", signed=True) < size:
            offsets.append(base)
        if len(head) >= 8 and 0 <= int.from_bytes(head[:8], "little") - at < size:
            pointers.append(base)
    pointers += [int.from_bytes(match[1], "little", signed=True) - at for match in _ABSOLUTE.finditer(reader.text)]
    for width, heads in ((4, offsets), (8, sorted(set(pointers)))):
        # Tables lie one behind the other: where the next one begins, this one has ended.
        for base, after in pairwise([*heads, 2**63]):
            yield from run(base, width, min(after, base + _TABLE_LIMIT))
