"""Each format: an exact transcript, what its readers say, and the rules that all formats share."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from fentry.errors import AskedWrong
from fentry.export import export, printable
from fentry.export.chrome import Chrome
from fentry.export.folded import WEIGHTS, Folded
from fentry.export.ftrace import FunctionText, GraphText, _duration, _value
from fentry.export.parquet import Parquet
from fentry.record.calls import calls
from fentry.record.layout import Kind, Policy
from fentry.record.store import Trace, Writer
from fentry.testing.exporter import check_exporter
from tests.record.rings import Program, meta, table, trace_of

ENTRY, EXIT, TAIL, UNWOUND, PLAIN = Kind
T0 = 1234 * 10**9 + 567_890_000

MAIN, PARSE, EVAL, PRINT, PUSH, ODD, LEAF = range(7)

#: main -> parse -> leaf, leaf; eval tail-calls print_value; push_back throws; odd is left by longjmp
STORY = [
    (100, T0, MAIN, ENTRY, 90, {"parent": 0x7F00_1234}),
    (100, T0 + 1_250, PARSE, ENTRY, 80, {"parent": 0x40_1010}),
    (100, T0 + 1_500, LEAF, ENTRY, 70, {"parent": 0x40_1050}),
    (100, T0 + 2_125, LEAF, EXIT, 70, {"retval": 5}),
    (100, T0 + 2_300, LEAF, ENTRY, 70, {"parent": 0x40_1050}),
    (100, T0 + 17_300, LEAF, EXIT, 70, {"retval": 2**64 - 2}),
    (100, T0 + 150_000, PARSE, EXIT, 80, {"retval": 0}),
    (100, T0 + 160_000, EVAL, ENTRY, 80, {"parent": 0x40_1020}),
    (100, T0 + 161_000, PRINT, TAIL, 80, {"parent": 0x40_1090}),
    (100, T0 + 162_000, LEAF, PLAIN, 70, {"parent": 0x40_10D0}),
    (100, T0 + 170_000, EVAL, EXIT, 80, {"retval": 2**32 - 22}),
    (100, T0 + 180_000, PUSH, ENTRY, 80, {"parent": 0x40_1030}),
    (100, T0 + 2_180_000, PUSH, UNWOUND, 80, {}),
    (100, T0 + 3_000_000, ODD, ENTRY, 80, {}),
    (100, T0 + 5_123_456_789, MAIN, EXIT, 90, {"retval": 0}),
]
#: a second thread that was in parse when recording began, and is in eval when it ends
OTHER = [
    (101, T0 + 1_600, LEAF, ENTRY, 70, {}),
    (101, T0 + 1_900, LEAF, EXIT, 70, {}),
    (101, T0 + 2_200, PARSE, EXIT, 80, {"retval": 1}),
    (101, T0 + 151_000, EVAL, ENTRY, 80, {"parent": 0x40_1020}),
]


@pytest.fixture
def story(tmp_path):
    return trace_of(tmp_path / "t", STORY)


@pytest.fixture
def both(tmp_path):
    return trace_of(tmp_path / "t", sorted(STORY + OTHER, key=lambda e: e[1]))


@pytest.fixture
def lossy(tmp_path):
    """A ring of 256 records that overflows twice, and a flight recorder's beginning."""
    program = Program(1, 4096)
    ring = program.claim()
    with Writer(tmp_path / "t", meta(lost={"rings": 344, "no ring": 7})) as writer:
        now = T0
        for burst in (150, 1):
            for _ in range(burst):
                for site, kind, bits in ((MAIN, ENTRY, 9), (PARSE, ENTRY, 8), (PARSE, EXIT, 8), (MAIN, EXIT, 9)):
                    program.event(ring, now, site, kind, bits)
                    now += 100
            program.region.drain(writer.write)
    return Trace.open(tmp_path / "t")


def text(trace, make, **options):
    out = io.StringIO()
    export(trace, make(out, **options))
    return out.getvalue()


# -- ftrace text ----------------------------------------------------------------------------------
def test_function_text(both, golden):
    golden("function.txt", text(both, FunctionText))


def test_function_text_without_parents(story, golden):
    golden("function-noparent.txt", text(story, FunctionText, parent=False))


def test_function_text_of_clock_order(tmp_path, golden):
    events = [(100, 0x40_1010 if i else 0, i % 3, ENTRY, 0, {}) for i in range(5)]
    trace = trace_of(tmp_path / "t", events, meta("order", tables=(table(kinds=(ENTRY,)),)))
    golden("function-order.txt", text(trace, FunctionText))


def test_graph_text(story, golden):
    golden("graph.txt", text(story, GraphText))


def test_graph_text_of_two_threads_with_every_column(both, golden):
    golden("graph-threads.txt", text(both, GraphText, retval=True, abstime=True, tail=True))


def test_graph_text_on_one_cpu_has_context_switches(both, golden):
    golden("graph-onecpu.txt", text(both, GraphText, one_cpu=True))


def test_graph_text_with_losses(lossy, golden):
    lines = text(lossy, GraphText).splitlines(keepends=True)
    assert len(lines) == 4 + 64 * 3 + 1 + 3 + 1
    golden("graph-lost.txt", "".join(lines[:8] + lines[-9:]))


def test_graph_text_of_clock_order_has_no_durations(tmp_path, golden):
    events = [(100, 0, MAIN, ENTRY, 9, {}), (100, 0, LEAF, ENTRY, 8, {}), (100, 0, LEAF, EXIT, 8, {})]
    trace = trace_of(tmp_path / "t", [*events, (100, 0, MAIN, EXIT, 9, {})], meta("order"))
    golden("graph-order.txt", text(trace, GraphText))


def test_graph_text_of_a_duration_threshold(tmp_path, golden):
    events = [(100, T0 + 100, LEAF, EXIT, 0, {"duration": 50}), (100, T0 + 900, MAIN, EXIT, 0, {"duration": 12_000})]
    golden("graph-threshold.txt", text(trace_of(tmp_path / "t", events), GraphText))


@pytest.mark.parametrize(
    ("ns", "want"),
    [
        (0, "  0.000 us    |  "),
        (625, "  0.625 us    |  "),
        (10_000, "  10.000 us   |  "),
        (10_001, "+ 10.001 us   |  "),
        (100_001, "! 100.001 us  |  "),
        (1_234_567, "# 1234.567 us |  "),
        (12_345_678, "* 12345.67 us |  "),
        (123_456_789, "@ 123456.7 us |  "),
        (1_234_567_890, "$ 1234567 us  |  "),
        (123_456_789_012, "$ 123456789 us |  "),
        (None, "              |  "),
    ],
)
def test_duration_column(ns, want):
    assert _duration(ns) == want


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (0, "0x0"), (255, "0xff"), (2**64 - 1, "-1"), (2**64 - 4095, "-4095"), (2**64 - 4096, "0xfffffffffffff000"),
        (2**32 - 22, "-22"), (2**32 - 4096, "0xfffff000"), (2**31, "0x80000000"), (2**63, "0x8000000000000000"),
    ],
)  # fmt: skip
def test_return_values(value, want):
    assert _value(value) == want


# -- folded ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight", WEIGHTS)
def test_folded(both, golden, weight):
    golden(f"story.{weight}.folded", text(both, Folded, weight=weight, threads=weight == "total"))
    assert Folded(io.StringIO(), weight).suffix == f".{weight}.folded"


def test_folded_weights_add_up_to_the_traced_time(story):
    lines = text(story, Folded).splitlines()
    outermost = [c["dur"] for c in calls(story).to_pylist() if c["parent_row"] is None]
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == sum(outermost) == 5_123_456_789


def test_folded_refuses_what_it_cannot_weigh(tmp_path):
    with pytest.raises(AskedWrong, match="weight 'bytes' is not known"):
        Folded(io.StringIO(), "bytes")
    trace = trace_of(tmp_path / "t", [(100, 0, MAIN, ENTRY, 9, {})], meta("order"))
    with pytest.raises(AskedWrong, match="weigh by calls"):
        text(trace, Folded)
    assert text(trace, Folded, weight="calls") == "main 1\n"


# -- chrome ---------------------------------------------------------------------------------------
def check_chunk(path, threads):
    """A chunk must load alone: all B and E pair up in every thread, times never go back, threads have names."""
    chunk = json.loads(path.read_text())
    opened, newest, named = {}, {}, set()
    for item in chunk["traceEvents"]:
        key = item["pid"], item["tid"]
        if item["ph"] == "M":
            named.add((item["name"], *key))
            continue
        if item["ph"] == "X":
            continue
        assert item["ts"] >= newest.get(key, 0)
        newest[key] = item["ts"]
        if item["ph"] == "B":
            opened.setdefault(key, []).append(item["name"])
        elif item["ph"] == "E":
            opened[key].pop()
    assert not any(opened.values())
    assert {("thread_name", *t) for t in threads} <= named
    return chunk["traceEvents"]


def test_chrome(both, tmp_path, golden):
    export(both, Chrome(tmp_path / "json"))
    (chunk,) = (tmp_path / "json").iterdir()
    check_chunk(chunk, [(100, 100), (100, 101)])
    golden("chrome.json", chunk.read_text())


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_every_chrome_chunk_loads_alone(both, tmp_path, limit):
    exporter = Chrome(tmp_path / "json", limit)
    export(both, exporter)
    paths = sorted((tmp_path / "json").iterdir())
    assert len(paths) == exporter.chunks == -(-both.count() // limit)
    items = [item for path in paths for item in check_chunk(path, [(100, 100), (100, 101)])]
    fresh = [i for i in items if i["ph"] == "B" and not i.get("args", {}).get("continued")]
    assert len(fresh) == sum(e[3] in (ENTRY, TAIL) for e in STORY + OTHER)


# -- parquet --------------------------------------------------------------------------------------
def test_parquet(both, tmp_path):
    export(both, Parquet(tmp_path / "pq", row_group=8))
    read = {p.stem: pq.read_table(p) for p in (tmp_path / "pq").iterdir()}
    assert set(read) == {"events", "calls", "functions", "threads", "meta"}
    for path in (tmp_path / "pq").iterdir():
        assert pq.read_schema(path).metadata[b"fentry.schema"] == b"1"
    events = read["events"]
    assert events.num_rows == both.count() == len(STORY) + len(OTHER)
    assert events.column("ts").to_pylist() == sorted(e[1] for e in STORY + OTHER)
    assert pq.ParquetFile(tmp_path / "pq" / "events.parquet").metadata.num_row_groups == 3
    # joined by name and parent, the calls say what the trace's own table says
    names = dict(
        zip(read["functions"].column("site").to_pylist(), read["functions"].column("name").to_pylist(), strict=True)
    )
    want = calls(both).to_pylist()
    by_row = {(c["tid"], c["row"]): c for c in read["calls"].to_pylist()}

    def spelled(call, parent):
        return names[call["site"]], call["tid"], call["ts"], call["dur"], parent and names[parent["site"]]

    got = [spelled(c, by_row.get((c["tid"], c["parent_row"]))) for c in by_row.values() if not c["flags"] & 8]
    expected = [
        spelled(c, want[c["parent_row"]] if c["parent_row"] is not None else None) for c in want if not c["flags"] & 8
    ]
    # the one call inside a call that was open at the start gets its parent only when the whole trace is known
    expected = [(*e[:4], None) if e[:3] == ("leaf", 101, T0 + 1_600) else e for e in expected]
    assert sorted(got, key=str) == sorted(expected, key=str)
    meta_rows = dict(zip(read["meta"].column("key").to_pylist(), read["meta"].column("value").to_pylist(), strict=True))
    assert json.loads(meta_rows["clock"])["hz"] == 1e9
    assert read["threads"].column("comm").to_pylist() == ["prog", "worker"]


# -- all ------------------------------------------------------------------------------------------
def opener(make, **options):
    """Exporters of text write to a stream; here the stream is a file."""

    def begin(path):
        exporter = make((path / "out").open("w", encoding="utf-8"), **options)
        end = exporter.end

        def close():
            end()
            exporter._out.close()

        exporter.end = close
        return exporter

    return begin


def parquet_rows(path):
    """Calls come batch by batch, in no order of their own."""
    rows = {p.name: pq.read_table(p).to_pylist() for p in path.rglob("*.parquet")}
    return {name: sorted(map(str, value)) for name, value in rows.items()}


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (opener(FunctionText), None),
        (opener(GraphText), None),
        (opener(GraphText, retval=True, abstime=True, tail=True), None),
        (opener(GraphText, one_cpu=True), None),
        (opener(Folded, weight="calls"), None),
        (opener(Folded, weight="calls", threads=True), None),
        (lambda path: Chrome(path / "json"), None),
        (lambda path: Chrome(path / "json", 5), None),
        (lambda path: Parquet(path / "pq", 8), parquet_rows),
    ],
    ids=["function", "graph", "graph-all", "graph-onecpu", "folded", "folded-threads", "chrome", "chrome-5", "parquet"],
)
def test_conformance(make, read):
    check_exporter(make, read)


def test_the_conformance_kit_finds_a_batch_that_shows():
    class Showing(FunctionText):
        def rows(self, table):
            self._out.write(f"# {table.num_rows}\n")

    with pytest.raises(AssertionError, match="show in the output"):
        check_exporter(opener(Showing))


def test_text_with_odd_names_keeps_its_lines():
    assert printable("a\nb\x1b[2J\udcff") == "a\\x0ab\\x1b[2J\\xdcff"
    assert printable("naïve λ<int>") == "naïve λ<int>"


def test_a_directory_that_cannot_be_made_is_one_clear_error(story, tmp_path):
    (tmp_path / "file").write_text("")
    for exporter in (Chrome(tmp_path / "file" / "x"), Parquet(tmp_path / "file" / "x")):
        with pytest.raises(AskedWrong, match="cannot write"):
            export(story, exporter)


def test_a_flight_recorder_trace(tmp_path, golden):
    program = Program(1, 4096, Policy.OVERWRITE)
    ring = program.claim()
    now = T0
    for i in range(300):
        for site, kind, bits in ((MAIN, ENTRY, 9), (PARSE, ENTRY, 8), (PARSE, EXIT, 8)):
            program.event(ring, now + i * 1000, site, kind, bits, **({"retval": i} if kind is EXIT else {}))
            now += 100
    for _ in range(3):
        now += 1_000_000
        program.event(ring, now, MAIN, EXIT, 9)
    with Writer(tmp_path / "t", replace(meta(), policy=Policy.OVERWRITE)) as writer:
        program.region.snapshot(writer.write)
    trace = Trace.open(tmp_path / "t")
    assert trace.damage == []
    assert trace.lost == 0
    lines = text(trace, GraphText).splitlines(keepends=True)
    golden("graph-flight.txt", "".join(lines[:10] + lines[-4:]))
    assert np.isin(calls(trace).column("depth").to_numpy(), range(400)).all()
