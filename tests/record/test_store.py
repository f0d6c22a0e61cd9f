"""The trace directory: survives its writer, and reading it survives anything."""

import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fentry.errors import AskedWrong, BadTrace, CannotHere
from fentry.record.calls import calls
from fentry.record.event import Clock
from fentry.record.layout import Kind, Policy, Table
from fentry.record.meta import Meta, ModuleInfo, Site
from fentry.record.ring import RingInfo
from fentry.record.store import CHUNK, Functions, Trace, Writer
from tests.record.rings import BASE, NAMES, Program, meta, record, table, trace_of

ENTRY, EXIT = Kind.ENTRY, Kind.EXIT


def stamps(trace):
    return [ts for batch in trace.events() for ts in batch.column("ts").to_pylist()]


def simple(path, count=300, **more):
    """A trace of `count` entries in many small chunks."""
    program = Program(1, 4096)
    ring = program.claim()
    with Writer(path, meta(**more)) as writer:
        for i in range(count):
            program.event(ring, 10**9 + i, i % 5, ENTRY)
            if i % 10 == 9:
                program.region.drain(writer.write)
                writer.flush()
        program.region.drain(writer.write)
    return path


# -- what is written can be read --------------------------------------------------------------------
def test_meta_data_come_back(tmp_path):
    what = Meta(
        clock=Clock("tsc", 2.4e9, ((5, 6), (7, 8))),
        arch="toy",
        created=3,
        policy=Policy.BLOCK,
        nrings=64,
        ring_size=1 << 20,
        sites=(Site("f", "m", 2**63, 9, "sled"), Site("\udcff\n")),
        tables=(Table(BASE, 64, {5: ENTRY, 60: EXIT}, [1, -1, 0]),),
        ops=({"op": "graph", "depth": 3},),
        modules=(ModuleInfo("m", "/bin/m", "abcd", -4096, 5, 6),),
        threads={1: "a", 2: "b"},
        lost={"rings": 3},
        status={"exited": 1},
    )
    assert Meta.from_json(what.to_json()) == what
    with Writer(tmp_path / "t", meta()) as writer:
        writer.close(what)
        writer.close()
    assert Trace.open(tmp_path / "t").meta == what


def test_a_trace_is_readable_while_and_after_it_is_written(tmp_path):
    program = Program(1, 4096)
    ring = program.claim()
    writer = Writer(tmp_path / "t", meta())
    assert stamps(Trace.open(tmp_path / "t")) == []
    program.event(ring, 10**9, 0, ENTRY)
    program.region.drain(writer.write)
    writer.flush()
    # the writer is never closed: this is what a killed one leaves
    trace = Trace.open(tmp_path / "t")
    assert stamps(trace) == [10**9]
    assert trace.meta.status == {}
    assert trace.damage == []
    writer.close()
    with pytest.raises(CannotHere, match="is closed"):
        writer.write(RingInfo(0, 1, 1, 0, 0, 0, 0), b"\0" * 16)


def test_an_old_trace_is_kept_as_old(tmp_path):
    path = tmp_path / "t"
    simple(path, 10)
    simple(path, 20)
    assert (Trace.open(path).count(), Trace.open(f"{path}.old").count()) == (20, 10)
    simple(path, 30)
    assert (Trace.open(path).count(), Trace.open(f"{path}.old").count()) == (30, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t", "t.old"]


def test_nothing_but_a_trace_is_replaced(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("docs", "file"):
        with pytest.raises(AskedWrong, match="is not a fentry trace"):
            Writer(tmp_path / name, meta())
    with pytest.raises(AskedWrong, match="cannot write"):
        Writer(tmp_path / "no" / "such" / "place", meta())
    assert (tmp_path / "docs" / "thesis").read_text() == "years of work"
    simple(tmp_path / "empty")
    simple(tmp_path / "t")
    shutil.copytree(tmp_path / "docs", tmp_path / "t.old")
    with pytest.raises(AskedWrong, match=r"t\.old is in the way"):
        Writer(tmp_path / "t", meta())
    assert Trace.open(tmp_path / "t").count() == 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["docs", "empty", "file", "t", "t.old"]


def test_symbols(tmp_path):
    simple(tmp_path / "t")
    assert Trace.open(tmp_path / "t").symbolize(np.array([0x40_1041, 5], np.uint64)).to_pylist() == ["parse", "0x5"]
    with Writer(tmp_path / "t", meta()) as writer:
        writer.write_symbols(
            [
                Functions("b", [0x2000, 0x2100], [0x80, 0], ["late", "empty"]),
                Functions("a", np.array([0x1000], np.uint64), np.array([0x10], np.uint64), ["early"]),
            ]
        )
    asked = np.array([0x2100, 0x1000, 0x100F, 0x1010, 0x207F, 0x2080, 0, 2**64 - 1, 0x1000], np.uint64)
    got = Trace.open(tmp_path / "t").symbolize(asked)
    assert got.to_pylist() == [
        "empty", "early", "early", "0x1010", "late", "0x2080", "0x0", "0xffffffffffffffff", "early"
    ]  # fmt: skip
    assert len(got.dictionary) < len(asked)


# -- order -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [64, 100, 5000])
def test_threads_are_merged_by_time(tmp_path, batch):
    rng = np.random.default_rng(batch)
    events, now = [], 10**9
    for i in range(3000):
        now += int(rng.integers(1, 9))
        events.append((100 + int(rng.integers(5)), now, i % 7, ENTRY, 0, {"parent": i} if i % 3 == 0 else {}))
    trace = trace_of(tmp_path / "t", events, ring_size=4096)
    rows = [row for part in trace.events(batch) for row in part.to_pylist()]
    assert [(r["tid"], r["ts"], r["site"], r["payload"]) for r in rows] == [
        (tid, ts, site, more.get("parent")) for tid, ts, site, _, _, more in events
    ]
    for thread in trace.threads:
        mine = [r["seq"] for r in rows if r["tid"] == thread.tid]
        assert mine == list(range(len(mine)))
        alone = [row for part in trace.events_of(thread, batch) for row in part.to_pylist()]
        assert alone == [r for r in rows if r["tid"] == thread.tid]


@pytest.mark.parametrize("clock", ["tsc", "order"])
def test_signal_handlers_join_their_thread(tmp_path, clock):
    program = Program(2, 4096)
    outer = program.claim()
    inner = program.claim(level=1, parent=outer)
    timed = clock == "tsc"
    program.event(outer, 10**9 if timed else 0, 0, ENTRY, 9)
    program.event(outer, 10**9 + 1 if timed else 0, 1, ENTRY, 8)
    more = {} if timed else {"pos": 32}
    program.event(inner, 10**9 + 1 if timed else 0, 6, ENTRY, 7, **more)
    program.event(inner, 10**9 + 5 if timed else 0, 6, EXIT, 7, **more)
    program.event(outer, 10**9 + 6 if timed else 0, 1, EXIT, 8)
    program.event(outer, 10**9 + 7 if timed else 0, 0, EXIT, 9)
    trace = record(tmp_path / "t", program, meta(clock))
    assert len(trace.threads) == 1
    events = pa.concat_tables(trace.events())
    assert events.column("site").to_pylist() == [0, 1, 6, 6, 1, 0]
    assert events.column("seq").to_pylist() == list(range(6))
    assert calls(trace).column("depth").to_pylist() == [0, 1, 2]


def test_extensions_stay_with_their_record_wherever_chunks_and_batches_end(tmp_path):
    program = Program(1, 4096)
    ring = program.claim()
    rng = random.Random(7)
    want = []
    with Writer(tmp_path / "t", meta()) as writer:
        for i in range(2000):
            more = rng.choice([{}, {"parent": i}, {"retval": i, "duration": i + 1}])
            want.append((more.get("parent", more.get("retval")), more.get("duration")))
            while not program.event(ring, 10**9 + i, 0, EXIT, **more):
                program.region.drain(writer.write)
        program.region.drain(writer.write)
    trace = Trace.open(tmp_path / "t")
    for batch in (1, 65, 1000, 10**6):
        rows = [row for part in trace.events(batch) for row in part.to_pylist()]
        assert [(r["payload"], r["duration"]) for r in rows] == want
    assert trace.damage == []
    assert trace.count() == len(rows)


def test_a_ring_that_changes_hands_gives_two_threads(tmp_path):
    program = Program(1, 4096)
    ring = program.claim(tid=100)
    with Writer(tmp_path / "t", meta()) as writer:
        program.event(ring, 10**9, 0, ENTRY)
        program.region.drain(writer.write)
        program.put(program.header(ring) + 32, 101 << 32 | 100)
        program.event(ring, 10**9 + 1, 1, ENTRY)
        program.region.drain(writer.write)
    trace = Trace.open(tmp_path / "t")
    assert [(t.tid, t.comm, t.lane) for t in trace.threads] == [(100, "prog", 0), (101, "worker", 1)]
    assert stamps(trace) == [10**9, 10**9 + 1]
    assert trace.lost == 0


def test_the_clock_can_be_calibrated_by_its_epochs():
    ts = np.array([1000, 2000, 500], np.uint64)
    assert Clock("tsc", 0, ((1000, 10**18), (3000, 10**18 + 1000))).unix_ns(ts).tolist() == [
        10**18, 10**18 + 500, 10**18 - 250
    ]  # fmt: skip
    assert Clock("tsc", 0, ((1000, 10**18),)).unix_ns(ts) is None
    assert Clock("order").unix_ns(ts) is None


# -- damage ------------------------------------------------------------------------------------------
def test_a_truncated_file_is_a_shorter_trace(tmp_path):
    path = simple(tmp_path / "t")
    whole = (path / "segments.bin").read_bytes()
    for size in range(len(whole) - 1, 0, -37):
        (path / "segments.bin").write_bytes(whole[:size])
        trace = Trace.open(path)
        got = stamps(trace)
        assert got == [10**9 + i for i in range(len(got))]
        clean = size % (CHUNK.size + 160) == 0
        assert bool(trace.damage) != clean
        assert trace.count() == len(got)


def test_a_damaged_chunk_is_skipped_and_what_is_missing_is_counted(tmp_path):
    path = simple(tmp_path / "t")
    data = bytearray((path / "segments.bin").read_bytes())
    data[(CHUNK.size + 160) * 3 + 20] ^= 0xFF
    (path / "segments.bin").write_bytes(data)
    trace = Trace.open(path)
    events = pa.concat_tables(trace.events())
    assert events.column("ts").to_pylist() == [10**9 + i for i in range(300) if not 30 <= i < 40]
    assert {i: n for i, n in enumerate(events.column("lost").to_pylist()) if n} == {30: 10}
    assert trace.lost == 10
    assert trace.damage == ["segments.bin: 224 bytes at 672 are no chunk; skipped"]


def test_a_repeated_chunk_is_left_out(tmp_path):
    path = simple(tmp_path / "t")
    data = (path / "segments.bin").read_bytes()
    (path / "segments.bin").write_bytes(data + data[:224])
    trace = Trace.open(path)
    assert len(stamps(trace)) == 300
    assert "repeats position 0" in trace.damage[0]


def test_records_that_make_no_sense_are_counted(tmp_path):
    program = Program(1, 4096)
    ring = program.claim()
    program.write(ring, (1, 3))  # an extension of nothing
    program.event(ring, 10**9, 0, ENTRY)
    program.write(ring, (7, 9))  # an extension that nobody knows
    program.write(ring, (10**9, BASE - 1))
    program.write(ring, (10**9, BASE + 14))
    program.write(ring, (10**9, BASE + 64 * len(NAMES) + 13))
    program.event(ring, 10**9 + 1, 1, ENTRY)
    trace = record(tmp_path / "t", program, meta())
    events = pa.concat_tables(trace.events())
    assert events.column("site").to_pylist() == [0, 1]
    assert trace.damage == ["5 records name no known function or belong to none; dropped"]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_hostile_segments_never_harm(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("hostile") / "t"
    events = [(100 + i % 2, 10**9 + i, i % 7, ENTRY if i % 3 else EXIT, i % 4, {"retval": i}) for i in range(60)]
    trace_of(path, events).close()
    raw = bytearray((path / "segments.bin").read_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=20)):
        raw[at] = value
    if data.draw(st.booleans()):
        # a header that checks out, saying anything
        fields = data.draw(st.tuples(*[st.integers(0, 2**32 - 1)] * 5, *[st.integers(0, 2**64 - 1)] * 3))
        info = RingInfo(*fields[:3], fields[3], fields[4], fields[5], fields[7])
        from fentry.record.store import _chunk_header

        raw[0 : CHUNK.size] = _chunk_header(info, fields[6])
    (path / "segments.bin").write_bytes(raw)
    trace = Trace.open(path)
    rows = sum(part.num_rows for part in trace.events(64))
    assert rows <= 120
    assert calls(trace).num_rows <= rows
    shutil.rmtree(path)


HOSTILE_META = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": "other"}', b"9" * 5000,
    b'{"format": "fentry trace", "version": 2}', b'{"format": "fentry trace", "version": "1"}',
    b'{"format": "fentry trace", "version": 1, "policy": "later"}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE_META, ids=range(len(HOSTILE_META)))
def test_meta_data_that_are_none_are_refused(tmp_path, text):
    path = simple(tmp_path / "t")
    (path / "meta.json").write_bytes(text)
    with pytest.raises(BadTrace):
        Trace.open(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("clock", "hz"), 1e300), (("clock", "hz"), "fast"), (("clock", "epoch"), [[1]]), (("clock",), 5),
        (("clock", "epoch"), [[-1, 2**70]]), (("sites",), [5]), (("sites",), {"a": 1}), (("sites", 0, "address"), -1),
        (("sites", 0, "name"), 7), (("tables", 0, "stride"), 0), (("tables", 0, "stride"), 2**40),
        (("tables", 0, "base"), 0), (("tables", 0, "base"), 2**60), (("tables", 0, "sites"), [10**6]),
        (("tables", 0, "sites"), [-2]), (("tables", 0, "sites"), ["x"]), (("tables", 0, "marks"), {"99": 0}),
        (("tables", 0, "marks"), {"x": 0}), (("tables", 0, "marks"), {"5": 77}), (("tables", 0, "marks"), [1]),
        (("threads",), {"one": "x"}), (("modules",), [{"bias": 2**64}]), (("rings", "size"), True),
    ],
)  # fmt: skip
def test_each_wrong_member_is_one_clear_error(tmp_path, where, value):
    path = simple(tmp_path / "t")
    top = json.loads((path / "meta.json").read_text())
    inner = top
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (path / "meta.json").write_text(json.dumps(top))
    with pytest.raises(BadTrace) as caught:
        Trace.open(path)
    assert "\n" not in caught.value.message


def test_overlapping_tables_are_refused(tmp_path):
    path = simple(tmp_path / "t")
    top = json.loads((path / "meta.json").read_text())
    top["tables"].append(top["tables"][0] | {"base": BASE + 64})
    (path / "meta.json").write_text(json.dumps(top))
    with pytest.raises(BadTrace, match="overlaps"):
        Trace.open(path)


@pytest.mark.parametrize("text", [b"", b"ARROW1\0\0garbage", b"\0" * 4096])
def test_damaged_symbols_leave_addresses(tmp_path, text):
    path = simple(tmp_path / "t")
    (path / "symbols.arrow").write_bytes(text)
    trace = Trace.open(path)
    assert trace.damage[0].startswith("symbols.arrow cannot be used")
    assert trace.symbolize(np.array([0x40_1041], np.uint64)).to_pylist() == ["0x401041"]


def test_what_is_no_trace_says_what_to_do(tmp_path):
    with pytest.raises(BadTrace, match="No such file") as caught:
        Trace.open(tmp_path / "none")
    assert "-i" in caught.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(BadTrace, match="Not a directory"):
        Trace.open(tmp_path / "file")


def test_a_huge_trace_is_read_in_batches(tmp_path):
    events = [(100, 10**9 + i, i % 7, ENTRY, 0, {}) for i in range(20_000)]
    trace = trace_of(tmp_path / "t", events, meta(tables=(table(kinds=(ENTRY,)),)))
    sizes = [part.num_rows for part in trace.events(1000)]
    assert max(sizes) <= 1000
    assert sum(sizes) == 20_000
