"""Symbol files: what is in a process is read as it is, whatever else is there ends in one error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fentry.arch import ReturnPlane, SlotShape, UnwindInfo, load
from fentry.engine import symbolfile
from fentry.engine.journal import NAME, Entry, Journal, size_for
from fentry.errors import Fault, TargetRefused, TraceError
from fentry.image.elf import Elf, Source
from fentry.image.unwind import frame_ranges
from fentry.target import Mapping

ARCH = load("x86_64")
SHAPE = SlotShape(1, 1, "entry-jump")
STRIDE = ARCH.slot_layout(SHAPE).stride
JOURNAL, CODE, SIZE = 0x10000000, 0x20000000, 0x10000
PLACE = 0x20100000


class Memory:
    """A process that holds a journal and one island."""

    pid = 1

    def __init__(self) -> None:
        self.journal = bytearray(size_for(8))
        self.code = bytearray(SIZE)

    def mappings(self) -> list[Mapping]:
        return [
            Mapping(JOURNAL, JOURNAL + len(self.journal), "rw-s", 0, f"/memfd:{NAME} (deleted)"),
            Mapping(CODE, CODE + SIZE, "r-xp", 0, ""),
        ]

    def read(self, at: int, size: int) -> bytes:
        for start, data in ((JOURNAL, self.journal), (CODE, self.code)):
            if start <= at and at + size <= start + len(data):
                return bytes(data[at - start : at - start + size])
        raise Fault(at, size)


def hooked(tables: int = 2, count: int = 3) -> tuple[Memory, Journal]:
    """Tables of slots as the engine leaves them; one jump leads to the second slot of the first table."""
    memory = Memory()
    journal = Journal(JOURNAL, memoryview(memory.journal))
    journal.meta.code.append((CODE, SIZE))
    for t in range(tables):
        start = CODE + t * 0x4000
        header = start + 0x2000
        info = ARCH.frame_info(
            SHAPE, [start + i * STRIDE for i in range(count)], header, UnwindInfo(ReturnPlane(1 << 40, 0, 1 << 30), 0)
        )
        memory.code[header - CODE : header - CODE + len(info)] = info
        # as in the target, up to 15 bytes of nothing follow
        journal.meta.unwind.append((start, count * STRIDE, header, (len(info) + 15) & -16))
    journal.save()
    jump = b"\xe9" + (CODE + STRIDE - PLACE - 5).to_bytes(4, "little", signed=True)
    journal.intend([Entry(PLACE, bytes(5), jump)])
    return memory, journal


def test_each_slot_is_a_function_and_a_frame(tmp_path) -> None:
    memory, _ = hooked()
    tables, places = symbolfile.read(memory, "x86_64")
    assert [table.slots for table in tables] == [
        [(CODE + t * 0x4000 + i * STRIDE, STRIDE) for i in range(3)] for t in range(2)
    ]
    assert places == {CODE + STRIDE: PLACE}
    path = tmp_path / "hooks.elf"
    path.write_bytes(symbolfile.encode(tables, {CODE + STRIDE: "half"}, ARCH.elf_machine))
    elf = Elf(Source.open(str(path)))
    assert elf.machine == ARCH.elf_machine
    slots = {at: size for table in tables for at, size in table.slots}
    assert dict(zip(*(column.tolist() for column in frame_ranges(elf)[:2]), strict=True)) == slots
    symbols = elf.symtab
    assert symbols is not None
    rows = np.arange(1, len(symbols.value))
    assert dict(zip(symbols.value[1:].tolist(), symbols.names(rows)[0], strict=True)) == {
        at: "fentry:half" if at == CODE + STRIDE else "fentry" for at in slots
    }


def test_nothing_of_ours() -> None:
    memory = Memory()
    memory.mappings = list  # type: ignore[method-assign]  # a process without a journal
    with pytest.raises(TargetRefused, match="holds nothing"):
        symbolfile.read(memory, "x86_64")


U64 = st.integers(0, (1 << 64) - 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(U64, U64, U64, U64), min_size=1, max_size=3))
def test_a_journal_may_say_anything(unwind) -> None:
    memory, journal = hooked()
    journal.meta.unwind = unwind
    journal.save()
    with pytest.raises(TargetRefused, match="damaged"):
        symbolfile.read(memory, "x86_64")


@settings(max_examples=300, deadline=None)
@given(st.integers(0x2000, 0x2400), st.binary(min_size=1, max_size=24))
def test_frame_information_may_be_anything(at, data) -> None:
    """It gives slots inside their table, or one error; a file can be made of what was accepted."""
    memory, journal = hooked(tables=1)
    memory.code[at : at + len(data)] = data
    try:
        tables, places = symbolfile.read(memory, "x86_64")
    except TraceError:
        return
    (start, size, _, length) = journal.meta.unwind[0]
    assert all(start <= slot and slot + span <= start + size for slot, span in tables[0].slots)
    assert len(tables[0].frames) <= length
    assert symbolfile.encode(tables, dict.fromkeys(places, "f"), ARCH.elf_machine).startswith(b"\x7fELF")


def test_hooks_that_are_being_unmapped() -> None:
    memory, journal = hooked()
    journal.meta.code.append((1 << 40, SIZE))
    journal.meta.unwind.append((1 << 40, STRIDE, (1 << 40) + STRIDE, 64))
    journal.save()
    with pytest.raises(TargetRefused, match="letting go"):
        symbolfile.read(memory, "x86_64")
