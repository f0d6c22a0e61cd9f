"""Programs as LLVM IR text: record an event, count, time; one description for every architecture.

A *program* is a ``preserve_mostcc`` function that a slot calls. It gets its site from its own return address
(the *mark*), never touches FP or vector registers, and has two bodies:

* the fast one: the thread's context is there, the ring has room: about 25 instructions, no call;
* ``<name>.slow``: everything else, entered by a tail call, so that it sees the same mark and stack. It gives a
  new thread (or a forked child) its context, waits for room or counts the loss, and puts
  events of signal handlers that interrupted a program into a ring of their own.

The context (256 bytes per ring, zeroed in a forked child) holds four levels of 64 bytes:

    0  key    thread pointer while idle; something else while a program of this level runs
    8  owner  thread pointer + 1 of the thread that it belongs to; 0 = nobody's
   16  ring   address of the ring header
   24  data   address of the ring's bytes, less the stream position where this lap of the ring began
   32  limit  stream position up to which there is room in this lap: the ring's own limit when last looked at,
              or the end of the lap, so that the hot path neither masks nor touches what the host writes
   40  index  ring index; also the row in the counter table
   48  depth  nesting of hooked calls
   56  acc    time spent in finished callees (profile)

``key`` is checked, cleared, and set again: one compare on the hot path tells "not my context" and
"a program is already running here" (a signal arrived inside it) at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from fentry.arch import Dialect
from fentry.record import layout as L

CONTEXT = 256
LEVEL = 64
LEVELS = 4
C_KEY, C_OWNER, C_RING, C_DATA, C_LIMIT, C_INDEX, C_DEPTH, C_ACC = range(0, 64, 8)

#: key of a context in a hashed table that belongs to nobody
NO_KEY = (1 << 64) - 1

#: one row of the counter table: hits, total, self, min, max, and padding to a power of two
COUNTER = 64
K_HITS, K_TOTAL, K_SELF, K_MIN, K_MAX = range(0, 40, 8)

#: a slot keeps this many bytes on the stack while it calls programs: a program's own return address (or, without
#: return slots, its stack pointer) lies so far below the caller's return slot (or the stack pointer at the entry)
IN_SLOT = 16


class Parent(Enum):
    """Where an entry program finds the caller's return address, relative to its own return slot."""

    NONE = "none"
    NEXT = "next"  #: in the caller's return slot (armed by a jump), or in the slot's frame of 16 bytes, at 8(sp)
    AFTER_RESUME = "after-resume"  #: one word further: behind the resume address (armed by a call)
    SHADOW = "shadow"  #: in the shadow of the caller's return slot


@dataclass(frozen=True, slots=True)
class Layout:
    """Addresses and sizes of one session that are compiled into its programs."""

    region: int  #: shared region (record/layout.py)
    nrings: int
    ring_size: int
    contexts: int  #: nrings contexts of CONTEXT bytes
    clock: str  #: "tsc" | "order" | "memory"
    clock_at: int = 0  #: where clock "memory" reads a u64
    shadow: int = 0  #: distance from a return slot to its shadow
    plane: int = 0  #: distance from one shadow plane to the next
    counters: int = 0  #: nrings tables of `sites` counter rows
    sites: int = 0
    sliced: bool = False  #: rings are only read while the target does not run
    system_calls: bool = True  #: False: the target has none that programs may use
    frames: dict[str, int] = field(default_factory=dict)  #: bytes of stack each program takes (see compile.py)


class Text:
    """LLVM IR being written: fresh value names, and shorthands for the few instructions in use."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def new(self, hint: str = "v") -> str:
        """Give a fresh SSA name."""
        self.count += 1
        return f"%{hint}{self.count}"

    def add(self, line: str) -> None:
        """Append one line."""
        self.lines.append("  " + line)

    def label(self, name: str) -> None:
        """Begin a block."""
        self.lines.append(f"{name}:")

    def op(self, what: str, hint: str = "v") -> str:
        """Append ``%new = what``."""
        out = self.new(hint)
        self.add(f"{out} = {what}")
        return out

    def snippet(self, template: str, **values: str | int) -> str:
        """Append a dialect snippet; gives its {out}."""
        out = self.new("d")
        self.add(template.format(out=out, **values))
        return out

    def at(self, base: str, offset: int) -> str:
        """Pointer `offset` bytes behind `base`."""
        return self.op(f"getelementptr i8, ptr {base}, i64 {offset}", "p") if offset else base

    def load(self, ptr: str, *, volatile: bool = False, space: int = 0) -> str:
        """Load an i64."""
        where = f"ptr addrspace({space})" if space else "ptr"
        return self.op(f"load {'volatile ' if volatile else ''}i64, {where} {ptr}, align 8")

    def store(self, value: str | int, ptr: str, *, volatile: bool = False, space: int = 0) -> None:
        """Store an i64."""
        where = f"ptr addrspace({space})" if space else "ptr"
        self.add(f"store {'volatile ' if volatile else ''}i64 {value}, {where} {ptr}, align 8")

    def pointer(self, value: str | int) -> str:
        """An i64 as a pointer."""
        return self.op(f"inttoptr i64 {value} to ptr", "p")

    def barrier(self) -> None:
        """Keep the compiler from moving memory accesses across (a signal may arrive here); no instruction."""
        self.add('fence syncscope("singlethread") seq_cst')

    def branch(self, cond: str, yes: str, no: str, *, likely: bool) -> None:
        """Conditional branch with a strong hint."""
        self.add(f"br i1 {cond}, label %{yes}, label %{no}, !prof !{0 if likely else 1}")


class Context:
    """Access to the running thread's context: through the segment, or through a pointer."""

    def __init__(self, text: Text, dialect: Dialect, pointer: str | None) -> None:
        self.text = text
        self.segment = dialect.segment if pointer is None else 0
        self.pointer = pointer

    def _where(self, offset: int) -> str:
        if self.segment:
            return f"inttoptr (i64 {offset} to ptr addrspace({self.segment}))" if offset else "null"
        assert self.pointer is not None
        return self.text.at(self.pointer, offset)

    def load(self, offset: int, *, volatile: bool = False) -> str:
        """Load a field as i64."""
        return self.text.load(self._where(offset), volatile=volatile, space=self.segment)

    def store(self, value: str | int, offset: int, *, volatile: bool = False) -> None:
        """Store a field."""
        self.text.store(value, self._where(offset), volatile=volatile, space=self.segment)


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


_ATTRS = "nounwind noimplicitfloat"


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
                "declare i64 @llvm.umax.i64(i64, i64)",
                "declare ptr @llvm.addressofreturnaddress.p0()" if d.return_slot else "",
                d.declares,
                *self.functions,
                _acquire(d, self.layout),
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
            return f"define {'internal ' if slow else ''}preserve_mostcc void @{name}() {_ATTRS} {{ ret void }}"
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
                pointer = _table_context(t, lay, tp)
            ctx = Context(t, d, pointer)
            key = ctx.load(C_KEY, volatile=True)
            mine = t.op(f"icmp eq i64 {key}, {tp}")
            t.branch(mine, "mine", "other", likely=True)
            t.label("other")
            bail()
            t.label("mine")
            if not light:  # a lone counter is one read-modify-write: a signal cannot come between
                ctx.store(_busy(t, pointer), C_KEY, volatile=True)
                t.barrier()

        full: Callable[[str], None] | None = None
        if not slow:

            def check(cond: str) -> None:
                t.branch(cond, "full", "room", likely=False)
                t.label("full")
                ctx.store(tp, C_KEY, volatile=True)
                bail()
                t.label("room")

            full = check
        self._work(t, spec, ctx, name, full, placed=placed)
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
        head = f"define {linkage}{kind} @{name}({params}) {_ATTRS}{note} {{"
        return "\n".join([head, "start:", *t.lines, "}"])

    def _units(self, spec: Spec) -> int:
        return event_units(spec, self.layout.clock, parent=spec.parent is not Parent.NONE)

    def _work(
        self,
        t: Text,
        spec: Spec,
        ctx: Context,
        name: str,
        full: Callable[[str], None] | None,
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
        needs_frame = spec.retval or spec.stack or spec.timed or spec.threshold or spec.depth or spec.parent is not Parent.NONE
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
        if full is not None and lay.clock == "tsc" and (spec.record or spec.timed):
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
            self._count(t, spec, ctx, mark(), position, shadow, clock)
        recording = spec.record and not (spec.threshold and not spec.exit)
        if not recording:
            return
        if keep:
            t.add(f"br i1 {keep}, label %keep, label %done")
            t.label("keep")
        ring = t.pointer(ctx.load(C_RING))
        pos = t.load(ring)
        units = self._units(spec)
        end = t.op(f"add i64 {pos}, {16 * units}")
        first = ""
        if full is not None:
            full(t.op(f"icmp ugt i64 {end}, {ctx.load(C_LIMIT)}"))
            first = t.pointer(t.op(f"add i64 {ctx.load(C_DATA)}, {pos}"))
        base = "" if full is not None else _ring_data(t, lay, ctx.load(C_INDEX))

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
            extensions.append((parent, L.EXT_PARENT))
        if spec.retval:
            extensions.append((ret, L.EXT_RETVAL))
        if lay.clock == "order":
            put(0, extensions[0][0] if extensions else lambda: "0", stacked)
            extensions = []
        else:
            put(0, (lambda: now) if now else clock, stacked)
        if duration:
            extensions.append((lambda: duration, L.EXT_DURATION))
        for index, (value, code) in enumerate(extensions):
            put(1 + index, value, lambda code=code: str(code))  # type: ignore[misc]  # a default binds the loop's value
        if placed:
            level = t.load(t.at(ring, L.H_LEVEL))
            t.add(f"br i1 {t.op(f'icmp eq i64 {level}, 0')}, label %own, label %nested")
            t.label("nested")
            row = t.op(f"mul i64 {t.load(t.at(ring, L.H_PARENT))}, {L.RING_HEADER}")
            parents = t.pointer(t.op(f"add i64 {row}, {lay.region + L.PAGE}"))
            put(1 + len(extensions), lambda: t.load(parents), lambda: str(L.EXT_POS))
            more = t.op(f"add i64 {end}, 16")
            t.add("br label %own")
            t.label("own")
            before = "keep" if keep else "go"
            end = t.op(f"phi i64 [ {end}, %{before} ], [ {more}, %nested ]")
        if not lay.sliced:
            t.add("fence release")
        t.barrier()
        if full is None:
            t.store(end, ring)
        else:  # the position is read again rather than kept
            ring = t.pointer(ctx.load(C_RING))
            t.store(t.op(f"add i64 {t.load(ring)}, {16 * units}"), ring)
        if full is None:  # the next lap
            lap = t.op(f"and i64 {end}, {-lay.ring_size}")
            ctx.store(t.op(f"sub i64 {base}, {lap}"), C_DATA)
            limit = t.load(t.at(ring, L.H_LIMIT), volatile=True)
            over = t.op(f"add i64 {lap}, {lay.ring_size}")
            ctx.store(t.op(f"call i64 @llvm.umin.i64(i64 {limit}, i64 {over})"), C_LIMIT)
        if keep:
            t.add("br label %done")
            t.label("done")

    def _count(
        self, t: Text, spec: Spec, ctx: Context, mark: str, position: str, shadow: int, clock: Callable[[], str]
    ) -> None:
        """Add to the site's row of this thread's counter table; times need a frame in the shadow planes."""
        lay = self.layout
        index = t.op(f"lshr i64 {t.op(f'sub i64 {mark}, {spec.base}')}, {spec.shift}")
        thread = t.op(f"mul i64 {ctx.load(C_INDEX)}, {lay.sites * COUNTER}")
        table = t.op(f"add i64 {thread}, {lay.counters + spec.row * COUNTER}")
        row = t.pointer(t.op(f"add i64 {table}, {t.op(f'shl i64 {index}, {COUNTER.bit_length() - 1}')}"))
        if not spec.exit:
            hits = t.at(row, K_HITS)
            t.store(t.op(f"add i64 {t.load(hits)}, 1"), hits)
        if not spec.timed or spec.tail:
            return
        start = t.pointer(t.op(f"add i64 {position}, {shadow + 2 * lay.plane}"))
        acc = t.pointer(t.op(f"add i64 {position}, {shadow + 3 * lay.plane}"))
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
            t.store(t.op(f"call i64 @llvm.umax.i64(i64 {t.load(cell)}, i64 {value})"), cell)


def _ring_data(t: Text, lay: Layout, index: str) -> str:
    """Address of a ring's bytes."""
    return t.op(f"add i64 {t.op(f'mul i64 {index}, {lay.ring_size}')}, {lay.region + L.data_offset(lay.nrings)}")


def _busy(t: Text, pointer: str | None) -> str:
    """What `key` holds while a program runs: no thread pointer.

    Through a segment that is 0. In a hashed table 0 may be a thread pointer (bare metal), so it is the context's own
    address there, which is at hand; an unused context of a table begins with a key of all ones (NO_KEY).
    """
    return "0" if pointer is None else t.op(f"ptrtoint ptr {pointer} to i64")


def _table_context(t: Text, lay: Layout, tp: str) -> str:
    """Pointer to the context that the hash of a thread pointer names."""
    h = t.op(f"and i64 {t.op(f'lshr i64 {tp}, 7')}, {lay.nrings - 1}")
    offset = t.op(f"shl i64 {h}, {CONTEXT.bit_length() - 1}")
    return t.op(f"getelementptr i8, ptr inttoptr (i64 {lay.contexts} to ptr), i64 {offset}", "c")


def _acquire(d: Dialect, lay: Layout) -> str:
    """``ptr @acquire(i64 need)``: a context level that is this thread's, marked busy, with room for `need`.

    Null after the loss was counted. Only slow halves call it; they have saved every register.
    """
    t = Text()
    region = f"inttoptr (i64 {lay.region} to ptr)"

    def lost(where: str, label: str) -> None:
        t.label(label)
        t.add(f"{t.new('l')} = atomicrmw add ptr {where}, i64 1 monotonic")
        t.add("ret ptr null")

    tp = t.snippet(d.thread_pointer)
    if d.real_thread_pointer:
        # a thread whose %fs:0 is not its thread pointer (no TLS yet, Go): its events are counted as lost
        real = t.snippet(d.real_thread_pointer)
        same = t.op(f"icmp eq i64 {real}, {tp}")
        t.branch(same, "known", "stranger", likely=True)
        lost(f"getelementptr (i8, ptr {region}, i64 {L.R_LOST})", "stranger")
        t.label("known")
    tpk = t.op(f"add i64 {tp}, 1")
    if d.segment:
        here = Context(t, d, None)
        base0 = t.pointer(t.snippet(d.get_segment))
        owner = here.load(C_OWNER)
    else:
        base0 = _table_context(t, lay, tp)
        owner = t.load(t.at(base0, C_OWNER))
    ours = t.op(f"icmp eq i64 {owner}, {tpk}")
    t.add(f"br i1 {ours}, label %levels, label %claim")

    # -- claim: a ring for this thread, and with it a context ----------------------------------------
    t.label("claim")
    if lay.system_calls and d.syscall:

        def sys(what: str) -> str:
            return t.snippet(d.syscall, nr=d.syscalls[what], a=0, b=0, c=0, d=0)

        pid, tid = sys("getpid"), sys("gettid")
    else:
        pid, tid = "0", "0"
    start = "0"
    if not d.segment:
        start = t.op(f"and i64 {t.op(f'lshr i64 {tp}, 7')}, {lay.nrings - 1}")
    t.add("br label %scan")
    t.label("scan")
    # pass 0: a ring that already belongs to this very thread (its thread pointer changed: TLS set-up);
    # pass 1: a free one. A hashed table must find its context at `start`, so only that one is tried.
    i = t.new("i")
    i2 = t.new("i")
    limit = 2 * lay.nrings if d.segment else 1
    t.add(f"{i} = phi i64 [ 0, %claim ], [ {i2}, %next ]")
    n = t.op(f"and i64 {t.op(f'add i64 {i}, {start}')}, {lay.nrings - 1}")
    row = t.op(f"mul i64 {n}, {L.RING_HEADER}")
    header = t.op(f"getelementptr i8, ptr {region}, i64 {t.op(f'add i64 {row}, {L.PAGE}')}", "h")
    state = t.at(header, L.H_STATE)
    if d.segment:
        first = t.op(f"icmp ult i64 {i}, {lay.nrings}")
        t.add(f"br i1 {first}, label %adopt, label %take")
        t.label("adopt")
        used = t.load(state)
        ids = t.load(t.at(header, L.H_PID))
        want = t.op(f"or i64 {t.op(f'shl i64 {tid}, 32')}, {pid}")
        a = t.op(f"icmp eq i64 {used}, 1")
        b = t.op(f"icmp eq i64 {ids}, {want}")
        level0 = t.op(f"icmp eq i64 {t.load(t.at(header, L.H_LEVEL))}, 0")
        known = t.op(f"icmp ne i64 {tid}, 0")
        ab = t.op(f"and i1 {a}, {b}")
        abc = t.op(f"and i1 {ab}, {level0}")
        abcd = t.op(f"and i1 {abc}, {known}")
        t.add(f"br i1 {abcd}, label %got, label %next")
    else:
        t.add("br label %take")
    t.label("take")
    swap = t.op(f"cmpxchg ptr {state}, i64 0, i64 1 acq_rel monotonic")
    won = t.op(f"extractvalue {{ i64, i1 }} {swap}, 1")
    t.add(f"br i1 {won}, label %got, label %next")
    t.label("next")
    t.add(f"{i2} = add i64 {i}, 1")
    more = t.op(f"icmp ult i64 {i2}, {limit}")
    t.add(f"br i1 {more}, label %scan, label %none")
    lost(f"getelementptr (i8, ptr {region}, i64 {L.R_LOST})", "none")

    t.label("got")
    spot = t.op(f"shl i64 {n}, {CONTEXT.bit_length() - 1}")
    c = t.op(f"getelementptr i8, ptr inttoptr (i64 {lay.contexts} to ptr), i64 {spot}", "c")
    t.add(f"call void @claim(ptr {c}, ptr {header}, i64 {n}, i64 {tpk}, i64 {pid}, i64 {tid}, i64 0, i64 {n})")
    for level in range(1, LEVELS):  # a wiped or recycled context must not keep rings of its levels
        t.store(0, t.at(c, level * LEVEL + C_OWNER))
    t.store(tp, t.at(c, C_KEY), volatile=True)
    if d.segment:
        t.add(d.set_segment.format(**{"in": t.op(f"ptrtoint ptr {c} to i64")}))
    t.add("br label %levels")

    # -- levels: the first one that is idle; a busy one was interrupted by a signal handler -----------
    t.label("levels")
    # `levels` is reached from the start block (or `known`) and from `got`
    origin = "known" if d.real_thread_pointer else "start"
    base = t.op(f"phi ptr [ {base0}, %{origin} ], [ {c}, %got ]", "base")
    ring0 = t.load(t.at(base, C_RING))
    t.add("br label %level")
    t.label("level")
    lv, lv2 = t.new("lv"), t.new("lv")
    t.add(f"{lv} = phi i64 [ 0, %levels ], [ {lv2}, %up ]")
    cl = t.op(f"getelementptr i8, ptr {base}, i64 {t.op(f'mul i64 {lv}, {LEVEL}')}", "cl")
    lowner = t.load(t.at(cl, C_OWNER))
    have = t.op(f"icmp eq i64 {lowner}, {tpk}")
    t.add(f"br i1 {have}, label %idle, label %grow")
    t.label("grow")
    t.add(f"{t.new('g')} = call i1 @grow(ptr {cl}, i64 {tpk}, i64 {lv}, ptr {base})")
    grown = f"%g{t.count}"
    t.add(f"br i1 {grown}, label %idle, label %deaf")
    t.label("idle")
    key = t.load(t.at(cl, C_KEY), volatile=True)
    idle = t.op(f"icmp eq i64 {key}, {tp}")
    t.add(f"br i1 {idle}, label %enter, label %up")
    t.label("up")
    t.add(f"{lv2} = add i64 {lv}, 1")
    deeper = t.op(f"icmp ult i64 {lv2}, {LEVELS}")
    t.add(f"br i1 {deeper}, label %level, label %deaf")
    t.label("deaf")
    hdr0 = t.pointer(ring0)
    lost_at = t.at(hdr0, L.H_LOST)
    t.add(f"{t.new('l')} = atomicrmw add ptr {lost_at}, i64 1 monotonic")
    t.add("ret ptr null")

    t.label("enter")
    t.store(_busy(t, None if d.segment else cl), t.at(cl, C_KEY), volatile=True)
    t.barrier()
    ring = t.pointer(t.load(t.at(cl, C_RING)))
    beat_at = f"getelementptr (i8, ptr {region}, i64 {L.R_BEAT})"
    beat0 = t.load(beat_at, volatile=True)
    t.add("br label %room")
    t.label("room")
    w, w2 = t.new("w"), t.new("w")
    t.add(f"{w} = phi i64 [ 0, %enter ], [ {w2}, %waited ]")
    end = t.op(f"add i64 {t.load(ring)}, %need")
    fits = t.op(f"icmp ule i64 {end}, {t.load(t.at(ring, L.H_LIMIT), volatile=True)}")
    t.add(f"br i1 {fits}, label %ready, label %full")
    t.label("ready")
    t.add(f"ret ptr {cl}")
    t.label("full")
    policy = t.load(f"getelementptr (i8, ptr {region}, i64 {L.R_POLICY})", volatile=True)
    off = t.load(f"getelementptr (i8, ptr {region}, i64 {L.R_OFF})", volatile=True)
    blocks = t.op(f"icmp eq i64 {policy}, {int(L.Policy.BLOCK)}")
    on = t.op(f"icmp eq i64 {off}, 0")
    wait = t.op(f"and i1 {blocks}, {on}")
    t.add(f"br i1 {wait}, label %sleep, label %drop")
    t.label("drop")
    lost_ring = t.at(ring, L.H_LOST)
    t.add(f"{t.new('l')} = atomicrmw add ptr {lost_ring}, i64 1 monotonic")
    t.store(tp, t.at(cl, C_KEY), volatile=True)
    t.add("ret ptr null")
    t.label("sleep")
    if lay.system_calls and d.syscall:
        spec = t.op("alloca { i64, i64 }, align 8", "ts")
        t.store(0, spec)
        t.store(50_000, t.at(spec, 8))
        t.snippet(d.syscall, nr=d.syscalls["nanosleep"], a=t.op(f"ptrtoint ptr {spec} to i64"), b=0, c=0, d=0)
    t.add(f"{w2} = add i64 {w}, 1")
    # nobody drains any more (2 s without a heartbeat): go on and count the losses rather than hang
    patient = t.op(f"icmp ult i64 {w2}, 20000")
    t.add(f"br i1 {patient}, label %waited, label %dead")
    t.label("dead")
    beat = t.load(beat_at, volatile=True)
    alive = t.op(f"icmp ne i64 {beat}, {beat0}")
    t.add(f"br i1 {alive}, label %waited, label %giveup")
    t.label("giveup")
    t.store(int(L.Policy.DROP), f"getelementptr (i8, ptr {region}, i64 {L.R_POLICY})", volatile=True)
    t.add("br label %waited")
    t.label("waited")
    t.add("br label %room")
    body = "\n".join([f"define internal ptr @acquire(i64 %need) {_ATTRS} noinline {{", "start:", *t.lines, "}"])
    return "\n".join([_claim(), _grow(lay), body])


def _claim() -> str:
    """``@claim``: fill a ring header and a context level."""
    t = Text()
    for offset, value in (
        (L.H_TP, t.op("sub i64 %tpk, 1")),
        (L.H_PID, t.op(f"or i64 {t.op('shl i64 %tid, 32')}, %pid")),
        (L.H_LEVEL, "%level"),
        (L.H_PARENT, "%parent"),
    ):
        t.store(value, t.at("%header", offset))
    for offset, value in (
        (C_OWNER, "%tpk"),
        (C_RING, t.op("ptrtoint ptr %header to i64")),
        (C_LIMIT, "0"),  # the first event takes the slow road, which sets data and limit
        (C_INDEX, "%n"),
        (C_DEPTH, "0"),
        (C_ACC, "0"),
    ):
        t.store(value, t.at("%c", offset))
    t.add("ret void")
    head = (
        "define internal void @claim(ptr %c, ptr %header, i64 %n, i64 %tpk, i64 %pid, i64 %tid, i64 %level, "
        f"i64 %parent) {_ATTRS} noinline {{"
    )
    return "\n".join([head, "start:", *t.lines, "}"])


def _grow(lay: Layout) -> str:
    """``i1 @grow``: a ring for a nested level; false if none is free."""
    t = Text()
    region = f"inttoptr (i64 {lay.region} to ptr)"
    top = t.op("icmp eq i64 %level, 0")
    t.add(f"br i1 {top}, label %no, label %scan")
    t.label("scan")
    i, i2 = t.new("i"), t.new("i")
    t.add(f"{i} = phi i64 [ 0, %start ], [ {i2}, %next ]")
    row = t.op(f"mul i64 {i}, {L.RING_HEADER}")
    header = t.op(f"getelementptr i8, ptr {region}, i64 {t.op(f'add i64 {row}, {L.PAGE}')}", "h")
    swap = t.op(f"cmpxchg ptr {t.at(header, L.H_STATE)}, i64 0, i64 1 acq_rel monotonic")
    won = t.op(f"extractvalue {{ i64, i1 }} {swap}, 1")
    t.add(f"br i1 {won}, label %got, label %next")
    t.label("next")
    t.add(f"{i2} = add i64 {i}, 1")
    more = t.op(f"icmp ult i64 {i2}, {lay.nrings}")
    t.add(f"br i1 {more}, label %scan, label %no")
    t.label("got")
    ring0 = t.pointer(t.load(t.at("%base", C_RING)))
    ids = t.load(t.at(ring0, L.H_PID))
    tid = t.op(f"lshr i64 {ids}, 32")
    pid = t.op(f"and i64 {ids}, 4294967295")
    index = t.load(t.at("%base", C_INDEX))
    t.add(f"call void @claim(ptr %cl, ptr {header}, i64 {i}, i64 %tpk, i64 {pid}, i64 {tid}, i64 %level, i64 {index})")
    t.store(t.op("sub i64 %tpk, 1"), t.at("%cl", C_KEY), volatile=True)
    t.add("ret i1 true")
    t.label("no")
    t.add("ret i1 false")
    head = f"define internal i1 @grow(ptr %cl, i64 %tpk, i64 %level, ptr %base) {_ATTRS} noinline {{"
    return "\n".join([head, "start:", *t.lines, "}"])
