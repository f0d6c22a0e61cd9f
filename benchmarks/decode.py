"""How many events per second the decoder makes columns of, on one core."""

from __future__ import annotations

import os
import statistics
import time

import numpy as np

from benchmarks.report import Limit, Result
from benchmarks.report import Table as ResultTable
from fentry.record.event import Clock, decode
from fentry.record.layout import EXT_PARENT, EXT_RETVAL, Kind, Table

ABOUT = """\
Records of random sites, as they come from a ring, into an Arrow table: one core, processor time, kinds in turn."""

SITES, STRIDE = 20_000, 128
BASE = 0x5555_5555_0000


def records(n: int) -> np.ndarray:
    """Entries and exits of random sites, 40 clock values apart, with stack bits."""
    rng = np.random.default_rng(1)
    words = np.empty((n, 2), dtype=np.uint64)
    words[:, 0] = np.arange(n, dtype=np.uint64) * 40 + 10**15
    site = rng.zipf(1.3, n) % SITES
    offset = np.where(np.arange(n) & 1, 61, 13)
    stack = rng.integers(1, 1 << 16, n, dtype=np.uint64) << np.uint64(48)
    words[:, 1] = (BASE + site * STRIDE + offset).astype(np.uint64) | stack
    return words


def with_extension(words: np.ndarray, which: int) -> np.ndarray:
    """Every record followed by an extension."""
    out = np.empty((2 * len(words), 2), dtype=np.uint64)
    out[::2] = words
    out[1::2, 0] = 0x7FFF_0000
    out[1::2, 1] = np.uint64(which)
    return out


def run(*, quick: bool = False) -> Result:
    """Measure; one page."""
    n, rounds = (1_000_000, 2) if quick else (4_000_000, 7)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        return measure(n, rounds)
    finally:
        os.sched_setaffinity(0, before)


def measure(n: int, rounds: int) -> Result:
    """Decode `n` records of each kind in turn, `rounds` times."""
    clock = Clock("tsc", 2.5e9, ((10**15, 1_700_000_000_000_000_000),))
    marks = {13: Kind.ENTRY, 61: Kind.EXIT}
    one = [Table(BASE, STRIDE, marks, list(range(SITES)))]
    part = SITES // 4
    four = [Table(BASE + i * part * STRIDE, STRIDE, marks, list(range(i * part, i * part + part))) for i in range(4)]
    plain = records(n)
    cases = [
        ("plain", plain, one, clock),
        ("plain, 4 tables", plain, four, clock),
        ("order", plain, one, Clock("order")),
        ("with parent", with_extension(plain[: n // 2], EXT_PARENT), one, clock),
        ("with retval", with_extension(plain[: n // 2], EXT_RETVAL), four, clock),
    ]
    rates: dict[str, list[float]] = {case[0]: [] for case in cases}
    for _ in range(rounds):
        for name, words, tables, which in cases:
            start = time.process_time()
            table, damaged = decode(words, tables, which, nsites=SITES, pid=1, tid=1)
            rates[name].append(table.num_rows / (time.process_time() - start) / 1e6)
            assert not damaged
    result = Result("decode", ABOUT, notes=[f"{rounds} rounds of {n:,} records"])
    shown = ResultTable("Events made columns of", ("kind of trace", "M events/s, median", "best", "ns per event"))
    for name, seen in rates.items():
        median = statistics.median(seen)
        shown.rows.append((name, median, max(seen), 1e3 / median))
    result.tables.append(shown)
    result.limits.append(Limit("plain", statistics.median(rates["plain"]), 20.0, "M events/s", least=True))
    return result
