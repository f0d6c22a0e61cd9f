"""A traced program in miniature: writes records into a region exactly as ``record/layout.py`` says."""

from __future__ import annotations

import struct
from pathlib import Path

from fentry.record import layout as L
from fentry.record.event import Clock
from fentry.record.layout import Kind, Policy, Table
from fentry.record.meta import Meta, Site, TargetInfo
from fentry.record.ring import Region
from fentry.record.store import Trace, Writer

BASE, STRIDE = 0x5555_0000_1000, 64
OFFSET = {Kind.ENTRY: 13, Kind.EXIT: 29, Kind.TAIL: 37, Kind.UNWOUND: 45, Kind.PLAIN: 53}
NAMES = ("main", "parse", "eval", "print_value", "std::vector<int>::push_back(int&&)", 'odd"; name\\\n', "leaf")


def table(nsites: int = len(NAMES), kinds: tuple[Kind, ...] = tuple(Kind)) -> Table:
    return Table(BASE, STRIDE, {OFFSET[k]: k for k in kinds}, list(range(nsites)))


def mark(site: int, kind: Kind, stack: int = 0) -> int:
    return stack << 48 | BASE + site * STRIDE + OFFSET[kind]


def meta(clock: str = "tsc", hz: float = 1e9, **more) -> Meta:
    first = {"tsc": 10**9, "mono": 10**9, "icount": 0, "order": 0}[clock]
    epoch = ((first, 1_700_000_000 * 10**9),) if clock != "order" else ()
    fields = {
        "clock": Clock(clock, hz if clock != "order" else 0, epoch),
        "arch": "toy",
        "created": 1_700_000_000 * 10**9,
        "target": TargetInfo("toy", 100, "prog", ("./prog", "-x"), "/bin/prog"),
        "sites": tuple(Site(n, "prog", 0x40_1000 + 64 * i, 64, "sled") for i, n in enumerate(NAMES)),
        "tables": (table(),),
        "threads": {100: "prog", 101: "worker"},
    }
    return Meta(**(fields | more))


class Program:
    """The target's side: claims rings, writes records, obeys the limit, counts what it loses."""

    def __init__(self, nrings: int = 4, ring_size: int = 4096, policy: Policy = Policy.DROP) -> None:
        self.memory = memoryview(bytearray(L.region_size(nrings, ring_size)))
        self.region = Region.format(self.memory, nrings, ring_size, policy)
        self.nrings, self.ring_size, self.policy = nrings, ring_size, policy

    def get(self, at: int) -> int:
        return struct.unpack_from("<Q", self.memory, at)[0]

    def put(self, at: int, value: int) -> None:
        struct.pack_into("<Q", self.memory, at, value)

    def header(self, ring: int) -> int:
        return L.PAGE + ring * L.RING_HEADER

    def claim(self, pid: int = 100, tid: int = 100, level: int = 0, parent: int = -1) -> int:
        ring = self.get(L.R_NEXT)
        self.put(L.R_NEXT, ring + 1)
        at = self.header(ring)
        self.put(at + L.H_PID, tid << 32 | pid)
        self.put(at + L.H_LEVEL, level)
        self.put(at + L.H_PARENT, ring if parent < 0 else parent)
        self.put(at + L.H_STATE, 1)
        return ring

    def write(self, ring: int, *words: tuple[int, int]) -> bool:
        """Write one record with its extensions, or count it as lost."""
        at = self.header(ring)
        pos = self.get(at + L.H_POS)
        if pos + 16 * len(words) > self.get(at + L.H_LIMIT):
            self.put(at + L.H_LOST, self.get(at + L.H_LOST) + 1)
            return False
        data = L.data_offset(self.nrings) + ring * self.ring_size
        for i, word in enumerate(words):
            struct.pack_into("<QQ", self.memory, data + ((pos + 16 * i) & (self.ring_size - 1)), *word)
        self.put(at + L.H_POS, pos + 16 * len(words))
        return True

    def event(self, ring: int, a: int, site: int, kind: Kind, stack: int = 0, **ext: int) -> bool:
        codes = {"parent": L.EXT_PARENT, "retval": L.EXT_RETVAL, "pos": L.EXT_POS, "duration": L.EXT_DURATION}
        words = [(a, mark(site, kind, stack))] + [(value, codes[name]) for name, value in ext.items()]
        return self.write(ring, *words)


def record(path: Path, program: Program, what: Meta) -> Trace:
    """Drain everything into a trace and open it."""
    with Writer(path, what) as writer:
        (program.region.snapshot if program.policy is Policy.OVERWRITE else program.region.drain)(writer.write)
    return Trace.open(path)


def trace_of(path: Path, events: list[tuple], what: Meta | None = None, ring_size: int = 1 << 16) -> Trace:
    """A trace of (tid, a, site, kind, stack, extensions) tuples, each thread with its own ring."""
    what = what or meta()
    tids = list(dict.fromkeys(e[0] for e in events))
    program = Program(max(len(tids), 1), ring_size)
    rings = {tid: program.claim(tid=tid) for tid in tids}
    with Writer(path, what) as writer:
        for tid, a, site, kind, stack, ext in events:
            while not program.event(rings[tid], a, site, kind, stack, **ext):
                program.put(program.header(rings[tid]) + L.H_LOST, 0)
                program.region.drain(writer.write)
        program.region.drain(writer.write)
    return Trace.open(path)
