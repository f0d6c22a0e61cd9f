"""Slots with the programs that really run in them: rings, marks, registers, and what an event costs."""

import struct

import pytest

from fentry.arch import SlotPlan, SlotShape
from fentry.arch.riscv64 import ARCH, facts
from fentry.program.compile import compile_programs
from fentry.program.context import CONTEXT, NO_KEY, Layout
from fentry.program.ir import Parent, Spec
from fentry.record import layout as ring
from tests.arch.riscv64.guest import BUILDS, load_program, run_program
from tests.arch.riscv64.machine import OFF, U64, Machine
from tests.arch.riscv64.test_slot import PLANE, SLED, TOP

REGION, CONTEXTS, CLOCK = 0x10_0000_0000, 0x11_0000_0000, 0x12_0000_0000
CODE, SLOTS, CONSTS = 0x4000_0000, 0x4010_0000, 0x400F_0000
NRINGS, RING = 2, 1 << 20
EVERY = {*facts.X[1:], *facts.F}

ENTRY = Spec("entry", stack=True)
ENTRY_PARENT = Spec("entry_parent", stack=True, parent=Parent.NEXT)
EXIT = Spec("exit", exit=True, stack=True, retval=True)


def session(machine, specs, clock="memory"):
    """Map an empty region, contexts and a clock; give the programs' addresses."""
    layout = Layout(
        REGION, NRINGS, RING, CONTEXTS, clock, clock_at=CLOCK, shadow=OFF, plane=1 << 36, system_calls=False
    )
    machine.map(REGION, ring.region_size(NRINGS, RING))
    machine.map(CONTEXTS, NRINGS * CONTEXT)
    for n in range(NRINGS):
        machine.write(CONTEXTS + n * CONTEXT, struct.pack("<Q", NO_KEY))
    machine.write(CLOCK, struct.pack("<Q", 77))
    for n in range(NRINGS):
        machine.write(REGION + ring.PAGE + n * ring.RING_HEADER + ring.H_LIMIT, struct.pack("<Q", RING))
    blob = compile_programs(ARCH, layout, specs)
    machine.write(CODE, blob.code)
    return {name: CODE + at for name, at in blob.symbols.items()}


def records(machine, number=0):
    """Give (a, stack bits, mark) of each record of a ring, and what was lost."""
    header = REGION + ring.PAGE + number * ring.RING_HEADER
    data = REGION + ring.data_offset(NRINGS) + number * RING
    raw = bytes(machine.uc.mem_read(data, machine.word(header + ring.H_POS)))
    rows = [(a, word >> 48, word & ring.MARK_MASK) for a, word in struct.iter_unpack("<QQ", raw)]
    return rows, machine.word(header + ring.H_LOST)


def place(machine, symbols, shape, entry, exit_, sites):
    layout = ARCH.slot_layout(shape)
    machine.write(CONSTS, ARCH.return_consts(PLANE, SLOTS, len(sites) * layout.stride))
    for n, site in enumerate(sites):
        at = SLOTS + n * layout.stride
        programs = tuple(symbols[e] for e in entry), tuple(symbols[e] for e in exit_)
        machine.write(at, ARCH.slot(SlotPlan(at, site, SLED, site + 8, *programs, consts=CONSTS)))
        machine.write(site, ARCH.arm(site, SLED, at, balanced=bool(exit_)))
    return layout


def bits(sp):
    return sp >> 4 & 0xFFFF


@pytest.mark.parametrize("spec", [ENTRY, ENTRY_PARENT], ids=lambda s: s.name)
def test_entry_program_in_a_slot(spec):
    """The slow first call and the fast ones after it keep every register but the slot's clobbers."""
    machine = Machine()
    symbols = session(machine, [spec])
    layout = place(machine, symbols, SlotShape(1, 0, "sled"), [spec.name], [], [CODE + 0x8000])
    machine["sp"] = TOP
    for seed in range(5):
        before = machine.randomise(seed)
        machine["tp"] = before["tp"] = 0x1234_5678_9000
        machine.run(CODE + 0x8000, CODE + 0x8008)
        after = machine.registers()
        assert {r for r in EVERY if after[r] != before[r]} <= set(facts.SLOT_CLOBBERS), seed
        rows, lost = records(machine)
        assert lost == 0
        if spec.parent is Parent.NEXT:
            assert rows.pop() == (before["ra"], 0, ring.EXT_PARENT)
            rows = rows[::2]
        assert rows[-1] == (77, bits(TOP - 16), SLOTS + layout.entry_marks[0])
        assert len(rows) == seed + 1


@pytest.mark.parametrize("build", [BUILDS[0], BUILDS[2], BUILDS[-2]], ids=lambda b: f"{b[0][0]} {b[1]}")
def test_graph_of_a_program(tmp_path, build):
    """Entries and exits of a whole program: balanced, each exit with its entry's stack bits and the value returned."""
    loaded = load_program(tmp_path, *build)
    plain, _, untraced = run_program(loaded, None)
    calls = sum(untraced.steps.count(site) for site in loaded[1])
    shape = SlotShape(1, 1, "sled")
    layout = ARCH.slot_layout(shape)

    def arm(machine, sites):
        symbols = session(machine, [ENTRY, EXIT])
        place(machine, symbols, shape, ["entry"], ["exit"], sites)

    result, _, machine = run_program(loaded, arm)
    assert result == plain
    rows, lost = records(machine)
    assert lost == 0
    open_, entries, value = [], 0, 0
    for a, stack, mark in rows:
        if mark < ring.EXT_LIMIT:
            assert (stack, mark) == (0, ring.EXT_RETVAL)
            value = a
            continue
        n, offset = divmod(mark - SLOTS, layout.stride)
        if offset in (layout.entry_marks[0], layout.tail_marks[0]):
            entries += 1
        if offset == layout.entry_marks[0]:
            open_.append((n, stack))
        elif offset == layout.exit_marks[0]:
            assert open_.pop() == (n, stack)
    assert not open_
    assert entries == calls
    assert value == plain & U64  # the last exit is that of the outermost function
