"""The address space of an emulated program: regions of host memory seen by the guest.

Every region is backed by an anonymous mapping of this host, handed to the emulator by pointer, so that

* reading and writing target memory is a slice of a host buffer, page protection or not;
* untouched pages of a large region cost nothing;
* a region can be seen from both sides at once.

Splitting (``unmap`` or ``protect`` of a part) keeps both halves on the same host bytes.
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unicorn import Uc, UcError, unicorn_const

from fentry.errors import AskedWrong, Fault, OutOfReach, Unsupported
from fentry.target import Mapping

_MAP_NORESERVE = 0x4000  # include/uapi/asm-generic/mman.h (6.1); the mmap module names it from Python 3.13 on

LARGEST = 1 << 36
"""Bytes of the largest single region: the emulator walks every page of a region when it goes (60 ns each)."""


@dataclass(slots=True)
class Region:
    """One mapped range with one protection; `host` is None for a device."""

    start: int
    end: int
    perms: str  #: "rwx" with "-" for what is missing
    path: str
    offset: int  #: file offset of ``start``
    host: mmap.mmap | None
    base: int  #: offset of ``start`` in ``host``

    def cut(self, start: int, end: int) -> Region:
        """Give the part [start, end) of this region."""
        return Region(
            start,
            end,
            self.perms,
            self.path,
            self.offset + (start - self.start if self.path and not self.path.startswith("[") else 0),
            self.host,
            self.base + start - self.start,
        )

    def joins(self, after: Region) -> bool:
        """Tell whether `after` goes on where this one ends, in the guest, the host and the file."""
        return (
            self.end == after.start
            and self.host is not None
            and self.host is after.host
            and (self.perms, self.path) == (after.perms, after.path)
            and self.base + self.end - self.start == after.base
            and self.cut(self.end, self.end).offset == after.offset
        )


def host_buffer(size: int) -> mmap.mmap:
    """Reserve `size` zeroed bytes of this host, backed page by page as they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def host_address(buffer: mmap.mmap) -> int:
    """Give the address of a host buffer in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class Space:
    """The regions of one emulated machine, in address order, and the verbs that change them.

    Args:
        uc: the machine, or None for a space that stays empty.
        low: lowest address that ``hole`` gives.
        high: one past the highest.
        page: bytes.
    """

    def __init__(self, uc: Uc | None, *, low: int, high: int, page: int = 4096) -> None:
        self._uc: Any = uc
        self._starts: list[int] = []
        self._regions: list[Region] = []
        self.low = low
        self.high = high
        self.page = page

    # -- what is there ----------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self._regions)

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions)

    def at(self, at: int) -> Region | None:
        """Give the region that holds `at`, or None."""
        i = bisect_right(self._starts, at) - 1
        if i >= 0 and at < self._regions[i].end:
            return self._regions[i]
        return None

    def within(self, start: int, end: int) -> list[Region]:
        """Give the regions that overlap [start, end)."""
        i = max(bisect_right(self._starts, start) - 1, 0)
        found = []
        for region in self._regions[i:]:
            if region.start >= end:
                break
            if region.end > start:
                found.append(region)
        return found

    def covered(self, at: int, size: int) -> int:
        """Count the bytes from `at` on, at most `size`, that are memory without a gap."""
        end = at
        for region in self.within(at, at + size):
            if region.start > end or region.host is None:
                break
            end = min(region.end, at + size)
        return end - at

    def mappings(self) -> list[Mapping]:
        """All regions as /proc/PID/maps would list them."""
        return [Mapping(r.start, r.end, r.perms + "p", r.offset, r.path) for r in self._regions]

    # -- bytes --------------------------------------------------------------------------------------
    def read(self, at: int, size: int) -> bytes:
        """Read exactly `size` bytes, whatever the protection. Raises Fault."""
        if size < 0:
            raise AskedWrong(f"cannot read {size} bytes")
        if self.covered(at, size) < size:
            raise Fault(at, size)
        found = []
        for region in self.within(at, at + size):
            assert region.host is not None
            lo, hi = max(at, region.start), min(at + size, region.end)
            found.append(region.host[region.base + lo - region.start : region.base + hi - region.start])
        return found[0] if len(found) == 1 else b"".join(found)

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Write `data`, whatever the protection; all of it or nothing. Raises Fault."""
        size = len(data)
        if self.covered(at, size) < size:
            raise Fault(at, size, "write")
        for region in self.within(at, at + size):
            assert region.host is not None
            lo, hi = max(at, region.start), min(at + size, region.end)
            region.host[region.base + lo - region.start : region.base + hi - region.start] = bytes(
                data[lo - at : hi - at]
            )

    # -- change -------------------------------------------------------------------------------------
    def map(
        self,
        at: int,
        size: int,
        perms: str,
        *,
        path: str = "",
        offset: int = 0,
        host: mmap.mmap | None = None,
        base: int = 0,
    ) -> mmap.mmap:
        """Map [at, at+size) on fresh zeroed memory, or on `host` from `base` on.

        Returns: the host buffer.
        Raises: AskedWrong if the range is not whole pages or not free. Unsupported if it is too large.
        """
        self._whole_pages(at, size)
        if self.within(at, at + size):
            raise AskedWrong(f"{at:#x}..{at + size:#x} is not free in the emulated address space")
        if size > LARGEST:
            raise Unsupported(f"a mapping of {size:#x} bytes is too large for the emulator (limit {LARGEST:#x})")
        if host is None:
            try:
                host = host_buffer(size)
            except (OSError, ValueError, OverflowError) as e:
                raise Unsupported(f"this host has no {size:#x} bytes of address space left: {e}") from e
        try:
            self._uc.mem_map_ptr(at, size, _flags(perms), host_address(host) + base)
        except UcError as e:
            raise Unsupported(f"the emulator cannot map {size:#x} bytes at {at:#x}: {e}") from e
        self._insert(Region(at, at + size, perms, path, offset, host, base))
        return host

    def device(self, at: int, size: int, path: str) -> None:
        """Note that [at, at+size) answers as a device (the emulator was told already)."""
        self._insert(Region(at, at + size, "rw-", path, 0, None, 0))

    def unmap(self, at: int, size: int) -> None:
        """Unmap whatever memory lies in [at, at+size). Raises AskedWrong if not whole pages."""
        self._whole_pages(at, size)
        end = at + size
        for region in self.within(at, end):
            lo, hi = max(at, region.start), min(end, region.end)
            self._uc.mem_unmap(lo, hi - lo)
            self._remove(region)
            if region.start < lo:
                self._insert(region.cut(region.start, lo))
            if hi < region.end:
                self._insert(region.cut(hi, region.end))

    def protect(self, at: int, size: int, perms: str) -> None:
        """Change the protection of [at, at+size). Raises Fault if a part of it is not mapped."""
        self._whole_pages(at, size)
        end = at + size
        if self.covered(at, size) < size:
            raise Fault(at, size, "protect")
        for region in self.within(at, end):
            lo, hi = max(at, region.start), min(end, region.end)
            if region.perms == perms:
                continue
            self._uc.mem_protect(lo, hi - lo, _flags(perms))
            self._remove(region)
            middle = region.cut(lo, hi)
            middle.perms = perms
            for part in (region.cut(region.start, lo), middle, region.cut(hi, region.end)):
                if part.start < part.end:
                    self._insert(part)

    def join(self, start: int, end: int) -> None:
        """Make one region of neighbours in [start, end) that only history keeps apart.

        The emulator's cost of a change grows with the number of regions (about 1 us each).
        """
        run: list[Region] = []
        for region in [*self.within(start, end), None]:
            if region is not None and (not run or run[-1].joins(region)):
                run.append(region)
                continue
            if len(run) > 1:
                first, size = run[0], run[-1].end - run[0].start
                self.unmap(first.start, size)
                self.map(
                    first.start,
                    size,
                    first.perms,
                    path=first.path,
                    offset=first.offset,
                    host=first.host,
                    base=first.base,
                )
            run = [] if region is None else [region]

    # -- room ---------------------------------------------------------------------------------------
    def hole(
        self,
        size: int,
        *,
        near: int | None = None,
        reach: int = 0,
        top: int | None = None,
        avoid: tuple[tuple[int, int], ...] = (),
    ) -> int:
        """Find `size` free bytes.

        Args:
            size: whole pages.
            near: the whole range must lie within `reach` bytes of it, as close as can be; without it,
                the highest hole below `top`.
            reach: bytes.
            top: an upper end, ``high`` by default.
            avoid: ranges to leave free.

        Raises: OutOfReach (with `near`) or Unsupported when there is none.
        """
        low, high = self.low, min(self.high, self.high if top is None else top)
        if near is not None:
            low, high = max(low, near - reach), min(self.high, near + reach)
        low = -(-low // self.page) * self.page
        high = high // self.page * self.page
        taken = sorted([(r.start, r.end) for r in self._regions] + [a for a in avoid if a[0] < a[1]])
        best, best_distance, free = -1, 0, low
        for start, end in [*taken, (high, high)]:
            room_end = min(start, high)
            if room_end - free >= size:
                if near is None:
                    best = room_end - size
                else:
                    spot = min(max(free, near // self.page * self.page), room_end - size)
                    distance = max(spot - near, near - spot)
                    if best < 0 or distance < best_distance:
                        best, best_distance = spot, distance
            free = max(free, end)
        if best >= 0:
            return best
        if near is not None:
            raise OutOfReach(near, near + size, reach)
        raise Unsupported(f"no hole of {size:#x} bytes is left in the emulated address space")

    def release(self) -> None:
        """Let go of the machine, then of all memory; nothing is left here."""
        self._uc = None
        self._starts.clear()
        self._regions.clear()

    def _whole_pages(self, at: int, size: int) -> None:
        if at % self.page or size % self.page or size <= 0 or at < 0 or at + size > 1 << 64:
            raise AskedWrong(f"{at:#x}, {size:#x} bytes: not whole pages of the address space")

    def _insert(self, region: Region) -> None:
        i = bisect_right(self._starts, region.start)
        self._starts.insert(i, region.start)
        self._regions.insert(i, region)

    def _remove(self, region: Region) -> None:
        i = bisect_right(self._starts, region.start) - 1
        del self._starts[i], self._regions[i]


def _flags(perms: str) -> int:
    """Turn "r-x" into the emulator's protection bits."""
    read, write, run = unicorn_const.UC_PROT_READ, unicorn_const.UC_PROT_WRITE, unicorn_const.UC_PROT_EXEC
    bits = {"r": read, "w": write, "x": run, "-": 0}
    if len(perms) != 3 or any(c not in (want, "-") for c, want in zip(perms, "rwx", strict=True)):
        raise AskedWrong(f"protection {perms!r} is not of the form 'r-x'")
    return sum(bits[c] for c in perms)
