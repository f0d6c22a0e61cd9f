"""Open calls of a thread: which exit belongs to which entry, one event at a time.

Rules, per thread, in the order of its stream:

* an exit (EXIT, UNWOUND) closes the *topmost open frame of the same site and stack bits*. Frames above it were
  left without an exit (longjmp): they end at that moment, flagged PASSED;
* an entry by tail call (TAIL) has no exit: it uses the return slot of the frame that made the jump, its
  *owner*, the topmost frame with the same stack bits, and closes together with it. Frames above the
  owner are dead by then and close as PASSED;
* a PLAIN entry (and an entry at a site whose returns are not recorded at all) is an instant: no duration, no
  children;
* an exit that closes nothing: with no frame open it is the end of a call that was already running when the
  thread's stream began (OPEN_AT_START): it encloses everything before it. With frames open nothing can be
  said about where it began (UNMATCHED). An exit that carries its duration is a call of its own (TIMED);
* where events were lost, frames stay open, since most of them are still running. What they say from then on
  is flagged: LOST on every call that was open there or may have lost its entry (its duration can span two calls),
  UNSURE on calls below such a frame (its place in the tree may be wrong);
* frames open at the end are NEVER_EXITED and have no duration.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag

from fentry.record.layout import Kind

# plain ints: comparing with an enum member costs more than the rest of a rule
_ENTRY, _TAIL, _UNWOUND, _PLAIN = (int(k) for k in (Kind.ENTRY, Kind.TAIL, Kind.UNWOUND, Kind.PLAIN))


class Flag(IntFlag):
    """What is special about a call."""

    TAIL = 1  #: entered by a tail call
    PLAIN = 2  #: the return is not hooked: an instant
    UNWOUND = 4  #: left by an exception
    OPEN_AT_START = 8  #: running before the first event; ts is that of the first event, dur what was seen
    NEVER_EXITED = 16  #: open at the end
    PASSED = 32  #: left without an exit (longjmp); dur ends when that was noticed
    LOST = 64  #: events were lost while it was open, or its entry was
    UNSURE = 128  #: below a frame that was open when events were lost
    UNMATCHED = 256  #: an exit without entry amid open frames
    RECURSIVE = 512  #: a call of the same site was open already
    TIMED = 1024  #: only its exit was recorded, together with the duration


class Bit:
    """The flags as plain integers: arithmetic with an enum's members is ten times slower, and there is much of it."""

    TAIL = Flag.TAIL.value
    PLAIN = Flag.PLAIN.value
    UNWOUND = Flag.UNWOUND.value
    OPEN_AT_START = Flag.OPEN_AT_START.value
    NEVER_EXITED = Flag.NEVER_EXITED.value
    PASSED = Flag.PASSED.value
    LOST = Flag.LOST.value
    UNSURE = Flag.UNSURE.value
    UNMATCHED = Flag.UNMATCHED.value
    RECURSIVE = Flag.RECURSIVE.value
    TIMED = Flag.TIMED.value


#: Calls with one of these have no duration that says something about the function.
UNTRUE = Bit.OPEN_AT_START | Bit.NEVER_EXITED | Bit.PASSED | Bit.LOST | Bit.UNMATCHED


class Frame:
    """One call, open or closed."""

    __slots__ = (
        "bits", "child", "depth", "dur", "flags", "gap", "kind", "own", "owner", "parent", "retval", "row", "site", "ts"
    )  # fmt: skip

    row: int  #: number of the call in its thread, by entry
    parent: int  #: row of the enclosing call, or -1
    ts: int
    site: int
    bits: int
    kind: int
    flags: int
    gap: int  #: how many gaps the thread had seen when it was entered
    depth: int
    child: int  #: time of finished callees
    owner: Frame | None  #: the frame whose return slot it has; None: it has its own
    dur: int  #: clock units; -1 while open, or if never known
    own: int  #: dur without callees
    retval: int | None


class Stack:
    """Open calls of one thread, and the rules by which events open and close them.

    Depths are relative to where the thread was when recording began: frames found to have been open at the start
    have negative depths.
    """

    def __init__(self) -> None:
        self.frames: list[Frame] = []  #: open, the outermost first
        self.base = 0  #: depth of the outermost frame
        self.rows = 0  #: calls numbered so far
        self.gaps = 0  #: places where events were lost
        self.since: int | None = None  #: time of the first event, or of the last gap
        self.loose = 0  #: open tail calls whose owner was never seen
        self.roots = 0  #: time of finished outermost calls, since `since`
        self._timed: list[tuple[int, int]] = []  # (start, duration) of TIMED calls that no other encloses yet
        self._open: dict[int, int] = {}  # site << 16 | bits: how many entered frames
        self._owners: dict[int, int] = {}  # bits: how many frames that own a return slot
        self._sites: dict[int, int] = {}  # site: how many frames

    def event(
        self, ts: int, site: int, kind: int, bits: int, payload: int | None, duration: int | None = None, lost: int = 0
    ) -> Sequence[Frame]:
        """Take one event.

        Returns: the calls that it closed, innermost first. An entry is then ``frames[-1]``.
        """
        if lost:
            self.gap(ts)
        elif self.since is None:
            self.since = ts
        if kind == _ENTRY:
            self._push(ts, site, kind, bits, None)
            return ()
        if kind == _TAIL:
            closed, owner = self._clear_above(ts, bits)
            self._push(ts, site, kind, bits, owner)
            return closed
        if kind == _PLAIN:
            frame = self._frame(ts, site, kind, bits)
            frame.flags |= Bit.PLAIN
            if self._sites.get(site):
                frame.flags |= Bit.RECURSIVE
            return (frame,)
        return self._exit(ts, site, kind, bits, payload, duration)

    def gap(self, ts: int) -> None:
        """Note that events are missing before the one at `ts`."""
        self.gaps += 1
        self.since = ts
        self.roots = 0
        self._timed.clear()

    def finish(self) -> list[Frame]:
        """Close what is open at the end, innermost first."""
        closed = []
        while self.frames:
            frame = self._pop(None, None)
            frame.flags |= Bit.NEVER_EXITED
            closed.append(frame)
        return closed

    def restore(self, frames: list[Frame]) -> None:
        """Replace the open frames (used after a stretch was matched in columns)."""
        self.frames = frames
        self._open, self._owners, self._sites = {}, {}, {}
        for frame in frames:
            self._count(frame, 1)

    # -- within -----------------------------------------------------------------------------------
    def _frame(self, ts: int, site: int, kind: int, bits: int) -> Frame:
        frames = self.frames
        frame = Frame()
        frame.row = self.rows
        self.rows += 1
        frame.parent = frames[-1].row if frames else -1
        frame.ts, frame.site, frame.bits, frame.kind = ts, site, bits, kind
        frame.flags = Bit.UNSURE if frames and frames[0].gap != self.gaps else 0
        frame.gap = self.gaps
        frame.depth = self.base + len(frames)
        frame.child = 0
        frame.owner = frame.retval = None
        frame.dur = frame.own = -1
        return frame

    def _count(self, frame: Frame, by: int) -> None:
        site, bits = frame.site, frame.bits
        sites = self._sites
        sites[site] = sites.get(site, 0) + by
        if frame.owner is None:
            owners = self._owners
            owners[bits] = owners.get(bits, 0) + by
            if frame.kind == _ENTRY:
                key = site << 16 | bits
                self._open[key] = self._open.get(key, 0) + by
            else:
                self.loose += by

    def _push(self, ts: int, site: int, kind: int, bits: int, owner: Frame | None) -> None:
        frame = self._frame(ts, site, kind, bits)
        frame.owner = owner
        if kind == _TAIL:
            frame.flags |= Bit.TAIL
        if self._sites.get(site):
            frame.flags |= Bit.RECURSIVE
        self._count(frame, 1)
        self.frames.append(frame)

    def _pop(self, ts: int | None, retval: int | None) -> Frame:
        frames = self.frames
        frame = frames.pop()
        self._count(frame, -1)
        if frame.gap != self.gaps:
            frame.flags |= Bit.LOST
        if ts is not None:
            frame.dur = dur = ts - frame.ts if ts > frame.ts else 0
            frame.own = dur - frame.child if dur > frame.child else 0
            frame.retval = retval
            if frames:
                frames[-1].child += dur
            else:
                self.roots += dur
        return frame

    def _clear_above(self, ts: int, bits: int) -> tuple[Sequence[Frame], Frame | None]:
        """Find the owner of a tail call's return slot and close what is above it."""
        if not self._owners.get(bits):
            return (), None
        closed = []
        while self.frames[-1].bits != bits:
            frame = self._pop(ts, None)
            frame.flags |= Bit.PASSED
            closed.append(frame)
        return closed, self.frames[-1].owner or self.frames[-1]

    def _exit(
        self, ts: int, site: int, kind: int, bits: int, payload: int | None, duration: int | None
    ) -> Sequence[Frame]:
        top = self.frames[-1] if self.frames else None
        if top and top.site == site and top.bits == bits and top.kind == _ENTRY and kind != _UNWOUND:
            return (self._pop(ts, payload),)  # what nearly always happens
        if self._open.get(site << 16 | bits):
            return self._close(ts, site, kind, bits, payload)
        closed: list[Frame] = []
        if self.loose and any(f.owner is None and f.kind == _TAIL and f.bits == bits for f in self.frames):
            # the entry of the owner is missing, but what it jumped to is there
            closed = self._close(ts, -1, kind, bits, payload)
        frame = self._frame(ts, site, kind, bits)
        frame.retval = payload
        if kind == _UNWOUND:
            frame.flags |= Bit.UNWOUND
        if duration is not None:
            self._time(frame, duration)
        elif self.frames:
            frame.flags |= Bit.UNMATCHED | (Bit.LOST if self.gaps else 0)
        else:
            self.base -= 1
            frame.depth = self.base
            frame.flags |= Bit.OPEN_AT_START | (Bit.LOST if self.gaps else 0)
            assert self.since is not None
            frame.ts = min(self.since, ts)
            frame.dur = ts - frame.ts
            frame.own = max(0, frame.dur - self.roots)
            self.roots = frame.dur
        closed.append(frame)
        return closed

    def _close(self, ts: int, site: int, kind: int, bits: int, payload: int | None) -> list[Frame]:
        """Pop to the topmost frame of this site (-1: the topmost loose tail call) and stack bits."""
        closed = []
        wanted = _TAIL if site < 0 else _ENTRY
        while True:
            frame = self._pop(ts, payload)
            closed.append(frame)
            if frame.bits == bits and frame.kind == wanted and frame.owner is None and site in (-1, frame.site):
                break
        for above in closed:
            if above is not frame and above.owner is not frame:
                above.flags |= Bit.PASSED
                above.retval = None
            elif kind == _UNWOUND:
                above.flags |= Bit.UNWOUND
        return closed

    def _time(self, frame: Frame, duration: int) -> None:
        """Make a call of an exit that says how long it took; those that lie inside it are its callees."""
        start = max(0, frame.ts - duration)
        frame.flags |= Bit.TIMED
        frame.ts, frame.dur = start, duration
        inside = 0
        while self._timed and self._timed[-1][0] >= start:
            inside += self._timed.pop()[1]
        frame.own = max(0, duration - inside)
        if self.frames:
            self.frames[-1].child += duration - inside
        self._timed.append((start, duration))
