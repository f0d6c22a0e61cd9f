"""The context of a traced thread: its layout, and the slow road on which a thread comes by one.

A context (256 bytes per ring, zeroed in a forked child) holds four levels of 64 bytes:

    0  key    thread pointer while idle; something else while a program of this level runs
    8  owner  thread pointer + 1 of the thread that it belongs to; 0 = nobody's
   16  ring   address of the ring header
   24  data   address of the ring's bytes, less the stream position where this lap of the ring began
   32  limit  stream position up to which there is room in this lap: the ring's own limit when last looked at,
              or the end of the lap, so that the hot path neither masks nor touches what the host writes
   40  table  address of the thread's counter rows
   48  depth  nesting of hooked calls
   56  acc    time spent in finished callees (profile)

``key`` is checked, cleared, and set again: one compare on the hot path tells "not my context" and
"a program is already running here" (a signal arrived inside it) at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fentry.arch import Dialect
from fentry.program.text import ATTRIBUTES, Text
from fentry.record import layout as ring_layout

CONTEXT = 256
LEVEL = 64
LEVELS = 4
C_KEY, C_OWNER, C_RING, C_DATA, C_LIMIT, C_TABLE, C_DEPTH, C_ACC = range(0, 64, 8)

#: key of a context in a hashed table that belongs to nobody
NO_KEY = (1 << 64) - 1

#: one row of the counter table: hits, total, self, min, max, and padding to a power of two
COUNTER = 64
K_HITS, K_TOTAL, K_SELF, K_MIN, K_MAX = range(0, 40, 8)

#: a slot keeps this many bytes on the stack while it calls programs: a program's own return address (or, without
#: return slots, its stack pointer) lies so far below the caller's return slot (or the stack pointer at the entry)
IN_SLOT = 16


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


def ring_index(t: Text, lay: Layout, header: str) -> str:
    """Number of a ring, from the address of its header."""
    offset = t.op(f"sub i64 {header}, {lay.region + ring_layout.PAGE}")
    return t.op(f"lshr i64 {offset}, {ring_layout.RING_HEADER.bit_length() - 1}")


def ring_data(t: Text, lay: Layout, header: str) -> str:
    """Address of a ring's bytes, from the address of its header."""
    bytes_before = t.op(f"mul i64 {ring_index(t, lay, header)}, {lay.ring_size}")
    return t.op(f"add i64 {bytes_before}, {lay.region + ring_layout.data_offset(lay.nrings)}")


def busy(t: Text, pointer: str | None) -> str:
    """What `key` holds while a program runs: no thread pointer.

    Through a segment that is 0. In a hashed table 0 may be a thread pointer (bare metal), so it is the context's own
    address there, which is at hand; an unused context of a table begins with a key of all ones (NO_KEY).
    """
    return "0" if pointer is None else t.op(f"ptrtoint ptr {pointer} to i64")


def table_context(t: Text, lay: Layout, tp: str) -> str:
    """Pointer to the context that the hash of a thread pointer names."""
    h = t.op(f"and i64 {t.op(f'lshr i64 {tp}, 7')}, {lay.nrings - 1}")
    offset = t.op(f"shl i64 {h}, {CONTEXT.bit_length() - 1}")
    return t.op(f"getelementptr i8, ptr inttoptr (i64 {lay.contexts} to ptr), i64 {offset}", "c")


#: waits of 50 us (and the kernel's slack of another 50) before a silent host is taken for dead
PATIENCE = 20_000


def _sleep(t: Text, d: Dialect, spec: str) -> None:
    """Wait 50 us; `spec` has room for a struct timespec (made once: the traced thread's stack may be small)."""
    t.store(0, spec)
    t.store(50_000, t.at(spec, 8))
    t.snippet(d.syscall, nr=d.syscalls["nanosleep"], a=t.op(f"ptrtoint ptr {spec} to i64"), b=0, c=0, d=0)


def acquire(d: Dialect, lay: Layout) -> str:
    """``ptr @acquire(i64 need)``: a context level that is this thread's, marked busy, with room for `need`.

    Null after the loss was counted. Only slow halves call it; they have saved every register.
    """
    t = Text()
    region = f"inttoptr (i64 {lay.region} to ptr)"
    timespec = t.op("alloca { i64, i64 }, align 8", "ts")

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
        lost(f"getelementptr (i8, ptr {region}, i64 {ring_layout.R_LOST})", "stranger")
        t.label("known")
    tpk = t.op(f"add i64 {tp}, 1")
    if d.segment:
        here = Context(t, d, None)
        base0 = t.pointer(t.snippet(d.get_segment))
        owner = here.load(C_OWNER)
    else:
        base0 = table_context(t, lay, tp)
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
    patient = lay.system_calls and bool(d.syscall)
    tried, tried2 = t.new("tried"), t.new("tried")
    retry = ", [ 0, %later ]" if patient else ""
    t.add(f"{i} = phi i64 [ 0, %claim ], [ {i2}, %next ]{retry}")
    if patient:
        t.add(f"{tried} = phi i64 [ 0, %claim ], [ {tried}, %next ], [ {tried2}, %later ]")
    n = t.op(f"and i64 {t.op(f'add i64 {i}, {start}')}, {lay.nrings - 1}")
    row = t.op(f"mul i64 {n}, {ring_layout.RING_HEADER}")
    header = t.op(f"getelementptr i8, ptr {region}, i64 {t.op(f'add i64 {row}, {ring_layout.PAGE}')}", "h")
    state = t.at(header, ring_layout.H_STATE)
    if d.segment:
        first = t.op(f"icmp ult i64 {i}, {lay.nrings}")
        t.add(f"br i1 {first}, label %adopt, label %take")
        t.label("adopt")
        used = t.load(state)
        ids = t.load(t.at(header, ring_layout.H_PID))
        want = t.op(f"or i64 {t.op(f'shl i64 {tid}, 32')}, {pid}")
        a = t.op(f"icmp eq i64 {used}, 1")
        b = t.op(f"icmp eq i64 {ids}, {want}")
        level0 = t.op(f"icmp eq i64 {t.load(t.at(header, ring_layout.H_LEVEL))}, 0")
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
    t.label("none")
    if patient:
        # a host that drains frees the rings of threads that have ended; policy block waits for one
        policy = t.load(f"getelementptr (i8, ptr {region}, i64 {ring_layout.R_POLICY})", volatile=True)
        off = t.load(f"getelementptr (i8, ptr {region}, i64 {ring_layout.R_OFF})", volatile=True)
        blocks = t.op(f"icmp eq i64 {policy}, {int(ring_layout.Policy.BLOCK)}")
        wait = t.op(f"and i1 {blocks}, {t.op(f'icmp eq i64 {off}, 0')}")
        t.add(f"{tried2} = add i64 {tried}, 1")
        # who has waited in vain says so, and nobody waits again until a ring was freed
        full = f"getelementptr (i8, ptr {region}, i64 {ring_layout.R_NEXT})"
        hope = t.op(f"icmp eq i64 {t.load(full, volatile=True)}, 0")
        early = t.op(f"and i1 {hope}, {t.op(f'icmp ult i64 {tried2}, {PATIENCE}')}")
        again = t.op(f"and i1 {wait}, {early}")
        t.add(f"br i1 {again}, label %later, label %never")
        t.label("later")
        _sleep(t, d, timespec)
        t.add("br label %scan")
    else:
        t.add("br label %never")
    t.label("never")
    t.store(1, f"getelementptr (i8, ptr {region}, i64 {ring_layout.R_NEXT})", volatile=True)
    t.add("br label %alone")
    lost(f"getelementptr (i8, ptr {region}, i64 {ring_layout.R_LOST})", "alone")

    t.label("got")
    spot = t.op(f"shl i64 {n}, {CONTEXT.bit_length() - 1}")
    c = t.op(f"getelementptr i8, ptr inttoptr (i64 {lay.contexts} to ptr), i64 {spot}", "c")
    for level in range(1, LEVELS):  # a wiped or recycled context must not keep rings of its levels
        t.store(0, t.at(c, level * LEVEL + C_OWNER))
    t.add(f"call void @claim(ptr {c}, ptr {header}, i64 {n}, i64 {tpk}, i64 {pid}, i64 {tid}, i64 0, i64 {n})")
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
    # (a context that was wiped by fork in a handler right now has no ring: its loss goes to the region)
    t.add(f"br i1 {t.op(f'icmp eq i64 {ring0}, 0')}, label %alone, label %heard")
    t.label("heard")
    hdr0 = t.pointer(ring0)
    lost_at = t.at(hdr0, ring_layout.H_LOST)
    t.add(f"{t.new('l')} = atomicrmw add ptr {lost_at}, i64 1 monotonic")
    t.add("ret ptr null")

    t.label("enter")
    t.store(busy(t, None if d.segment else cl), t.at(cl, C_KEY), volatile=True)
    t.barrier()
    mine_now = t.load(t.at(cl, C_RING))
    t.add(f"br i1 {t.op(f'icmp eq i64 {mine_now}, 0')}, label %alone, label %ringed")
    t.label("ringed")
    ring = t.pointer(mine_now)
    beat_at = f"getelementptr (i8, ptr {region}, i64 {ring_layout.R_BEAT})"
    beat0 = t.load(beat_at, volatile=True)
    t.add("br label %room")
    t.label("room")
    w, w2 = t.new("w"), t.new("w")
    t.add(f"{w} = phi i64 [ 0, %ringed ], [ {w2}, %waited ]")
    end = t.op(f"add i64 {t.load(ring)}, %need")
    fits = t.op(f"icmp ule i64 {end}, {t.load(t.at(ring, ring_layout.H_LIMIT), volatile=True)}")
    t.add(f"br i1 {fits}, label %ready, label %full")
    t.label("ready")
    t.add(f"ret ptr {cl}")
    t.label("full")
    policy = t.load(f"getelementptr (i8, ptr {region}, i64 {ring_layout.R_POLICY})", volatile=True)
    off = t.load(f"getelementptr (i8, ptr {region}, i64 {ring_layout.R_OFF})", volatile=True)
    blocks = t.op(f"icmp eq i64 {policy}, {int(ring_layout.Policy.BLOCK)}")
    on = t.op(f"icmp eq i64 {off}, 0")
    wait = t.op(f"and i1 {blocks}, {on}")
    t.add(f"br i1 {wait}, label %sleep, label %drop")
    t.label("drop")
    lost_ring = t.at(ring, ring_layout.H_LOST)
    t.add(f"{t.new('l')} = atomicrmw add ptr {lost_ring}, i64 1 monotonic")
    t.store(tp, t.at(cl, C_KEY), volatile=True)
    t.add("ret ptr null")
    t.label("sleep")
    if lay.system_calls and d.syscall:
        _sleep(t, d, timespec)
    t.add(f"{w2} = add i64 {w}, 1")
    # nobody drains any more (2 s without a heartbeat): go on and count the losses rather than hang
    early = t.op(f"icmp ult i64 {w2}, {PATIENCE}")
    t.add(f"br i1 {early}, label %waited, label %dead")
    t.label("dead")
    beat = t.load(beat_at, volatile=True)
    alive = t.op(f"icmp ne i64 {beat}, {beat0}")
    t.add(f"br i1 {alive}, label %waited, label %giveup")
    t.label("giveup")
    t.store(
        int(ring_layout.Policy.DROP), f"getelementptr (i8, ptr {region}, i64 {ring_layout.R_POLICY})", volatile=True
    )
    t.add("br label %waited")
    t.label("waited")
    t.add("br label %room")
    body = "\n".join([f"define internal ptr @acquire(i64 %need) {ATTRIBUTES} noinline {{", "start:", *t.lines, "}"])
    return "\n".join([_claim(lay), _grow(lay), body])


def _claim(lay: Layout) -> str:
    """``@claim``: fill a ring header and a context level."""
    t = Text()
    for offset, value in (
        (ring_layout.H_TP, t.op("sub i64 %tpk, 1")),
        (ring_layout.H_PID, t.op(f"or i64 {t.op('shl i64 %tid, 32')}, %pid")),
        (ring_layout.H_LEVEL, "%level"),
        (ring_layout.H_PARENT, "%parent"),
    ):
        t.store(value, t.at("%header", offset))
    for offset, value in (
        (C_RING, t.op("ptrtoint ptr %header to i64")),
        (C_LIMIT, "0"),  # the first event takes the slow road, which sets data and limit
        (C_TABLE, t.op(f"add i64 {t.op(f'mul i64 %n, {lay.sites * COUNTER}')}, {lay.counters}")),
        (C_DEPTH, "0"),
        (C_ACC, "0"),
    ):
        t.store(value, t.at("%c", offset))
    # the owner last: a signal handler that is traced, too, must not find a context of its own that has no ring yet
    t.barrier()
    t.store("%tpk", t.at("%c", C_OWNER), volatile=True)
    t.add("ret void")
    head = (
        "define internal void @claim(ptr %c, ptr %header, i64 %n, i64 %tpk, i64 %pid, i64 %tid, i64 %level, "
        f"i64 %parent) {ATTRIBUTES} noinline {{"
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
    row = t.op(f"mul i64 {i}, {ring_layout.RING_HEADER}")
    header = t.op(f"getelementptr i8, ptr {region}, i64 {t.op(f'add i64 {row}, {ring_layout.PAGE}')}", "h")
    swap = t.op(f"cmpxchg ptr {t.at(header, ring_layout.H_STATE)}, i64 0, i64 1 acq_rel monotonic")
    won = t.op(f"extractvalue {{ i64, i1 }} {swap}, 1")
    t.add(f"br i1 {won}, label %got, label %next")
    t.label("next")
    t.add(f"{i2} = add i64 {i}, 1")
    more = t.op(f"icmp ult i64 {i2}, {lay.nrings}")
    t.add(f"br i1 {more}, label %scan, label %no")
    t.label("got")
    ring0 = t.pointer(t.load(t.at("%base", C_RING)))
    ids = t.load(t.at(ring0, ring_layout.H_PID))
    tid = t.op(f"lshr i64 {ids}, 32")
    pid = t.op(f"and i64 {ids}, 4294967295")
    index = ring_index(t, lay, t.load(t.at("%base", C_RING)))
    t.add(f"call void @claim(ptr %cl, ptr {header}, i64 {i}, i64 %tpk, i64 {pid}, i64 {tid}, i64 %level, i64 {index})")
    t.store(t.op("sub i64 %tpk, 1"), t.at("%cl", C_KEY), volatile=True)
    t.add("ret i1 true")
    t.label("no")
    t.add("ret i1 false")
    head = f"define internal i1 @grow(ptr %cl, i64 %tpk, i64 %level, ptr %base) {ATTRIBUTES} noinline {{"
    return "\n".join([head, "start:", *t.lines, "}"])
