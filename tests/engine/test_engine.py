"""The engine on a target of pages: what it maps, patches, moves and puts back, for every architecture."""

import contextlib
import struct

import pytest

from fentry.arch import all_archs, load
from fentry.engine import Engine, Op, journal, restore
from fentry.engine.census import Site, Verdict
from fentry.errors import AskedWrong, CannotHere, PatchMismatch, TargetRefused, Unsupported
from fentry.image import Function
from fentry.program.ir import Spec
from fentry.record.layout import Kind, Policy
from fentry.target import Module
from fentry.testing.fake import FakeTarget

arches = pytest.mark.parametrize("arch", [a.name for a in all_archs()])
CODE = 0x5555_5555_0000
COUNT = 8


def nops(arch):
    facts = load(arch).facts
    return facts.NOPS[1] * 5 if isinstance(facts.NOP, bytes) and len(facts.NOP) > 4 else facts.NOP * 2


def stack(arch):
    window = load(arch).dialect.stack_window
    return window[0] + (7 << 40) if window else 0x7000_0000


def make(arch, *, pc=CODE, threads=1, **registers):
    a = load(arch)
    body = nops(arch) + b"\xc3\x00"
    text = b"".join(body.ljust(64, b"\xcc") for _ in range(COUNT)).ljust(4096, b"\xcc")
    top = stack(arch) + 4096
    target = FakeTarget(
        arch,
        [
            (CODE, text, "r-x", "prog"),
            (CODE + 4096, bytes(4096), "rw-", "prog"),
            (stack(arch), bytes(8192), "rw-", "[stack]"),
        ],
        [{a.sp: top, a.pc: pc, a.tp: 0x1234_0000 + i, **registers} for i in range(threads)],
    )
    module = Module("prog", "prog", "", 0, CODE, CODE + 8192, True)
    sites = []
    for n in range(COUNT):
        at = CODE + 64 * n
        sled = a.sled_at(target.read(at, 32), "patchable")
        sites.append(Site(Verdict(Function(f"f{n}", at, 16, "symtab"), "prog", True, sled, at, ""), module, at, at))
    target.done.writes.clear()
    return target, sites


def picture(target):
    maps = target.mappings()
    return (
        maps,
        [target.read(m.start, m.size) for m in maps if m.size < 1 << 30],
        [target.regs(t) for t in target.threads()],
    )


def function_op():
    return Op("function", entry=Spec("function"), parent=True)


def graph_op():
    return Op("graph", entry=Spec("e", stack=True), exit=Spec("x", exit=True, stack=True))


def hits_op():
    return Op("hits", entry=Spec("hits", record=False, count=True), counts=True)


def engine_for(target, **more):
    return Engine(target, rings=4, ring_size=4096, **more)


@arches
@pytest.mark.parametrize("op", [function_op, graph_op, hits_op])
def test_everything_is_put_back(arch, op):
    target, sites = make(arch, threads=3)
    before = picture(target)
    engine = engine_for(target)
    engine.register(op(), sites)
    engine.commit()
    assert picture(target)[1] != before[1]
    for site in sites:
        assert target.read(site.at, site.sled.size) != site.sled.idle
    assert not any("w" in m.perms and "x" in m.perms for m in target.mappings())
    engine.close()
    engine.close()
    assert picture(target) == before
    assert engine.report.sites == COUNT
    assert engine.report.strange == []
    assert engine.report.left_mapped == ""


@arches
def test_every_site_leads_to_its_own_slot(arch):
    a = load(arch)
    target, sites = make(arch)
    engine = engine_for(target)
    op, second = function_op(), graph_op()
    engine.register(op, sites)
    engine.register(second, sites[::2])
    engine.commit()
    seen = set()
    for (table,) in [[t] for i in engine.islands for t in i.tables]:
        for n, site in enumerate(table.sites):
            slot = table.slot(n)
            assert target.read(site.at, site.sled.size) == a.arm(site.at, site.sled, slot, balanced=table.hooked)
            assert table.hooked == (site in sites[::2])
            seen.add(site.at)
    assert seen == {s.at for s in sites}
    assert engine.sites == sites
    # what decoders get: each site of an op once, its marks inside its slot
    for o, members in ((op, sites), (second, sites[::2])):
        tables = engine.tables(o)
        assert sorted(n for t in tables for n in t.sites) == [sites.index(s) for s in members]
        for t in tables:
            assert all(0 < offset < t.stride for offset in t.marks)
    kinds = [set(t.marks.values()) for t in engine.tables(second)]
    assert all({Kind.ENTRY, Kind.EXIT, Kind.TAIL, Kind.PLAIN} <= k for k in kinds)
    engine.close()


@arches
def test_ops_come_and_go(arch):
    """After each commit every site is idle, or leads to a slot that calls just its ops; rows do not run out."""
    target, sites = make(arch)
    before = picture(target)
    engine = engine_for(target)
    first, second = function_op(), function_op()
    engine.register(first, sites)
    engine.open(extra_sites=COUNT)
    engine.commit()
    armed = {s.at: target.read(s.at, s.sled.size) for s in sites}
    engine.register(second, sites[:4])
    engine.register(second, sites[:4])  # twice is once
    engine.commit()
    assert [armed[s.at] != target.read(s.at, s.sled.size) for s in sites] == [True] * 4 + [False] * 4
    engine.unregister(first)
    engine.commit()
    assert [target.read(s.at, s.sled.size) == s.sled.idle for s in sites] == [False] * 4 + [True] * 4
    engine.unregister(second, sites[:1])
    engine.commit()
    assert target.read(sites[0].at, sites[0].sled.size) == sites[0].sled.idle
    engine.commit()  # nothing to do
    engine.close()
    assert picture(target) == before


@arches
@pytest.mark.parametrize("late", ["hits", "depth", "threshold"])
def test_an_op_that_comes_too_late_for_its_memory_is_refused(arch, late):
    """Its programs would write where nothing was mapped, inside the traced program."""
    target, sites = make(arch)
    before = picture(target)
    more = {} if late == "hits" else {late: 5}
    op = hits_op() if late == "hits" else Op(late, entry=Spec("e", **more), exit=Spec("x", exit=True, **more))
    engine = engine_for(target)
    first = graph_op()
    engine.register(first, sites)
    engine.commit()
    armed = target.read(CODE, 4096)
    engine.register(op, sites)
    with pytest.raises(AskedWrong, match=f"op {late} needs memory"):
        engine.commit()
    assert target.read(CODE, 4096) == armed
    engine.unregister(op)
    engine.commit()
    engine.close()
    assert picture(target) == before


@arches
def test_a_return_hook_that_comes_too_late_records_plain_entries(arch):
    target, sites = make(arch)
    engine = engine_for(target)
    engine.register(function_op(), sites)
    engine.commit()
    op = graph_op()
    engine.register(op, sites)
    engine.commit()
    assert [set(t.marks.values()) for t in engine.tables(op)] == [{Kind.PLAIN}]
    engine.close()


@arches
def test_a_mismatch_changes_nothing(arch):
    """One site is not what the census saw: no site is patched, no thread touched; closing leaves it as it was."""
    target, sites = make(arch, threads=2)
    target.write(sites[5].at, b"\xcc")
    before, text = picture(target), target.read(CODE, 4096)
    engine = engine_for(target)
    engine.register(graph_op(), sites)
    with pytest.raises(PatchMismatch) as caught:
        engine.commit()
    assert caught.value.at == sites[5].at
    assert picture(target)[2] == before[2]
    assert target.read(CODE, 4096) == text
    engine.close()
    assert picture(target) == before


@arches
def test_another_engine_can_undo_it(arch):
    """The tracer was killed: the journal in the target is enough, whoever reads it."""
    target, sites = make(arch, threads=2)
    before = picture(target)
    engine = engine_for(target)
    engine.register(graph_op(), sites)
    engine.commit()
    del engine
    report = restore.recover(target)
    assert report.sites == COUNT
    assert picture(target) == before
    with pytest.raises(TargetRefused, match="nothing of fentry's"):
        restore.recover(target)


@pytest.mark.parametrize("writes", range(0, 40, 3))
@arches
def test_a_tracer_killed_after_any_write_can_be_undone(arch, writes):
    """Whatever was done until then is in the journal."""
    target, sites = make(arch)
    text = target.read(CODE, 4096)
    engine = engine_for(target)
    engine.register(graph_op(), sites)
    left = [writes]

    def die(_at, data):
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedError
        return data

    target.on_write = die
    with contextlib.suppress(InterruptedError):
        engine.commit()
    target.on_write = None
    if restore.find_journal(target) is not None:
        restore.recover(target)
    assert target.read(CODE, 4096) == text
    assert [target.regs(t)[load(arch).pc] for t in target.threads()] == [CODE]
    assert not [m for m in target.mappings() if "x" in m.perms and m.start != CODE]


@arches
def test_a_thread_that_stands_in_a_sled(arch):
    """It goes on behind the sled: nothing in it has happened."""
    a = load(arch)
    offset = a.insn_align if a.name == "x86_64" else 4
    target, sites = make(arch, pc=CODE + 64 + offset)
    engine = engine_for(target)
    engine.register(function_op(), sites)
    engine.commit()
    assert target.regs(1)[a.pc] == sites[1].at + sites[1].sled.resume
    engine.close()


def test_frames_in_flight_get_their_return_addresses_back():
    """Two frames have returned into hooks: the originals are in the mirror, whatever else looks alike stays."""
    target, sites = make("x86_64")
    before = picture(target)
    engine = engine_for(target)
    engine.register(graph_op(), sites)
    engine.commit()
    (table,) = [t for i in engine.islands for t in i.tables]
    plane = engine._plane
    top = stack("x86_64") + 4096
    for n, at in enumerate((top + 64, top + 256)):
        target.write(at, struct.pack("<Q", table.slot(n) + table.layout.hook))
        target.write(at + plane.off, struct.pack("<Q", 0xCAFE00 + n))
    beside = struct.pack("<Q", table.slot(0) + table.layout.hook + 1)
    target.write(top + 512, beside)
    target.write(top + 512 + plane.off, struct.pack("<Q", 7))
    engine.close()
    assert engine.report.frames == 2
    assert target.read(top + 64, 8) == struct.pack("<Q", 0xCAFE00)
    assert target.read(top + 256, 8) == struct.pack("<Q", 0xCAFE01)
    assert target.read(top + 512, 8) == beside
    assert target.mappings() == before[0]


def test_a_thread_that_uses_the_segment_itself_is_refused():
    target, sites = make("x86_64", threads=2)
    target.set_regs(2, {"gs_base": 0x1000})
    before = picture(target)
    engine = engine_for(target)
    engine.register(function_op(), sites)
    with pytest.raises(TargetRefused, match=r"thread 2 uses gs_base itself \(0x1000\)"):
        engine.commit()
    engine.close()
    assert picture(target) == before


def test_a_thread_without_tls_is_lent_a_block():
    target, sites = make("x86_64", fs_base=0)
    before = picture(target)
    engine = engine_for(target)
    engine.register(function_op(), sites)
    engine.commit()
    lent = target.regs(1)["fs_base"]
    assert lent
    assert target.read(lent, 8) == struct.pack("<Q", lent)
    engine.close()
    assert picture(target) == before


@arches
def test_no_room_near_the_code_is_one_clear_error(arch):
    target, sites = make(arch)
    target.allocator = None
    engine = engine_for(target)
    engine.register(function_op(), sites)
    with pytest.raises(Unsupported, match="no memory allocator"):
        engine.commit()
    engine.close()


@arches
def test_options_that_cannot_be(arch):
    target, _ = make(arch)
    for more, kind in (
        ({"clock": "sundial"}, AskedWrong),
        ({"clock": "icount"}, CannotHere),
        ({"rings": 3}, AskedWrong),
        ({"rings": 0}, AskedWrong),
        ({"ring_size": 5000}, AskedWrong),
        ({"ring_size": -4096}, AskedWrong),
    ):
        with pytest.raises(kind):
            Engine(target, **more)
    target.clock_at = 0x1000
    with pytest.raises(CannotHere, match="time stamp counter"):
        Engine(target, clock="tsc")


@arches
def test_the_region_is_formatted_as_asked(arch):
    target, sites = make(arch)
    engine = engine_for(target, policy=Policy.OVERWRITE)
    engine.register(function_op(), sites)
    engine.open()
    assert (engine.region.nrings, engine.region.ring_size, engine.region.policy) == (4, 4096, Policy.OVERWRITE)
    found = restore.find_journal(target)
    assert found[0].region[0] in {m.start for m in target.mappings()}
    assert {at for at, _ in found[0].mappings} <= {m.start for m in target.mappings()}
    assert journal.NAME in " ".join(m.path for m in target.mappings())
    engine.close()
