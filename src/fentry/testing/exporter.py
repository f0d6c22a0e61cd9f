"""Conformance of exporters: what every format owes its users, whatever it looks like.

Usage::

    check_exporter(lambda path: MyExporter(path / "out"))
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fentry.export import Exporter, Header
from fentry.record.event import Clock, Columns, to_table
from fentry.record.layout import Kind
from fentry.record.meta import Meta, Site
from fentry.record.store import Thread

#: Names that break formats: separators, quotes, line ends, other alphabets, no text at all, nothing.
NAMES = ("plain", "a;b", 'quote"and\\slash', "line\nend\r\t", "naïve::λ<int>", "\udcff", "", "with space 7")


def check_exporter(make: Callable[[Path], Exporter], read: Callable[[Path], Any] | None = None) -> None:
    """Run every rule on an exporter.

    The rules: an empty trace is a file too; every kind of event, lost ones, calls without end and exits
    without entry, and any function name are accepted; how the events are cut into batches does
    not show; a trace exported twice is the same.

    Args:
        make: gives a fresh exporter that writes below the (empty) directory it is handed.
        read: what of the directory must not depend on batches; None: the bytes of every file.

    Raises:
        AssertionError: naming the rule that is broken.
    """
    seen = read or _bytes
    for clock in (Clock("tsc", 1e9, ((0, 0),)), Clock("order")):
        whole = _run(make, seen, clock, 1 << 20)
        assert whole == _run(make, seen, clock, 1 << 20), "the same trace gave two different exports"
        for batch in (1, 7):
            assert whole == _run(make, seen, clock, batch), f"batches of {batch} events show in the output"
        _run(make, seen, clock, 0)


def _bytes(path: Path) -> dict[str, bytes]:
    found = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    assert found, "the exporter wrote no file"
    return found


def _run(make: Callable[[Path], Exporter], read: Callable[[Path], Any], clock: Clock, batch: int) -> Any:
    """Export the sample in batches; 0: an empty trace."""
    table = _sample(clock)
    threads = (Thread(7, 7, 'main "x"', 0), Thread(7, 8, "wörker;", 1))
    meta = Meta(clock, "toy", sites=tuple(Site(name, "m", 64 * i, 64) for i, name in enumerate(NAMES)))
    with tempfile.TemporaryDirectory() as place:
        exporter = make(Path(place))
        returning = np.ones(len(NAMES), bool)
        returning[-1] = False
        exporter.begin(Header(meta, threads, table.num_rows if batch else 0, returning, _symbolize))
        for at in range(0, table.num_rows if batch else 0, max(batch, 1)):
            exporter.rows(table.slice(at, batch))
        if batch:
            exporter.lost(3)
        exporter.end()
        return read(Path(place))


def _symbolize(addresses: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> pa.DictionaryArray:
    return pa.array([f"caller_{a:x}" for a in addresses.tolist()], pa.string()).dictionary_encode()


def _sample(clock: Clock) -> pa.Table:
    """Two threads, every kind of event, a loss, a longjmp, a late start and an open end."""
    e, x, t, u, p = Kind.ENTRY, Kind.EXIT, Kind.TAIL, Kind.UNWOUND, Kind.PLAIN
    script = [
        *[(7, 4, x, 20), (8, 0, e, 20), (7, 1, e, 19), (7, 2, e, 18), (8, 3, p, 19), (7, 2, x, 18), (7, 3, e, 18)],
        *[(8, 5, e, 18), (7, 4, e, 17), (7, 5, t, 17), (8, 6, e, 17), (7, 6, e, 16), (7, 6, u, 16), (7, 4, x, 17)],
        *[(8, 0, x, 20), (7, 1, x, 19), (7, 0, e, 19), (8, 7, e, 20), (7, 2, x, 33), (7, 7, e, 12), (7, 6, e, 18)],
    ]
    n = len(script)
    columns = Columns(
        np.arange(n, dtype=np.uint64) * np.uint64(1_234_567) + np.uint64(5 * 10**9),
        np.array([s[1] for s in script], np.uint32),
        np.array([s[2] for s in script], np.uint8),
        np.array([s[3] for s in script], np.uint16),
        np.arange(n, dtype=np.uint64) * np.uint64(0x1000),
        np.arange(n) % 3 > 0,
        gaps=[(11, 4)],
    )
    tids = np.array([s[0] for s in script], np.uint32)
    seq = np.zeros(n, np.uint64)
    for tid in (7, 8):
        seq[tids == tid] = np.arange(int((tids == tid).sum()))
    return to_table(columns, clock, pid=7, tid=tids, seq=seq)
