"""The undo journal: what is written is read back, whatever else it is never crashes its reader."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fentry.engine import journal as undo
from fentry.engine.journal import CODE_MAX, ENTRY, META_ROOM, Entry, HookTable, Journal, Meta, parse, size_for
from fentry.errors import EngineBug, TargetRefused

U64 = st.integers(0, (1 << 64) - 1)
PAIRS = st.lists(st.tuples(U64, U64), max_size=5)
METAS = st.builds(
    Meta, PAIRS, PAIRS,
    st.lists(st.builds(HookTable, U64, st.integers(1, 1 << 20), U64, U64), max_size=3), U64, U64, U64,
    st.tuples(U64, U64), U64, st.tuples(U64, U64), st.lists(st.tuples(U64, U64, U64, U64), max_size=3),
)  # fmt: skip
ENTRIES = st.lists(
    st.builds(lambda at, pair: Entry(at, pair[0], pair[1]), U64, st.integers(1, CODE_MAX).flatmap(
        lambda n: st.tuples(st.binary(min_size=n, max_size=n), st.binary(min_size=n, max_size=n)))),
    max_size=8, unique_by=lambda e: e.at,
)  # fmt: skip


def new(entries=8):
    view = memoryview(bytearray(size_for(entries)))
    return Journal(0x1000, view)


@settings(max_examples=50, deadline=None)
@given(METAS, METAS, ENTRIES)
def test_round_trip(first, second, entries):
    journal = new()
    for meta in (first, second):
        journal.meta = meta
        journal.save()
        journal.intend(entries)
        assert parse(bytes(journal.view)) == (meta, entries)


def test_a_place_keeps_the_old_bytes_of_its_first_change():
    journal = new()
    journal.intend([Entry(0x10, b"idle", b"one.")])
    journal.intend([Entry(0x10, b"one.", b"two."), Entry(0x20, b"a", b"b")])
    assert parse(bytes(journal.view))[1] == [Entry(0x10, b"idle", b"two."), Entry(0x20, b"a", b"b")]


def test_refusals():
    journal = new(2)
    journal.intend([Entry(1, b"a", b"b")])
    for bad in (Entry(2, b"aa", b"b"), Entry(2, b"a" * 25, b"b" * 25)):
        with pytest.raises(EngineBug, match="bytes at 0x2"):
            journal.intend([bad])
    with pytest.raises(EngineBug, match="full"):
        journal.intend([Entry(2, b"a", b"b"), Entry(3, b"a", b"b")])
    assert parse(bytes(journal.view))[1] == [Entry(1, b"a", b"b")]  # what was refused does not count
    journal.meta.mappings = [(1 << 63, 1 << 40)] * 40000
    with pytest.raises(EngineBug, match="too many"):
        journal.save()
    assert parse(bytes(journal.view))[0].mappings == []


class Dying:
    """A view whose writer dies before its n-th store."""

    def __init__(self, view, stores):
        self.view, self.left = view, stores

    def __len__(self):
        return len(self.view)

    def __getitem__(self, key):
        return self.view[key]

    def __setitem__(self, key, value):
        if not self.left:
            raise InterruptedError
        self.left -= 1
        self.view[key] = value

    def __buffer__(self, flags):  # what struct.unpack_from asks for
        return self.view


def test_a_tracer_killed_between_any_two_stores_leaves_a_true_journal(monkeypatch):
    """Meta is the old or the new one, whole; entries that count are whole."""
    before, after = Meta(mappings=[(1, 2)]), Meta(mappings=[(3, 4), (5, 6)], shadow=7)
    seen = set()
    read = struct.unpack_from
    monkeypatch.setattr(undo.struct, "unpack_from", lambda f, d, at=0: read(f, getattr(d, "view", d), at))
    for stores in range(12):
        journal = new()
        journal.meta = before
        journal.save()
        journal.intend([Entry(0x10, b"old", b"new")])
        view = journal.view
        journal.view = Dying(view, stores)
        journal.meta = after
        try:
            journal.save()
            journal.intend([Entry(0x20, b"was", b"is.")])
            seen.add("done")
        except InterruptedError:
            pass
        meta, entries = parse(bytes(view))
        assert meta in (before, after)
        assert entries[0] == Entry(0x10, b"old", b"new")
        assert entries[1:] in ([], [Entry(0x20, b"was", b"is.")])
        assert meta == after or not entries[1:]
        seen.add((len(meta.mappings), len(entries)))
    assert seen == {"done", (1, 1), (2, 1), (2, 2)}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 255), st.data())
def test_bytes_from_anywhere(head, fill, data):
    """Damage at any place gives a journal or one clear error."""
    journal = new(4)
    journal.meta = Meta(mappings=[(4096, 4096)], hooks=[HookTable(1, 2, 3, 4)])
    journal.save()
    journal.intend([Entry(16, b"abc", b"def")])
    raw = bytearray(journal.view)
    at = data.draw(st.sampled_from([0, 8, 16, 20, 32, undo.META_AT, undo.META_HALF, META_ROOM, META_ROOM + 8]))
    raw[at : at + len(head)] = head
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    check_parse(bytes(raw))


def check_parse(raw):
    try:
        meta, entries = parse(raw)
    except TargetRefused as error:
        assert "journal" in error.message
    else:
        assert isinstance(meta, Meta)
        assert len(entries) <= (len(raw) - META_ROOM) // ENTRY


HOSTILE = {
    "infinite": '{"mappings": [[Infinity, 1]]}',
    "no number": '{"mappings": [[NaN, 1]]}',
    "deep": "[" * 100_000,
    "deep objects": '{"mappings":' * 50_000,
    "text": '"mappings"',
    "numbers": "[1, 2, 3]",
    "null": "null",
    "not UTF-8": b"\xff\xfe{}",
    "huge": '{"mappings": [[1' + "0" * 5000 + ", 1]]}",
    "strings": '{"mappings": ["ab"]}',
}


def with_text(text):
    journal = new()
    text = text if isinstance(text, bytes) else text.encode()
    raw = bytearray(journal.view)
    raw[undo.META_AT : undo.META_AT + len(text)] = text
    raw[undo.META_WORD : undo.META_WORD + 8] = struct.pack("<II", len(text), undo.META_AT)
    return bytes(raw)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text(name):
    with pytest.raises(TargetRefused, match="journal is damaged"):
        parse(with_text(HOSTILE[name]))


@pytest.mark.parametrize("value", [-1, 1 << 64, 1 << 200], ids=hex)
def test_numbers_that_are_no_addresses(value):
    """They would reach arithmetic on 64-bit words."""
    good = json.loads(json.dumps(undo.asdict(Meta(mappings=[(1, 2)], hooks=[HookTable(1, 2, 3, 4)]))))
    for change in (
        {"shadow": value},
        {"mappings": [[1, value]]},
        {"hooks": [{"base": value, "stride": 1, "count": 1, "hook": 0}]},
    ):
        with pytest.raises(TargetRefused, match="journal is damaged"):
            parse(with_text(json.dumps(good | change)))


def test_a_hook_table_without_a_stride_is_damage():
    good = json.loads(json.dumps(undo.asdict(Meta())))
    with pytest.raises(TargetRefused, match="journal is damaged"):
        parse(with_text(json.dumps(good | {"hooks": [{"base": 1, "stride": 0, "count": 1, "hook": 0}]})))


def test_a_journal_of_a_tracer_that_knew_nothing_of_debuggers():
    journal = new()
    journal.meta = Meta(mappings=[(1, 2)])
    journal.save()
    size, at = struct.unpack_from("<II", journal.view, undo.META_WORD)
    raw = json.loads(bytes(journal.view[at : at + size]))
    del raw["unwind"]
    old = json.dumps(raw).encode()
    journal.view[at : at + len(old)] = old
    journal.view[undo.META_WORD : undo.META_WORD + 4] = struct.pack("<I", len(old))
    assert parse(bytes(journal.view))[0] == Meta(mappings=[(1, 2)])
