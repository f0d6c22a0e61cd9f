"""The shape of rings and events in shared memory: one place, read by code generator and decoder.

A *region* is one shared mapping: a header page, then ``nrings`` ring headers of 128 bytes, padding to a
page, then ``nrings`` data areas of ``ring_size`` bytes (a power of two). All numbers are
little-endian u64 unless said otherwise.

    region header (one page)            ring header (128 bytes, two cache lines)
      0  magic  b"FENTRYR1"               0  pos    bytes ever written (target writes)
      8  nrings                           8  lost   events not written (target writes)
     16  ring_size                       16  limit  the target stops writing at pos == limit
     24  full     1: no ring was free    24  tp     thread pointer of the owner
     32  beat     heartbeat (host)       32  pid u32, tid u32
     40  policy   0 drop 1 overwrite     40  level  0 normal, 1.. nested (signal handlers)
                  2 block                48  parent index of the level-0 ring, or own index
     48  off      1: stop recording      56  state  0 free 1 in use
     56  lost     events without a ring  64  tail   bytes ever consumed (host writes)
     64  data     offset of the first data area

``pos`` and ``tail`` only grow; the byte at stream offset n lives at data + (n & (ring_size-1)).
Valid bytes are [tail, pos) for drop and block, and the last ring_size bytes below pos for overwrite.
The target publishes ``pos`` after the record is written.

A *record* is 16 bytes: ``(a, word)``.

* ``word`` bits 47..0 = return address of the program call inside the slot ("mark"): it tells
  site, op and kind at once, see :class:`Table`. Bits 63..48 = bits 19..4 of the stack position of
  the frame's return address (0 where the op does not ask for it).
* ``a`` = time stamp (clock ``tsc``, ``mono`` or ``icount``), or, for clock ``order``, the payload.
* If ``word`` is less than 16 this is an *extension* of the record before it: ``a`` is a payload
  and ``word`` says which (a number that one instruction can load): 1 = parent ip (function entry),
  2 = return value (exit), 3 = position ``pos`` of the parent ring when a nested record was written
  (clock ``order`` only), 4 = duration of the call in clock units (exit of a call whose entry is not
  recorded, because the target itself decides by the duration whether the call is worth an event).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"FENTRYR1"
PAGE = 4096
RECORD = 16
RING_HEADER = 128

# region header offsets
R_NRINGS, R_RING_SIZE, R_NEXT, R_BEAT, R_POLICY, R_OFF, R_LOST, R_DATA = 8, 16, 24, 32, 40, 48, 56, 64
# ring header offsets
H_POS, H_LOST, H_LIMIT, H_TP, H_PID, H_TID, H_LEVEL, H_PARENT, H_STATE, H_TAIL = 0, 8, 16, 24, 32, 36, 40, 48, 56, 64

MARK_MASK = (1 << 48) - 1
EXT_LIMIT = 16  #: words below are extensions
EXT_PARENT, EXT_RETVAL, EXT_POS, EXT_DURATION = 1, 2, 3, 4


class Policy(IntEnum):
    """What happens to an event that finds its ring full."""

    DROP = 0
    OVERWRITE = 1
    BLOCK = 2


class Kind(IntEnum):
    """What a mark stands for."""

    ENTRY = 0
    EXIT = 1
    TAIL = 2  #: entry by tail call: the exit of the frame below closes it too
    UNWOUND = 3  #: exit because an exception passed
    PLAIN = 4  #: entry whose exit is not hooked (stack outside the shadow window)


def data_offset(nrings: int) -> int:
    """Offset of the first data area."""
    end = PAGE + nrings * RING_HEADER
    return (end + PAGE - 1) & -PAGE


def region_size(nrings: int, ring_size: int) -> int:
    """Bytes of a whole region."""
    return data_offset(nrings) + nrings * ring_size


@dataclass(frozen=True, slots=True)
class Table:
    """A run of slots of one shape: how to turn marks back into (site, kind).

    ``marks`` maps a mark's offset inside its slot to its kind. Slot i begins at base + i*stride and belongs
    to site ``sites[i]`` (an index into the trace's site list; -1 for a slot not in use).
    """

    base: int
    stride: int
    marks: dict[int, Kind]
    sites: list[int]
