"""Calls: the exact rules against what really happened, the fast way against the exact one."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fentry.record import event
from fentry.record.calls import Matcher, Rows, calls, iter_calls
from fentry.record.layout import Kind
from fentry.record.stack import Flag
from fentry.record.stat import stat
from tests.record.rings import NAMES, meta, table, trace_of

ENTRY, EXIT, TAIL, UNWOUND, PLAIN = Kind
RETURNING = np.ones(len(NAMES), bool)


class Machine:
    """Runs random programs and knows the truth: what each call really was."""

    def __init__(self, rng, length):
        self.rng = rng
        self.length = length
        self.now = 1000
        self.sp = 60000
        self.events = []  # (ts, site, kind, bits, payload)
        self.truth = []  # [site, begin, end or None, how]

    def emit(self, site, kind, sp, payload=None):
        self.now += int(self.rng.integers(1, 5))
        self.events.append((self.now, site, kind, sp & 0xFFFF, payload))

    def call(self, depth):
        """One call; gives the number of levels still to be left at once (longjmp, exception), or 0."""
        if len(self.events) >= self.length:
            return 0
        site = int(self.rng.integers(len(NAMES)))
        self.sp -= int(self.rng.integers(1, 4))
        sp = self.sp
        if self.rng.random() < 0.1:
            self.emit(site, PLAIN, sp)
            self.truth.append([site, self.now, None, "plain"])
            self.sp = sp + 1
            return 0
        self.emit(site, ENTRY, sp)
        frames = [len(self.truth)]
        self.truth.append([site, self.now, None, "open"])
        leaving = self.body(depth)
        while not leaving and self.rng.random() < 0.15:
            self.sp = sp
            jumped = int(self.rng.integers(len(NAMES)))
            self.emit(jumped, TAIL, sp)
            frames.append(len(self.truth))
            self.truth.append([jumped, self.now, None, "open"])
            leaving = self.body(depth)
        self.sp = sp
        if leaving > 0:  # longjmp over this frame: no exit at all
            for frame in frames:
                self.truth[frame][3] = "passed"
            return leaving - 1
        self.emit(site, UNWOUND if leaving < 0 else EXIT, sp, 7)
        for frame in frames:
            self.truth[frame][2:] = [self.now, "unwound" if leaving < 0 else "returned"]
        return leaving + 1 if leaving < 0 else 0

    def body(self, depth):
        while depth < 12 and self.rng.random() < 0.55:
            leaving = self.call(depth + 1)
            if leaving:
                return leaving
        if depth > 1 and self.rng.random() < 0.06:
            return int(self.rng.integers(1, depth)) * int(self.rng.choice([1, -1]))
        return 0

    def run(self):
        self.sp -= 1
        bottom = self.sp
        self.emit(0, ENTRY, bottom)
        self.truth.append([0, self.now, None, "open"])
        while len(self.events) < self.length:
            self.call(1)
            self.sp = bottom
        self.emit(0, EXIT, bottom, 0)
        self.truth[0][2:] = [self.now, "returned"]
        return self


def events_table(events, lost=None):
    ts, site, kind, bits, payload = zip(*events, strict=True) if events else ([],) * 5
    columns = event.Columns(
        np.array(ts, np.uint64),
        np.array(site, np.uint32),
        np.array(kind, np.uint8),
        np.array(bits, np.uint16),
        np.array([p or 0 for p in payload], np.uint64),
        np.array([p is not None for p in payload], bool),
    )
    columns.gaps = sorted((lost or {}).items())
    return event.to_table(columns, event.Clock("tsc", 1e9), pid=1, tid=1, seq=0)


def match(tab, *, exact, batch=10**9):
    matcher = Matcher(RETURNING, exact=exact)
    parts = [matcher.feed(tab.slice(at, batch)) for at in range(0, tab.num_rows, batch)]
    return matcher, Rows.join([*parts, matcher.finish()])


def as_set(rows):
    return sorted(
        zip(
            rows.row.tolist(), rows.parent.tolist(), rows.ts.tolist(), rows.dur.tolist(), rows.own.tolist(),
            rows.site.tolist(), rows.depth.tolist(), rows.retval.tolist(), rows.has_retval.tolist(),
            rows.flags.tolist(), strict=True,
        )
    )  # fmt: skip


class Always:
    """Makes the fast way the first choice even for short streams."""

    SPAN = (64, 256)
    WINDOW = (8, 64)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(Matcher, "SPAN", Always.SPAN)
    monkeypatch.setattr(Matcher, "WINDOW", Always.WINDOW)


@given(st.integers(0, 2**32), st.integers(1, 1500))
@settings(max_examples=60, deadline=None)
def test_calls_are_what_really_happened(seed, length):
    machine = Machine(np.random.default_rng(seed), length).run()
    _, rows = match(events_table(machine.events), exact=True)
    got = {row: (site, ts, dur, flags) for row, _, ts, dur, _, site, _, _, _, flags in as_set(rows)}
    assert len(got) == len(machine.truth)
    for row, (site, begin, end, how) in enumerate(machine.truth):
        assert got[row][:2] == (site, begin)
        flags = Flag(got[row][3])
        assert (Flag.PLAIN in flags) == (how == "plain")
        assert (Flag.PASSED in flags) == (how == "passed")
        assert (Flag.UNWOUND in flags) == (how == "unwound")
        if end is not None:
            assert got[row][2] == end - begin


@given(st.integers(0, 2**32), st.integers(1, 3000), st.integers(16, 700))
@settings(max_examples=60, deadline=None)
def test_fast_is_exact_on_programs(seed, length, batch):
    tab = events_table(Machine(np.random.default_rng(seed), length).run().events)
    assert as_set(match(tab, exact=False, batch=batch)[1]) == as_set(match(tab, exact=True)[1])


@given(st.integers(0, 2**32), st.integers(1, 2000), st.integers(50, 700), st.floats(0, 0.03), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_fast_is_exact_with_losses_and_a_late_start(seed, length, batch, rate, start):
    rng = np.random.default_rng(seed)
    events = Machine(rng, length).run().events[start:]
    kept, gaps, missing = [], {}, 0
    for item in events:
        if rng.random() < rate:
            missing += 1
            continue
        if missing:
            gaps[len(kept)] = missing
            missing = 0
        kept.append(item)
    tab = events_table(kept, gaps)
    fast, exact = match(tab, exact=False, batch=batch)[1], match(tab, exact=True)[1]
    assert as_set(fast) == as_set(exact)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4]), st.integers(0, 2)), max_size=400),
    st.integers(20, 400),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_fast_is_exact_on_nonsense(items, batch):
    tab = events_table([(10 * i, site, kind, bits, i) for i, (site, kind, bits) in enumerate(items)])
    fast, exact = match(tab, exact=False, batch=batch)[1], match(tab, exact=True)[1]
    assert as_set(fast) == as_set(exact)
    assert sorted(exact.row.tolist()) == list(range(len(exact)))


def test_the_fast_way_is_really_taken():
    machine = Machine(np.random.default_rng(5), 4000)
    machine.rng = np.random.default_rng(5)
    events = []
    for i in range(1000):
        events += [(4 * i, 1, ENTRY, 9, None), (4 * i + 1, 2, ENTRY, 8, None), (4 * i + 2, 2, EXIT, 8, 1)]
        events += [(4 * i + 3, 1, EXIT, 9, 1)]
    matcher = Matcher(RETURNING)
    matcher._slow = None
    rows = matcher.feed(events_table(events[:3968]))
    assert len(rows) == 1984


CASES = {
    "nested": (
        [(0, 0, ENTRY, 5), (2, 1, ENTRY, 4), (7, 1, EXIT, 4), (9, 0, EXIT, 5)],
        ["0 main 0 9 own 4", "1 parse 2 5 own 5"],
    ),
    "longjmp": (
        [(0, 0, ENTRY, 5), (1, 1, ENTRY, 4), (2, 2, ENTRY, 3), (9, 0, EXIT, 5)],
        ["0 main 0 9 own 1", "1 parse 1 8 own 1 PASSED", "2 eval 2 7 own 7 PASSED"],
    ),
    "recursion": (
        [(0, 1, ENTRY, 5), (1, 1, ENTRY, 4), (2, 1, EXIT, 4), (4, 1, EXIT, 5)],
        ["0 parse 0 4 own 3", "1 parse 1 1 own 1 RECURSIVE"],
    ),
    "tail call": (
        [(0, 0, ENTRY, 5), (1, 1, ENTRY, 4), (3, 2, TAIL, 4), (4, 6, ENTRY, 3), (5, 6, EXIT, 3), (8, 1, EXIT, 4)],
        ["0 main 0 - own - NEVER_EXITED", "1 parse 1 7 own 2", "2 eval 3 5 own 4 TAIL", "3 leaf 4 1 own 1"],
    ),
    "plain": (
        [(0, 0, ENTRY, 5), (1, 6, PLAIN, 4), (2, 6, PLAIN, 4), (3, 0, EXIT, 5)],
        ["0 main 0 3 own 3", "1 leaf 1 - own - PLAIN", "1 leaf 2 - own - PLAIN"],
    ),
    "unwound": (
        [(0, 0, ENTRY, 5), (1, 1, ENTRY, 4), (3, 1, UNWOUND, 4), (4, 0, EXIT, 5)],
        ["0 main 0 4 own 2", "1 parse 1 2 own 2 UNWOUND"],
    ),
    "open at the start": (
        [(5, 2, ENTRY, 3), (7, 2, EXIT, 3), (8, 1, EXIT, 4), (9, 2, ENTRY, 4), (10, 2, EXIT, 4), (12, 0, EXIT, 5)],
        ["0 main 5 7 own 3 OPEN_AT_START", "1 parse 5 3 own 1 OPEN_AT_START", "2 eval 5 2 own 2", "1 eval 9 1 own 1"],
    ),
    "exit of nothing amid open frames": (
        [(0, 0, ENTRY, 5), (1, 1, EXIT, 9), (2, 0, EXIT, 5)],
        ["0 main 0 2 own 2", "1 parse 1 - own - UNMATCHED"],
    ),
    "lost": (
        [(0, 0, ENTRY, 5), (1, 1, ENTRY, 4), (5, 2, ENTRY, 3, 12), (6, 2, EXIT, 3), (9, 0, EXIT, 5)],
        ["0 main 0 9 own 1 LOST", "1 parse 1 8 own 7 PASSED|LOST", "2 eval 5 1 own 1 UNSURE"],
    ),
    "durations only": (
        [(4, 2, EXIT, 0, 0, 2), (8, 1, EXIT, 0, 0, 7), (20, 6, EXIT, 0, 0, 1)],
        ["0 parse 1 7 own 5 TIMED", "1 eval 2 2 own 2 TIMED", "0 leaf 19 1 own 1 TIMED"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rules(name, tmp_path):
    events, want = CASES[name]
    trace = trace_of(tmp_path / "t", [(100, 10**9, 0, PLAIN, 0, {})], meta())
    rows = []
    for ts, site, kind, bits, *rest in events:
        columns = event.Columns(
            np.array([ts], np.uint64), np.array([site], np.uint32), np.array([kind], np.uint8),
            np.array([bits], np.uint16),
        )  # fmt: skip
        if rest and rest[0]:
            columns.gaps = [(0, rest[0])]
        if len(rest) > 1:
            columns.duration = np.array([rest[1]], np.uint64)
        rows.append(event.to_table(columns, trace.meta.clock, pid=100, tid=100, seq=0))
    trace.events_of = lambda thread: iter([pa.concat_tables(rows)])
    got = []
    for call in calls(trace).to_pylist():
        flags = "|".join(f.name for f in Flag if f & call["flags"])
        dur, own = (("-" if v is None else v) for v in (call["dur"], call["own"]))
        got.append(f"{call['depth']} {NAMES[call['site']]} {call['ts']} {dur} own {own} {flags}".strip())
    assert got == want


def test_calls_of_several_threads_point_at_their_parents(tmp_path):
    events = []
    for i in range(40):
        for tid in (100, 101):
            at = 10**9 + i * 100
            events += [(tid, at, 0, ENTRY, 5, {}), (tid, at + 10, 1, ENTRY, 4, {}), (tid, at + 20, 1, EXIT, 4, {})]
            events += [(tid, at + 60, 0, EXIT, 5, {"retval": i})]
    trace = trace_of(tmp_path / "t", events)
    found = calls(trace)
    assert found.num_rows == 160
    for index, call in enumerate(found.to_pylist()):
        assert call["row"] == index
        if call["site"] == 1:
            parent = found.slice(call["parent_row"], 1).to_pylist()[0]
            assert (parent["tid"], parent["site"], parent["depth"]) == (call["tid"], 0, call["depth"] - 1)
            assert call["dur"] == 10
        else:
            assert (call["parent_row"], call["dur"], call["own"]) == (None, 60, 50)
    assert sum(t.num_rows for t in iter_calls(trace)) == 160


def test_statistics(tmp_path):
    at = 10**9
    trace = trace_of(
        tmp_path / "t",
        [
            (100, at, 0, ENTRY, 5, {}), (100, at + 10, 1, ENTRY, 4, {}), (100, at + 20, 1, ENTRY, 3, {}),
            (100, at + 30, 1, EXIT, 3, {}), (100, at + 60, 1, EXIT, 4, {}), (100, at + 100, 0, EXIT, 5, {}),
            (101, at + 5, 6, PLAIN, 4, {}), (101, at + 6, 2, ENTRY, 4, {}),
        ],
        meta(hz=5e8),
    )  # fmt: skip
    keys = ("function", "module", "hits", "total_ns", "self_ns", "min_ns", "max_ns")
    assert [tuple(row[k] for k in keys) for row in stat(trace)] == [
        ("main", "prog", 1, 200, 100, 200, 200),
        ("parse", "prog", 2, 100, 100, 20, 100),
        ("eval", "prog", 1, None, None, None, None),
        ("leaf", "prog", 1, None, None, None, None),
    ]


def test_entries_alone_are_instants(tmp_path):
    what = meta(tables=(table(kinds=(ENTRY,)),))
    trace = trace_of(tmp_path / "t", [(100, 10**9 + i, i % 3, ENTRY, 0, {}) for i in range(100)], what)
    found = calls(trace)
    assert set(found.column("flags").to_pylist()) <= {int(Flag.PLAIN)}
    assert found.column("dur").null_count == 100
    assert set(found.column("depth").to_pylist()) == {0}


def test_order_clock_counts_events(tmp_path):
    trace = trace_of(
        tmp_path / "t",
        [(100, 0x401000, 0, ENTRY, 5, {}), (100, 0x401010, 1, ENTRY, 4, {}), (100, 3, 1, EXIT, 4, {})]
        + [(100, 0, 0, EXIT, 5, {})],
        meta("order"),
    )
    assert [(c["ts"], c["ns"], c["dur"], c["retval"]) for c in calls(trace).to_pylist()] == [
        (0, None, 3, 0),
        (1, None, 1, 3),
    ]
    assert [r["total_ns"] for r in stat(trace)] == [None, None]
