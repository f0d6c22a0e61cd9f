"""Slots, executed: registers kept, marks in order, and frame information that is true at every instruction."""

import io
import itertools
import random
import struct

import pytest
import unicorn
from elftools.dwarf.callframe import FDE, CallFrameInfo
from elftools.dwarf.structs import DWARFStructs

from fentry.arch import ReturnPlane, Sled, SlotPlan, SlotShape, UnwindInfo
from fentry.arch.x86_64 import ARCH, slot
from fentry.engine.ops import Op
from fentry.errors import EngineBug, OutOfReach, Unsupported
from fentry.program.ir import Spec
from fentry.record.layout import Kind
from tests.program.bench import STOP, U64, Bench

SLED = Sled("sled", 5, b"\x90" * 5, 5, "stack")
JUMP = Sled("entry-jump", 5, bytes.fromhex("554889e55d"), 5, moved=True)
PLANE = ReturnPlane(off=0x2000_0000_0000 - 0x7800_0000_0000 & U64, low=0x7800_0000_0000, size=1 << 43)
RESUME = 0x4800_0000


def graph(n=0):
    return Op(f"graph{n}", entry=Spec("e", stack=True), exit=Spec("x", exit=True, stack=True))


def walk(code):
    """(offset, bytes) of each instruction up to the fill."""
    at = 0
    while at < len(code):
        size = ARCH.length(code[at : at + 15])
        assert size
        yield at, code[at : at + size]
        at += size


@pytest.mark.parametrize(
    "shape", list(itertools.product(range(4), range(4), ["sled", "entry-jump", "fentry"])), ids=str
)
def test_marks_are_the_return_addresses_of_calls(shape):
    """A layout holds wherever the slot is, and its offsets are those of the emitted calls."""
    entry, exit_, form = shape
    layout = ARCH.slot_layout(SlotShape(entry, exit_, form))
    assert layout.stride & (layout.stride - 1) == 0
    marks = [*layout.entry_marks, *layout.exit_marks, *layout.tail_marks, *layout.plain_marks, *layout.unwound_marks]
    assert len(set(marks)) == len(marks) == entry + exit_ + (2 * entry + exit_ if exit_ else 0)
    for at, far in ((0x10000, 0x7000_0000), (0x7000_0000, 0x10000)):
        sled = Sled(form, 5, JUMP.idle, 5, moved=form == "entry-jump")
        plan = SlotPlan(
            at, far, sled, far + 8, (far,) * entry, (far,) * exit_,
            plane=PLANE if exit_ else None, resume_unwind=RESUME, unwound=(far,) * exit_,
        )  # fmt: skip
        code = ARCH.slot(plan)
        assert len(code) == layout.stride
        returns = {o + 5 for o, insn in walk(code) if insn[0] == 0xE8}
        assert set(marks) == returns - {layout.hook}
        if exit_:
            assert layout.hook == layout.call + 5
            assert layout.hook in returns


def test_refusals():
    with pytest.raises(Unsupported, match="behind the prologue"):
        ARCH.slot_layout(SlotShape(1, 1, "mcount"))
    with pytest.raises(OutOfReach):
        ARCH.slot(SlotPlan(0x1000, 0x2000, SLED, 0x2005, (1 << 40,)))
    for plane in (None, ReturnPlane(0, 0, 3 << 20), ReturnPlane(0, 4096, 1 << 20), ReturnPlane(0, 1 << 40, 1 << 20)):
        with pytest.raises(EngineBug, match="aligned power-of-two"):
            ARCH.slot(SlotPlan(0x1000, 0x2000, SLED, 0x2005, (0x3000,), (0x3000,), plane=plane))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("form", ["sled", "fentry", "mcount", "entry-jump"])
def test_entry_only(form, count):
    """Every form: all registers and the flags' users are kept, stack and stack arguments do not move."""
    bench = Bench("x86_64")
    ops = tuple(Op(f"o{n}", entry=Spec("e", stack=True)) for n in range(count))
    code = bytes.fromhex("55 4889e5 5d c3") if form == "entry-jump" else b""
    f = bench.function("f", form=form, code=code)
    bench.arm([(f, ops)])
    for seed in range(3):
        bench.call(f, seed=seed)
    assert [o.name for o, _ in bench.story()] == 3 * [o.name for o in ops]
    assert {e.kind for _, e in bench.story()} == {Kind.ENTRY}


@pytest.mark.parametrize("entries", [0, 1, 3])
@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize("form", ["sled", "entry-jump"])
def test_hooked(form, entries, exits):
    """The body finds its arguments where they were, relative to rsp; its return value passes untouched."""
    bench = Bench("x86_64")
    ops = tuple(Op(f"e{n}", entry=Spec("e", stack=True)) for n in range(entries))
    ops += tuple(Op(f"x{n}", exit=Spec("x", exit=True, stack=True)) for n in range(exits))
    code = bytes.fromhex("55 4889e5 5d c3") if form == "entry-jump" else b""
    f = bench.function("f", form=form, code=code)
    (table,) = bench.arm([(f, ops)])
    body = bench.islands[0].bodies[f.at]
    rnd = random.Random(7)
    above = rnd.randbytes(64)
    seen = []

    def at_body():
        sp = bench.core["rsp"]
        seen.append((sp, bench.core.read(sp + 8, 64), bench.core.word(sp)))

    bench.core.watch(body, at_body)
    bench.core.write(bench.thread.top + 8, above)
    for seed in range(3):
        bench.call(f, seed=seed)
    assert seen == 3 * [(bench.thread.top, above, table.slot(0) + table.layout.hook)]
    # entries newest first, exits in the opposite order
    once = [f"e{n}" for n in range(entries)] + [f"x{n}" for n in reversed(range(exits))]
    assert [o.name for o, _ in bench.story()] == 3 * once
    assert bench.core.word(bench.thread.top + bench.plane.off & U64) == STOP


# -- call frame information -------------------------------------------------------------------------------


def rows_of(info, at):
    """{slot address: [(offset, CFA register, CFA offset, rule of the return address)]} of an .eh_frame_hdr."""
    assert info[:4] == b"\x01\x1b\x03\x3b"
    to_frames, count = struct.unpack_from("<iI", info, 4)
    frames = 4 + to_frames
    table = [struct.unpack_from("<ii", info, 12 + 8 * n) for n in range(count)]
    assert table == sorted(table)
    structs = DWARFStructs(little_endian=True, dwarf_format=32, address_size=8)
    data = info[frames:]
    cfi = CallFrameInfo(io.BytesIO(data), len(data), at + frames, structs, for_eh_frame=True)
    out = {}
    listed = {at + offset: at + fde for offset, fde in table}
    for entry in cfi.get_entries():
        if not isinstance(entry, FDE):
            continue
        begin = entry.header["initial_location"]
        assert listed.pop(begin) == at + frames + entry.offset
        table_ = entry.get_decoded().table
        rows = [(line["pc"] - begin, line["cfa"].reg, line["cfa"].offset, line[16]) for line in table_]
        out[begin] = (entry, rows)
    assert not listed
    return out


def unwind(rows, offset, core):
    """Return (CFA, return address) that the row for `offset` gives with the core's registers and memory."""
    _, register, plus, rule = [r for r in rows if r[0] <= offset][-1]
    assert register == 7
    cfa = core["rsp"] + plus
    if rule.type == "OFFSET":
        return cfa, core.word(cfa + rule.arg)
    assert rule.type == "EXPRESSION"
    expression = bytes(rule.arg)
    assert (expression[0], expression[9:]) == (0x0E, b"\x22")  # const8u, plus
    return cfa, core.word(cfa + int.from_bytes(expression[1:9], "little") & U64)


@pytest.mark.parametrize("count", [1, 2])
def test_unwinders_see_the_truth_at_every_instruction(count):
    """Emulated step by step: CFA and return address are right before each instruction of each road through a slot."""
    bench = Bench("x86_64")
    ops = tuple(graph(n) for n in range(count))
    leaf = bench.function("leaf")
    jumper = bench.function("jumper", bench.jump(leaf))
    (table,) = bench.arm([(s, ops) for s in (leaf, jumper)], resume_unwind=RESUME, personality=0x4900_0000)
    (found,) = bench.islands[0].unwind
    island = bench.islands[0]
    info = island.code[found.header - island.at : found.header - island.at + 4096]
    frames = rows_of(info[: found.info - found.header], found.header)
    assert sorted(frames) == [table.slot(0), table.slot(1)]
    visited = set()
    truth = {}

    def check(_uc, address, _size, _user):
        begin = address & -table.layout.stride
        visited.add(address - begin)
        cfa, back = unwind(frames[begin][1], address - begin, bench.core)
        if back == table.slot(1) + table.layout.hook and begin == table.slot(0):
            # tail-called: one more frame of the same CFA, the hook of the function that jumped here
            sp = bench.core["rsp"]
            bench.core["rsp"] = cfa
            cfa, back = unwind(frames[table.slot(1)][1], table.layout.hook - 1, bench.core)
            bench.core["rsp"] = sp
        assert (cfa, back) == (truth["cfa"], STOP), f"at offset {address - begin:#x}"

    bench.core.uc.hook_add(unicorn.UC_HOOK_CODE, check, None, table.base, table.base + 2 * table.layout.stride - 1)
    for thread in (bench.thread, bench.new_thread(mirrored=False)):
        truth["cfa"] = thread.top + 8
        for site in (leaf, jumper):
            bench.call(site, thread)
    # an exception passes: the unwinder enters the pad with the registers of the hooked frame
    truth["cfa"] = bench.thread.top + 8
    seen = {}

    def resumed():
        seen.update(rdi=bench.core["rdi"], sp=bench.core["rsp"])
        bench.core.uc.emu_stop()

    bench.core.map(RESUME, 4096)
    bench.core.watch(RESUME, resumed)
    bench.enter(bench.thread)
    bench.core["rsp"] = truth["cfa"]
    bench.core["rax"] = 0x1234_5678
    bench.core.put(bench.thread.top, 0xDEAD)
    bench.core.put(bench.thread.top + bench.plane.off & U64, STOP)
    bench.core.uc.emu_start(table.slot(0) + table.layout.pad, STOP, count=1000)
    bench.leave(bench.thread)
    assert seen["rdi"] == 0x1234_5678
    assert (seen["sp"] + 8) % 16 == 0  # as the ABI wants it at a function's entry
    back = bench.core.word(seen["sp"]) - 1  # where the unwinder looks
    bench.core["rsp"] = seen["sp"] + 8
    assert unwind(frames[table.slot(0)][1], back - table.slot(0), bench.core) == (truth["cfa"], STOP)
    kinds = [e.kind for o, e in bench.story() if o is ops[0]]
    assert kinds == [Kind.ENTRY, Kind.EXIT, Kind.ENTRY, Kind.TAIL, Kind.EXIT, *[Kind.PLAIN] * 3, Kind.UNWOUND]
    # every instruction was seen, but for the fill
    code = island.code[table.slot(0) - island.at :][: table.layout.stride]
    assert {o for o, insn in walk(code.rstrip(b"\xcc"))} == visited


def test_an_exception_is_sent_to_the_pad_and_nothing_else_is():
    shape = SlotShape(1, 1, "sled")
    layout = ARCH.slot_layout(shape)
    at, slots = 0x9000_0000, [0x8000_0000 + n * layout.stride for n in range(3)]
    info = ARCH.frame_info(shape, slots, at, UnwindInfo(PLANE, 0x7777_0000))
    frames = rows_of(info, at)
    assert sorted(frames) == slots
    for begin, (fde, _) in frames.items():
        assert fde.header["address_range"] == layout.stride
        assert fde.cie.augmentation_dict["personality"].function == 0x7777_0000
        lsda = info[fde.lsda_pointer - at :]
        assert lsda[:3] == b"\xff\xff\x01"  # no LPStart, no types, uleb128 call sites
        numbers, value, shift = [], 0, 0
        for byte in lsda[4 : 4 + lsda[3]]:
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                numbers.append(value)
                value = shift = 0
        assert numbers == [layout.call, 5, layout.pad, 0], hex(begin)


def test_frame_information_is_not_made_where_nothing_is_hooked():
    assert ARCH.frame_info(SlotShape(1, 0, "sled"), [0x1000], 0x2000, UnwindInfo(PLANE)) == b""
    assert ARCH.frame_info(SlotShape(1, 1, "sled"), [], 0x2000, UnwindInfo(PLANE)) == b""
    assert ARCH.frame_info(SlotShape(1, 1, "sled"), [0x1000], 0x2000, UnwindInfo(None)) == b""


@pytest.mark.parametrize("count", [1, 2, 4])
def test_frame_information_fits_the_room_that_islands_give_it(count):
    from fentry.engine.island import FRAME_INFO_ROOM

    shape = SlotShape(count, count, "sled")
    layout = ARCH.slot_layout(shape)
    for n in (1, 100):
        slots = [0x8000_0000 + i * layout.stride for i in range(n)]
        info = ARCH.frame_info(shape, slots, 0x9000_0000, UnwindInfo(PLANE, 0x7777_0000))
        assert len(info) <= n * FRAME_INFO_ROOM + 4096


# -- signal frames ----------------------------------------------------------------------------------------


def test_signal_frames_are_told_from_noise():
    rnd = random.Random(3)
    noise = rnd.randbytes(1 << 16)
    assert slot.saved_pcs(noise) == []
    assert slot.saved_pcs(b"") == []
    assert slot.saved_pcs(bytes(4096)) == []
    frame = [0] * 40
    frame[22], frame[23], frame[24] = 0x401234, 0x246, 0x002B_0000_0000_0033
    data = noise[:800] + struct.pack("<40Q", *frame) + noise[800:]
    assert slot.saved_pcs(data) == [(800 + 22 * 8, 0x401234)]
