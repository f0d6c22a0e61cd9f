"""The only writer of code: everything is verified before anything is written, and noted before it is done."""

import struct

import pytest

from fentry.arch import all_archs, load
from fentry.engine import patch
from fentry.engine.journal import Entry, Journal, parse, size_for
from fentry.engine.patch import Change
from fentry.errors import Fault, PatchMismatch, TargetRefused
from fentry.testing.fake import FakeTarget

CODE, STACK = 0x40_0000, 0x7F00_0000
arches = pytest.mark.parametrize("arch", [a.name for a in all_archs()])
IDLE, HOOK = b"\x90" * 5, b"\xe8abcd"


def commit(target, changes, journal):
    """What the engine does, in its order."""
    patch.verify(target, changes)
    patch.intend(journal, changes)
    patch.apply(target, changes)


def make(arch="x86_64", threads=({},), pages=4):
    target = FakeTarget(
        arch, [(CODE, b"\x90" * 4096 * pages, "r-x", "prog"), (STACK, bytes(8192), "rw-", "[stack]")], threads
    )
    at, view = target.shared.share(size_for(16), "fentry.undo")
    return target, Journal(at, view)


def test_all_places_are_written_noted_and_synchronised():
    target, journal = make()
    changes = [Change(CODE + 0x10 * n, IDLE, b"\xe8" + bytes([n] * 4)) for n in (3, 1, 2)] + [
        Change(CODE + 0x3000, IDLE, HOOK)
    ]
    commit(target, changes, journal)
    for c in changes:
        assert target.read(c.at, 5) == c.put
        assert any(at <= c.at and c.at + 5 <= at + size for at, size in target.done.syncs)
    between = target.read(CODE + 0x15, 11)
    assert between == b"\x90" * 11
    assert sorted(parse(bytes(journal.view))[1], key=lambda e: e.at) == sorted(
        (Entry(c.at, c.expect, c.put) for c in changes), key=lambda e: e.at
    )


def test_the_journal_is_written_before_the_text():
    target, journal = make()

    def on_write(at, data):
        assert parse(bytes(journal.view))[1] == [Entry(CODE, IDLE, HOOK)]
        return data

    target.on_write = on_write
    commit(target, [Change(CODE, IDLE, HOOK)], journal)
    assert target.done.writes


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_mismatch_anywhere_writes_nothing_and_shows_both(bad):
    target, journal = make()
    places = [CODE, CODE + 0x20, CODE + 0x2000]
    target.write(places[bad] + 2, b"\xcc")
    target.done.writes.clear()
    with pytest.raises(PatchMismatch) as caught:
        commit(target, [Change(at, IDLE, HOOK) for at in places], journal)
    assert caught.value.at == places[bad]
    assert (caught.value.expect, caught.value.found) == (IDLE, b"\x90\x90\xcc\x90\x90")
    assert "90 90 90 90 90" in caught.value.message
    assert "90 90 cc 90 90" in caught.value.message
    assert "fentry recover" in caught.value.hint
    assert target.done.writes == []
    assert parse(bytes(journal.view))[1] == []


def test_a_write_that_did_not_take_is_found():
    target, journal = make()
    target.on_write = lambda _at, data: data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(PatchMismatch, match="after the write") as caught:
        commit(target, [Change(CODE, IDLE, HOOK)], journal)
    assert (caught.value.expect, caught.value.found) == (HOOK, HOOK[:-1] + b"e")
    target.on_write = None
    patch.restore(target, [e for e in parse(bytes(journal.view))[1] if target.read(e.at, 5) == e.new])


def test_memory_that_is_not_there():
    target, journal = make()
    with pytest.raises(Fault):
        commit(target, [Change(CODE, IDLE, HOOK), Change(0x100, IDLE, HOOK)], journal)
    assert target.done.writes == []


def test_restore_puts_back_what_is_ours_and_reports_what_is_not():
    target, journal = make()
    places = [CODE + 0x40 * n for n in range(4)]
    changes = [Change(at, IDLE, HOOK) for at in places]
    commit(target, changes, journal)
    target.write(places[1], IDLE)  # somebody put it back
    target.write(places[2], b"\xcc" + HOOK[1:])  # a debugger's breakpoint in our hook
    gone = [Entry(0x100, IDLE, HOOK)]  # a module that was unloaded
    strange = patch.restore(target, [*parse(bytes(journal.view))[1], *gone])
    assert [(m.at, m.expect, m.found) for m in strange] == [(places[2], HOOK, b"\xcc" + HOOK[1:])]
    assert [target.read(at, 5) for at in places] == [IDLE, IDLE, b"\xcc" + HOOK[1:], IDLE]


def test_restore_beside_unmapped_memory():
    """A span that reaches over a hole is looked at place by place."""
    target, _ = make(pages=1)
    target.write(CODE + 4000, HOOK)
    entries = [Entry(CODE + 4000, IDLE, HOOK), Entry(CODE + 4096 + 100, IDLE, HOOK)]
    assert patch.restore(target, entries) == []
    assert target.read(CODE + 4000, 5) == IDLE


# -- threads ----------------------------------------------------------------------------------------------


def thread(arch, pc, sp=STACK + 256):
    a = load(arch)
    return {a.pc: pc, a.sp: sp}


@arches
def test_threads_inside_a_place_go_on_where_they_are_told(arch):
    pcs = [CODE, CODE + 2, CODE + 4, CODE + 5, CODE - 1 + 0x1000]
    target, _ = make(arch, [thread(arch, pc) for pc in pcs])
    patch.move_threads(target, load(arch), {CODE: (5, lambda: {2: 0x9002, 4: 0x9004}), CODE + 0x100: (5, dict)})
    got = [target.regs(t)[load(arch).pc] for t in target.threads()]
    assert got == [CODE, 0x9002, 0x9004, CODE + 5, CODE - 1 + 0x1000]


@arches
def test_a_thread_at_an_unknown_offset_is_refused(arch):
    target, _ = make(arch, [thread(arch, CODE + 3)])
    with pytest.raises(TargetRefused, match="inside code that must change"):
        patch.move_threads(target, load(arch), {CODE: (5, lambda: {2: 0x9002})})
    assert target.regs(1)[load(arch).pc] == CODE + 3


def test_the_pc_in_a_signal_frame_is_moved():
    """The thread itself is in its handler; it will return into the place."""
    words = [0] * 60
    words[8 + 22], words[8 + 23], words[8 + 24] = CODE + 2, 0x246, 0x33
    words[40] = CODE + 2  # an ordinary word that looks alike is left alone
    target, _ = make("x86_64", [thread("x86_64", CODE + 0x800)])
    target.write(STACK + 256, struct.pack("<60Q", *words))
    patch.move_threads(target, load("x86_64"), {CODE: (5, lambda: {2: 0x9002})})
    words[8 + 22] = 0x9002
    assert target.read(STACK + 256, 480) == struct.pack("<60Q", *words)
    assert target.regs(1)["rip"] == CODE + 0x800
    assert patch.inside(target, load("x86_64"), [(0x9000, 16)]) == [1]
    assert patch.inside(target, load("x86_64"), [(0x9003, 16)]) == []


@arches
@pytest.mark.parametrize("sp", [0, 1, STACK - 8, STACK + 8192, STACK + 8191, (1 << 64) - 8], ids=hex)
def test_a_wild_stack_pointer_is_no_trouble(arch, sp):
    target, _ = make(arch, [thread(arch, CODE + 2, sp)])
    patch.move_threads(target, load(arch), {CODE: (5, lambda: {2: 0x9002})})
    assert target.regs(1)[load(arch).pc] == 0x9002
