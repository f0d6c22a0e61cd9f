"""Tracers: what each one puts at a function, and the options that it refuses."""

import pytest

from fentry.errors import AskedWrong
from fentry.tracers import Options, Tracer, all_tracers, load

KNOWN = {
    "nop": set(),
    "function": {"parent"},
    "function_graph": {"retval", "depth", "threshold"},
    "profile": {"times"},
}
CHANGED = {"retval": True, "depth": 3, "threshold": 100, "times": False, "parent": False}


def test_all_are_found_by_name():
    found = all_tracers()
    assert set(KNOWN) <= set(found)
    for name, tracer in found.items():
        assert isinstance(tracer, Tracer)
        assert load(name) is tracer
        assert tracer.name == name
        assert tracer.summary
        assert "\n" not in tracer.summary
        assert tracer.options <= set(Options.__dataclass_fields__)
        assert tracer.op(Options(), clock="tsc").name


def test_an_unknown_one_is_named_and_the_known_ones_are_listed():
    with pytest.raises(AskedWrong, match="no tracer 'grahp'") as caught:
        load("grahp")
    for name in KNOWN:
        assert name in caught.value.hint


@pytest.mark.parametrize("option", sorted(CHANGED))
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_an_option_is_understood_or_refused(name, option):
    """Never silently ignored: what is understood changes the programs."""
    tracer, options = load(name), Options(**{option: CHANGED[option]})
    if option not in KNOWN[name]:
        with pytest.raises(AskedWrong, match=f"tracer {name} has no option {option}"):
            tracer.op(options, clock="tsc")
        return
    plain, changed = tracer.op(Options(), clock="tsc"), tracer.op(options, clock="tsc")
    assert (plain.entry, plain.exit, plain.parent) != (changed.entry, changed.exit, changed.parent)


def test_every_option_is_checked():
    """A field of Options that `check` forgets would be ignored silently by every tracer."""
    assert set(CHANGED) == set(Options.__dataclass_fields__)


def test_nop_records_nothing():
    op = load("nop").op(Options(), clock="tsc")
    assert op.exit is None
    assert not op.entry.record
    assert not op.entry.count
    assert not load("nop").events


@pytest.mark.parametrize("clock", ["tsc", "order", "icount"])
def test_function_records_entries(clock):
    op = load("function").op(Options(), clock=clock)
    assert op.entry.record
    assert op.exit is None
    assert op.parent
    assert not op.counts
    assert not load("function").op(Options(parent=False), clock=clock).parent


def test_graph_records_both_with_the_same_frame():
    op = load("function_graph").op(Options(retval=True, depth=4, threshold=9), clock="tsc")
    assert op.exit.exit
    assert not op.entry.exit
    assert op.entry.stack
    assert op.exit.stack
    assert op.exit.retval
    assert not op.entry.retval
    assert (op.entry.depth, op.exit.depth) == (4, 4)
    assert (op.entry.threshold, op.exit.threshold) == (9, 9)


def test_profile_counts_and_times():
    op = load("profile").op(Options(), clock="tsc")
    assert op.counts
    assert op.entry.count
    assert not op.exit.count  # a call is counted once
    assert op.entry.timed
    assert op.exit.timed
    assert not op.entry.record
    assert not op.exit.record
    hits = load("profile").op(Options(times=False), clock="order")
    assert hits.exit is None
    assert hits.counts
    assert not hits.entry.timed


@pytest.mark.parametrize(("name", "options"), [("function_graph", Options(threshold=1)), ("profile", Options())])
def test_durations_need_a_clock(name, options):
    with pytest.raises(AskedWrong, match="no durations") as caught:
        load(name).op(options, clock="order")
    assert caught.value.hint
    assert load(name).op(options, clock="icount").exit
