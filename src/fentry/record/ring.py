"""The host's side of a region of rings: format it, drain it while the target runs, read it after the target died.

:mod:`fentry.record.layout` fixes the bytes. Everything but the geometry (which the host fixed itself)
is shared with a program that may do anything to it, so nothing read here is believed: positions are
checked against what was seen before, owners and levels are clamped, and the tail that decides what is read
next is the host's private copy. A ring that shows an impossible position is set aside and reported in
:attr:`Region.damage`; the other rings go on.

Memory order: a target publishes ``pos`` after its record with a plain store; the host reads ``pos`` and
then the record, and publishes ``tail`` and ``limit`` after its copy. That is enough on machines that keep the
order of loads and the order of stores; elsewhere the interpreter's own locks stand between the two steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fentry.errors import AskedWrong, BadTrace
from fentry.record import layout
from fentry.record.layout import Policy

Words = npt.NDArray[np.uint64]

#: A position that grew by more than this since the last look is not a position.
MAX_JUMP = 1 << 48
#: Bytes behind ``pos`` + ring size that a record being written right now may already have destroyed:
#: one record with its two extensions, rounded up.
IN_FLIGHT = 4 * layout.RECORD
#: Limit of a ring that is never full (policy overwrite); below 2**63 so that a signed compare works too.
NO_LIMIT = 1 << 62
#: How deeply nested a context may claim to be (signal handlers inside signal handlers).
MAX_LEVEL = 255
MAX_NOTES = 64

_POS, _LOST, _LIMIT, _OWNER, _LEVEL, _PARENT, _STATE, _TAIL = (
    offset // 8
    for offset in (
        layout.H_POS,
        layout.H_LOST,
        layout.H_LIMIT,
        layout.H_PID,
        layout.H_LEVEL,
        layout.H_PARENT,
        layout.H_STATE,
        layout.H_TAIL,
    )
)


@dataclass(frozen=True, slots=True)
class RingInfo:
    """Whose bytes a sink is given, and where in the ring's stream they begin."""

    index: int
    pid: int
    tid: int
    level: int  #: 0 normal, 1.. nested (signal handlers)
    parent: int  #: index of the level-0 ring of the same thread
    first: int  #: stream position of the first byte, a multiple of 16
    lost: int  #: events that this ring lost before the first byte, ever


#: Receives bytes of one ring; must have copied them when it returns.
Sink = Callable[[RingInfo, memoryview], None]


class Region:
    """One shared mapping of rings, seen from the host.

    Args:
        view: writable view of the whole mapping, at least ``layout.region_size`` bytes.

    Raises:
        BadTrace: the mapping is not a formatted region, or is shorter than it says.
    """

    def __init__(self, view: memoryview) -> None:
        view = view.cast("B")
        if len(view) < layout.PAGE or bytes(view[:8]) != layout.MAGIC:
            raise BadTrace("not a region of rings: the magic number is missing")
        head = np.frombuffer(view, "<u8", layout.PAGE // 8)
        nrings, ring_size = int(head[layout.R_NRINGS // 8]), int(head[layout.R_RING_SIZE // 8])
        policy = int(head[layout.R_POLICY // 8])
        _check_geometry(nrings, ring_size)
        if layout.region_size(nrings, ring_size) > len(view):
            raise BadTrace(f"a region of {nrings} rings of {ring_size} bytes does not fit its {len(view)} bytes")
        if policy not in tuple(Policy):
            raise BadTrace(f"a region with policy {policy}, which is none of {', '.join(p.name for p in Policy)}")
        self.nrings = nrings
        self.ring_size = ring_size
        self.policy = Policy(policy)
        self.damage: list[str] = []
        self.damaged = 0  #: number of damage reports, also those beyond the kept texts
        self.overrun = 0  #: records overwritten before they were read although the policy forbids it
        self.discarded = 0  #: records thrown away by :meth:`discard`
        self._view = view
        self._head = head
        self._rings = np.frombuffer(view, "<u8", nrings * 16, layout.PAGE).reshape(nrings, 16)
        self._data = layout.data_offset(nrings)
        # The shared tail is where another host left off; it is a claim, so it may not be ahead of pos.
        self._tail: Words = np.minimum(self._rings[:, _TAIL], self._rings[:, _POS]) & ~np.uint64(15)
        self._alive = np.ones(nrings, dtype=bool)
        self._lost_at_tail: Words = np.zeros(nrings, dtype=np.uint64)

    @classmethod
    def format(cls, view: memoryview, nrings: int, ring_size: int, policy: Policy) -> Region:
        """Write empty headers over `view` and give the region.

        Args:
            view: writable, at least ``layout.region_size(nrings, ring_size)`` bytes.
            nrings: how many threads and signal levels can record at a time.
            ring_size: bytes of each ring, a power of two of at least one page.
            policy: what happens to an event that finds its ring full.

        Raises:
            AskedWrong: the geometry is impossible or larger than the view.
        """
        view = view.cast("B")
        try:
            _check_geometry(nrings, ring_size)
        except BadTrace as error:
            raise AskedWrong(error.message, hint="choose a power of two between 4096 and 2**40") from None
        size = layout.region_size(nrings, ring_size)
        if size > len(view):
            raise AskedWrong(f"{nrings} rings of {ring_size} bytes need {size} bytes, there are {len(view)}")
        head = np.frombuffer(view, "<u8", layout.PAGE // 8)
        head[:] = 0
        head[layout.R_NRINGS // 8] = nrings
        head[layout.R_RING_SIZE // 8] = ring_size
        head[layout.R_POLICY // 8] = int(policy)
        head[layout.R_DATA // 8] = layout.data_offset(nrings)
        rings = np.frombuffer(view, "<u8", nrings * 16, layout.PAGE).reshape(nrings, 16)
        rings[:] = 0
        rings[:, _LIMIT] = NO_LIMIT if policy is Policy.OVERWRITE else ring_size
        rings[:, _PARENT] = np.arange(nrings)
        view[:8] = layout.MAGIC
        return cls(view)

    # -- questions --------------------------------------------------------------------------------
    @property
    def in_use(self) -> list[int]:
        """Indices of rings that have an owner."""
        return [int(i) for i in np.flatnonzero(self._rings[:, _STATE] == 1)]

    @property
    def off(self) -> bool:
        """Recording is switched off."""
        return bool(self._head[layout.R_OFF // 8])

    @property
    def gave_up(self) -> bool:
        """A writer of policy block waited for a host that seemed dead, and made the policy drop."""
        return self.policy is Policy.BLOCK and int(self._head[layout.R_POLICY // 8]) != Policy.BLOCK

    @property
    def ringless(self) -> int:
        """Events lost because no ring was free."""
        return int(self._head[layout.R_LOST // 8])

    @property
    def lost(self) -> int:
        """All events lost so far: by full rings, for want of a ring, by overrun, and discarded ones."""
        return sum(int(n) for n in self._rings[:, _LOST]) + self.ringless + self.overrun + self.discarded

    def lost_of(self, index: int) -> int:
        """Events that ring `index` lost."""
        return int(self._rings[index, _LOST])

    def info(self, index: int) -> RingInfo:
        """Describe ring `index` as it is now: its owner, and its tail as ``first``."""
        head = [int(word) for word in self._rings[index]]
        level, parent = head[_LEVEL], head[_PARENT]
        if level > MAX_LEVEL or parent >= self.nrings:
            self._note(f"ring {index}: level {level:#x}, parent {parent:#x} cannot be")
            level, parent = min(level, MAX_LEVEL), index
        pid, tid = head[_OWNER] & 0xFFFFFFFF, head[_OWNER] >> 32
        return RingInfo(index, pid, tid, level, parent, int(self._tail[index]), int(self._lost_at_tail[index]))

    def fill(self) -> float:
        """How full the fullest ring is, 0 to 1 (always 0 for policy overwrite)."""
        if self.policy is Policy.OVERWRITE:
            return 0.0
        used = (self._rings[:, _POS] - self._tail)[self._alive]
        return min(1.0, float(used.max()) / self.ring_size) if len(used) else 0.0

    # -- verbs ------------------------------------------------------------------------------------
    def switch(self, *, on: bool) -> None:
        """Switch recording on or off for every thread."""
        self._head[layout.R_OFF // 8] = 0 if on else 1

    def beat(self) -> None:
        """Tell the target that a host is alive."""
        self._head[layout.R_BEAT // 8] += np.uint64(1)

    def drain(self, sink: Sink) -> int:
        """Give every byte written since the last drain to `sink` and make room for more.

        Does nothing but the heartbeat for policy overwrite: see :meth:`snapshot`.
        If the sink raises, the bytes it was offered stay in the ring.

        Returns: bytes given to the sink.
        """
        self.beat()
        if self.policy is Policy.OVERWRITE:
            return 0
        total = 0
        positions: Words = self._rings[:, _POS].copy()
        for index in np.flatnonzero((positions != self._tail) & self._alive):
            total += self._drain_ring(int(index), int(positions[index]), sink)
        return total

    def _drain_ring(self, index: int, pos: int, sink: Sink) -> int:
        tail = int(self._tail[index])
        if not self._plausible(index, tail, pos):
            return 0
        pos &= -layout.RECORD
        if pos - tail > self.ring_size:
            missed = pos - tail - self.ring_size
            self.overrun += missed // layout.RECORD
            self._note(f"ring {index}: ran {missed} bytes past its limit")
            tail = pos - self.ring_size
        info = self.info(index)
        self._give(info, tail, pos, sink)
        self._publish(index, pos)
        return pos - tail

    def snapshot(self, sink: Sink) -> int:
        """Give the newest bytes of every ring to `sink` (policy overwrite), while the target runs.

        What the target overwrote during the copy is discarded, and so are the few bytes that a record
        in flight may have destroyed. A second snapshot gives only what came after the first.

        Returns: bytes given to the sink.
        """
        self.beat()
        total = 0
        for index in range(self.nrings):
            tail, before = int(self._tail[index]), int(self._rings[index, _POS])
            if before == tail or not self._alive[index] or not self._plausible(index, tail, before):
                continue
            end = before & -layout.RECORD
            start = max(tail, end - self.ring_size)
            copy = bytearray(end - start)
            info = self.info(index)
            at = 0
            for part in self._spans(index, start, end):
                copy[at : at + len(part)] = part
                at += len(part)
            after = int(self._rings[index, _POS])
            if not self._plausible(index, before, after):
                continue
            safe = max(start, (after & -layout.RECORD) - self.ring_size + IN_FLIGHT)
            if safe < end:
                self._tail[index] = end
                given = RingInfo(index, info.pid, info.tid, info.level, info.parent, safe, info.lost)
                sink(given, memoryview(copy)[safe - start :])
                total += end - safe
        return total

    @property
    def short(self) -> bool:
        """Fewer than a quarter of the rings are free."""
        return int(np.count_nonzero(self._rings[:, _STATE])) > self.nrings * 3 // 4

    def recycle(self, alive: Callable[[int, int], bool], forget: Callable[[RingInfo], None] | None = None) -> int:
        """Free the rings of threads that have ended, once all of theirs is drained, for new threads to claim.

        Call it from where :meth:`drain` is called. Policy overwrite keeps what its rings hold.

        Args:
            alive: tells whether thread `tid` of process `pid` still exists.
            forget: called before a ring is freed: wipes what may still lead a thread to it.

        Returns: rings freed.
        """
        if self.policy is Policy.OVERWRITE:
            return 0
        freed = 0
        for index in self.in_use:
            info = self.info(index)
            if not info.tid or not self._alive[index] or alive(info.pid, info.tid):
                continue
            if int(self._rings[index, _POS]) != int(self._tail[index]):
                continue
            if forget is not None:
                forget(info)
            self._rings[index, _LEVEL] = 0
            self._rings[index, _PARENT] = index
            self._rings[index, _OWNER] = 0
            self._rings[index, _STATE] = 0  # last: from here on somebody else may claim it
            freed += 1
        if freed:
            self._head[layout.R_NEXT // 8] = 0  # whoever waits for a ring may hope again
        return freed

    def discard(self) -> int:
        """Throw away what is in the rings and let blocked writers go on.

        Returns: records thrown away, extensions included; also added to :attr:`lost`.
        """
        self.beat()
        total = 0
        for index in np.flatnonzero((self._rings[:, _POS] != self._tail) & self._alive):
            tail, pos = int(self._tail[index]), int(self._rings[index, _POS])
            if self._plausible(int(index), tail, pos):
                total += ((pos & -layout.RECORD) - tail) // layout.RECORD
                self._publish(int(index), pos & -layout.RECORD)
        self.discarded += total
        return total

    def close(self) -> None:
        """Let go of the mapping, so that its owner can unmap it."""
        self._head = self._head.copy()
        self._rings = self._rings.copy()
        self._view = memoryview(b"")

    # -- within -----------------------------------------------------------------------------------
    def _plausible(self, index: int, seen: int, pos: int) -> bool:
        """Tell whether `pos` can follow `seen`; otherwise report the ring and set it aside."""
        if pos & (layout.RECORD - 1):
            self._note(f"ring {index}: position {pos:#x} is not a multiple of {layout.RECORD}")
        if seen <= pos <= seen + MAX_JUMP:
            return True
        self._note(f"ring {index}: position went from {seen:#x} to {pos:#x}; set aside")
        self._alive[index] = False
        return False

    def _spans(self, index: int, start: int, end: int) -> list[memoryview]:
        """Bytes [start, end) of a ring's stream as one or two views of the mapping."""
        base = self._data + index * self.ring_size
        low = start & (self.ring_size - 1)
        size = end - start
        first = min(size, self.ring_size - low)
        parts = [self._view[base + low : base + low + first]]
        if size > first:
            parts.append(self._view[base : base + size - first])
        return parts

    def _give(self, info: RingInfo, start: int, end: int, sink: Sink) -> None:
        first = start
        for part in self._spans(info.index, start, end):
            sink(RingInfo(info.index, info.pid, info.tid, info.level, info.parent, first, info.lost), part)
            first += len(part)

    def _publish(self, index: int, pos: int) -> None:
        self._tail[index] = pos
        self._rings[index, _TAIL] = pos
        if self.policy is not Policy.OVERWRITE:
            self._rings[index, _LIMIT] = pos + self.ring_size
        # What was lost until here was lost for want of room below the old limit: right before `pos`. (A thread that
        # saw the old limit and counts its loss only now is off by one event.)
        self._lost_at_tail[index] = self._rings[index, _LOST]

    def _note(self, text: str) -> None:
        self.damaged += 1
        if len(self.damage) < MAX_NOTES:
            self.damage.append(text)


def _check_geometry(nrings: int, ring_size: int) -> None:
    if not 1 <= nrings <= 1 << 20:
        raise BadTrace(f"a region of {nrings} rings cannot be")
    if ring_size & (ring_size - 1) or not layout.PAGE <= ring_size <= 1 << 40:
        raise BadTrace(f"a ring of {ring_size} bytes cannot be")


class Drainer:
    """A thread that keeps a region's rings from filling up.

    It drains at once while a ring is more than a quarter full and otherwise every few milliseconds; the
    pause grows while nothing is recorded, but never beyond what one fast thread needs to fill a ring.
    For policy overwrite it only keeps the heartbeat and takes a snapshot when it is stopped.

    If the sink fails (disk full), recording is switched off, what is still in the rings is discarded and
    counted as lost so that no thread of the target waits for room, and :meth:`stop` raises the error.

    Args:
        region: the rings.
        sink: receives the bytes, on the drainer's thread.
        alive: tells whether thread `tid` of `pid` exists; rings of those that do not are freed.
        forget: see :meth:`Region.recycle`.
    """

    #: bytes per second that one thread of a target can record; sets the pauses
    FASTEST = 500e6

    #: seconds between looks for rings of threads that have ended
    RECYCLE = 0.05

    def __init__(
        self,
        region: Region,
        sink: Sink,
        alive: Callable[[int, int], bool] | None = None,
        forget: Callable[[RingInfo], None] | None = None,
    ) -> None:
        self._forget = forget
        self.region = region
        self._thread_alive = alive
        self._recycled = 0.0
        self.error: Exception | None = None
        self.drained = 0  #: bytes given to the sink
        self._sink = sink
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        full = region.ring_size / self.FASTEST
        self._busy_pause = min(max(full / 4, 0.0005), 0.004)
        self._idle_pause = min(max(full / 2, 0.001), 0.02)

    def start(self) -> None:
        """Begin draining."""
        assert self._thread is None, "a drainer starts once"
        self._thread = threading.Thread(target=self._run, name="fentry-drain", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Drain a last time, end the thread, and raise what went wrong. Idempotent.

        Raises: whatever the sink raised, once.
        """
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._step(last=True)
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        pause = self._busy_pause
        due = 0.0
        while not self._wake.is_set():
            now = time.monotonic()
            crowded = self.region.fill() > 0.25
            if self._thread_alive is not None and (now - self._recycled > self.RECYCLE or self.region.short):
                self._recycled = now
                self.region.recycle(self._thread_alive, self._forget)
            if crowded or now >= due:
                moved = self._step(last=False)
                pause = self._busy_pause if moved else min(pause * 1.5, self._idle_pause)
                due = now + pause
            if not crowded:
                self._wake.wait(min(pause, max(due - time.monotonic(), 0.0002)))

    def _step(self, *, last: bool) -> int:
        """Drain once; after an error, discard instead."""
        try:
            if self.error is not None:
                self.region.discard()
                return 0
            if last and self.region.policy is Policy.OVERWRITE:
                moved = self.region.snapshot(self._sink)
            else:
                moved = self.region.drain(self._sink)
            self.drained += moved
            return moved
        except Exception as error:
            self.region.switch(on=False)
            self.error = error
            self.region.discard()
            return 0
