"""A session: a target, what is traced in it and how, from the first stop to the last event.

This is where the parts meet: the census of the loaded modules, the filters, the engine, the drain, the trace directory.
The command line and the Python API are thin above it.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fentry.engine import Engine, Site, census, restore, unwind
from fentry.engine import filter as filters
from fentry.engine import journal as undo
from fentry.engine.census import Census, Verdict
from fentry.errors import AskedWrong, BadImage, Gone, NothingMatched, TargetRefused, TraceError
from fentry.image import Image
from fentry.program.context import COUNTER, K_HITS, K_MAX, K_MIN, K_SELF, K_TOTAL
from fentry.record.event import Clock
from fentry.record.layout import Policy
from fentry.record.ring import Drainer, RingInfo
from fentry.record.store import Functions, Meta, ModuleInfo, TargetInfo, Writer
from fentry.record.store import Site as TraceSite
from fentry.target import Module, Stop, Target, hostclock
from fentry.tracers import Options, Tracer, load

Progress = Callable[[str], None]

#: runtimes that move frames about, or look for their own return addresses on the stack: greenlet, V8, HotSpot
_COPIES_STACKS = re.compile(r"_greenlet\..*|node(js)?(-?\d+)?|libnode\.so.*|libv8\.so.*|libjvm\.so.*")

#: how long a detach waits for another tracer to let go of the process
DETACH_PATIENCE_S = 3.0

#: start-up code of the C runtime (crti.o, crtbegin.o): traced only if asked for
_GLUE = frozenset(
    ("_init", "_fini", "frame_dummy", "register_tm_clones", "deregister_tm_clones", "__do_global_dtors_aux")
)


@dataclass(slots=True)
class Plan:
    """What to trace and how.

    Attributes:
        tracer: name of a tracer.
        wanted, unwanted: filter patterns (see fentry.engine.filter).
        clock: "" = the target's best.
        policy: None = block for a program that we started, drop for one that we attached to.
        ring_size: bytes per thread, a power of two.
        rings: threads that can record at once.
        retval, depth, threshold_ns, times, parent: see fentry.tracers.Options; the threshold in nanoseconds.
    """

    tracer: str = "function_graph"
    wanted: Sequence[str] = ()
    unwanted: Sequence[str] = ()
    clock: str = ""
    policy: Policy | None = None
    ring_size: int = 1 << 20
    rings: int = 256
    retval: bool = False
    depth: int = 0
    threshold_ns: int = 0
    times: bool = True
    parent: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """One function of a profile; times in ns (or clock units where the clock has no rate)."""

    function: str
    module: str
    hits: int
    total_ns: int
    self_ns: int
    min_ns: int
    max_ns: int


@dataclass(slots=True)
class Outcome:
    """What became of a session."""

    stop: Stop | None = None
    lost: int = 0
    events: int = 0
    restored: restore.Report | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""


class Session:
    """Trace one target.

    Args:
        target: a stopped target.
        plan: what to trace.
        directory: where to write the trace, or None for tracers without events.
        started: the target is a program that we started (its end is the session's end).
        progress: called with short texts on what takes time.
    """

    def __init__(
        self,
        target: Target,
        plan: Plan,
        *,
        directory: Path | None = None,
        started: bool = True,
        progress: Progress | None = None,
        argv: Sequence[str] = (),
    ) -> None:
        self.target = target
        self.plan = plan
        self.directory = directory
        self.started = started
        self.progress = progress or (lambda _text: None)
        self.argv = list(argv)
        self.tracer: Tracer = load(plan.tracer)
        policy = plan.policy if plan.policy is not None else (Policy.BLOCK if started else Policy.DROP)
        self.engine = Engine(target, clock=plan.clock, policy=policy, rings=plan.rings, ring_size=plan.ring_size)
        self.censuses: dict[str, tuple[Module, Census]] = {}
        self.sites: list[Site] = []
        self.outcome = Outcome()
        self._writer: Writer | None = None
        self._drainer: Drainer | None = None
        self._begun = 0.0
        self._rows: list[Row] | None = None
        self._finished = False
        self._created = 0
        self._epoch: list[tuple[int, int]] = []
        self._comms: dict[int, str] = {}
        name = Path(self.argv[0]).name[:15] if self.argv else ""
        self._comm = name or (_comm(target.pid) if target.pid else "")

    # -- what there is ------------------------------------------------------------------------------------
    def census(self, module: Module) -> Census | None:
        """The census of a loaded module; None if it has no file that can be read."""
        known = self.censuses.get(module.path)
        if known is None:
            if not module.file:
                return None
            try:
                image = Image.open(module.file)
            except (BadImage, OSError) as error:
                self.outcome.notes.append(f"{module.name} is left out: {error}")
                return None
            taken = census.take(image, module.name, main=module.main)
            known = self.censuses[module.path] = (module, taken)
        return known[1]

    def choose(self) -> list[Site]:
        """Apply the filters: the sites to hook. Raises NothingMatched, AskedWrong."""
        modules = self.target.modules()
        patterns = [filters.parse(p) for p in self.plan.wanted]
        everything = any(p.index for p in patterns)
        wanted = [m for m in modules if m.main or everything]
        for p in patterns:
            if p.module:
                wanted += [m for m in modules if filters.module_matches(p.module, m.name) and m not in wanted]
        verdicts = self._verdicts(wanted)
        try:
            chosen = filters.select(verdicts, self.plan.wanted, self.plan.unwanted)
            if not self.plan.wanted:  # a program's own functions are not what the compiler links into every one
                chosen = [i for i in chosen if verdicts[i].name not in _GLUE]
        except NothingMatched:
            if len(wanted) == len(modules):
                raise
            verdicts = self._verdicts(modules)
            chosen = filters.select(verdicts, self.plan.wanted, self.plan.unwanted)
        refused = [verdicts[i] for i in chosen if verdicts[i].sled is None]
        if chosen and len(refused) == len(chosen):
            reasons = sorted({v.reason for v in refused})
            raise NothingMatched(
                f"none of the {len(chosen)} functions that match can be traced: {'; '.join(reasons[:3])}",
                hint="fentry list -v shows each function with its reason",
            )
        if not chosen:
            raise NothingMatched(
                f"{modules[0].name} has no functions of its own that can be traced",
                hint=f"name some: -l 'libc.so.6:mem*' (fentry list {modules[0].path})",
            )
        if refused and self.plan.wanted:
            self.outcome.notes.append(f"{len(refused)} of {len(chosen)} functions cannot be traced (fentry list -v)")
        by_module: dict[str, list[Verdict]] = {}
        for i in chosen:
            by_module.setdefault(verdicts[i].module, []).append(verdicts[i])
        sites: dict[int, Site] = {}
        for module in modules:
            if module.name in by_module and module.path in self.censuses:
                for site in census.sites(module, by_module[module.name]):
                    sites.setdefault(site.at, site)
        self.sites = [sites[at] for at in sorted(sites)]
        return self.sites

    def _verdicts(self, modules: Sequence[Module]) -> list[Verdict]:
        out: list[Verdict] = []
        for m in modules:
            taken = self.census(m)
            if taken is not None:
                out += taken.verdicts
        return out

    def symbol(self, name: str) -> int:
        """Address in the target of a symbol, in the order the loader searches; 0 if there is none."""
        for m in self.target.modules():
            if not m.file:
                continue
            try:
                value = self._image(m).symbol(name)
            except (BadImage, OSError):
                continue
            if value:
                return value + m.bias
        return 0

    def _image(self, module: Module) -> Image:
        known = self.censuses.get(module.path)
        return known[1].image if known else Image.open(module.file)

    def _unwinder_sites(self) -> dict[str, Site]:
        """Where unwinders ask for frame information, if that can be hooked."""
        found: dict[str, Site] = {}
        for m in self.target.modules():
            if not m.file:
                continue
            try:
                image = self._image(m)
            except (BadImage, OSError):
                continue
            for name in (unwind.FIND, unwind.ITERATE):
                function = None if name in found else image.function(name)
                if function is not None:
                    taken = self.census(m)
                    verdict = taken.find(name) if taken else None
                    if verdict is not None and verdict.sled is not None:
                        found[name] = census.sites(m, [verdict])[0]
        return found

    # -- running ------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Hook everything and let the target run.

        Raises: what :meth:`choose` and the engine raise; the target is then what it was.
        """
        plan = self.plan
        hz = hostclock.hz() if self.engine.clock in ("tsc", "mono") else 1e9
        options = Options(
            retval=plan.retval,
            depth=plan.depth,
            threshold=round(plan.threshold_ns * hz / 1e9),
            times=plan.times,
            parent=plan.parent,
        )
        op = self.tracer.op(options, clock=self.engine.clock)
        self._op = op
        sites = self.choose()
        if op.exit is not None:
            busy = self._unwinder_sites()
            sites = self.sites = self._catchable(sites, told=bool(busy))
            taken = {s.at for s in busy.values()}
            sites = self.sites = [s for s in sites if s.at not in taken]
            self.engine.unwinder_sites(busy)
            self.engine.symbols = self.symbol
        self.engine.register(op, sites)
        self.engine.live = not self.started
        self.progress(f"hooking {len(sites)} functions")
        try:
            if self.engine.live:
                self.target.resume()
            self.engine.open()
            if self.tracer.events:
                self._record()
            elif not self.target.sliced:
                self._recycle()
            self.engine.commit()
            self.outcome.notes += self.engine.notes
            self._update_meta({})
        except BaseException:
            self._abandon()
            raise
        self._begun = time.monotonic()
        self.target.resume()

    def _catchable(self, sites: list[Site], *, told: bool) -> list[Site]:
        """Keep returns alone where an exception could not pass a hooked frame.

        Args:
            sites: what was chosen.
            told: unwinders of the target can be told about our frames.
        """
        main = next((taken for m, taken in self.censuses.values() if m.main), None)
        if main is None:
            return sites
        copier = next((m.name for m in self.target.modules() if _COPIES_STACKS.match(m.name)), "")
        if copier:
            why = f"{copier} copies stacks or reads return addresses off them"
        elif self.engine.arch.unwinds:
            if told or not main.image.uses_cxx_unwinder:
                return sites
            why = "its unwinder cannot be found (a static program without symbols)"
        elif main.image.symbol("__gxx_personality_v0"):
            why = f"exceptions cannot pass a return hook on {self.engine.arch.name} yet"
        else:
            return sites
        self.outcome.notes.append(f"entries only: {why}")
        return [replace(s, verdict=replace(s.verdict, returns=False, returns_reason=why)) for s in sites]

    def _abandon(self) -> None:
        """Undo a start that failed half way."""
        with contextlib.suppress(Gone):
            self.engine.close()
        if self._drainer is not None:
            self._drainer.stop()
        if self._writer is not None:
            self._writer.close()

    # -- the trace ----------------------------------------------------------------------------------------
    def _record(self) -> None:
        assert self.engine.region is not None
        if self.directory is None:
            raise AskedWrong(f"tracer {self.tracer.name} writes events: it needs a directory")
        self._created = time.time_ns()
        self._epoch = [self._moment()]
        self._writer = Writer(self.directory, self._meta({}))
        self._writer.write_symbols(self._functions())
        if self.target.sliced:
            return
        alive = getattr(self.target, "alive", None)  # a target whose threads can be looked up from here
        self._drainer = Drainer(self.engine.region, self._sink, alive, self.engine.forget)
        self._drainer.start()

    def _recycle(self) -> None:
        """Give the rings of threads that ended to others, who wait for one, although nothing is drained from them."""
        assert self.engine.region is not None
        alive = getattr(self.target, "alive", None)  # a target whose threads can be looked up from here
        self._drainer = Drainer(self.engine.region, lambda _ring, _data: None, alive, self.engine.forget)
        self._drainer.start()

    def _sink(self, ring: RingInfo, data: memoryview) -> None:
        """Receive ring bytes on the drainer's thread; learn the names of threads while they live."""
        assert self._writer is not None
        if ring.tid and ring.tid not in self._comms:
            try:
                self._comms[ring.tid] = Path(f"/proc/{ring.tid}/comm").read_text(errors="replace").rstrip("\n")
            except OSError:
                self._comms[ring.tid] = ""
        self._writer.write(ring, data)

    def _moment(self) -> tuple[int, int]:
        if self.engine.clock == "tsc":
            return hostclock.pair()
        if self.engine.clock == "mono":
            return hostclock.pair(time.monotonic_ns)
        # a virtual clock begins at 0, in nanoseconds of its own: two runs give the same trace
        now = self.target.clock if self.target.clock_at else time.time_ns()
        return (now, now) if self.engine.clock == "icount" else (0, now)

    def _meta(self, status: dict[str, int]) -> Meta:
        engine, target = self.engine, self.target
        hz = {"tsc": hostclock.hz(), "mono": hostclock.hz(), "icount": 1e9}.get(engine.clock, 0.0)
        lost = engine.region.lost if engine.region is not None else 0
        exe = self.argv[0] if self.argv else ""
        return Meta(
            clock=Clock(engine.clock, hz, tuple(self._epoch)),
            arch=engine.arch.name,
            created=self._created,
            target=TargetInfo(target.kind, target.pid, self._comm, tuple(self.argv), exe),
            policy=engine.policy,
            nrings=engine.rings,
            ring_size=engine.ring_size,
            sites=tuple(
                TraceSite(s.name, s.module.name, s.function, s.verdict.size, s.verdict.form) for s in engine.sites
            ),
            tables=tuple(engine.tables(self._op)),
            ops=({"tracer": self.tracer.name, "retval": self.plan.retval, "threshold_ns": self.plan.threshold_ns},),
            modules=tuple(
                ModuleInfo(m.name, m.path, taken.image.build_id, m.bias, m.start, m.end)
                for m, taken in self.censuses.values()
            ),
            threads={tid: name for tid, name in self._comms.items() if name},
            lost={"events": lost} if lost else {},
            status=status,
        )

    def _update_meta(self, status: dict[str, int]) -> None:
        if self._writer is not None:
            self._writer.update(self._meta(status))

    def _functions(self) -> list[Functions]:
        """Names for parent addresses: every function of the program and of each module looked at."""
        out = []
        for m, taken in self.censuses.values():
            rows = [v.function for v in taken.verdicts]
            out.append(
                Functions(m.name, [f.address + m.bias for f in rows], [f.size for f in rows], [f.name for f in rows])
            )
        return out

    # -- waiting and ending ---------------------------------------------------------------------------------
    def wait(self, timeout: float | None = None) -> Stop | None:
        """Wait until the target ends, or `timeout` seconds; gives its end, or None."""
        wait = self._run if self.target.sliced else self.target.wait  # type: ignore[attr-defined]  # all that run have it
        stop: Stop | None = wait(timeout)
        if stop is not None:
            self.outcome.stop = stop
        return stop

    def _run(self, timeout: float | None) -> Stop | None:
        """Run a sliced target, draining between slices: the same program gives the same trace, byte for byte."""
        deadline = None if timeout is None else time.monotonic() + timeout

        def between() -> None:
            if not self._finished:
                self._drain()
            if deadline is not None and time.monotonic() >= deadline:
                with contextlib.suppress(Gone):  # it may have ended in this very slice
                    self.target.stop()

        self.target.resume()
        # a slice records at most a quarter of a ring: an event takes 40 instructions and writes two records
        slice_size = min(1_000_000, 40 * self.plan.ring_size // 32 // 4)
        stop: Stop = self.target.wait(on_slice=between, every=slice_size)  # type: ignore[attr-defined]
        if stop.kind == "stopped":
            return None
        return stop

    def _drain(self) -> None:
        region = self.engine.region
        if self._writer is not None and region is not None:
            region.drain(self._sink)

    @property
    def failed(self) -> bool:
        """The trace cannot be written any more, and recording is off; :meth:`finish` raises why."""
        return self._drainer is not None and self._drainer.error is not None

    @property
    def finished(self) -> bool:
        """:meth:`finish` was called."""
        return self._finished

    @property
    def records(self) -> int:
        """How many records have been written so far."""
        return self._writer.records if self._writer is not None else 0

    def flush(self) -> None:
        """Let what was drained so far be read by others. Raises CannotHere if the disk is full."""
        if self._writer is not None and not self._finished:
            self._writer.flush()

    def finish(self) -> Outcome:
        """Detach (if the target still runs), drain what is left, close the trace. Idempotent.

        Raises: CannotHere if the disk was full (the trace up to there is readable).
        """
        outcome = self.outcome
        if self._finished:
            return outcome
        self._finished = True
        outcome.seconds = time.monotonic() - self._begun if self._begun else 0.0
        trouble = self._detach() if outcome.stop is None else None
        self._restore_relatives()
        if self.engine.region is not None:
            self._rows = self.rows()
        try:
            if self._drainer is not None:
                self._drainer.stop()
            elif self.engine.policy is Policy.OVERWRITE and self._writer is not None and self.engine.region is not None:
                self.engine.region.snapshot(self._sink)
            else:
                self._drain()
        finally:
            if self.engine.region is not None:
                outcome.lost = self.engine.region.lost
            if self._writer is not None:
                outcome.events = self._writer.records
                self._epoch.append(self._moment())
                stop = outcome.stop
                self._writer.close(self._meta({stop.kind: stop.status} if stop else {"detached": 0}))
        if trouble is not None:
            raise trouble
        return outcome

    def _detach(self) -> TraceError | None:
        """Undo everything in a target that still runs; gives what is in the way if that cannot be done (a debugger)."""
        deadline = time.monotonic() + DETACH_PATIENCE_S
        while True:
            try:
                self.engine.close()
            except Gone as gone:
                self.outcome.stop = Stop("exited", gone.status if gone.status is not None else -1)
            except TraceError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.1)  # somebody else holds the process; it does not tell when it lets go
                    continue
                if self.engine.region is not None:
                    self.engine.region.switch(on=False)
                pid = self.target.pid
                return TargetRefused(
                    f"process {pid} is still hooked: {error.message}",
                    hint=f"when nothing else holds it: fentry recover {pid}",
                )
            else:
                self.outcome.restored = self.engine.report
            return None

    def _restore_relatives(self) -> None:
        """Put forked children back, too: they inherited the hooks, and go on recording into our rings.

        A child may fork before it is restored, so we look until there is none.
        """
        for _ in range(8):
            relatives = self.target.relatives(undo.NAME)
            if not relatives:
                return
            for relative in relatives:
                try:
                    report = self.engine.restore_other(relative)
                    self.outcome.notes.append(f"process {relative.pid} had inherited the hooks: {report.sites} undone")
                except TraceError as error:
                    if not isinstance(error, Gone):
                        self.outcome.notes.append(f"process {relative.pid} is still hooked: {error.message}")
                relative.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.finish()
        finally:
            self.target.close()

    def rows(self) -> list[Row]:
        """Profile rows, hottest first."""
        counters = self.engine.counters
        if counters is None:
            return self._rows or []
        table = np.frombuffer(counters, dtype=np.uint64).reshape(self.engine.rings, -1, COUNTER // 8)
        scale = 1e9 / hostclock.hz() if self.engine.clock in ("tsc", "mono") else 1.0
        out = []
        for site, row in self.engine.rows(self._op):
            cells = table[:, row, :]
            hits = int(cells[:, K_HITS // 8].sum())
            if not hits:
                continue
            used = cells[:, K_MAX // 8] > 0
            least = int(np.invert(cells[used, K_MIN // 8]).min()) if used.any() else 0

            def ns(value: int) -> int:
                return round(value * scale)

            out.append(
                Row(
                    site.name,
                    site.module.name,
                    hits,
                    ns(int(cells[:, K_TOTAL // 8].sum())),
                    ns(int(cells[:, K_SELF // 8].sum())),
                    ns(least),
                    ns(int(cells[:, K_MAX // 8].max())),
                )
            )
        out.sort(key=lambda r: (-r.self_ns, -r.hits, r.function))
        return out
