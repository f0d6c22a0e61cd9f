"""The undo journal: what must be put back, kept in the target's own memory.

It is written before each change, so that whoever comes next (``fentry recover PID``, a forked child's clean-up, our own
detach) can restore the target from what is mapped in it, without the tracer that made the changes.

Layout of the shared mapping ``fentry.undo`` (little-endian):

      0  magic b"FENTRYU1"      16  meta: u32 size, u32 offset 32  entry count
      8  bytes of the mapping   24  reserved                   40  reserved
     64  JSON: see Meta; two rooms, of which one is written while the other counts
     META_ROOM  entries of 64 bytes:
           0 address u64   8 size u32   12 reserved   16 old bytes (24)   40 new bytes (24)

A tracer may be killed between any two stores, so each store leaves a journal that is true: new text of Meta goes
into the room that does not count, and then one word says that it does.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from fentry.errors import EngineBug, TargetRefused

NAME = "fentry.undo"
MAGIC = b"FENTRYU1"
META_AT = 64
META_ROOM = 1 << 20
META_HALF = META_ROOM // 2
META_WORD = 16
ENTRIES_WORD = 32
ENTRY = 64
CODE_MAX = 24


@dataclass(slots=True)
class HookTable:
    """A run of slots with return hooks: (address - base) % stride == hook is an address frames return to."""

    base: int
    stride: int
    count: int
    hook: int
    pad: int = 0  #: offset of the landing pad that exceptions enter, the last thing in a slot; 0 if there is none


@dataclass(slots=True)
class Meta:
    """Everything that is not a patched site."""

    mappings: list[tuple[int, int]] = field(default_factory=list)  #: (address, size) to unmap
    code: list[tuple[int, int]] = field(default_factory=list)  #: (address, size) of islands among them
    hooks: list[HookTable] = field(default_factory=list)
    shadow: int = 0  #: distance from a return slot to its shadow slot
    low: int = 0  #: stacks in [low, low + size) are mirrored
    size: int = 0
    context: tuple[int, int] = (0, 0)  #: (address, size) of the contexts: a segment base in it is ours
    tls: int = 0  #: thread pointer that was lent to a thread that had none
    region: tuple[int, int] = (0, 0)  #: (address, size) of the ring region
    #: (address, size) of a table with return hooks, (address, size) of its .eh_frame_hdr and .eh_frame: for debuggers
    unwind: list[tuple[int, int, int, int]] = field(default_factory=list)
    lookups: list[int] = field(default_factory=list)  #: sites of the unwinders' lookup functions
    calls: list[int] = field(default_factory=list)  #: return addresses in our code beneath a program's callbacks


@dataclass(frozen=True, slots=True)
class Entry:
    """One changed place."""

    at: int
    old: bytes
    new: bytes


def size_for(entries: int) -> int:
    """Bytes of a journal with room for `entries`."""
    return META_ROOM + entries * ENTRY


class Journal:
    """A journal being written through its shared view."""

    def __init__(self, at: int, view: memoryview) -> None:
        self.at = at
        self.view = view
        self.meta = Meta()
        self.entries: dict[int, int] = {}
        view[0:8] = MAGIC
        view[8:16] = struct.pack("<Q", len(view))
        self.save()

    @property
    def room(self) -> int:
        """How many entries fit."""
        return (len(self.view) - META_ROOM) // ENTRY

    def save(self) -> None:
        """Write the meta data."""
        at, data, word = encode(self.meta, struct.unpack_from("<Q", self.view, META_WORD)[0])
        self.view[at : at + len(data)] = data
        self.view[META_WORD : META_WORD + 8] = word

    def intend(self, entries: Sequence[Entry]) -> None:
        """Note changes that are about to be made. A place noted before keeps its first `old`."""
        count = struct.unpack_from("<Q", self.view, ENTRIES_WORD)[0]
        for e in entries:
            if len(e.new) > CODE_MAX or len(e.old) != len(e.new):
                raise EngineBug(f"undo journal: a change of {len(e.new)} bytes at {e.at:#x}")
            index = self.entries.get(e.at)
            if index is None:
                index = count
                if index >= self.room:
                    raise EngineBug("undo journal is full")
                at = META_ROOM + index * ENTRY
                self.view[at : at + 40] = struct.pack("<QII24s", e.at, len(e.old), 0, e.old)
                self.view[at + 40 : at + 64] = e.new.ljust(CODE_MAX, b"\0")
                self.entries[e.at] = index
                count += 1
            else:
                at = META_ROOM + index * ENTRY
                self.view[at + 40 : at + 64] = e.new.ljust(CODE_MAX, b"\0")
        self.view[ENTRIES_WORD : ENTRIES_WORD + 8] = struct.pack("<Q", count)


def encode(meta: Meta, word: int) -> tuple[int, bytes, bytes]:
    """Give where new meta data goes, its bytes, and the word that makes them count, to be written in this order.

    Args:
        meta: what to write.
        word: the word that counts now.
    """
    data = json.dumps(asdict(meta), separators=(",", ":")).encode()
    at = META_AT if word >> 32 >= META_HALF else META_HALF
    if len(data) > META_HALF - META_AT:
        raise EngineBug("undo journal: too many mappings")
    return at, data, struct.pack("<II", len(data), at)


def _word(value: object) -> int:
    """Check that `value` fits a word of the target: whoever calculates with it counts on that."""
    if not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ValueError(f"{str(value)[:40]} is not a 64-bit number")
    return value


def _distance(value: object) -> int:
    """Check a distance between mappings: the mirror may lie below what it mirrors, but by whole pages."""
    if isinstance(value, int) and value < 0 and value % 4096 == 0:
        return -_word(-value)
    return _word(value)


def parse(data: bytes) -> tuple[Meta, list[Entry]]:
    """Read a journal out of target memory; it is untrusted.

    Raises: TargetRefused if it is not one.
    """
    if len(data) < META_ROOM or data[:8] != MAGIC:
        raise TargetRefused("no undo journal: the mapping is damaged or of another version")
    size, start = struct.unpack_from("<II", data, META_WORD)
    count = struct.unpack_from("<Q", data, ENTRIES_WORD)[0]
    meta = Meta()
    if size:
        try:
            raw = json.loads(data[min(start, META_ROOM) : min(start + size, META_ROOM)])
            meta = Meta(
                mappings=[(_word(a), _word(b)) for a, b in raw["mappings"]],
                code=[(_word(a), _word(b)) for a, b in raw["code"]],
                hooks=[
                    HookTable(*(_word(h.get(k, 0)) for k in ("base", "stride", "count", "hook", "pad")))
                    for h in raw["hooks"]
                ],
                shadow=_distance(raw["shadow"]),
                low=_word(raw["low"]),
                size=_word(raw["size"]),
                context=(_word(raw["context"][0]), _word(raw["context"][1])),
                tls=_word(raw["tls"]),
                region=(_word(raw["region"][0]), _word(raw["region"][1])),
                # older tracers do not write it
                unwind=[(_word(a), _word(b), _word(c), _word(d)) for a, b, c, d in raw.get("unwind", [])],
                lookups=[_word(a) for a in raw.get("lookups", [])],
                calls=[_word(a) for a in raw.get("calls", [])],
            )
            if not all(h.stride for h in meta.hooks):
                raise ValueError("slots of no size")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise TargetRefused(f"the undo journal is damaged: {error}") from None
    entries = []
    for i in range(min(count, (len(data) - META_ROOM) // ENTRY)):
        at, length, _, old = struct.unpack_from("<QII24s", data, META_ROOM + i * ENTRY)
        new = data[META_ROOM + i * ENTRY + 40 : META_ROOM + i * ENTRY + 64]
        if length <= CODE_MAX:
            entries.append(Entry(at, old[:length], new[:length]))
    return meta, entries
