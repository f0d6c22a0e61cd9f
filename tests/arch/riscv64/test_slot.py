"""Slots, executed: registers kept, marks in order, returns hooked, and what they cost."""

import itertools
import tomllib
from importlib import resources

import pytest
import unicorn
from elftools.elf.elffile import ELFFile

from fentry.arch import ReturnPlane, Sled, SlotPlan, SlotShape
from fentry.arch.riscv64 import ARCH, code, facts, insn
from fentry.errors import EngineBug, OutOfReach, Unsupported
from tests.arch.riscv64 import llvm
from tests.arch.riscv64.guest import BUILDS, GCC, load_program, run_program
from tests.arch.riscv64.machine import (
    GPRS,
    OFF,
    SHADOW,
    STACK,
    STACK_SIZE,
    STOP,
    WITNESS,
    Machine,
    i,
    li,
    witness,
    words,
)

VECTORS = tomllib.loads(resources.files("fentry.arch.riscv64").joinpath("vectors.toml").read_text())
NOPS = facts.NOP * 2
SLED = Sled("sled", 8, NOPS, 8, "t0")
PLANE = ReturnPlane(off=OFF, low=STACK, size=STACK_SIZE)
SITE, SLOT, PROGRAM, CONSTS = 0x1_0000_0002, 0x1_0800_0000, 0x1_1000_0000, 0x1_0700_0000
TOP = STACK + STACK_SIZE // 2  #: sp at the site
EVERY = {*GPRS, *facts.F}


def texts(data):
    return [insn.decode(data[n : n + 4]).text for n in range(0, len(data), 4) if any(data[n : n + 4])]


# -- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", VECTORS["slot"], ids=lambda v: f"{v['form']}-{len(v['entry'])}-{len(v.get('exit', []))}")
def test_slot_vectors(v):
    def numbers(key):
        return tuple(int(n, 16) for n in v.get(key, []))

    site = int(v["site"], 16)
    sled = Sled(v["form"], 8, NOPS, 8)
    plan = SlotPlan(int(v["at"], 16), site, sled, site + 8, numbers("entry"), numbers("exit"))
    if "consts" in v:
        plan = SlotPlan(plan.at, site, sled, site + 8, plan.entry, plan.exit, consts=int(v["consts"], 16))
    got = ARCH.slot(plan)
    want = v["want"].strip().split("\n")
    assert texts(got) == want
    if llvm.MC:
        numbers_ = [int.from_bytes(got[n : n + 4], "little") for n in range(0, 4 * len(want), 4)]
        assert llvm.disassemble(numbers_, 4) == want
    layout = ARCH.slot_layout(SlotShape(len(plan.entry), len(plan.exit), v["form"]))
    assert len(got) == layout.stride
    assert layout.stride.bit_count() == 1  # a program turns a mark into a site by a shift
    for marks in (layout.entry_marks, layout.exit_marks, layout.tail_marks, layout.plain_marks):
        for mark in marks:  # a mark is behind `jalr ra, (ra)`
            assert insn.decode(got[mark - 4 :]).text.startswith("jalr ra, ")


@pytest.mark.parametrize("shape", list(itertools.product(range(4), range(4))), ids=str)
def test_layout_is_that_of_every_slot(shape):
    """Marks do not depend on where things are."""
    entry, exit_ = shape
    layout = ARCH.slot_layout(SlotShape(entry, exit_, "sled"))
    marks = layout.entry_marks + layout.exit_marks + layout.tail_marks + layout.plain_marks
    assert len(set(marks)) == len(marks) == (entry + (exit_ and 2 * entry) + exit_)
    for at, far in ((0x10000, 0x7000_0000), (0x7000_0000, 0x10000), (0x10000, 0x10800)):
        plan = SlotPlan(at, far, SLED, far + 8, (far,) * entry, (far,) * exit_, consts=far + 64)
        data = ARCH.slot(plan)
        assert len(data) == layout.stride
        calls = {n + 4 for n in range(0, len(data), 4) if any(data[n:]) and is_call(data, n)}
        assert calls == set(marks)
        if exit_:
            assert layout.hook == layout.call + 4
            assert insn.decode(data[layout.call :]).text.startswith("jalr ra, ")


def is_call(data, n):
    one = insn.decode(data[n : n + 4])
    return one is not None and one.name == "jalr" and one.fields["rd"] == one.fields["rs1"] == 1


def test_refusals():
    for form in ("mcount", "sled16"):
        with pytest.raises(Unsupported, match="return cannot be hooked"):
            ARCH.slot_layout(SlotShape(1, 1, form))
    with pytest.raises(Unsupported, match="entry-jump"):
        ARCH.slot_layout(SlotShape(1, 0, "entry-jump"))
    with pytest.raises(EngineBug, match="aligned"):
        ARCH.slot(SlotPlan(0x1002, 0x2000, SLED, 0x2008))
    with pytest.raises(EngineBug, match="constants"):
        ARCH.slot(SlotPlan(0x1000, 0x2000, SLED, 0x2008, (), (0x3000,)))
    with pytest.raises(EngineBug, match="behind its site"):
        ARCH.slot(SlotPlan(0x1000, 0x2000, SLED, 0x200C, (0x3000,)))
    with pytest.raises(EngineBug, match="tail and plain"):
        ARCH.slot(SlotPlan(0x1000, 0x2000, SLED, 0x2008, (0x3000,), (0x3000,), consts=0x4000, tail=()))
    for program, consts in ((1 << 40, 0x4000), (0x3000, 1 << 40)):
        with pytest.raises(OutOfReach):
            ARCH.slot(SlotPlan(0x1000, 0x2000, SLED, 0x2008, (program,), (0x3000,), consts=consts))


def test_consts_are_reached_from_every_distance():
    """Wherever the constants lie, one auipc and 12-bit offsets reach all five words of one of the two sets."""
    size = len(ARCH.return_consts(PLANE, 0x1000, 0x100))
    for consts in range(0x20000, 0x21000, 4):
        data = ARCH.slot(SlotPlan(0x10000, 0x2000, SLED, 0x2008, (), (0x3000,), consts=consts))
        base = 0x10008 + insn.decode(data[8:]).fields["imm"]
        loads = [insn.decode(data[n : n + 4]) for n in range(12, 0x40, 4)]
        reached = {base + o.fields["imm"] for o in loads if o.name == "ld" and o.fields["rs1"] == 6}
        copy = 40 * (min(reached) >= consts + 40)
        assert reached == {consts + copy + n for n in range(0, 40, 8)}
        assert max(reached) + 8 <= consts + size


# -- entry only -------------------------------------------------------------------------------------------


def entry_machine(form, count, sled=None):
    """A machine with one site armed in `form`, and `count` witnesses; the body stops the run."""
    machine = Machine()
    sled = sled or {"sled": SLED, "mcount": Sled("mcount", 8, NOPS, 8, "ra")}[form]
    programs = tuple(PROGRAM + 0x1000 * n for n in range(count))
    for n, at in enumerate(programs):
        machine.write(at, witness(n))
    machine.write(SITE, ARCH.arm(SITE, sled, SLOT, balanced=False))
    machine.write(SLOT, ARCH.slot(SlotPlan(SLOT, SITE, sled, SITE + sled.resume, programs)))
    machine["sp"] = TOP
    return machine, ARCH.slot_layout(SlotShape(count, 0, form))


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_entry_slot(count, seed):
    machine, layout = entry_machine("sled", count)
    before = machine.randomise(seed)
    steps = machine.run(SITE, SITE + 8)
    after = machine.registers()
    assert {r for r in EVERY if after[r] != before[r]} <= set(facts.SLOT_CLOBBERS)
    assert after["t0"] == SITE + 8
    seen = machine.log()
    assert [s.mark for s in seen] == [SLOT + m for m in layout.entry_marks]
    assert [s.ident for s in seen] == list(range(count))
    assert {(s.sp, s.parent) for s in seen} <= {(TOP - 16, before["ra"])}
    assert steps == 2 + 5 + count * (2 + WITNESS)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_mcount_slot(count, seed):
    machine, layout = entry_machine("mcount", count)
    before = machine.randomise(seed)
    steps = machine.run(SITE, SITE + 8)
    after = machine.registers()
    assert {r for r in EVERY if after[r] != before[r]} <= {"t0", "t1", "ra"}
    assert after["ra"] == SITE + 8
    seen = machine.log()
    assert [s.mark for s in seen] == [SLOT + m for m in layout.entry_marks]
    assert {(s.sp, s.parent) for s in seen} == {(TOP - 16, before["a0"])}
    assert steps == 2 + 6 + count * (2 + WITNESS)


@pytest.mark.parametrize("seed", range(4))
def test_sled16_slot(seed):
    sled = code.sled16_at(facts.NOP * 4)
    machine, layout = entry_machine("sled16", 2, sled)
    before = machine.randomise(seed)
    machine.run(SITE, SITE + 16)
    after = machine.registers()
    assert {r for r in EVERY if after[r] != before[r]} <= {"t0", "t1"}
    seen = machine.log()
    assert [s.mark for s in seen] == [SLOT + m for m in layout.entry_marks]
    assert {(s.sp, s.parent) for s in seen} == {(TOP - 16, before["ra"])}


# -- with return hooks ------------------------------------------------------------------------------------

DEAD_AT_RETURN = tuple(r for r in facts.EXIT_CLOBBERS if r != "ra")


def hooked(bodies, *, plane=PLANE, exits=1, entries=1):
    """A machine with return-hooked functions; `bodies` are code that follows each sled.

    Function n has its site at SITE + 0x100 * n; entry witnesses are 0..., exit witnesses 100...
    """
    machine = Machine()
    shape = SlotShape(entries, exits, "sled")
    layout = ARCH.slot_layout(shape)
    entry = tuple(PROGRAM + 0x1000 * n for n in range(entries))
    exit_ = tuple(PROGRAM + 0x1000 * (entries + n) for n in range(exits))
    for n, at in enumerate(entry):
        machine.write(at, witness(n))
    for n, at in enumerate(exit_):
        machine.write(at, witness(100 + n, scramble=("t1", "ra", *DEAD_AT_RETURN)))
    machine.write(CONSTS, ARCH.return_consts(plane, SLOT, layout.stride * len(bodies)))
    for n, body in enumerate(bodies):
        site, at = SITE + 0x100 * n, SLOT + layout.stride * n
        plan = SlotPlan(at, site, SLED, site + 8, entry, exit_, consts=CONSTS, plane=plane)
        machine.write(site, ARCH.arm(site, SLED, at, balanced=True) + body)
        machine.write(at, ARCH.slot(plan))
    machine["sp"] = TOP
    machine["ra"] = STOP
    return machine, layout


RET = i("jalr", rd="zero", rs1="ra", imm=0)


def site(n):
    return SITE + 0x100 * n


def slot_at(layout, n):
    return SLOT + layout.stride * n


@pytest.mark.parametrize("exits", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_hooked_return(seed, exits):
    machine, layout = hooked([RET], exits=exits)
    before = machine.randomise(seed)
    machine["ra"] = STOP
    steps = machine.run(SITE)
    after = machine.registers()
    changed = {r for r in EVERY if after[r] != before[r]}
    assert changed <= {"ra", *DEAD_AT_RETURN}  # sp, s-registers, return values, all floating point
    assert after["ra"] == STOP
    assert machine.word(TOP + OFF) == STOP
    seen = machine.log()
    assert [s.mark - SLOT for s in seen] == [*layout.entry_marks, *layout.exit_marks]
    assert {(s.sp, s.parent) for s in seen} == {(TOP - 16, STOP)}
    exit_witness = len(witness(0, scramble=("t1", "ra", *DEAD_AT_RETURN))) // 4
    assert steps == 2 + 18 + (2 + WITNESS) + 1 + 9 + exits * (2 + exit_witness)


@pytest.mark.parametrize("seed", range(4))
def test_registers_at_a_hooked_body(seed):
    machine, layout = hooked([RET])
    before = machine.randomise(seed)
    machine.run(SITE, SITE + 8)
    after = machine.registers()
    assert {r for r in EVERY if after[r] != before[r]} <= {"ra", *facts.SLOT_CLOBBERS}
    assert after["ra"] == SLOT + layout.hook


def test_overhead_fits_the_budget():
    """Instructions of one event beside the programs': 50 and 110 with programs of about 30."""
    shape = ARCH.slot_layout(SlotShape(1, 0, "sled"))
    assert shape.stride == 32
    machine, _ = entry_machine("sled", 1)
    assert machine.run(SITE, SITE + 8) - WITNESS == 9
    machine, _ = hooked([RET])
    machine.write(PROGRAM, i("jalr", rd="zero", rs1="ra", imm=0))
    machine.write(PROGRAM + 0x1000, i("jalr", rd="zero", rs1="ra", imm=0))
    assert machine.run(SITE) - 1 - 2 == 33


def test_tail_call_is_not_hooked_twice():
    """Function 0 jumps to function 1 in the same frame; 1's return is 0's, and both have the true parent."""
    jump = code.jump(site(0) + 8, site(1), "t3")
    machine, layout = hooked([jump, RET])
    machine.run(SITE)
    zero, one = slot_at(layout, 0), slot_at(layout, 1)
    assert [s.mark for s in machine.log()] == [
        zero + layout.entry_marks[0],
        one + layout.tail_marks[0],
        zero + layout.exit_marks[0],
    ]
    assert {(s.sp, s.parent) for s in machine.log()} == {(TOP - 16, STOP)}


def test_registers_at_a_tail_called_body():
    machine, layout = hooked([RET])
    before = machine.randomise(1)
    machine["ra"] = before["ra"] = SLOT + layout.hook
    machine.run(SITE, SITE + 8)
    after = machine.registers()
    assert {r for r in EVERY if after[r] != before[r]} <= set(facts.SLOT_CLOBBERS)


@pytest.mark.parametrize(
    ("sp", "mirrored"),
    [
        (STACK, True),
        (STACK - 16, False),
        (STACK + STACK_SIZE - 16, True),
        (STACK + STACK_SIZE, False),
        (STACK + STACK_SIZE + 32, False),
    ],
)
def test_edges_of_the_mirrored_stacks(sp, mirrored):
    machine, layout = hooked([RET])
    machine.map(STACK - 0x1000, 0x1000)  # the slot's frame and the witness's may lie below
    machine["sp"] = sp
    before = machine.registers()
    machine.run(SITE)
    after = machine.registers()
    assert after["sp"] == sp
    marks = [s.mark - SLOT for s in machine.log()]
    assert marks == [*(layout.entry_marks + layout.exit_marks if mirrored else layout.plain_marks)]
    assert {s.parent for s in machine.log()} == {STOP}
    assert {r for r in EVERY if after[r] != before[r]} <= {"ra", *DEAD_AT_RETURN}
    shadow = bytes(machine.uc.mem_read(SHADOW, STACK_SIZE + 4096))
    assert any(shadow) == mirrored


def test_recursion_needs_no_repair():
    """Frames left without returning (longjmp) leave nothing to clean: the next call uses its own slot."""
    body = words(  # f(n): if n < 0, return; if n == 0, give up all frames at once; else call f(n - 1)
        i("blt", rs1="a0", rs2="zero", imm=40),
        i("beq", rs1="a0", rs2="zero", imm=28),
        i("addi", rd="sp", rs1="sp", imm=-16),
        i("sd", rs2="ra", rs1="sp", imm=8),
        i("addi", rd="a0", rs1="a0", imm=-1),
        code.call(SITE + 8 + 20, SITE),
        i("ebreak"),  # no frame returns here: the innermost one leaves them all behind
        i("addi", rd="sp", rs1="s1", imm=0),
        i("jalr", rd="zero", rs1="s2", imm=0),
        RET,
    )
    machine, layout = hooked([body])
    machine["a0"], machine["s1"], machine["s2"] = 4, TOP, STOP
    machine.run(SITE)
    assert [s.mark - SLOT for s in machine.log()] == [layout.entry_marks[0]] * 5
    assert [s.sp for s in machine.log()] == [TOP - 16 - 16 * n for n in range(5)]
    machine["a0"], machine["ra"] = -1, STOP
    machine.run(SITE)
    assert [s.mark - SLOT for s in machine.log()[5:]] == [layout.entry_marks[0], layout.exit_marks[0]]
    assert machine.log()[-1].parent == STOP


def test_two_ops_call_different_programs_by_path():
    """tail and plain programs may differ from the entry ones."""
    layout = ARCH.slot_layout(SlotShape(1, 1, "sled"))
    plan = SlotPlan(0x1000, 0x2000, SLED, 0x2008, (0x3000,), (0x4000,), consts=0x5000, tail=(0x6000,), plain=(0x7000,))
    data = ARCH.slot(plan)
    targets = dict(ARCH.branch_targets(data, 0x1000))

    def called(mark):
        return targets[0x1000 + mark - 8]

    assert [called(m[0]) for m in (layout.entry_marks, layout.exit_marks, layout.tail_marks, layout.plain_marks)] == [
        0x3000,
        0x4000,
        0x6000,
        0x7000,
    ]


# -- whole programs ---------------------------------------------------------------------------------------

FAR = 0x4000_0000


def arm_all(machine, sites, shape):
    layout = ARCH.slot_layout(shape)
    programs = [FAR + 0x10_0000 + 0x1000 * n for n in range(shape.entry + shape.exit)]
    for n, at in enumerate(programs):
        last = ("t1", "ra") if n < shape.entry else ("t1", "ra", *DEAD_AT_RETURN)
        machine.write(at, witness(n, scramble=last))
    machine.write(FAR, ARCH.return_consts(PLANE, FAR + 0x1000, len(sites) * layout.stride))
    for n, address in enumerate(sites):
        sled = ARCH.sled_at(bytes(machine.uc.mem_read(address, 32)), "patchable")
        assert isinstance(sled, Sled), sled
        at = FAR + 0x1000 + n * layout.stride
        plan = SlotPlan(
            at, address, sled, address + 8, tuple(programs[: shape.entry]), tuple(programs[shape.entry :]), consts=FAR
        )
        machine.write(at, ARCH.slot(plan))
        machine.write(address, ARCH.arm(address, sled, at, balanced=bool(shape.exit)))


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: f"{b[0][0]} {' '.join(b[1:])}")
def test_programs_compute_the_same(tmp_path, build):
    """Recursion, stack arguments, structs, doubles, tail calls, static chains: all functions hooked, same result.

    Calls are counted independently: each time an instruction at a function's first byte is run without tracing.
    """
    loaded = load_program(tmp_path, *build)
    plain, _, untraced = run_program(loaded, None)
    calls = {s: untraced.steps.count(s) for s in loaded[1]}
    assert len(calls) >= 8
    for shape in (SlotShape(1, 0, "sled"), SlotShape(2, 0, "sled"), SlotShape(1, 1, "sled"), SlotShape(2, 2, "sled")):
        result, seen, _ = run_program(loaded, lambda m, s, shape=shape: arm_all(m, s, shape))
        assert result == plain, shape
        layout = ARCH.slot_layout(shape)
        first = FAR + 0x1000
        entered = {}
        depth = []
        for s in seen:
            n, mark = divmod(s.mark - first, layout.stride)
            if mark in (layout.entry_marks[0], *layout.tail_marks[:1]):
                entered[loaded[1][n]] = entered.get(loaded[1][n], 0) + 1
            if shape.exit and mark == layout.entry_marks[0]:
                depth.append((n, s.sp, s.parent))
            if shape.exit and mark == layout.exit_marks[-1]:
                assert depth.pop() == (n, s.sp, s.parent)  # exits match entries, by slot and stack pointer
        assert not depth
        assert entered == {s: c for s, c in calls.items() if c}
    if build[1] in ("-O2", "-O3") and build[0] is GCC:
        assert any((s.mark - first) % layout.stride in layout.tail_marks for s in seen), "no tail call was met"


# -- what the code generator promises ---------------------------------------------------------------------

HUNGRY = """
target triple = "{triple}"
declare ptr @llvm.returnaddress(i32)
{declares}
define preserve_mostcc void @hungry() nounwind noimplicitfloat {{
  %tp = call i64 @tp()
  %base = inttoptr i64 {log} to ptr
{loads}
{stores}
  ret void
}}
define internal preserve_mostcc i64 @tp() alwaysinline {{
  {tp}
  ret i64 %v
}}
"""


def test_programs_keep_all_but_their_clobbers():
    """A program that wants every register at once: the dialect's features must hold LLVM to PROGRAM_CLOBBERS."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    count = 40
    offsets = [f"  %p{n} = getelementptr i8, ptr %base, i64 {8 * n}" for n in range(count)]
    loads = [f"{offsets[n]}\n  %v{n} = load volatile i64, ptr %p{n}" for n in range(count)]
    stores = [f"  %s{n} = add i64 %v{n}, %tp\n  store volatile i64 %s{n}, ptr %p{n}" for n in reversed(range(count))]
    d = ARCH.dialect
    text = HUNGRY.format(
        triple=ARCH.triple,
        declares=d.declares,
        log=0x7F01_0000,
        loads="\n".join(loads),
        stores="\n".join(stores),
        tp=d.thread_pointer.format(out="%v"),
    )
    module = llvm.parse_assembly(text)
    module.verify()
    features = ",".join(f for f in (ARCH.features, d.features) if f)
    machine = llvm.Target.from_triple(ARCH.triple).create_target_machine(
        cpu=ARCH.cpu, features=features, opt=3, reloc="static", codemodel="small"
    )
    blob = ELFFile(__import__("io").BytesIO(machine.emit_object(module))).get_section_by_name(".text").data()
    box = Machine()
    box.write(PROGRAM, blob)
    box["sp"] = TOP
    before = box.randomise(5)
    before["ra"] = box["ra"] = STOP
    box.run(PROGRAM)
    after = box.registers()
    assert {r for r in EVERY if after[r] != before[r]} <= set(facts.PROGRAM_CLOBBERS)
    assert d.clobbers == facts.PROGRAM_CLOBBERS


def test_li_of_the_test_machine():
    box = Machine()
    for n, value in enumerate((0, 0x7FF, 0x800, 0x7FFFF7FF, 0x12345FFF)):
        box.write(SITE + 16 * n, li("a0", value))
        box.run(SITE + 16 * n, SITE + 16 * n + 8)
        assert box["a0"] == value


def test_unused_bytes_of_a_slot_trap():
    """A jump into the filling must not run on into the next slot."""
    data = ARCH.slot(SlotPlan(SLOT, SITE, SLED, SITE + 8, (PROGRAM,)))
    assert data.endswith(bytes(4))
    box = Machine()
    box.write(SLOT, data)
    with pytest.raises(unicorn.UcError):
        box.uc.emu_start(SLOT + 28, STOP, count=4)
