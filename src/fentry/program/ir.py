"""Programs as LLVM IR text: record an event, count, time; one description for every architecture.

A *program* is a ``preserve_mostcc`` function that a slot calls. It gets its site from its own return address
(the *mark*), never touches FP or vector registers, and has two bodies:

* the fast one: the thread's context is there, the ring has room: about 25 instructions, no call;
* ``<name>.slow``: everything else, entered by a tail call, so that it sees the same mark and stack. It gives a
  new thread (or a forked child) its context, waits for room or counts the loss, and puts
  events of signal handlers that interrupted a program into a ring of their own.

What a thread's context holds, and how it gets one, is in :mod:`fentry.program.context`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from fentry.arch import Dialect
from fentry.program.context import (
    C_ACC,
    C_DATA,
    C_DEPTH,
    C_KEY,
    C_LIMIT,
    C_OWNER,
    C_RING,
    C_TABLE,
    COUNTER,
    IN_SLOT,
    K_HITS,
    K_MAX,
    K_MIN,
    K_SELF,
    K_TOTAL,
    Context,
    Layout,
    acquire,
    busy,
    ring_data,
    table_context,
)
from fentry.program.text import ATTRIBUTES, Text
from fentry.record import layout as ring_layout


class Parent(Enum):
    """Where an entry program finds the caller's return address, relative to its own return slot."""

    NONE = "none"
    NEXT = "next"  #: in the caller's return slot (armed by a jump), or in the slot's frame of 16 bytes, at 8(sp)
    AFTER_RESUME = "after-resume"  #: one word further: behind the resume address (armed by a call)
    SHADOW = "shadow"  #: in the shadow of the caller's return slot


@dataclass(frozen=True, slots=True)
class Spec:
    """What one program does; the unit that engine and tracers choose from.

    Attributes:
        name: symbol name, unique in its module.
        exit: runs at an exit: takes the return value as its argument.
        record: write an event.
        parent: where the parent address is found; it becomes an EXT_PARENT extension (or the payload of
            clock ``order``).
        stack: put the frame's stack bits into the record.
        retval: add the return value (EXT_RETVAL).
        depth: keep the nesting depth and record only calls less than this deep; 0 = any.
        threshold: record only exits of calls that took at least this many clock units, with their duration.
        count: add one to the site's hits, in the table at Layout.counters; needs `base` and `shift`.
        timed: also total, self, min, max.
        base, shift: slot table address and log2 of its stride, which turn a mark into a counter row.
        row: first counter row of that table.
        tail: an entry by tail call: no frame of its own.
    """

    name: str
    exit: bool = False
    record: bool = True
    parent: Parent = Parent.NONE
    stack: bool = False
    retval: bool = False
    depth: int = 0
    threshold: int = 0
    count: bool = False
    timed: bool = False
    base: int = 0
    shift: int = 0
    row: int = 0
    tail: bool = False


def event_units(spec: Spec, clock: str, *, parent: bool) -> int:
    """How many records one event of a program takes, extensions included; 0 if it writes none."""
    if not spec.record or (spec.threshold and not spec.exit):
        return 0
    extensions = 0 if clock == "order" else (parent and not spec.exit) + spec.retval
    return 1 + extensions + (1 if spec.threshold else 0)


class Module:
    """A module of programs for one session."""

    def __init__(self, dialect: Dialect, layout: Layout) -> None:
        self.dialect = dialect
        self.layout = layout
        self.functions: list[str] = []
        self.names: list[str] = []

    def add(self, spec: Spec) -> None:
        """Add a program (and its slow half)."""
        self.names.append(spec.name)
        self.functions.append(self._body(spec, slow=False))
        self.functions.append(self._body(spec, slow=True))

    def text(self) -> str:
        """The whole module."""
        d = self.dialect
        return "\n".join(
            [
                'target triple = "TRIPLE"',
                "declare ptr @llvm.returnaddress(i32)",
                "declare i64 @llvm.readcyclecounter()",
                "declare i64 @llvm.read_register.i64(metadata)",
                "declare i64 @llvm.umin.i64(i64, i64)",
                "declare ptr @llvm.addressofreturnaddress.p0()" if d.return_slot else "",
                d.declares,
                *self.functions,
                acquire(d, self.layout),
                '!0 = !{!"branch_weights", i32 100000, i32 1}',
                '!1 = !{!"branch_weights", i32 1, i32 100000}',
                '!2 = !{!"sp"}',
                "",
            ]
        )

    # -- one program -------------------------------------------------------------------------------
    def _body(self, spec: Spec, *, slow: bool) -> str:
        if not (spec.record or spec.count or spec.timed):  # tracer nop: the cost of being called at all
            name = f"{spec.name}.slow" if slow else spec.name
            return f"define {'internal ' if slow else ''}preserve_mostcc void @{name}() {ATTRIBUTES} {{ ret void }}"
        t, lay, d = Text(), self.layout, self.dialect
        name = f"{spec.name}.slow" if slow else spec.name
        pair = spec.exit and d.exit_pair
        params = args = "i64 %ret, i64 %ret2" if pair else ""
        kind = "{ i64, i64 }" if pair else "preserve_mostcc void"
        units = self._units(spec)
        light = spec.count and not (spec.record or spec.timed or spec.depth or spec.threshold)

        def bail() -> None:
            if pair:
                t.add(f"ret {{ i64, i64 }} {t.op(f'musttail call {kind} @{spec.name}.slow({args})')}")
            else:
                t.add(f"musttail call {kind} @{spec.name}.slow({args})")
                t.add("ret void")

        # a nested event of a clock without time says where in its parent's ring it belongs
        placed = slow and spec.record and self.layout.clock == "order"
        if slow:
            c = t.op(f"call ptr @acquire(i64 {16 * (units + placed)})", "c")
            none = t.op(f"icmp eq ptr {c}, null")
            t.branch(none, "out", "go", likely=False)
            t.label("go")
            ctx = Context(t, d, c)
            tp = t.op(f"sub i64 {ctx.load(C_OWNER)}, 1")
        else:
            tp = t.snippet(d.thread_pointer)
            pointer = None
            if not d.segment:
                pointer = table_context(t, lay, tp)
            ctx = Context(t, d, pointer)
            key = ctx.load(C_KEY, volatile=True)
            mine = t.op(f"icmp eq i64 {key}, {tp}")
            t.branch(mine, "mine", "other", likely=True)
            t.label("other")
            bail()
            t.label("mine")
            if not light:  # a lone counter is one read-modify-write: a signal cannot come between
                ctx.store(busy(t, pointer), C_KEY, volatile=True)
                t.barrier()

        def leave() -> None:
            if not light:
                ctx.store(tp, C_KEY, volatile=True)
            bail()

        self._work(t, spec, ctx, name, None if slow else leave, placed=placed)
        if slow or not light:
            t.barrier()
            ctx.store(tp, C_KEY, volatile=True)
        if slow:
            t.add("br label %out")
            t.label("out")
        if pair:
            one = t.op("insertvalue { i64, i64 } poison, i64 %ret, 0")
            t.add(f"ret {{ i64, i64 }} {t.op(f'insertvalue {{ i64, i64 }} {one}, i64 %ret2, 1')}")
        else:
            t.add("ret void")
        linkage = "internal " if slow else ""
        note = " noinline" if slow else ""
        head = f"define {linkage}{kind} @{name}({params}) {ATTRIBUTES}{note} {{"
        return "\n".join([head, "start:", *t.lines, "}"])

    def _units(self, spec: Spec) -> int:
        return event_units(spec, self.layout.clock, parent=spec.parent is not Parent.NONE)

    def _work(
        self,
        t: Text,
        spec: Spec,
        ctx: Context,
        name: str,
        leave: Callable[[], None] | None,
        *,
        placed: bool,
    ) -> None:
        lay, d = self.layout, self.dialect

        def mark() -> str:
            if d.return_slot:  # an ordinary load, so that it can be told when to happen
                return t.load(t.op("call ptr @llvm.addressofreturnaddress.p0()", "p"), volatile=True)
            return t.op(f"ptrtoint ptr {t.op('call ptr @llvm.returnaddress(i32 0)', 'm')} to i64", "mark")

        # the frame's position: where the return slot is (the same for entry and exit of one call)
        frame = self.layout.frames.get(name, 0)
        needs_frame = (
            spec.retval or spec.stack or spec.timed or spec.threshold or spec.depth or spec.parent is not Parent.NONE
        )
        position = ""
        if needs_frame:
            if d.return_slot:
                own = t.op(f"ptrtoint ptr {t.op('call ptr @llvm.addressofreturnaddress.p0()', 'p')} to i64")
                position = t.op(f"add i64 {own}, {IN_SLOT}")
            else:
                sp = t.op("call i64 @llvm.read_register.i64(metadata !2)")
                position = t.op(f"add i64 {sp}, {frame}")  # the stack pointer when the program was entered
        # without return slots the frame is known by the stack pointer at its entry: above the slot's frame
        shadow = lay.shadow if d.return_slot else lay.shadow + IN_SLOT
        now = ""

        def clock() -> str:
            if early:
                return early
            if lay.clock == "order":
                return "0"
            if lay.clock == "memory":
                return t.load(t.pointer(lay.clock_at), volatile=True)
            return t.snippet(d.cycles)

        # A cycle counter is microcode that lets nothing else start meanwhile; what is issued after it overlaps with the
        # traced program, what is issued before it does not. Reading it first takes 2 ns off an event of 11 (measured).
        early = ""
        if leave is not None and lay.clock == "tsc" and (spec.record or spec.timed):
            early = clock()
            t.barrier()

        keep = ""  # a condition that lets the record through
        if spec.depth:
            plane = t.pointer(t.op(f"add i64 {position}, {shadow + 3 * lay.plane}"))
            if spec.exit:
                depth = t.load(plane)
                ctx.store(depth, C_DEPTH)
            else:
                depth = ctx.load(C_DEPTH)
                if not spec.tail:
                    t.store(depth, plane)
                    ctx.store(t.op(f"add i64 {depth}, 1"), C_DEPTH)
            keep = t.op(f"icmp ult i64 {depth}, {spec.depth}")
        duration = ""
        if spec.threshold:
            now = clock()
            start = t.pointer(t.op(f"add i64 {position}, {shadow + 2 * lay.plane}"))
            if spec.exit:
                duration = t.op(f"sub i64 {now}, {t.load(start)}")
                slow_enough = t.op(f"icmp uge i64 {duration}, {spec.threshold}")
                keep = t.op(f"and i1 {keep}, {slow_enough}") if keep else slow_enough
            elif not spec.tail:  # which has no frame of its own, perhaps not even a mirrored stack
                t.store(now, start)
        if spec.count or spec.timed:
            self._count(t, spec, ctx, mark(), position, shadow, clock, leave)
        recording = spec.record and not (spec.threshold and not spec.exit)
        if not recording:
            return
        if keep:
            t.add(f"br i1 {keep}, label %keep, label %done")
            t.label("keep")
        header = ctx.load(C_RING)
        if leave is not None and lay.system_calls:
            # a child that was forked by a signal handler inside a program finds the context wiped under its feet
            t.branch(t.op(f"icmp eq i64 {header}, 0"), "full", "whole", likely=False)
            t.label("whole")
        if leave is None:
            t.add(f"br i1 {t.op(f'icmp eq i64 {header}, 0')}, label %out, label %ringed")
            t.label("ringed")
        ring = t.pointer(header)
        pos = t.load(ring)
        units = self._units(spec)
        end = t.op(f"add i64 {pos}, {16 * units}")
        first = ""
        if leave is not None:
            # the limit is read last: if the context is wiped before that, it is 0 and sends us away; after that
            # everything is at hand
            data = ctx.load(C_DATA, volatile=True)
            t.branch(t.op(f"icmp ugt i64 {end}, {ctx.load(C_LIMIT, volatile=True)}"), "full", "room", likely=False)
            t.label("full")
            leave()
            t.label("room")
            first = t.pointer(t.op(f"add i64 {data}, {pos}"))
        base = "" if leave is not None else ring_data(t, lay, ctx.load(C_RING))

        def put(index: int, a: Callable[[], str], word: Callable[[], str]) -> None:
            if first:
                rec = t.at(first, 16 * index)
            else:
                at = t.op(f"add i64 {pos}, {16 * index}") if index else pos
                rec = t.pointer(t.op(f"add i64 {base}, {t.op(f'and i64 {at}, {lay.ring_size - 1}')}"))
            t.store(a(), rec, volatile=True)
            t.store(word(), t.at(rec, 8), volatile=True)

        # Each word is made right before it is stored, and nothing is kept over the clock: a register less is a push and
        # a pop less. Hence thunks, and volatile loads, which stay where they are written.
        def stacked() -> str:
            if not spec.stack:
                return mark()
            bits = t.op(f"shl i64 {t.op(f'lshr i64 {position}, 4')}, 48")
            return t.op(f"or i64 {bits}, {mark()}")

        def parent() -> str:
            offset = shadow
            if spec.parent is not Parent.SHADOW:
                offset = (0 if d.return_slot else 8) + (8 if spec.parent is Parent.AFTER_RESUME else 0)
            return t.load(t.pointer(t.op(f"add i64 {position}, {offset}")), volatile=True)

        def ret() -> str:
            return t.load(t.pointer(position), volatile=True) if d.return_slot else "%ret"

        extensions: list[tuple[Callable[[], str], int]] = []
        if spec.parent is not Parent.NONE:
            extensions.append((parent, ring_layout.EXT_PARENT))
        if spec.retval:
            extensions.append((ret, ring_layout.EXT_RETVAL))
        if lay.clock == "order":
            put(0, extensions[0][0] if extensions else lambda: "0", stacked)
            extensions = []
        else:
            put(0, (lambda: now) if now else clock, stacked)
        if duration:
            extensions.append((lambda: duration, ring_layout.EXT_DURATION))
        for index, (value, code) in enumerate(extensions):
            put(1 + index, value, lambda code=code: str(code))  # type: ignore[misc]  # a default binds the loop's value
        if placed:
            level = t.load(t.at(ring, ring_layout.H_LEVEL))
            t.add(f"br i1 {t.op(f'icmp eq i64 {level}, 0')}, label %own, label %nested")
            t.label("nested")
            row = t.op(f"mul i64 {t.load(t.at(ring, ring_layout.H_PARENT))}, {ring_layout.RING_HEADER}")
            parents = t.pointer(t.op(f"add i64 {row}, {lay.region + ring_layout.PAGE}"))
            put(1 + len(extensions), lambda: t.load(parents), lambda: str(ring_layout.EXT_POS))
            more = t.op(f"add i64 {end}, 16")
            t.add("br label %own")
            t.label("own")
            before = "ringed"
            end = t.op(f"phi i64 [ {end}, %{before} ], [ {more}, %nested ]")
        if not lay.sliced:
            t.add("fence release")
        t.barrier()
        if leave is None:
            t.store(end, ring)
        else:  # the position is read again rather than kept
            header = ctx.load(C_RING)
            if lay.system_calls:
                t.branch(t.op(f"icmp eq i64 {header}, 0"), "unpublished", "publish", likely=False)
                t.label("publish")
            ring = t.pointer(header)
            t.store(t.op(f"add i64 {t.load(ring)}, {16 * units}"), ring)
            if lay.system_calls:
                t.add("br label %unpublished")
                t.label("unpublished")
        if leave is None:  # the next lap
            lap = t.op(f"and i64 {end}, {-lay.ring_size}")
            ctx.store(t.op(f"sub i64 {base}, {lap}"), C_DATA)
            limit = t.load(t.at(ring, ring_layout.H_LIMIT), volatile=True)
            over = t.op(f"add i64 {lap}, {lay.ring_size}")
            ctx.store(t.op(f"call i64 @llvm.umin.i64(i64 {limit}, i64 {over})"), C_LIMIT)
        if keep:
            t.add("br label %done")
            t.label("done")

    def _count(
        self,
        t: Text,
        spec: Spec,
        ctx: Context,
        mark: str,
        position: str,
        shadow: int,
        clock: Callable[[], str],
        leave: Callable[[], None] | None,
    ) -> None:
        """Add to the site's row of this thread's counter table; times need a frame in the shadow planes."""
        lay = self.layout
        # a table lies at a multiple of its stride, so its address and its first row become one constant
        wide = COUNTER.bit_length() - 1
        index = t.op(f"shl i64 {t.op(f'lshr i64 {mark}, {spec.shift}')}, {wide}")
        first = (spec.row << wide) - ((spec.base >> spec.shift) << wide)
        table = ctx.load(C_TABLE)
        if leave is not None and lay.system_calls:  # see `whole` in _work
            t.branch(t.op(f"icmp eq i64 {table}, 0"), "wiped", "counting", likely=False)
            t.label("wiped")
            leave()
            t.label("counting")
        row = t.pointer(t.op(f"add i64 {t.op(f'add i64 {index}, {first}')}, {table}"))
        if not spec.exit:
            hits = t.at(row, K_HITS)
            if self.dialect.atomic_add:  # a signal handler may count between a load and its store
                t.op(f"atomicrmw add ptr {hits}, i64 1 monotonic")
            else:
                t.store(t.op(f"add i64 {t.load(hits)}, 1"), hits)
        if not spec.timed or spec.tail:
            return
        start = t.pointer(t.op(f"add i64 {position}, {shadow + 2 * lay.plane}"))
        if self.dialect.return_slot:
            acc = t.pointer(t.op(f"add i64 {position}, {shadow + 3 * lay.plane}"))
        else:  # frames are known by stack pointers, which are multiples of 16: there is room beside the time
            acc = t.at(start, 8)
        if not spec.exit:
            t.store(clock(), start)
            t.store(ctx.load(C_ACC), acc)
            return
        # self = duration - what callees that finished meanwhile took; robust against frames left by longjmp,
        # because the accumulator only grows and each frame remembers where it began
        took = t.op(f"sub i64 {clock()}, {t.load(start)}")
        before = t.load(acc)
        callees = t.op(f"sub i64 {ctx.load(C_ACC)}, {before}")
        own = t.op(f"sub i64 {took}, {callees}")
        ctx.store(t.op(f"add i64 {before}, {took}"), C_ACC)
        for offset, value in ((K_TOTAL, took), (K_SELF, own)):
            cell = t.at(row, offset)
            t.store(t.op(f"add i64 {t.load(cell)}, {value}"), cell)
        # the minimum is kept as its complement, so that a zeroed row needs no set-up
        for offset, value in ((K_MIN, t.op(f"xor i64 {took}, -1")), (K_MAX, took)):
            cell = t.at(row, offset)
            t.add(f"br i1 {t.op(f'icmp ugt i64 {value}, {t.load(cell)}')}, label %more{offset}, label %kept{offset}")
            t.label(f"more{offset}")
            t.store(value, cell)
            t.add(f"br label %kept{offset}")
            t.label(f"kept{offset}")
