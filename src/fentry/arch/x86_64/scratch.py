"""Where r11 is not free although the psABI says so: functions whose entry or exit must not destroy it.

A slot uses r11 as its scratch register. By the psABI nothing of value is in it when a function begins or ends, and
code built for tracing (-pg, patchable entries) keeps to that. Other code does not always:

* gcc's -fipa-ra (on from -O1; off with -pg and -fpatchable-function-entry) lets a caller keep a value in r11 across
  the call of a function of the same file that is known not to touch it;
* Go passes an argument in r11, and so do a few pieces of assembly (retpoline thunks, __morestack).

Both show in the code: r11 is *read* where the nearest write lies on the other side of a call, or of the function's
beginning. So every read of r11 is followed backwards, against all paths, to a write. Few functions mention r11; only
those are decoded. A vectorised scan of the encodings that can name it (REX, VEX and EVEX forms) says which.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from iced_x86 import Code, Decoder, FlowControl, Instruction, InstructionInfoFactory, OpAccess, Register, RegisterExt

_Array = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]

_CHUNK = 8 << 20
_EARLY = 256  #: bytes of a function within which an argument is read or stored
_READS = frozenset({OpAccess.READ, OpAccess.READ_WRITE, OpAccess.COND_READ, OpAccess.READ_COND_WRITE})
_NEXT = FlowControl.NEXT
_BRANCHES = frozenset(
    {FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CONDITIONAL_BRANCH, FlowControl.XBEGIN_XABORT_XEND}
)
_STOPS = frozenset(
    {FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH, FlowControl.RETURN, FlowControl.EXCEPTION}
)
#: jmp *x(%rip), as linkage stubs begin: after endbr64, with or without a bnd prefix
_STUB = re.compile(rb"(?:\xf3\x0f\x1e\xfa)?\xf2?\xff\x25")
_LOW: Final = 3  #: r11 = extension bit + 3


def _table(*ranges: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    """Which of 256 opcodes lie in one of (first, one past the last, step)."""
    table = np.zeros(256, bool)
    for first, end, step in ranges:
        table[first:end:step] = True
    return table


# Opcode maps: SDM volume 2, tables.
#: opcodes that name register 3 in their low bits: push, pop, xchg, mov imm; bswap in the two-byte map
_NAMES = (_table((0x53, 0x60, 8), (0x93, 0x98, 8), (0xB3, 0xC0, 8)), _table((0xCB, 0xD0, 8)))
#: one-byte opcodes with a ModRM byte
_HAS_MODRM = _table(
    *((base, base + 4, 1) for base in range(0, 0x40, 8)),
    *((0x62, 0x64, 1), (0x69, 0x6C, 2), (0x80, 0x90, 1), (0xC0, 0xC2, 1), (0xC6, 0xC8, 1)),
    *((0xD0, 0xD4, 1), (0xD8, 0xE0, 1), (0xF6, 0xF8, 1), (0xFE, 0x100, 1)),
)


def _mentions(text: _Bytes) -> _Array:
    """Offsets of prefixes (REX, VEX3, EVEX) with which an instruction could name r11. A superset, sorted."""
    found = []
    for low in range(0, len(text), _CHUNK):
        code = np.zeros(min(_CHUNK, len(text) - low) + 8, np.uint8)
        part = text[low : low + len(code)]
        code[: len(part)] = part
        here = code[:-8]
        rex = np.flatnonzero((here & 0xF0 == 0x40) & (here & 7 != 0))
        prefix = code[rex]
        opcode, second = code[rex + 1], code[rex + 2]
        long = opcode == 0x0F
        longer = long & ((second == 0x38) | (second == 0x3A))
        named = np.where(long, _NAMES[1][second], _NAMES[0][opcode]) & (prefix & 1 != 0)
        place = rex + 2 + long + longer
        hit = _operands(code, place, prefix & 4 != 0, prefix & 2 != 0, prefix & 1 != 0) & (long | _HAS_MODRM[opcode])
        found.append(rex[named | hit] + low)
        for escape, modrm in ((0xC4, 4), (0x62, 5)):
            vex = np.flatnonzero(here == escape)
            bits = code[vex + 1]  # R X B, inverted, and the opcode map: 1..3 and, for EVEX, 5 and 6
            vex = vex[(bits & 0x18 == 0) & (bits & 7 != 0)]
            bits = code[vex + 1]
            hit = _operands(code, vex + modrm, bits & 0x80 == 0, bits & 0x40 == 0, bits & 0x20 == 0)
            found.append(vex[hit | (code[vex + 2] & 0x78 == 0x20)] + low)  # vvvv, inverted
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)


def _operands(
    code: _Bytes, place: _Array, reg: npt.NDArray[np.bool_], index: npt.NDArray[np.bool_], base: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Tell which ModRM (and SIB) bytes name r11, given the extension bits."""
    modrm, sib = code[place], code[place + 1]
    in_sib = (modrm & 7 == 4) & (modrm < 0xC0)
    named: npt.NDArray[np.bool_] = reg & ((modrm >> 3) & 7 == _LOW)
    named |= base & (np.where(in_sib, sib, modrm) & 7 == _LOW)
    named |= index & in_sib & ((sib >> 3) & 7 == _LOW)
    return named


@dataclass(slots=True)
class _Region:
    """A function, or what lies between two, decoded: as much as following r11 needs."""

    begin: int
    is_function: bool
    starts: list[int] = field(default_factory=list)
    stops: set[int] = field(default_factory=set)  #: indexes of instructions that never go on to the next
    calls: dict[int, int] = field(default_factory=dict)  #: index -> target offset; -1: anybody
    reads: dict[int, int] = field(default_factory=dict)  #: index -> bytes of r11 that are read
    writes: dict[int, int] = field(default_factory=dict)  #: index -> bytes of r11 that are written for certain
    sources: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  #: target -> indexes
    indirect: list[int] = field(default_factory=list)  #: indexes of indirect jumps
    leaves: set[int] = field(default_factory=set)  #: targets of jumps out of the region


class ScratchUse:
    """Which functions of a text find r11 in use.

    Args:
        text: the code.
        starts: sorted offsets of known functions.
        ends: end of the function at each of `starts`.
        calls: (source, target) offsets of all that could be a direct call, bogus ones included.
        jumps: the same of jumps.

    Attributes:
        inputs: offsets of functions that read r11 as they found it.
        kept: offsets of functions across whose call somebody keeps r11.
    """

    def __init__(
        self,
        text: bytes,
        starts: list[int],
        ends: dict[int, int],
        calls: tuple[_Array, _Array],
        jumps: tuple[_Array, _Array],
    ) -> None:
        self.inputs: set[int] = set()
        self.kept: set[int] = set()
        self._text = text
        self._starts = starts
        self._ends = ends
        self._known = set(starts)
        order = np.argsort(jumps[1], kind="stable")
        self._sources, self._targets = jumps[0][order], jumps[1][order]
        self._mentions = _mentions(np.frombuffer(text, np.uint8))
        self._decoder = Decoder(64, text)
        self._insn = Instruction()
        self._infos = InstructionInfoFactory()
        self._regions: dict[int, _Region] = {}
        self._spared: dict[int, bool] = {}
        self._done: dict[int, int] = {}  # offset of an instruction -> bytes of r11 followed from there
        for begin in self._worth_a_look(*calls):
            region = self._region(begin)
            for read in region.reads:
                self._follow(region, read)
        self._close()

    def _worth_a_look(self, sources: _Array, targets: _Array) -> list[int]:
        """Give the begins of regions in which r11 can be live where it matters."""
        edges = np.array(sorted({0, *self._starts, *self._ends.values()}), np.int64)
        owners = edges[np.searchsorted(edges, self._mentions, "right") - 1]
        begins, first, count = np.unique(owners, return_index=True, return_counts=True)
        # Kept across a call: written before it, read behind it, and the callee spares it.
        twice = begins[count > 1]
        callers = edges[np.searchsorted(edges, sources, "right") - 1]
        inside = np.isin(callers, twice, assume_unique=False) & np.isin(targets, np.array(self._starts, np.int64))
        callers, targets = callers[inside], targets[inside]
        sparing = np.array([to for to in np.unique(targets).tolist() if self._spares(to)], np.int64)
        found = set(callers[np.isin(targets, sparing)].tolist())
        # An input: met as it was, so the first mention is a read, and early.
        near = self._mentions[first] - begins < _EARLY
        for begin, mention in zip(begins[near].tolist(), self._mentions[first[near]].tolist(), strict=True):
            if begin in self._known and begin not in found and self._reads_first(begin, mention):
                found.add(begin)
        return sorted(found)

    def _reads_first(self, pos: int, mention: int) -> bool:
        """Tell whether the instruction at offset `mention` reads r11, or only looked as if it named it."""
        while pos <= mention:
            insn = self._decode(pos)
            after = pos + insn.len
            if after > mention:
                reads, writes = self._uses()
                return bool(reads or not writes)
            pos = after
        return True

    def _decode(self, pos: int) -> Instruction:
        self._decoder.position = pos
        self._decoder.ip = pos
        self._decoder.decode_out(self._insn)
        return self._insn

    def _begin(self, pos: int) -> int:
        """Give the begin of the region that `pos` lies in."""
        i = bisect_right(self._starts, pos) - 1
        if i < 0:
            return 0
        start = self._starts[i]
        return start if pos < self._ends[start] else self._ends[start]

    def _region(self, begin: int) -> _Region:
        """Decode the region at `begin`, once."""
        if begin in self._regions:
            return self._regions[begin]
        region = self._regions[begin] = _Region(begin, begin in self._known)
        i = bisect_right(self._starts, begin)
        end = min(self._starts[i] if i < len(self._starts) else len(self._text), len(self._text))
        if region.is_function:
            end = min(end, self._ends[begin])
        first, last = np.searchsorted(self._mentions, (begin, end))
        mentions = [*self._mentions[first:last].tolist(), len(self._text)]
        mention = 0
        insn, decode_next = self._insn, self._decoder.decode_out
        self._decoder.position = self._decoder.ip = pos = begin
        index = -1
        while pos < end:
            decode_next(insn)
            index += 1
            region.starts.append(pos)
            after = pos + insn.len
            flow = insn.flow_control
            if flow != _NEXT:
                self._note_flow(region, index, flow, begin, end)
            while mentions[mention] < pos:
                mention += 1
            if mentions[mention] < after:
                reads, writes = self._uses()
                if reads:
                    region.reads[index] = reads
                if writes:
                    region.writes[index] = writes
            pos = after
        return region

    def _note_flow(self, region: _Region, index: int, flow: int, begin: int, end: int) -> None:
        insn = self._insn
        if flow in _STOPS:
            region.stops.add(index)
        if flow in _BRANCHES:
            target = insn.near_branch_target
            if begin <= target < end:
                region.sources[target].append(index)
            else:
                region.leaves.add(target)
        elif flow == FlowControl.INDIRECT_BRANCH:
            region.indirect.append(index)
        elif flow == FlowControl.CALL:
            region.calls[index] = -1 if insn.code == Code.SYSCALL else insn.near_branch_target
        elif flow == FlowControl.INDIRECT_CALL:
            region.calls[index] = -1

    def _uses(self) -> tuple[int, int]:
        """Bytes of r11 that the instruction just decoded (reads, writes for certain)."""
        reads = writes = 0
        for used in self._infos.info(self._insn).used_registers():
            if RegisterExt.full_register(used.register) == Register.R11:
                size = RegisterExt.size(used.register)
                if used.access in _READS:
                    reads = max(reads, size)
                elif used.access == OpAccess.WRITE:
                    writes = 8 if size == 4 else max(writes, size)  # a 32-bit result clears the upper half
        return reads, writes

    def _follow(self, region: _Region, index: int) -> None:
        """Walk backwards from instruction `index`, which reads r11, to writes."""
        width = region.reads[index]
        work = [(region, index)]
        done = self._done
        while work:
            region, index = work.pop()
            pos = region.starts[index]
            if done.get(pos, 0) >= width:
                continue
            done[pos] = width
            if index == 0 and region.is_function:
                self.inputs.add(region.begin)
            before = [(region, i) for i in region.sources.get(pos, ())]
            if index and index - 1 not in region.stops:
                before.append((region, index - 1))
            if not before:
                before = [(region, i) for i in region.indirect] + self._from_elsewhere(pos)
            for origin, i in before:
                if origin.writes.get(i, 0) >= width:
                    continue
                target = origin.calls.get(i)
                if target is not None:
                    if not (self._spares(target) if target in self._known else self._may_spare(target)):
                        continue  # so r11 was not kept across it, and this path is never taken
                    self.kept.add(target)
                work.append((origin, i))

    def _from_elsewhere(self, pos: int) -> list[tuple[_Region, int]]:
        """Instructions of other regions that jump to `pos`: how the cold part of a function is entered."""
        found = []
        low, high = np.searchsorted(self._targets, (pos, pos + 1))
        for source in self._sources[low:high].tolist():
            region = self._region(self._begin(source))
            i = bisect_right(region.starts, source) - 1
            if i >= 0 and pos in region.leaves:
                found.append((region, i))
        return found

    def _may_spare(self, target: int) -> bool:
        """Tell whether code that is no known function may leave r11 alone.

        Of another module, or of a stub that leads there, a compiler knows nothing; anything else is believed.
        """
        return 0 <= target < len(self._text) and not _STUB.match(self._text, target)

    def _spares(self, target: int) -> bool:
        """Tell whether the known function at `target` may leave r11 alone, all that it calls included."""
        if target in self._spared:
            return self._spared[target]
        callers: defaultdict[int, list[int]] = defaultdict(list)
        destroys = []
        met = {target}
        work = [target]
        while work:
            function = work.pop()
            calls = self._calls_if_spared(function)
            if calls is None or not all(self._spared.get(to, True) for to in calls):
                destroys.append(function)
                continue
            for to in calls:
                callers[to].append(function)
                if to not in met and to not in self._spared and to in self._known:
                    met.add(to)
                    work.append(to)
        bad = set(destroys)
        while destroys:
            for caller in callers[destroys.pop()]:
                if caller not in bad:
                    bad.add(caller)
                    destroys.append(caller)
        self._spared.update((function, function not in bad) for function in met)
        return self._spared[target]

    def _calls_if_spared(self, begin: int) -> set[int] | None:
        """Targets that leave the function at `begin`, or None as soon as it destroys r11 or calls anybody."""
        end = min(self._ends[begin], len(self._text))
        first, last = np.searchsorted(self._mentions, (begin, end))
        mentions = [*self._mentions[first:last].tolist(), len(self._text)]
        mention = 0
        calls = set()
        insn, decode_next = self._insn, self._decoder.decode_out
        self._decoder.position = self._decoder.ip = pos = begin
        while pos < end:
            decode_next(insn)
            after = pos + insn.len
            flow = insn.flow_control
            if flow == _NEXT:
                pass
            elif flow == FlowControl.INDIRECT_CALL or insn.code == Code.SYSCALL:
                return None
            elif flow == FlowControl.CALL or flow in _BRANCHES:
                target = insn.near_branch_target
                if not begin <= target < end or flow == FlowControl.CALL:
                    if target not in self._known and not self._may_spare(target):
                        return None
                    calls.add(target)
            while mentions[mention] < pos:
                mention += 1
            if mentions[mention] < after and self._uses()[1]:
                return None
            pos = after
        return calls

    def _close(self) -> None:
        """Add what the kept functions call: they could not be kept across if that touched r11."""
        work = list(self.kept)
        while work:
            target = work.pop()
            if target in self._known:
                region = self._region(target)
                added = {*region.calls.values(), *region.leaves} - self.kept
                self.kept |= added
                work += added
