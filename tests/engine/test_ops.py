"""Several ops on one function: their order, their marks, and how they come and go."""

import os
import struct
import time
from collections import Counter

import pytest

from fentry.arch import all_archs, load
from fentry.engine import Engine, Op, census
from fentry.engine.ops import specialise
from fentry.image import Image
from fentry.program.ir import Parent, Spec
from fentry.record import layout as ring
from fentry.record.layout import Kind, Policy
from fentry.target import process
from tests.program.bench import STOP, Bench

arches = pytest.mark.parametrize("arch", [a.name for a in all_archs()])


def entry(name, **more):
    return Op(name, entry=Spec("e", stack=True), **more)


def both(name):
    return Op(name, entry=Spec("e", stack=True), exit=Spec("x", exit=True, stack=True))


def leaving(name):
    return Op(name, exit=Spec("x", exit=True, stack=True))


@arches
def test_the_newest_enters_first_and_leaves_last(arch):
    bench = Bench(arch)
    a, b, c, d = both("a"), entry("b"), both("c"), leaving("d")
    f, g = bench.function("f"), bench.function("g")
    bench.arm([(f, (a, b, c, d)), (g, (d, c, b, a))])
    bench.call(f, seed=1)
    bench.call(g, seed=2)
    story = [(op.name, e.kind.name[:2]) for op, e in bench.story()]
    assert story[:6] == [("a", "EN"), ("b", "EN"), ("c", "EN"), ("d", "EX"), ("c", "EX"), ("a", "EX")]
    assert story[6:] == [("c", "EN"), ("b", "EN"), ("a", "EN"), ("a", "EX"), ("c", "EX"), ("d", "EX")]


@arches
def test_the_parent_is_found_whoever_else_is_there(arch):
    """Beside a return hook the return address is elsewhere: in the mirror, or still in its slot for plain calls."""
    alone = entry("alone", parent=True)
    for ops in ((alone,), (alone, entry("n")), (entry("n"), alone), (both("g"), alone), (alone, both("g"))):
        bench = Bench(arch)
        leaf = bench.function("leaf")
        jumper = bench.function("jumper", bench.jump(leaf))
        bench.arm([(s, ops) for s in (leaf, jumper)])
        for thread in (bench.thread, bench.new_thread(mirrored=False)):
            for site in (leaf, jumper):
                bench.call(site, thread)
        events = bench.events(alone)
        assert [e.site for e in events] == [0, 1, 0] * 2
        assert {e.kind for e in events} == {Kind.ENTRY}
        assert [e.extensions for e in events] == [{ring.EXT_PARENT: STOP}] * 6, [o.name for o in ops]


@arches
@pytest.mark.parametrize("hooked", [False, True])
def test_programs_are_fitted_to_their_slots(arch, hooked):
    dialect = load(arch).dialect
    op = Op("p", entry=Spec("e"), exit=Spec("x", exit=True, retval=True), parent=True, counts=True)
    got = specialise(op, dialect, "sled", hooked=hooked, base=0x1000, shift=7, row=5)
    assert (got.entry.base, got.entry.shift, got.entry.row) == (0x1000, 7, 5)
    if not hooked:
        assert got.exit is got.tail is got.plain is got.unwound is None
        assert got.entry.tail  # there is no frame for it
        return
    assert not got.entry.tail
    assert got.tail.tail
    assert got.plain.tail
    assert got.exit.retval
    assert not got.unwound.retval  # an exception returns nothing
    assert got.exit.parent is Parent.NONE
    assert (got.entry.parent is Parent.SHADOW) == dialect.return_slot


@arches
def test_each_op_decodes_its_own_marks_only(arch):
    bench = Bench(arch)
    ops = (both("a"), entry("b"), both("c"))
    f = bench.function("f")
    (table,) = bench.arm([(f, ops)])
    marks = [set(table.marks(op)) for op in ops]
    assert not marks[0] & marks[1]
    assert not marks[0] & marks[2]
    assert not marks[1] & marks[2]
    assert table.marks(entry("stranger")) == {}
    kinds = [Counter(table.marks(op).values()) for op in ops]
    assert kinds[0] == kinds[2]
    assert kinds[1] == Counter({Kind.ENTRY: 3})  # hooked for others, an entry for this one, however it was entered
    assert kinds[0] - Counter({Kind.UNWOUND: 1}) == Counter({k: 1 for k in Kind if k is not Kind.UNWOUND})


# -- on a live process ------------------------------------------------------------------------------------

COUNT = 20


class Live:
    """A program of 20 functions that calls each one once for every line it is given."""

    def __init__(self, path):
        to, self.lines = os.pipe()
        self.output, out = os.pipe()
        self.target = process.spawn([str(path), "1", "wait"], stdin=to, stdout=out)
        os.close(to)
        os.close(out)
        self.module = self.target.modules()[0]
        taken = census.take(Image.open(self.module.file), self.module.name, main=True)
        found = census.sites(self.module, taken.verdicts)
        self.sites = sorted((s for s in found if s.name.startswith("fn_")), key=lambda s: s.name)
        self.engine = Engine(self.target, policy=Policy.DROP, rings=4)
        self.words = []

    def story(self, ops, until):
        """Drain until there are `until` events; (op, kind, function) of each, in order."""
        deadline = time.monotonic() + 20
        while len(self.words) < until and time.monotonic() < deadline:
            self.engine.region.drain(
                lambda _ring, data: self.words.extend(w for _, w in struct.iter_unpack("<QQ", data) if w >= 16)
            )
        marks = {
            t.base + i * t.stride + offset: (op.name, kind, self.engine.sites[site].name)
            for op in ops for t in self.engine.tables(op) for i, site in enumerate(t.sites)
            for offset, kind in t.marks.items()
        }  # fmt: skip
        story = [marks[w & ring.MARK_MASK] for w in self.words]
        self.words.clear()
        return story

    def line(self):
        os.write(self.lines, b"\n")

    def end(self):
        os.close(self.lines)
        said = b""
        while more := os.read(self.output, 4096):
            said += more
        os.close(self.output)
        return said


@pytest.mark.live
@pytest.mark.parametrize("flags", [("-fpatchable-function-entry=5",), ()], ids=["sled", "entry-jump"])
def test_ops_come_and_go_while_the_program_runs(many, flags):
    """Each function is called once a line; what is recorded is just what is registered, in order."""
    run = Live(many(COUNT, flags=flags))
    names = [s.name for s in run.sites]
    assert len(names) == COUNT
    a, b = Op("a", entry=Spec("a"), parent=True), both("b")
    engine = run.engine
    ops = (a, b)
    engine.register(a, run.sites)
    engine.register(b, run.sites[:10])
    engine.open(extra_sites=COUNT)
    engine.commit()
    run.target.resume()
    ready = os.read(run.output, 100)
    assert ready == b"waiting\n"
    engine.live = True

    def once(name, newest_first):
        inner = [(op, Kind.ENTRY, name) for op in newest_first]
        return inner + [("b", Kind.EXIT, name)] * ("b" in newest_first)

    def whole(first, rest):
        return [e for n in names[:10] for e in once(n, first)] + [e for n in names[10:] for e in once(n, rest)]

    expected = whole(["b", "a"], ["a"])
    assert run.story(ops, len(expected)) == expected

    engine.unregister(a)
    engine.commit()
    run.line()
    expected = whole(["b"], [])
    assert run.story(ops, len(expected)) == expected

    engine.register(a, run.sites)
    engine.commit()
    run.line()
    expected = whole(["a", "b"], ["a"])
    assert run.story(ops, len(expected)) == expected

    engine.unregister(b, run.sites[:5])
    engine.commit()
    run.line()
    expected = [e for i, n in enumerate(names) for e in once(n, ["a", "b"] if 5 <= i < 10 else ["a"])]
    assert run.story(ops, len(expected)) == expected

    engine.close()
    assert engine.report.strange == []
    assert engine.report.left_mapped == ""
    for s in run.sites:
        assert run.target.read(s.at, s.sled.size) == s.sled.idle
    assert not [m for m in run.target.mappings() if "memfd:fentry" in m.path]
    run.target.resume()
    run.line()
    assert len(run.end()) == 17  # a number of 16 digits
    assert engine.region.lost == 0
    run.target.close()
