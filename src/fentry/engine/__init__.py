"""Engine: puts programs at sites of a target, and takes them away again.

    with Engine(target) as engine:          # target stopped
        engine.register(op, sites)
        engine.commit()                     # islands built, sites patched
        target.resume()
        ...
    # here the target is byte for byte what it was

An engine owns everything it maps in the target: rings, contexts, the shadow stack, islands, the undo journal. Each
address is in the journal before it is used.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from fentry.arch import Arch, ReturnPlane, load
from fentry.engine import journal as undo
from fentry.engine import patch, restore, unwind
from fentry.engine.census import Site
from fentry.engine.island import Island, SlotTable, build, code_size, group, room_for
from fentry.engine.ops import Op
from fentry.errors import AskedWrong, CannotHere, Denied, EngineBug, Gone, OutOfReach, TargetRefused, TraceError
from fentry.program.compile import compile_text
from fentry.program.context import CONTEXT, COUNTER, NO_KEY, Layout
from fentry.record import layout as ring_layout
from fentry.record.layout import Policy, Table
from fentry.record.ring import Region, RingInfo
from fentry.target import Mapping, Target, need

__all__ = ["Engine", "Op", "Site"]

#: the counter; the counter, shown as CLOCK_MONOTONIC; no time, only sequence; a target's virtual clock
CLOCKS = ("tsc", "mono", "order", "icount")
#: threads (and signal levels, and forked processes) that can record at the same time
RINGS = 256
#: the same for a target that runs one thread at a time
SLICED_RINGS = 8
#: bytes of one ring: 65,536 records
RING_SIZE = 1 << 20
#: sites of one island lie within this many bytes
_CLUSTER = 1 << 29
#: bytes for one function that stands before an unwinder's lookup
_LOOKUP_ROOM = 1 << 14


@dataclass(slots=True)
class _Armed:
    """One site as it is in the target now."""

    site: Site
    ops: tuple[Op, ...] = ()  #: newest first
    bytes: bytes = b""  #: what is in the target; empty = idle
    table: SlotTable | None = None


class Engine:
    """Sites, ops and rings of one target.

    Args:
        target: a stopped target.
        clock: one of CLOCKS; "" = the target's best.
        policy: what happens to events that find their ring full.
        rings: how many threads can record at the same time (a power of two).
        ring_size: bytes per ring (a power of two).
    """

    def __init__(
        self,
        target: Target,
        *,
        clock: str = "",
        policy: Policy = Policy.BLOCK,
        rings: int = RINGS,
        ring_size: int = RING_SIZE,
    ) -> None:
        self.target = target
        self.arch: Arch = load(target.arch)
        self.clock_at = target.clock_at
        self.clock = clock or ("icount" if self.clock_at else "tsc")
        if self.clock == "icount" and not self.clock_at:
            raise CannotHere(f"a {target.kind} target has no instruction counter", hint="use --clock tsc or order")
        if self.clock in ("tsc", "mono") and self.clock_at:
            raise CannotHere(f"a {target.kind} target has no time stamp counter", hint="use --clock icount or order")
        if self.clock not in CLOCKS:
            raise AskedWrong(f"no clock {self.clock!r}", hint=f"clocks: {', '.join(CLOCKS)}")
        for what, n in (("rings", rings), ("ring size", ring_size)):
            if n & (n - 1) or n <= 0:
                raise AskedWrong(f"{what} {n} is not a power of two")
        self.policy = policy
        self.rings = min(rings, SLICED_RINGS) if target.sliced else rings
        self.ring_size = ring_size
        self.islands: list[Island] = []
        self.symbols: Callable[[str], int] = lambda _name: 0  #: address of a symbol in the target, or 0
        self.region: Region | None = None
        self.counters: memoryview | None = None
        self.report: restore.Report | None = None
        self._armed: dict[int, _Armed] = {}
        self._dirty: set[int] = set()
        self._journal: undo.Journal | None = None
        self._layout: Layout | None = None
        self._plane: ReturnPlane | None = None
        self._deep = False  #: the mirror has planes for entry times and depths
        self._rows = 0
        self._row_room = 0
        self._unwind_sites: dict[str, Site] = {}
        self._unwind_now: dict[int, bytes] = {}
        self._closed = False
        self.live = False  #: let the target run between stops (it was running before we came)
        self.notes: list[str] = []  #: what had to be done differently, in words
        self.stops: list[int] = []  #: ns that each of our stops lasted

    # -- what runs where -------------------------------------------------------------------------------
    def register(self, op: Op, sites: Iterable[Site]) -> None:
        """Add an op to sites; takes effect at :meth:`commit`. The newest op's entry runs first."""
        for site in sites:
            armed = self._armed.setdefault(site.at, _Armed(site))
            if op in armed.ops:
                continue
            armed.ops = (op, *armed.ops)
            self._dirty.add(site.at)

    def unregister(self, op: Op, sites: Iterable[Site] | None = None) -> None:
        """Take an op away from `sites`, or from all; takes effect at :meth:`commit`."""
        only = None if sites is None else {s.at for s in sites}
        for at, armed in self._armed.items():
            if op in armed.ops and (only is None or at in only):
                armed.ops = tuple(o for o in armed.ops if o is not op)
                self._dirty.add(at)

    @property
    def sites(self) -> list[Site]:
        """Every site that was ever registered, in a stable order: the trace's site numbers."""
        return [a.site for a in self._armed.values()]

    def tables(self, op: Op) -> list[Table]:
        """Slot tables of one op, for decoding."""
        index = {at: i for i, at in enumerate(self._armed)}
        return [t.table(op, index) for island in self.islands for t in island.tables if op in t.ops]

    def rows(self, op: Op) -> list[tuple[Site, int]]:
        """Counter rows of an op: (site, row)."""
        return [
            (site, t.row + i)
            for island in self.islands
            for t in island.tables
            if op in t.ops
            for i, site in enumerate(t.sites)
        ]

    # -- memory in the target ----------------------------------------------------------------------------
    def open(self, *, extra_sites: int = 0) -> None:
        """Map what the registered ops need, in one short stop.

        Args:
            extra_sites: room in the journal and the counters for sites registered later.
        """
        with self._halted():
            self._open(extra_sites)

    def _open(self, extra_sites: int) -> None:
        target = self.target
        need(target.allocator, "memory allocator", target=target)
        shared = need(target.shared, "shared memory", target=target)
        self._check_threads()
        count = len(self._armed) + extra_sites
        ops = {op for a in self._armed.values() for op in a.ops}
        size = undo.size_for(2 * count + 16)
        at, view = shared.share(size, undo.NAME)
        self._journal = undo.Journal(at, view)
        meta = self._journal.meta
        self._note(at, size)

        size = ring_layout.region_size(self.rings, self.ring_size)
        region_at, view = shared.share(size, "fentry.rings")
        self._note(region_at, size)
        meta.region = (region_at, size)
        self.region = Region.format(view, self.rings, self.ring_size, self.policy)

        size = self.rings * CONTEXT + target.page  # one more: all zero, where a thread begins
        table = not self.arch.dialect.segment
        # a table of contexts is addressed on every event: one instruction makes a low address
        near, reach = (1 << 30, (1 << 30) - (1 << 16)) if table else (None, 0)
        contexts = self._map(size, "rw-", name="wipeonfork", near=near, reach=reach)
        meta.context = (contexts, size)
        if table:
            blank = NO_KEY.to_bytes(8, "little").ljust(CONTEXT, b"\0")
            target.write(contexts, blank * self.rings)  # house: data, contexts that belong to nobody
        else:  # where threads begin; the word at %fs:0 may be 0 (Go), and a key of 0 would be taken for theirs
            target.write(contexts + self.rings * CONTEXT, NO_KEY.to_bytes(8, "little"))  # house: data, nobody's key

        shadow = plane_step = 0
        if any(op.exit for op in ops):
            low, window = self._stack_window()
            # return addresses, hooks; entry times; depths or accumulated time
            self._deep = any(_deep(op) for op in ops)
            planes = 4 if self._deep else 2
            # where the kernel puts it by itself it takes the place of stacks to come: those of new threads would begin
            # below it, outside the window
            near, reach = (low >> 3, low - (low >> 3)) if self.arch.dialect.stack_window else (None, 0)
            try:
                at = self._map(planes * window, "rw-", name="noreserve", near=near, reach=reach)
            except (TargetRefused, CannotHere) as error:
                # RLIMIT_AS, mlockall, no overcommit: entries can still be traced
                self.notes.append(f"returns are not hooked: no room for a shadow stack ({error.message})")
            else:
                shadow, plane_step = at - low, window
                self._plane = ReturnPlane(shadow, low, window)
                meta.shadow, meta.low, meta.size = shadow, low, window
        counters = 0
        if any(op.counts for op in ops):
            self._row_room = max(2 * count, 64)
            size = self.rings * self._row_room * COUNTER
            counters, self.counters = shared.share(size, "fentry.counts")
            self._note(counters, size)
        self._journal.save()
        self._layout = Layout(
            region=region_at,
            nrings=self.rings,
            ring_size=self.ring_size,
            contexts=contexts,
            clock={"icount": "memory", "mono": "tsc"}.get(self.clock, self.clock),
            clock_at=self.clock_at,
            sliced=target.sliced,
            shadow=shadow,
            plane=plane_step,
            counters=counters,
            sites=self._row_room,
            system_calls=target.system_calls,
        )

    def _map(self, size: int, perms: str, *, near: int | None = None, reach: int = 0, name: str = "") -> int:
        """Map private memory that is in the journal before it is there."""
        assert self._journal is not None
        meta = self._journal.meta
        before = meta.mappings

        def note(at: int | None) -> None:
            assert self._journal is not None
            meta.mappings = before if at is None else [*before, (at, size)]
            self._journal.save()

        allocator = need(self.target.allocator, "memory allocator", target=self.target)
        try:
            return allocator.map(size, perms, near=near, reach=reach, name=name, intend=note)
        except TraceError:
            note(None)
            raise

    def _note(self, at: int, size: int) -> None:
        assert self._journal is not None
        self._journal.meta.mappings.append((at, size))
        self._journal.save()

    def _check_threads(self) -> None:
        d = self.arch.dialect
        if self.target.system_calls and (why := self.target.forbids(d.syscalls.values())):
            raise Denied(
                f"process {self.target.pid} cannot be traced: {why}", hint="trace it with seccomp switched off"
            )
        if not d.segment_register:
            return
        for tid in self.target.threads():
            base = self.target.regs(tid)[d.segment_register]
            if base:
                raise TargetRefused(
                    f"thread {tid} uses {d.segment_register} itself ({base:#x})",
                    hint="another fentry traces it, or it is a program like Wine; if a tracer was killed: "
                    f"fentry recover {self.target.pid}",
                )

    def _stack_window(self) -> tuple[int, int]:
        """(low, size) of the stack addresses to mirror: an aligned power of two around every thread's stack."""
        if self.arch.dialect.stack_window is not None:
            return self.arch.dialect.stack_window
        low, high = 1 << 64, 0
        mappings = self.target.mappings()
        for tid in self.target.threads():
            sp = self.target.regs(tid)[self.arch.sp]
            m = _containing(mappings, sp - 1)
            if m is None:
                continue
            low, high = min(low, m.start), max(high, m.end)
        if high == 0:
            largest = max((m for m in mappings if m.perms.startswith("rw")), key=lambda m: m.size, default=None)
            if largest is None:
                raise TargetRefused("no stack was found to mirror", hint="trace entries only: -p function")
            low, high = largest.start, largest.end
        size = 1 << 16
        while (low & -size) + size < high:
            size <<= 1
        return low & -size, size

    # -- building and patching -----------------------------------------------------------------------------
    @contextmanager
    def _halted(self) -> Iterator[None]:
        """Keep the target stopped for a while; afterwards a live one runs on."""
        begun = time.monotonic_ns()
        self.target.stop()
        try:
            yield
        finally:
            if self.live:
                self.target.resume()
            self.stops.append(time.monotonic_ns() - begun)

    def commit(self) -> None:
        """Bring the target to what is registered.

        Islands are mapped in one short stop and built while a live target runs on; then it is stopped again, every
        place is verified, and all are patched. On return the target is stopped, or runs on if it is live.

        Raises: PatchMismatch (nothing was changed), OutOfReach, Gone, TargetRefused.
        """
        if self._layout is None:
            self.open()
        dirty = [self._armed[at] for at in sorted(self._dirty)]
        self._check_layout({op for a in dirty for op in a.ops})
        wanted = [(a.site, a.ops) for a in dirty if a.ops]
        plans = [self._plan(cluster) for cluster in self._clusters(wanted)]
        returning = any(t.hooked for tables, _, _ in plans for t in tables)
        lookups = self._lookups() if returning and self.arch.unwinds else []
        with self._halted():
            spots = [self._map_code(size, near) for _, size, near in plans]
            lookup_spots = [self._map_code(_LOOKUP_ROOM, site.at) for _, site in lookups]
        fresh = list(zip(spots, (size for _, size, _ in plans), strict=True))
        fresh += [(at, _LOOKUP_ROOM) for at in lookup_spots]
        placed: dict[int, tuple[SlotTable, int, Island]] = {}
        for (tables, size, _), at in zip(plans, spots, strict=True):
            island = self._build(tables, at, size)
            for table in tables:
                for i, site in enumerate(table.sites):
                    placed[site.at] = (table, table.slot(i), island)
        changes = []
        far: list[Site] = []
        after: dict[int, tuple[bytes, SlotTable | None]] = {}
        moves: dict[int, tuple[int, Callable[[], dict[int, int]]]] = {}
        for a in dirty:
            site = a.site
            now = a.bytes or site.sled.idle
            if a.ops:
                table, slot, island = placed[site.at]
                try:
                    put = self.arch.arm(site.at, site.sled, slot, balanced=table.hooked)
                except OutOfReach:  # a form of its own, shorter reach than the island is near
                    far.append(site)
                    continue
                after[site.at] = (put, table)
                moves[site.at] = (len(put), partial(island.moves, site))
            else:
                put = site.sled.idle
                after[site.at] = (b"", None)
            if len(now) != len(put):
                now = site.sled.idle[: len(put)]
            changes.append(patch.Change(site.at, now, put))
        for site in far:
            self._armed[site.at].ops = ()
        if far:
            self.notes.append(
                f"{len(far)} functions are out of reach of generated code and not traced: {far[0].name}..."
            )
        dirty = [a for a in dirty if a.site.at in after]
        for (name, site), at in zip(lookups, lookup_spots, strict=True):
            changes.append(self._lookup_change(name, site, at))
        first = not any(a.bytes for a in self._armed.values())
        # what takes time is done while a live target runs: places are verified once more when it is stopped
        patch.verify(self.target, changes)
        assert self._journal is not None
        patch.intend(self._journal, changes)
        with self._halted():
            try:
                if first:
                    self._enter_threads()
                patch.synchronise(self.target, fresh)
                patch.move_threads(self.target, self.arch, moves)
                patch.apply(self.target, changes)
            except TraceError:
                if first:
                    self._leave_threads()
                raise
        for a in dirty:
            a.bytes, a.table = after[a.site.at]
        self._dirty.clear()

    def _check_layout(self, ops: Iterable[Op]) -> None:
        """Refuse ops whose programs would write where :meth:`open` mapped nothing, because they were not there yet."""
        assert self._layout is not None
        for op in ops:
            if (op.counts and not self._layout.counters) or (_deep(op) and self._plane is not None and not self._deep):
                raise AskedWrong(
                    f"op {op.name} needs memory that was not mapped when tracing began",
                    hint="register it (or one of its kind) before the engine is opened",
                )

    def _clusters(self, wanted: Sequence[tuple[Site, tuple[Op, ...]]]) -> list[list[tuple[Site, tuple[Op, ...]]]]:
        clusters: list[list[tuple[Site, tuple[Op, ...]]]] = []
        for item in sorted(wanted, key=lambda w: w[0].at):
            if clusters and item[0].at - clusters[-1][0][0].at < _CLUSTER:
                clusters[-1].append(item)
            else:
                clusters.append([item])
        return clusters

    def _plan(self, cluster: list[tuple[Site, tuple[Op, ...]]]) -> tuple[list[SlotTable], int, int]:
        """Tables of an island, its size, and what it must be near to."""
        assert self._layout is not None
        tables = group(self.arch, cluster, returns=self._plane is not None, first_row=self._rows)
        self._rows += len(cluster)
        if self._row_room and self._rows > self._row_room:
            raise CannotHere(
                f"the counter table has no room for {len(cluster)} functions more",
                hint="end this session and begin another, or open the engine with extra_sites",
            )
        size = room_for(tables, code_size(self.arch, self._layout, tables))
        return tables, size, cluster[0][0].at

    def _map_code(self, size: int, near: int) -> int:
        """Map an island; the target is stopped."""
        assert self._journal is not None
        reach = min(self.arch.jump_reach, 1 << 40) - _CLUSTER
        at = self._map(size, "r-x", near=near, reach=reach)
        self._journal.meta.code.append((at, size))
        self._journal.save()
        self.target.set_arena(*((start, start + length) for start, length in self._journal.meta.code))
        return at

    def _build(self, tables: list[SlotTable], at: int, size: int) -> Island:
        assert self._layout is not None
        assert self._journal is not None
        personality, resume = 0, 0
        if any(t.hooked for t in tables):
            personality, resume = self.symbols("__gcc_personality_v0"), self.symbols("_Unwind_Resume")
            if not (personality and resume):
                personality = resume = 0
        island = build(
            self.arch,
            self._layout,
            tables,
            at,
            size,
            plane=self._plane,
            personality=personality,
            resume_unwind=resume,
        )
        patch.write_new(self.target, at, island.code)
        for t in tables:
            if t.hooked:
                self._journal.meta.hooks.append(
                    undo.HookTable(t.base, t.layout.stride, len(t.sites), t.layout.hook, max(t.layout.pad, 0))
                )
        self._journal.meta.unwind += [(o.start, o.size, o.header, o.info - o.header) for o in island.unwind]
        self._journal.save()
        self.islands.append(island)
        return island

    # -- threads -----------------------------------------------------------------------------------------
    def _enter_threads(self) -> None:
        """Give every thread a context to begin with: one that belongs to nobody, so that its first event claims one."""
        d = self.arch.dialect
        assert self._journal is not None
        if not d.segment_register:
            return
        start, size = self._journal.meta.context
        empty = start + size - self.target.page
        for tid in self.target.threads():
            change = {d.segment_register: empty}
            if d.thread_register and self.target.regs(tid)[d.thread_register] == 0:
                # a static program before its TLS is set up: lend it a block whose first word points to itself
                lent = empty + 2048
                self.target.write(lent, struct.pack("<Q", lent))  # house: data, a thread block
                self._journal.meta.tls = lent
                self._journal.save()
                change[d.thread_register] = lent
            self.target.set_regs(tid, change)

    def _leave_threads(self) -> None:
        assert self._journal is not None
        restore._lend_back(self.target, self.arch, self._journal.meta)

    # -- unwinders ------------------------------------------------------------------------------------------
    def unwinder_sites(self, sites: dict[str, Site]) -> None:
        """Tell where ``_dl_find_object`` and ``dl_iterate_phdr`` can be hooked (see engine.unwind)."""
        self._unwind_sites = sites

    def _lookups(self) -> list[tuple[str, Site]]:
        """The lookup functions to be hooked, without those that are being traced."""
        return [
            (name, site)
            for name, site in self._unwind_sites.items()
            if not ((armed := self._armed.get(site.at)) and (armed.bytes or armed.ops))
        ]

    def _lookup_change(self, name: str, site: Site, at: int) -> patch.Change:
        """Write the function that stands before `name`, at `at`; gives the entry jump to it."""
        objects = [o for island in self.islands for o in island.unwind]
        moved = self.arch.displace(site.sled, site.at, at, site.at + site.sled.resume)
        entry = (len(moved.code) + 63) & -64
        finds = name == unwind.FIND
        blob = compile_text(self.arch, unwind.module(objects, at if finds else 0, 0 if finds else at))
        code = moved.code.ljust(entry, b"\xcc") + blob.code
        if len(code) > _LOOKUP_ROOM:
            raise EngineBug(f"the lookup of {len(objects)} islands is too large")
        patch.write_new(self.target, at, code)
        assert self._journal is not None
        meta = self._journal.meta
        meta.lookups.append(site.at)
        # the original and the callbacks are called from here: these addresses lie on stacks meanwhile
        lines = [*self.arch.disassemble(blob.code, at + entry), (at + len(code), b"", "")]
        meta.calls += [after for (_, _, text), (after, _, _) in pairwise(lines) if text.startswith("call")]
        self._journal.save()
        assert self._journal is not None
        meta = self._journal.meta
        meta.lookups.append(site.at)
        # the original and the callbacks are called from here: these addresses lie on stacks meanwhile
        lines = [*self.arch.disassemble(blob.code, at + entry), (at + len(code), b"", "")]
        meta.calls += [after for (_, _, text), (after, _, _) in pairwise(lines) if text.startswith("call")]
        self._journal.save()
        put = self.arch.arm(
            site.at, site.sled, at + entry + blob.symbols["find" if finds else "iterate"], balanced=True
        )
        now = self._unwind_now.get(site.at, site.sled.idle[: len(put)])
        self._unwind_now[site.at] = put
        return patch.Change(site.at, now, put)

    # -- the end ---------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Undo everything. The target is left stopped; one that is gone is fine. Idempotent."""
        if self._closed or self._journal is None:
            return
        self.target.stop()
        self._closed = True
        view = bytes(self._journal.view)
        self.report = restore.restore(self.target, *undo.parse(view))

    def forget(self, ring: RingInfo) -> None:
        """Wipe the context of a thread that has ended, before its ring is given to another.

        A new thread may have inherited that context and, with a stack used again, even the thread pointer.
        May be called from another thread while the target runs.
        """
        if self._layout is None or ring.level or ring.pid != self.target.pid:
            return
        with suppress(TraceError):
            at = self._layout.contexts + ring.index * CONTEXT
            self.target.write(at, bytes(CONTEXT))  # house: data, a context that belongs to nobody

    def restore_other(self, target: Target) -> restore.Report:
        """Undo our changes in another stopped target that inherited them by fork. Raises Gone."""
        assert self._journal is not None
        return restore.restore(target, *undo.parse(bytes(self._journal.view)))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:

        with suppress(Gone):
            self.close()


def _deep(op: Op) -> bool:
    """Its programs use the second and third shadow plane."""
    return any(s is not None and (s.timed or s.threshold or s.depth) for s in (op.entry, op.exit))


def _containing(mappings: Sequence[Mapping], at: int) -> Mapping | None:
    return next((m for m in mappings if m.start <= at < m.end), None)
