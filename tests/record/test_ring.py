"""Rings: what the target wrote comes out once and in order, and nothing it can write there harms the host."""

import resource
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fentry.errors import AskedWrong, BadTrace, CannotHere
from fentry.record import layout as L
from fentry.record.layout import Kind, Policy
from fentry.record.ring import Drainer, Region
from fentry.record.store import Trace, Writer
from tests.record.rings import Program, meta, record


class Sink(dict):
    """Keeps every ring's bytes, and checks that they come without a hole."""

    def __call__(self, info, data):
        kept = self.setdefault(info.index, bytearray())
        assert info.first == len(kept)
        kept += data


def stamps(data):
    return np.frombuffer(bytes(data), "<u8")[::2].tolist()


def test_bytes_come_out_once_and_in_order_over_many_wraps():
    program, sink = Program(2, 4096), Sink()
    rings = [program.claim(tid=100), program.claim(tid=101)]
    want = {ring: [] for ring in rings}
    rng = np.random.default_rng(3)
    for number in range(3000):
        ring = rings[int(rng.integers(2))]
        if not program.event(ring, number, 1, Kind.ENTRY):
            program.region.drain(sink)
            assert program.event(ring, number, 1, Kind.ENTRY)
        want[ring].append(number)
    program.region.drain(sink)
    assert {ring: stamps(data) for ring, data in sink.items()} == want
    assert program.region.drain(sink) == 0
    assert program.region.in_use == [0, 1]


def test_a_full_ring_drops_counts_and_goes_on_after_a_drain():
    program, sink = Program(1, 4096), Sink()
    ring = program.claim()
    assert [program.event(ring, i, 0, Kind.ENTRY) for i in range(300)].count(False) == 300 - 256
    assert program.region.fill() == 1.0
    assert program.region.lost == 44
    program.region.drain(sink)
    assert program.region.fill() == 0.0
    assert program.event(ring, 300, 0, Kind.ENTRY)
    program.region.drain(sink)
    assert stamps(sink[0]) == [*range(256), 300]


def test_losses_are_placed_where_they_happened(tmp_path):
    program = Program(1, 4096)
    ring = program.claim()
    with Writer(tmp_path / "t", meta()) as writer:
        for i in range(300):
            program.event(ring, i, 0, Kind.PLAIN)
        program.region.drain(writer.write)
        for i in range(300, 310):
            program.event(ring, i, 0, Kind.PLAIN)
        program.region.drain(writer.write)
    trace = Trace.open(tmp_path / "t")
    (events,) = trace.events()
    lost = events.column("lost").to_pylist()
    assert {i: n for i, n in enumerate(lost) if n} == {256: 44}
    assert trace.lost == 44


def test_overwrite_keeps_the_newest_and_a_second_snapshot_gives_only_news():
    program = Program(1, 4096, Policy.OVERWRITE)
    ring = program.claim()
    for i in range(1000):
        assert program.event(ring, i, 0, Kind.ENTRY)
    got = []
    assert program.region.drain(lambda *_: pytest.fail("overwrite is not consumed")) == 0
    program.region.snapshot(lambda info, data: got.append((info.first, stamps(data))))
    assert got == [(16 * 748, list(range(748, 1000)))]  # 256 fit, 4 may have been in flight
    program.event(ring, 1000, 0, Kind.ENTRY)
    got.clear()
    program.region.snapshot(lambda info, data: got.append((info.first, stamps(data))))
    assert got == [(16000, [1000])]


def test_what_is_overwritten_during_a_snapshot_is_left_out():
    program = Program(1, 4096, Policy.OVERWRITE)
    ring = program.claim()
    for i in range(1000):
        program.event(ring, i, 0, Kind.ENTRY)
    region, got = program.region, []
    spans = region._spans

    def meanwhile(index, start, end):
        parts = [memoryview(bytes(part)) for part in spans(index, start, end)]
        for i in range(1000, 1100):
            program.event(ring, i, 0, Kind.ENTRY)
        return parts

    region._spans = meanwhile
    region.snapshot(lambda info, data: got.extend(stamps(data)))
    assert got == list(range(1100 - 256 + 4, 1000))


def test_heartbeat_switch_and_discard():
    program = Program(1, 4096)
    ring = program.claim()
    for i in range(256):
        program.event(ring, i, 0, Kind.ENTRY)
    before = program.get(L.R_BEAT)
    program.region.beat()
    assert program.get(L.R_BEAT) == before + 1
    program.region.switch(on=False)
    assert program.region.off
    assert program.get(L.R_OFF) == 1
    assert program.region.discard() == 256
    assert program.region.lost == 256
    assert program.event(ring, 0, 0, Kind.ENTRY), "a blocked writer has room again"


@pytest.mark.parametrize("jump", [-16, 1 << 49, (1 << 64) - 4096])
def test_an_impossible_position_sets_that_ring_aside(jump):
    program, sink = Program(2, 4096), Sink()
    bad, good = program.claim(tid=1), program.claim(tid=2)
    for i in range(10):
        program.event(bad, i, 0, Kind.ENTRY)
    program.region.drain(sink)
    at = program.header(bad) + L.H_POS
    program.put(at, (program.get(at) + jump) % 2**64)
    program.event(good, 7, 0, Kind.ENTRY)
    program.region.drain(sink)
    assert stamps(sink[good]) == [7]
    assert len(sink[bad]) == 160
    assert program.region.damaged == 1
    assert "set aside" in program.region.damage[0]
    program.region.drain(sink)
    assert program.region.damaged == 1


def test_running_past_the_limit_is_reported_and_counted():
    program, got = Program(1, 4096), []
    ring = program.claim()
    program.put(program.header(ring) + L.H_POS, 8192)
    program.region.drain(lambda info, data: got.append((info.first, len(data))))
    assert got == [(4096, 4096)]
    assert program.region.overrun == 256
    assert "past its limit" in program.region.damage[0]


@given(st.binary(min_size=256, max_size=256), st.integers(0, 2), st.integers(0, 300))
@settings(max_examples=150, deadline=None)
def test_garbage_in_shared_headers_never_harms(garbage, policy, position):
    program = Program(2, 4096, Policy(policy))
    ring = program.claim()
    for i in range(position):
        program.event(ring, i, 0, Kind.ENTRY)
    given_ = 0

    def sink(info, data):
        nonlocal given_
        given_ += len(data)
        assert 0 <= info.level <= 255
        assert 0 <= info.parent < 2
        assert info.first % 16 == 0

    program.region.drain(sink)
    program.memory[L.PAGE : L.PAGE + 256] = garbage
    program.memory[8:24] = garbage[:16]  # the geometry was read once and is not believed again
    for _ in range(3):
        program.region.drain(sink)
        program.region.snapshot(sink)
        program.region.discard()
        assert 0.0 <= program.region.fill() <= 1.0
        assert program.region.lost >= 0
        assert program.region.in_use in ([], [0], [1], [0, 1])
    assert given_ <= 8 * 4096


def test_regions_that_are_none_are_refused():
    with pytest.raises(BadTrace, match="magic"):
        Region(memoryview(bytearray(8192)))
    program = Program(2, 4096)
    with pytest.raises(BadTrace, match="does not fit"):
        Region(program.memory[:8192])
    program.put(L.R_RING_SIZE, 5000)
    with pytest.raises(BadTrace, match="5000 bytes cannot be"):
        Region(program.memory)
    with pytest.raises(AskedWrong, match="need"):
        Region.format(memoryview(bytearray(4096)), 4, 4096, Policy.DROP)
    with pytest.raises(AskedWrong, match="power of two"):
        Region.format(memoryview(bytearray(1 << 20)), 4, 5000, Policy.DROP)


def test_a_target_that_stopped_waiting_is_noticed():
    region = Program(1, 4096, Policy.BLOCK).region
    assert not region.gave_up
    region._head[L.R_POLICY // 8] = int(Policy.DROP)
    assert region.gave_up
    assert not Program(1, 4096, Policy.DROP).region.gave_up


def test_a_second_host_goes_on_where_the_first_one_died():
    program, sink = Program(1, 4096), Sink()
    ring = program.claim()
    for i in range(10):
        program.event(ring, i, 0, Kind.ENTRY)
    program.region.drain(sink)
    for i in range(10, 20):
        program.event(ring, i, 0, Kind.ENTRY)
    Region(program.memory).drain(sink)
    assert stamps(sink[0]) == list(range(20))


def test_the_view_can_be_released_after_close():
    program = Program(1, 4096)
    program.region.close()
    program.memory.release()


def test_a_drainer_loses_nothing_under_policy_block(tmp_path):
    program = Program(2, 1 << 14, Policy.BLOCK)
    rings = [program.claim(tid=100), program.claim(tid=101)]
    count = 20_000

    def run(ring):
        for i in range(count):
            while not program.event(ring, i, ring, Kind.PLAIN):
                progress.wait(0.001)  # a target blocks here; the drainer makes room

    progress = threading.Event()
    with Writer(tmp_path / "t", meta()) as writer:
        drainer = Drainer(program.region, writer.write)
        drainer.start()
        threads = [threading.Thread(target=run, args=(ring,)) for ring in rings]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        drainer.stop()
        drainer.stop()
    assert drainer.drained == 2 * count * 16
    trace = Trace.open(tmp_path / "t")
    for thread in trace.threads:
        got = [ts for batch in trace.events_of(thread) for ts in batch.column("ts").to_pylist()]
        assert got == list(range(count))
    assert not any(t.name == "fentry-drain" for t in threading.enumerate())


def test_a_drainer_snapshots_at_the_end_under_policy_overwrite(tmp_path):
    program = Program(1, 4096, Policy.OVERWRITE)
    ring = program.claim()
    with Writer(tmp_path / "t", meta()) as writer:
        drainer = Drainer(program.region, writer.write)
        drainer.start()
        for i in range(1000):
            program.event(ring, i, 0, Kind.PLAIN)
        drainer.stop()
    (events,) = Trace.open(tmp_path / "t").events()
    assert events.column("ts").to_pylist() == list(range(748, 1000))


def test_a_failing_sink_switches_recording_off_and_frees_writers():
    program = Program(1, 4096, Policy.BLOCK)
    ring = program.claim()
    failed = threading.Event()

    def sink(info, data):
        failed.set()
        raise CannotHere("disk full")

    drainer = Drainer(program.region, sink)
    drainer.start()
    for i in range(256):
        program.event(ring, i, 0, Kind.ENTRY)
    assert failed.wait(10)
    with pytest.raises(CannotHere, match="disk full"):
        drainer.stop()
    drainer.stop()
    assert program.region.off
    assert program.region.lost == 256
    assert program.event(ring, 1, 0, Kind.ENTRY)


def test_a_full_disk_is_one_clear_error_and_a_readable_trace(tmp_path):
    code = """
        import resource, sys
        from fentry.errors import CannotHere
        from fentry.record.layout import Kind
        from fentry.record.ring import Drainer
        from fentry.record.store import Writer
        from tests.record.rings import Program, meta

        program = Program(1, 1 << 16)
        ring = program.claim()
        writer = Writer(sys.argv[1], meta())
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
        try:
            for i in range(1_000_000):
                if not program.event(ring, i, 0, Kind.PLAIN):
                    program.region.drain(writer.write)
        except CannotHere as error:
            writer.close(meta(status={"detached": 0}))
            sys.exit(str(error))
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "t"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1, run.stderr
    assert run.stderr.startswith("disk full after ")
    assert "Traceback" not in run.stderr
    records = int(run.stderr.split()[3])
    trace = Trace.open(tmp_path / "t")
    assert trace.damage == []
    assert trace.count() == records > 100_000
    assert trace.meta.status == {"detached": 0}
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == (soft, hard)


def test_record_and_read(tmp_path):
    program = Program(1, 4096)
    ring = program.claim()
    program.event(ring, 10**9 + 5, 0, Kind.ENTRY, 7, parent=0x401008)
    program.event(ring, 10**9 + 9, 0, Kind.EXIT, 7, retval=2**64 - 1)
    (events,) = record(tmp_path / "t", program, meta()).events()
    assert events.to_pylist() == [
        {
            "ts": 10**9 + 5, "ns": 17 * 10**17 + 5, "pid": 100, "tid": 100, "site": 0, "kind": 0, "stack": 7,
            "payload": 0x401008, "duration": None, "seq": 0, "lost": 0,
        },
        {
            "ts": 10**9 + 9, "ns": 17 * 10**17 + 9, "pid": 100, "tid": 100, "site": 0, "kind": 1, "stack": 7,
            "payload": 2**64 - 1, "duration": None, "seq": 1, "lost": 0,
        },
    ]  # fmt: skip
