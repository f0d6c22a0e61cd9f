"""How many events per second the decoder makes columns of, on one core.

Run: ``python benchmarks/decode.py [MILLIONS]``. Prints one line per kind of trace: the best of five runs.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from fentry.record.event import Clock, decode
from fentry.record.layout import EXT_PARENT, EXT_RETVAL, Kind, Table

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


def main() -> None:
    n = int(float(sys.argv[1]) * 1e6) if len(sys.argv) > 1 else 4_000_000
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
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
    for name, words, tables, which in cases:
        best, events = float("inf"), 0
        for _ in range(5):
            start = time.perf_counter()
            table, damaged = decode(words, tables, which, nsites=SITES, pid=1, tid=1)
            best = min(best, time.perf_counter() - start)
            events = table.num_rows
            assert not damaged
        print(f"{name:16s} {events / best / 1e6:7.1f} M events/s   ({best / events * 1e9:.1f} ns per event)")


if __name__ == "__main__":
    main()
