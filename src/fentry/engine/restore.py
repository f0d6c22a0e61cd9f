"""Put a target back to what it was, from its undo journal: detach, ``fentry recover`` and forked children alike.

Order: text first (no new hook is entered), then the return addresses of frames in flight and the segment bases, then,
when no thread is in our code any more, the mappings. The target is stopped throughout, except in short slices
in which threads that were caught inside our code run out of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fentry.arch import Arch, load
from fentry.engine import patch
from fentry.engine.journal import META_AT, META_ROOM, NAME, Entry, Meta, parse
from fentry.errors import Fault, PatchMismatch, TargetRefused
from fentry.record import layout as ring_layout
from fentry.target import Mapping, Readable, Target

#: how long we wait for threads to leave our code
PATIENCE_S = 5.0


@dataclass(slots=True)
class Report:
    """What a restore did."""

    sites: int = 0
    frames: int = 0  #: return addresses put back
    strange: list[PatchMismatch] = field(default_factory=list)
    left_mapped: str = ""  #: why islands could not be unmapped, or ""


def find_journal(target: Readable) -> tuple[Meta, list[Entry]] | None:
    """Find and read the undo journal mapped in a target; None if there is none.

    Raises: TargetRefused if it is damaged; Gone.
    """
    mappings = target.mappings()
    for m in mappings:
        if f"memfd:{NAME}" in m.path and m.size >= META_ROOM and m.offset == 0:
            data = target.read(m.start, m.size)
            # all zero: its writer was killed before the first store, so it has changed nothing but mappings
            meta, entries = (Meta(), []) if not any(data[:META_AT]) else parse(data)
            named = [(m.start, m.size), *((o.start, o.size) for o in mappings if "memfd:fentry." in o.path)]
            # the journal itself first: it is unmapped last; then what was mapped but not noted yet
            meta.mappings = list(dict.fromkeys([named[0], *meta.mappings, *named]))
            return meta, entries
    return None


def restore(target: Target, meta: Meta, entries: Sequence[Entry]) -> Report:
    """Undo everything the journal speaks of. The target must be stopped and stays so.

    Raises: Gone.
    """
    arch = load(target.arch)
    report = Report()
    _switch_off(target, meta)
    lookups = [e for e in entries if e.at in meta.lookups]
    report.strange = patch.restore(target, [e for e in entries if e.at not in meta.lookups])
    deadline = time.monotonic() + PATIENCE_S
    # a landing pad of ours is about to call the unwinder, too: nobody may be inside when the lookups go
    while lookups and _unwinding(target, arch, meta):
        if time.monotonic() > deadline:
            report.left_mapped = (
                "a thread is in fentry's code, or in an unwinder with one of its frames, and does not leave"
            )
            return report
        _slice(target)
    report.strange += patch.restore(target, lookups)
    report.sites = len(entries) - len(report.strange)
    while True:
        if arch.dialect.return_slot:
            report.frames += _unhook_frames(target, meta)
        busy = {*patch.inside(target, arch, meta.code), *_called_from(target, arch, meta)}
        if not busy:
            break
        if time.monotonic() > deadline:
            report.left_mapped = "a thread is still inside fentry's code (stopped there, or below a signal handler)"
            break
        # nothing leads into our code any more: whoever is in it leaves by running on
        _slice(target)
    _lend_back(target, arch, meta, keep=busy)
    if not arch.dialect.return_slot and _linked_frames(target, arch, meta):
        # a callee keeps its link register wherever it likes, so its frame's shadow entry cannot be found from it
        report.left_mapped = "functions that are still running return through fentry's code"
    if report.strange:
        report.left_mapped = "code that fentry did not write jumps somewhere it does not know"
    if not report.left_mapped and target.allocator is not None:
        for at, size in reversed(meta.mappings):
            target.allocator.unmap(at, size)
    return report


def _slice(target: Target) -> None:
    """Let the target run for a moment."""
    target.resume()
    time.sleep(0.001)  # there is no event to wait for
    target.stop()


#: an unwinder's frames lie this near to the stack pointer while it works
_NEAR = 16384
#: a program that a landing pad called has its frame, and the pad's address above it, within this
_PAD_FRAMES = 512
_UNWINDER = re.compile(r"/lib(gcc_s|unwind)[-.][^/]*$")


def _near_stack(target: Target, arch: Arch, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(thread, up to `size` bytes of words above its stack pointer) of each thread."""
    mappings = target.mappings()
    for tid in target.threads():
        sp = target.regs(tid)[arch.sp] & -8
        m = next((m for m in mappings if m.start <= sp < m.end), None)
        if m is not None:
            yield tid, np.frombuffer(target.read(sp, min(m.end - sp, size) & -8), np.uint64)


def _unwinding(target: Target, arch: Arch, meta: Meta) -> bool:
    """Tell whether a thread is in an unwinder that has one of our frames in hand.

    It then holds addresses of hooks, and will ask the lookup functions about them: frames, lookups and islands must
    stay until it is done. No new hook is entered meanwhile, so this ends.
    """
    if not (meta.hooks and meta.lookups):
        return False
    code = [(m.start, m.end) for m in target.mappings() if "x" in m.perms and _UNWINDER.search(m.path)]
    for tid, words in _near_stack(target, arch, 8 * _NEAR) if code else ():
        regs = np.array([v for v in target.regs(tid).values() if 0 <= v < 1 << 64], dtype=np.uint64)
        words = np.concatenate([regs, words])
        if _in_pad(words[: len(regs) + _PAD_FRAMES // 8], meta):
            return True
        near = words[: len(regs) + _NEAR // 8]
        active = any(((near >= lo) & (near < hi)).any() for lo, hi in code)
        if active and any(((words >= at) & (words < at + size)).any() for at, size in meta.code):
            return True
    return False


def _in_pad(words: np.ndarray, meta: Meta) -> bool:
    """Tell whether a word is an address in a landing pad."""
    for h in meta.hooks:
        offset = words - np.uint64(h.base)
        inside = offset < np.uint64(h.count * h.stride)
        if h.pad and (inside & (offset % np.uint64(h.stride) >= np.uint64(h.pad))).any():
            return True
    return False


def _called_from(target: Target, arch: Arch, meta: Meta) -> list[int]:
    """Threads that run a callback, or the original, beneath one of our lookup functions."""
    if not meta.calls:
        return []
    ours = np.array(meta.calls, dtype=np.uint64)
    return [tid for tid, words in _near_stack(target, arch, 1 << 20) if np.isin(words, ours).any()]


def _still_ours(target: Target, meta: Meta) -> Meta:
    """Leave out what is not mapped any more, because an earlier restore was killed while it unmapped.

    The journal cannot say how far that one came: forked children share it. But what is left of ours begins and ends
    where one of ours did and has no file but ours, and whatever the program maps there later hardly does.
    """

    def end(at: int, size: int) -> int:
        return at + ((size + target.page - 1) & -target.page)

    starts = {at for at, _ in meta.mappings}
    ends = {end(at, size) for at, size in meta.mappings}
    mappings = target.mappings()

    def ours(at: int, size: int) -> bool:
        pieces = [m for m in mappings if m.start < end(at, size) and m.end > at]
        return bool(pieces) and all(
            m.start in starts and m.end in ends and (not m.path or "fentry." in m.path) for m in pieces
        )

    left = [m for m in meta.mappings if ours(*m)]
    return replace(
        meta,
        mappings=left,
        code=[c for c in meta.code if c in left],
        region=meta.region if meta.region in left else (0, 0),
        context=meta.context if meta.context in left else (0, 0),
        size=meta.size if any(at <= meta.low + meta.shadow < at + size for at, size in left) else 0,
    )


def _switch_off(target: Target, meta: Meta) -> None:
    """Tell programs that wait for room not to."""
    at, size = meta.region
    if size:
        target.write(at + ring_layout.R_OFF, (1).to_bytes(8, "little"))  # house: data, a switch in the ring header


def _lend_back(target: Target, arch: Arch, meta: Meta, *, keep: Collection[int] = ()) -> None:
    """Clear segment bases (and a lent thread pointer) that are ours.

    Threads in `keep` are inside our programs, which reach their context through them.
    """
    d = arch.dialect
    low, size = meta.context
    for tid in target.threads():
        if tid in keep:
            continue
        regs = target.regs(tid)
        change = {}
        if d.segment_register and size and low <= regs[d.segment_register] < low + size:
            change[d.segment_register] = 0
        if d.thread_register and meta.tls and regs[d.thread_register] == meta.tls:
            change[d.thread_register] = 0
        if change:
            target.set_regs(tid, change)


def _stacks(target: Target, meta: Meta) -> list[Mapping]:
    """Writable mappings inside the mirrored window, without our own."""
    ours = {at for at, _ in meta.mappings}
    return [
        m
        for m in target.mappings()
        if m.perms.startswith("rw") and m.start < meta.low + meta.size and m.end > meta.low and m.start not in ours
    ]


def _unhook_frames(target: Target, meta: Meta) -> int:
    """Put the return addresses of hooked frames back where they belong.

    For architectures with return slots: a frame's return address lies on the stack at p while its original lies at
    p + shadow; so every word of a touched shadow page that stands over a hook's address names a frame, on whatever
    stack.
    """
    if not meta.hooks or not meta.size:
        return 0
    put = 0
    for m in _stacks(target, meta):
        start, end = max(m.start, meta.low), min(m.end, meta.low + meta.size)
        for lo, hi in target.touched(start + meta.shadow, end + meta.shadow):
            try:
                stack = np.frombuffer(target.read(lo - meta.shadow, hi - lo), dtype=np.uint64)
                shadow = np.frombuffer(target.read(lo, hi - lo), dtype=np.uint64)
            except Fault:
                continue
            for i in np.flatnonzero(hooked(stack, meta) & (shadow != 0)):
                original = int(shadow[i]).to_bytes(8, "little")
                target.write(lo - meta.shadow + 8 * int(i), original)  # house: data, a return address on a stack
                put += 1
    return put


def _linked_frames(target: Target, arch: Arch, meta: Meta) -> bool:
    """Tell whether a register or a word of a live stack is an address that hooked frames return to."""
    if not meta.hooks:
        return False
    mappings = target.mappings()
    for tid in target.threads():
        regs = target.regs(tid)
        values = np.array([v for v in regs.values() if 0 <= v < 1 << 64], dtype=np.uint64)
        if hooked(values, meta).any():
            return True
        sp = regs[arch.sp] & -8
        for m in mappings:
            if m.start <= sp < m.end and hooked(np.frombuffer(target.read(sp, m.end - sp), np.uint64), meta).any():
                return True
    return False


def hooked(words: np.ndarray, meta: Meta) -> np.ndarray:
    """Which words are addresses that hooked frames return to."""
    mask = np.zeros(len(words), dtype=bool)
    for h in meta.hooks:
        offset = words - np.uint64(h.base)
        mask |= (offset < np.uint64(h.count * h.stride)) & (offset % np.uint64(h.stride) == np.uint64(h.hook))
    return mask


def recover(target: Target) -> Report:
    """Restore a stopped target whose tracer was killed.

    Raises: TargetRefused if it has no journal.
    """
    found = find_journal(target)
    if found is None:
        raise TargetRefused(f"process {target.pid} holds nothing of fentry's", hint="it is not being traced")
    meta, entries = found
    return restore(target, _still_ours(target, meta), entries)
