"""Programs in their slots, on an emulated core of each architecture: what they write is what layout.py says."""

import struct

import pytest

from fentry.arch import all_archs
from fentry.engine.ops import Op
from fentry.program.context import CONTEXT
from fentry.program.ir import Spec
from fentry.record import layout as ring
from fentry.record.layout import Kind, Policy
from tests.program.bench import REGION, STOP, U64, Bench

ARCHS = [a.name for a in all_archs()]
arches = pytest.mark.parametrize("arch", ARCHS)


def function_op(**more):
    return Op("function", entry=Spec("function", **more), parent=True)


def graph_op(*, retval=False, **more):
    more = {"stack": True, **more}
    return Op("graph", entry=Spec("graph_entry", **more), exit=Spec("graph_exit", exit=True, retval=retval, **more))


def bits(position):
    return position >> 4 & 0xFFFF


def slot_position(bench, thread=None, below=0):
    """What the stack bits of a call are made of: where the return address is, or 16 below the stack pointer."""
    return (thread or bench.thread).top - below - (0 if bench.arch.dialect.return_slot else 16)


@arches
def test_function_records_time_mark_and_parent(arch):
    bench = Bench(arch)
    op = function_op()
    f, g = bench.function("f"), bench.function("g")
    bench.arm([(f, (op,)), (g, (op,))])
    for n, site in enumerate([f, g, f, f, g]):
        bench.now(1000 + n)
        bench.call(site, seed=n)
    events = bench.events(op)
    assert [(e.kind, e.site, e.a) for e in events] == [(Kind.ENTRY, s, 1000 + n) for n, s in enumerate([0, 1, 0, 0, 1])]
    assert [e.extensions for e in events] == [{ring.EXT_PARENT: STOP}] * 5
    assert bench.region.lost == 0
    assert not bench.region.damage


@arches
def test_clock_order_puts_the_parent_into_the_record_itself(arch):
    bench = Bench(arch, clock="order")
    op = function_op()
    f = bench.function("f")
    bench.arm([(f, (op,))])
    for n in range(3):
        bench.call(f, seed=n)
    assert [(e.a, e.extensions) for e in bench.events(op)] == [(STOP, {})] * 3


@arches
def test_graph_records_a_pair_with_one_stack_position(arch):
    """The return value is that of the register, whatever it holds."""
    bench = Bench(arch)
    op = graph_op(retval=True)
    f = bench.function("f")
    bench.arm([(f, (op,))])
    result = bench.arch.facts.RETURNS[0]
    for n in range(3):
        seen = {}
        bench.core.at.clear()
        bench.core.watch(f.at + f.sled.resume, lambda seen=seen, n=n: (
            seen.update(value=bench.core[result]), bench.now(200 + n)))  # fmt: skip
        bench.now(100 + n)
        bench.call(f, seed=n, below=64 * n)
        entry, exit_ = bench.events(op)[-2:]
        stack = bits(slot_position(bench, below=64 * n))
        assert entry == type(entry)(entry.ring, 0, Kind.ENTRY, 0, 100 + n, stack)
        assert (exit_.kind, exit_.a, exit_.stack) == (Kind.EXIT, 200 + n, stack)
        assert exit_.extensions == {ring.EXT_RETVAL: seen["value"]}
    assert len(bench.events(op)) == 6


@arches
def test_nested_calls_and_tail_calls(arch):
    """A tail call has no frame of its own: one exit closes both, and the true return address comes back."""
    bench = Bench(arch)
    op = graph_op()
    leaf = bench.function("leaf")
    jumper = bench.function("jumper", bench.jump(leaf))
    outer = bench.function("outer", bench.call_then_return(jumper))
    bench.arm([(s, (op,)) for s in (leaf, jumper, outer)])
    for _ in range(3):
        bench.call(outer)
    events = bench.events(op)
    assert [(e.kind, e.site) for e in events] == 3 * [
        (Kind.ENTRY, 2), (Kind.ENTRY, 1), (Kind.TAIL, 0), (Kind.EXIT, 1), (Kind.EXIT, 2),
    ]  # fmt: skip
    one, two, three, four, five = (e.stack for e in events[:5])
    assert one == five
    assert two == three == four != one


@arches
def test_a_stack_outside_the_window_gives_plain_entries(arch):
    bench = Bench(arch)
    op = graph_op()
    f = bench.function("f")
    bench.arm([(f, (op,))])
    elsewhere = bench.new_thread(mirrored=False)
    for n in range(3):
        bench.call(f, elsewhere, seed=n)
    assert [e.kind for e in bench.events(op)] == [Kind.PLAIN] * 3


@arches
def test_a_return_that_may_not_be_hooked_gives_plain_entries_beside_hooked_ones(arch):
    bench = Bench(arch)
    op = graph_op()
    f, twice = bench.function("f"), bench.function("setjmp", returns=False)
    tables = bench.arm([(f, (op,)), (twice, (op,))])
    assert sorted(t.hooked for t in tables) == [False, True]
    bench.call(f)
    bench.call(twice)
    assert [(e.kind, e.site) for e in bench.events(op)] == [(Kind.ENTRY, 0), (Kind.EXIT, 0), (Kind.PLAIN, 1)]


# -- rings ------------------------------------------------------------------------------------------------


@arches
@pytest.mark.parametrize("units", [1, 2])
def test_laps(arch, units):
    """A ring that is drained in time goes on over its end, record by record, and loses nothing.

    With records of two units a lap does not end where a record does: the first one fills up the ring by one unit.
    """
    bench = Bench(arch, ring_size=4096)
    op = function_op()
    lone = Op("lone", entry=Spec("lone"))
    f, g = bench.function("f"), bench.function("g")
    bench.arm([(f, (op,)), (g, (lone,))])
    bench.call(g)
    total = 3 * 256 // units + 10
    for n in range(total):
        bench.now(n)
        bench.call(f if units == 2 else g)
        if n % 50 == 49:
            bench.region.drain(bench._sink)
    events = bench.events(op if units == 2 else lone)
    assert [e.a for e in events][-total:] == list(range(total))
    if units == 2:
        assert all(e.extensions == {ring.EXT_PARENT: STOP} for e in events)
    assert bench.region.lost == 0
    assert not bench.region.damage


@arches
def test_drop_keeps_the_oldest_and_counts_the_rest(arch):
    bench = Bench(arch)
    op = Op("lone", entry=Spec("lone"))
    f = bench.function("f")
    bench.arm([(f, (op,))])
    for n in range(300):
        bench.now(n)
        bench.call(f, seed=n if n > 250 else None)  # the slow road keeps registers, too
    assert bench.region.lost == 300 - 256
    assert [e.a for e in bench.events(op)] == list(range(256))
    bench.call(f)  # there is room again
    assert len(bench.events(op)) == 257
    assert bench.region.lost == 44


@arches
def test_an_event_is_written_whole_or_not_at_all(arch):
    """One unit is left, the event has two: it is lost, and the unit stays free."""
    bench = Bench(arch)
    lone, op = Op("lone", entry=Spec("lone")), function_op()
    f, g = bench.function("f"), bench.function("g")
    bench.arm([(f, (op,)), (g, (lone,))])
    for _ in range(255):
        bench.call(g)
    bench.call(f)
    assert bench.region.lost == 1
    bench.call(g)
    assert bench.region.lost == 1
    assert len(bench.events(lone)) == 256
    assert bench.events(op) == []


@arches
def test_overwrite_keeps_the_newest(arch):
    bench = Bench(arch, policy=Policy.OVERWRITE)
    op = Op("lone", entry=Spec("lone"))
    f = bench.function("f")
    bench.arm([(f, (op,))])
    for n in range(700):
        bench.now(n)
        bench.call(f)
    seen = [e.a for e in bench.events(op)]
    assert seen == list(range(700 - len(seen), 700))
    assert 240 <= len(seen) <= 256
    assert bench.region.lost == 0


def test_block_waits_for_the_host():
    """The writer sleeps until there is room; the host's drain wakes it. Needs system calls, so one architecture."""
    bench = Bench("x86_64", policy=Policy.BLOCK)
    op = Op("lone", entry=Spec("lone"))
    f = bench.function("f")
    bench.arm([(f, (op,))])
    waits = []
    bench.core.at[-1].append(lambda: (waits.append(1), len(waits) % 5 == 0 and bench.region.drain(bench._sink)))
    for n in range(600):
        bench.now(n)
        bench.call(f, seed=n)
    assert len(waits) == 10  # two full rings, five naps each
    assert [e.a for e in bench.events(op)] == list(range(600))
    assert bench.region.lost == 0


@arches
def test_block_gives_up_when_nobody_drains(arch):
    """No heartbeat for 20,000 looks: the policy becomes drop for good, the program goes on, losses are counted."""
    bench = Bench(arch, policy=Policy.BLOCK, system_calls=False)
    op = Op("lone", entry=Spec("lone"))
    f = bench.function("f")
    bench.arm([(f, (op,))])
    for _ in range(256):
        bench.call(f)
    assert not bench.region.gave_up
    bench.core.run = lambda at: bench.core.uc.emu_start(at, STOP, count=10_000_000)
    for n in range(3):
        bench.call(f, seed=n)
        assert bench.core[bench.arch.pc] == STOP
    assert bench.region.gave_up
    assert bench.region.lost == 3


@arches
def test_block_does_not_wait_when_recording_is_off(arch):
    bench = Bench(arch, policy=Policy.BLOCK, system_calls=False)
    op = Op("lone", entry=Spec("lone"))
    f = bench.function("f")
    bench.arm([(f, (op,))])
    for _ in range(256):
        bench.call(f)
    bench.region.switch(on=False)
    bench.call(f)
    assert bench.region.lost == 1
    assert not bench.region.gave_up


# -- threads, forks, signals ------------------------------------------------------------------------------


@arches
def test_each_thread_claims_a_ring_and_too_many_are_counted(arch):
    bench = Bench(arch, nrings=4)
    op = function_op()
    f = bench.function("f")
    bench.arm([(f, (op,))])
    threads = [bench.new_thread() for _ in range(6)]  # pointers 128 bytes apart, so a table takes them in turn
    for round_ in range(2):
        for n, thread in enumerate(threads):
            bench.core.tid = 200 + n
            bench.now(10 * round_ + n)
            bench.call(f, thread, seed=n)
    events = bench.events(op)
    assert bench.region.in_use == [0, 1, 2, 3]
    by_ring = {}
    for e in events:
        by_ring.setdefault(e.ring, []).append(e.a)
    assert sorted(by_ring.values()) == [[n, 10 + n] for n in range(4)]
    assert bench.region.ringless == 4  # two threads, two calls each
    for number in range(4):
        header = REGION + ring.PAGE + number * ring.RING_HEADER
        assert bench.core.word(header + ring.H_TP) in {t.pointer for t in threads[:4]}
        assert bench.core.word(header + ring.H_PARENT) == number
        assert bench.core.word(header + ring.H_LEVEL) == 0
    if bench.layout.system_calls:
        ids = {(bench.region.info(n).pid, bench.region.info(n).tid) for n in range(4)}
        assert ids == {(100, 200 + n) for n in range(4)}
        assert len(bench.core.calls) == 2 * 4 + 2 * 4  # getpid and gettid: once a thread, and at each vain attempt


def test_a_thread_keeps_its_ring_when_its_thread_pointer_changes():
    """A static program records before its TLS is set up, and after: one thread, one ring."""
    bench = Bench("x86_64")
    op = function_op()
    f = bench.function("f")
    bench.arm([(f, (op,))])
    bench.call(f)
    other = bench.new_thread()
    other.segment = bench.thread.segment
    bench.call(f, other, seed=1)
    assert [e.ring for e in bench.events(op)] == [0, 0]


@arches
def test_a_forked_child_does_not_write_into_its_parents_ring(arch):
    """Its contexts are wiped, its segment register and stack are copies. It gets a ring, or its losses are counted."""
    bench = Bench(arch)
    op = function_op()
    f = bench.function("f")
    bench.arm([(f, (op,))])
    bench.call(f)
    parent = bench.core.read(bench.layout.contexts, bench.nrings * CONTEXT)
    bench.core.write(bench.layout.contexts, bytes(bench.nrings * CONTEXT))
    bench.core.pid = bench.core.tid = 101
    for n in range(2):
        bench.call(f, seed=n)
    events = bench.events(op)
    assert events[0].ring not in {e.ring for e in events[1:]}
    assert len(events) - 1 + bench.region.ringless == 2
    if bench.layout.system_calls:
        assert [bench.region.info(e.ring).pid for e in events] == [100, 101, 101]
    assert parent != bench.core.read(bench.layout.contexts, bench.nrings * CONTEXT)


def test_a_thread_without_tls_is_counted_and_left_alone():
    """%fs:0 is not the thread pointer (Go): nothing is written but a count."""
    bench = Bench("x86_64")
    op = function_op()
    f = bench.function("f")
    bench.arm([(f, (op,))])
    bench.core.put(bench.thread.pointer, 0x1234)
    for n in range(3):
        bench.call(f, seed=n)
    assert bench.events(op) == []
    assert bench.region.ringless == 3
    assert bench.region.in_use == []


def interrupted(bench, outer, inner, steps):
    """Call `outer`; after `steps` instructions a signal handler calls `inner` below the red zone. True if it came."""
    core, thread = bench.core, bench.thread
    bench.enter(thread)
    core.run(outer.at, STOP, count=steps)
    if core[bench.arch.pc] == STOP:
        bench.leave(thread)
        return False
    before = core.everything()
    bench.leave(thread)
    handler = type(thread)(thread.pointer, (before[bench.arch.sp] - 1024) & -16, thread.segment)
    bench.call(inner, handler)
    gs = handler.segment
    core.restore(before)
    if bench.arch.name == "x86_64":
        core["gs_base"] = gs
    core.run(before[bench.arch.pc])
    bench.leave(thread)
    return True


@arches
@pytest.mark.parametrize("clock", ["memory", "order"])
@pytest.mark.parametrize("fresh", [False, True], ids=["fast", "claiming"])
def test_a_signal_at_every_instruction(arch, clock, fresh):
    """Whatever instruction of hook, slot and program is interrupted: every event is there once, or counted as lost."""
    steps = 0
    bench = None
    while True:
        steps += 1
        if fresh or bench is None:
            bench = Bench(arch, clock=clock, nrings=8)
            op = graph_op(retval=True)
            f, g = bench.function("f"), bench.function("g")
            bench.arm([(f, (op,)), (g, (op,))])
        if not fresh:  # the same thread again and again: it has a context, and the rings of its levels
            bench.call(f)
            bench.events(op)
            bench._partial.clear()
        came = interrupted(bench, f, g, steps)
        events = bench.events(op)
        lost = bench.region.lost
        assert not bench.region.damage
        of = {s: [e.kind for e in events if e.site == s] for s in (0, 1)}
        expected = {0: [Kind.ENTRY, Kind.EXIT], 1: [Kind.ENTRY, Kind.EXIT] if came else []}
        if lost == 0:
            assert of == expected, (steps, of)
        else:
            assert fresh or not came, (steps, lost)
            assert sum(map(len, of.values())) + lost == 4, (steps, of, lost)
        for e in events:
            nested = {ring.EXT_POS} if e.level and clock == "order" else set()
            assert set(e.extensions) - {ring.EXT_RETVAL} == nested, (steps, e)
            if e.level:
                assert e.site == 1
                assert bench.region.info(e.ring).parent == 0
        if not came:
            assert steps > 40
            break
        if fresh:
            steps += 6  # the slow road is long


@arches
def test_levels_have_an_end(arch):
    """A fifth handler inside handlers inside programs is counted, not written."""
    bench = Bench(arch, nrings=8)
    op = Op("lone", entry=Spec("lone"))
    f = bench.function("f")
    bench.arm([(f, (op,))])
    bench.call(f)
    contexts = range(bench.layout.contexts, bench.layout.contexts + 8 * CONTEXT, CONTEXT)
    base = next(at for at in contexts if bench.core.word(at) == bench.thread.pointer)
    for level in range(5):
        bench.now(level)
        bench.call(f, seed=level)
        if level < 4:
            key = base + 64 * level
            assert bench.core.word(key) == bench.thread.pointer
            bench.core.put(key, 0 if bench.arch.dialect.segment else key)  # a program of this level is running
    events = bench.events(op)
    assert [(e.level, e.a) for e in events][1:] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert bench.region.lost == 1


# -- depth, threshold, counts -----------------------------------------------------------------------------


def chain(bench, op, length=4):
    """Functions that call one another: the first is the leaf."""
    sites = [bench.function("f0")]
    for n in range(1, length):
        sites.append(bench.function(f"f{n}", bench.call_then_return(sites[-1])))
    bench.arm([(s, (op,)) for s in sites])
    return sites


@arches
def test_depth_records_the_outermost_calls(arch):
    bench = Bench(arch)
    op = graph_op(depth=2)
    sites = chain(bench, op)
    for _ in range(2):
        bench.call(sites[-1])
    assert [(e.kind, e.site) for e in bench.events(op)] == 2 * [
        (Kind.ENTRY, 3), (Kind.ENTRY, 2), (Kind.EXIT, 2), (Kind.EXIT, 3),
    ]  # fmt: skip


@arches
def test_threshold_records_slow_calls_with_their_duration(arch):
    bench = Bench(arch)
    op = graph_op(threshold=100, retval=True)
    sites = chain(bench, op, 3)
    leaf = sites[0]
    took = [99, 100, 101, 5000]
    bench.core.watch(leaf.at + leaf.sled.resume, lambda: bench.now(1000 + took[0]))
    for _ in range(4):
        bench.now(1000)
        bench.call(sites[-1])
        took.append(took.pop(0))
    events = bench.events(op)
    assert {e.kind for e in events} == {Kind.EXIT}
    assert [(e.site, e.a, e.extensions[ring.EXT_DURATION]) for e in events] == [
        (site, 1000 + t, t) for t in (100, 101, 5000) for site in (0, 1, 2)
    ]
    assert all(ring.EXT_RETVAL in e.extensions for e in events)


@arches
def test_hits(arch):
    bench = Bench(arch)
    op = Op("hits", entry=Spec("hits", record=False, count=True), counts=True)
    f, g = bench.function("f"), bench.function("g")
    bench.arm([(f, (op,)), (g, (op,))])
    other = bench.new_thread()
    for n in range(5):
        bench.call(f, seed=n)
    bench.call(g, seed=9)
    bench.core.tid += 1
    bench.call(g, other, seed=10)
    rings = bench.region.in_use
    assert sorted(bench.counts(f, op, i)[0] for i in rings) == [0, 5]
    assert sorted(bench.counts(g, op, i)[0] for i in rings) == [1, 1]
    assert bench.region.drain(lambda *_: None) == 0


@arches
def test_times_total_self_min_and_max(arch):
    """Minimum is kept as its complement, so that a zeroed row needs no set-up."""
    bench = Bench(arch)
    op = Op(
        "profile",
        entry=Spec("time_entry", record=False, count=True, timed=True),
        exit=Spec("time_exit", exit=True, record=False, timed=True),
        counts=True,
    )
    sites = chain(bench, op, 2)
    leaf, outer = sites
    clock = [0]

    def tick(by):
        clock[0] += by
        bench.now(clock[0])

    leaf_takes = [7, 3, 20]
    bench.core.watch(leaf.at + leaf.sled.resume, lambda: tick(leaf_takes[0]))
    bench.core.watch(outer.at + outer.sled.resume, lambda: tick(10))
    for _ in range(3):
        bench.call(outer)
        leaf_takes.append(leaf_takes.pop(0))
    index = bench.region.in_use[0]
    assert bench.counts(leaf, op, index) == (3, 30, 30, U64 - 3, 20)
    assert bench.counts(outer, op, index) == (3, 60, 30, U64 - 13, 30)


# -- registers --------------------------------------------------------------------------------------------

PROGRAMS = {
    "nop": Op("nop", entry=Spec("nop", record=False)),
    "function": function_op(),
    "lone": Op("lone", entry=Spec("lone")),
    "graph": graph_op(),
    "retval": graph_op(retval=True),
    "depth": graph_op(depth=1, retval=True),
    "threshold": graph_op(threshold=1, retval=True),
    "hits": Op("hits", entry=Spec("hits", record=False, count=True), counts=True),
    "profile": Op("profile", entry=Spec("e", record=False, count=True, timed=True),
                  exit=Spec("x", exit=True, record=False, timed=True), counts=True),
}  # fmt: skip


@arches
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_keeps_every_register(arch, name):
    """At the body, and after the return: on the slow road, on the fast one, and with a full ring."""
    clocks = ["memory"]
    if name not in ("threshold", "profile"):  # which tracers refuse for clock "order": tests/tracers
        clocks.append("order")
    if arch == "x86_64":  # the emulated riscv64 core has no time counter
        clocks.append("tsc")
    for clock in clocks:
        registers_are_kept(arch, name, clock)


def registers_are_kept(arch, name, clock):
    bench = Bench(arch, clock=clock)
    op = PROGRAMS[name]
    f = bench.function("f")
    bench.arm([(f, (op,))])
    at_body = {}
    bench.core.watch(f.at + f.sled.resume, lambda: at_body.update(bench.core.registers()))
    for n in range(12):
        if n == 6:
            for header in range(REGION + ring.PAGE, REGION + ring.PAGE + 4 * ring.RING_HEADER, ring.RING_HEADER):
                bench.region._view[header - REGION + ring.H_LIMIT :][:8] = struct.pack("<Q", 0)
        if n == 9:
            bench.core.write(bench.layout.contexts, bytes(4 * CONTEXT))
        seen = {}
        bench.core.at[f.at] = [lambda seen=seen: seen.update(bench.core.registers())]
        if n == 0:
            bench.core.watch(f.at, lambda: None)
        bench.call(f, seed=n)
        sp = bench.arch.sp
        assert at_body[sp] == seen[sp]
        hooked = {"ra"} if op.exit is not None else set()  # where the link is a register, it is the hook now
        wrong = {r for r in bench.dress.kept - hooked if at_body[r] != seen[r]}
        assert not wrong, (n, wrong)


@arches
def test_a_nested_event_says_where_in_its_parents_ring_it_belongs(arch):
    bench = Bench(arch, clock="order", nrings=8)
    op = function_op()
    f = bench.function("f")
    bench.arm([(f, (op,))])
    for _ in range(3):
        bench.call(f)
    contexts = range(bench.layout.contexts, bench.layout.contexts + 8 * CONTEXT, CONTEXT)
    base = next(at for at in contexts if bench.core.word(at) == bench.thread.pointer)
    bench.core.put(base, 0 if bench.arch.dialect.segment else base)  # a program is running: this is a signal handler
    bench.call(f, seed=1)
    bench.core.put(base, bench.thread.pointer)
    bench.call(f, seed=2)
    events = bench.events(op)
    (nested,) = [e for e in events if e.level]
    assert nested.extensions == {ring.EXT_POS: 3 * ring.RECORD}
    assert [e.extensions for e in events if not e.level] == [{}] * 4
    info = bench.region.info(nested.ring)
    assert (info.level, info.parent) == (1, events[0].ring)


@arches
@pytest.mark.parametrize("timed", [False, True], ids=["hits", "times"])
def test_a_signal_at_every_instruction_of_a_counter(arch, timed):
    """A handler that calls the very function that is being counted: both calls are counted."""
    more = {"exit": Spec("x", exit=True, record=False, timed=True)} if timed else {}
    op = Op("count", entry=Spec("e", record=False, count=True, timed=timed), counts=True, **more)
    missing = {}
    steps = 0
    came = True
    bench = Bench(arch, nrings=8)
    f = bench.function("f")
    bench.arm([(f, (op,))])
    bench.call(f)

    def counted():
        return sum(bench.counts(f, op, i)[0] for i in bench.region.in_use) + bench.region.lost

    while came:
        steps += 1
        before = counted()
        came = interrupted(bench, f, f, steps)
        if counted() - before != 1 + came:
            missing[steps] = counted() - before
    assert not missing
