"""What /proc tells about a process: threads, states, mappings, loaded images, identity.

`tid` may be any live thread of the process: /proc/TID has the same files as /proc/PID, and goes on
working after the first thread has ended (whose own entry is then a zombie without memory).

Sources: proc(5); Linux ``Documentation/filesystems/proc.rst`` tables 1-2 (status) and 1-4 (stat).
"""

from __future__ import annotations

import bisect
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fentry.errors import Denied, Gone
from fentry.target import Mapping, Module

AT_PHDR, AT_ENTRY = 3, 9  # elf.h
_PT_LOAD = 1
_MAX_PHDRS = 4096  # a real file has about a dozen; a hostile one may claim 65,535
_PF_KTHREAD = 0x00200000  # include/linux/sched.h
_DELETED = " (deleted)"


@dataclass(frozen=True, slots=True)
class Region:
    """A Mapping with the identity of its file."""

    mapping: Mapping
    device: int  #: as os.makedev gives it
    inode: int  #: 0 if there is no file

    @property
    def deleted(self) -> bool:
        """The file has no name any more (replaced by an upgrade, memfd)."""
        return self.inode != 0 and self.mapping.path.endswith(_DELETED)


@dataclass(frozen=True, slots=True)
class Identity:
    """Tells a process from its successors: another one under the same number, or the same one after exec.

    Addresses in the auxiliary vector are drawn anew by every exec, so that even an exec of the same
    file shows.
    """

    started: int  #: clock ticks after boot
    executable: tuple[int, int]  #: device, inode
    auxv: bytes


def _read(path: str, tid: int) -> bytes:
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"process {tid} is gone") from None
    except PermissionError:
        raise Denied(
            f"not permitted to read {path}",
            hint="run as the process's own user, or as root",
        ) from None


def tids(pid: int) -> list[int]:
    """Thread ids, the one that was started first in front. Raises Gone."""
    try:
        found = sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"process {pid} is gone") from None
    if pid in found:
        found.remove(pid)
        found.insert(0, pid)
    return found


def status(tid: int) -> dict[str, str]:
    """The lines of /proc/TID/status by name. Raises Gone."""
    text = _read(f"/proc/{tid}/status", tid).decode("utf-8", "replace")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def stat(tid: int) -> list[str]:
    """Fields of /proc/TID/stat from the state on: item 0 is field 3 of proc(5). Raises Gone."""
    text = _read(f"/proc/{tid}/stat", tid).decode("utf-8", "replace")
    return text[text.rindex(")") + 1 :].split()


def state(tid: int) -> str:
    """State letter of a thread ("R", "S", "D", "T", "t", "Z", ...), or "" if there is none."""
    try:
        return stat(tid)[0]
    except Gone:
        return ""


def is_kernel_thread(tid: int) -> bool:
    """Whether this thread has no user space. Raises Gone."""
    return bool(int(stat(tid)[6]) & _PF_KTHREAD)


def comm(tid: int) -> str:
    """Name of a thread. Raises Gone."""
    return _read(f"/proc/{tid}/comm", tid).decode("utf-8", "replace").rstrip("\n")


def start_brk(tid: int) -> int:
    """Where the program break started; 0 if the kernel does not say. Raises Gone."""
    return int(stat(tid)[44])


def auxv(tid: int) -> dict[int, int]:
    """The auxiliary vector. Raises Gone, Denied."""
    raw = _read(f"/proc/{tid}/auxv", tid)
    return dict(struct.iter_unpack("<QQ", raw[: len(raw) & -16]))


def identity(tid: int) -> Identity:
    """Tell which program runs in which process now. Raises Gone, Denied."""
    raw = _read(f"/proc/{tid}/auxv", tid)
    started = int(stat(tid)[19])
    try:
        exe = Path(f"/proc/{tid}/exe").stat()
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"process {tid} is gone") from None
    except PermissionError:
        raise Denied(f"not permitted to look at /proc/{tid}/exe", hint="run as the process's own user") from None
    return Identity(started, (exe.st_dev, exe.st_ino), raw)


def regions(tid: int) -> list[Region]:
    """All mapped ranges in address order. Raises Gone, Denied."""
    text = _read(f"/proc/{tid}/maps", tid).decode("utf-8", "surrogateescape")
    return [_region(line) for line in text.splitlines()]


def _region(line: str) -> Region:
    fields = line.split(None, 5)
    start, _, end = fields[0].partition("-")
    major, _, minor = fields[3].partition(":")
    path = fields[5] if len(fields) > 5 else ""
    if "\\" in path:  # the kernel writes a newline in a name as \012
        path = path.replace("\\012", "\n")
    mapping = Mapping(int(start, 16), int(end, 16), fields[1], int(fields[2], 16), path)
    return Region(mapping, os.makedev(int(major, 16), int(minor, 16)), int(fields[4]))


def host_path(tid: int, region: Region) -> str:
    """A path this host can open for the file of `region`, or "".

    The name in the maps is as the target sees it: it may live in another root or mount namespace, and
    another file may have taken the name. A deleted file can be opened through map_files, by the
    privileged only.
    """
    if not region.inode:
        return ""
    mapping = region.mapping
    candidates = [f"/proc/{tid}/map_files/{mapping.start:x}-{mapping.end:x}", f"/proc/{tid}/exe"]
    if not region.deleted:
        candidates.insert(0, f"/proc/{tid}/root{mapping.path}")
        if _same_root(tid):
            candidates.insert(0, mapping.path)
    for path in candidates:
        try:
            if Path(path).stat().st_ino == region.inode and os.access(path, os.R_OK):
                return path
        except OSError:
            continue
    return ""


def _same_root(tid: int) -> bool:
    try:
        spaces = [Path(f"/proc/{who}/ns/mnt").readlink() for who in (tid, "self")]
        return spaces[0] == spaces[1] and Path(f"/proc/{tid}/root").samefile("/")
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class _Load:
    """A PT_LOAD program header."""

    offset: int
    vaddr: int
    filesz: int
    memsz: int


def _loads(head: bytes, read: Callable[[int, int], bytes]) -> list[_Load]:
    """PT_LOAD entries of an ELF64 image in address order; empty if it is none."""
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return []
    phoff, phentsize, phnum = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
    if phentsize != 56 or phnum > _MAX_PHDRS or phoff >= 1 << 62:
        return []
    table = read(phoff, phnum * phentsize)
    found = []
    for at in range(0, len(table) // 56 * 56, 56):
        kind, _, offset, vaddr, _, filesz, memsz, _ = struct.unpack_from("<IIQQQQQQ", table, at)
        if kind == _PT_LOAD and memsz:
            found.append(_Load(offset, vaddr, filesz, memsz))
    return sorted(found, key=lambda load: load.vaddr)


def _loads_of_file(path: str) -> list[_Load]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        return _loads(os.pread(fd, 64, 0), lambda at, size: os.pread(fd, size, at))
    except (OSError, OverflowError):
        return []
    finally:
        os.close(fd)


def modules(tid: int, read: Callable[[int, int], bytes]) -> list[Module]:
    """Loaded images, the program itself first.

    An image is a mapped ELF file whose segments lie where its program headers want them, one of them
    executable; a file that is merely mapped to be read is none. A file loaded twice (dlmopen) gives two.

    Args:
        tid: any live thread.
        read: reads target memory (address, size); used where there is no file, as for the vdso.
    """
    ranges = regions(tid)
    starts = [region.mapping.start for region in ranges]
    entry = auxv(tid).get(AT_PHDR, 0)
    coded = {(r.device, r.inode) for r in ranges if r.inode and "x" in r.mapping.perms}
    known: dict[tuple[int, int], tuple[str, list[_Load]]] = {}
    found: list[Module] = []
    for region in ranges:
        mapping = region.mapping
        if mapping.path == "[vdso]":
            loads = _loads_in_memory(mapping, read)
            bias = mapping.start - (loads[0].vaddr & -4096 if loads else 0)
            found.append(Module("[vdso]", "[vdso]", "", bias, mapping.start, mapping.end))
            continue
        key = (region.device, region.inode)
        if key not in coded:
            continue
        if key not in known:
            path = host_path(tid, region)
            known[key] = (path, _loads_of_file(path) if path else _loads_in_memory(mapping, read))
        path, loads = known[key]
        found += _placed(region, path, loads, ranges, starts)
    main = [i for i, module in enumerate(found) if module.start <= entry < module.end][:1]
    first = [replace(found[i], main=True) for i in main]
    return first + [module for i, module in enumerate(found) if i not in main]


def _loads_in_memory(mapping: Mapping, read: Callable[[int, int], bytes]) -> list[_Load]:
    if mapping.offset or "r" not in mapping.perms or mapping.size < 4096:
        return []
    page = read(mapping.start, 4096)
    return _loads(page, lambda at, size: page[at : at + size])


def _placed(region: Region, path: str, loads: list[_Load], ranges: list[Region], starts: list[int]) -> Iterator[Module]:
    """The image that begins with `region`, if one does; `starts` are the first addresses of `ranges`."""
    mapping = region.mapping
    if not loads or mapping.offset != loads[0].offset & -4096:
        return
    bias = mapping.start - (loads[0].vaddr & -4096)
    for load in loads:
        if not load.filesz:
            continue
        at = bias + load.vaddr
        home = ranges[bisect.bisect_right(starts, at) - 1]
        inside = home.mapping.start <= at < home.mapping.end
        if not inside or (home.device, home.inode) != (region.device, region.inode):
            return
        if home.mapping.offset + at - home.mapping.start != load.offset:
            return
    end = max(bias + load.vaddr + load.memsz for load in loads)
    seen = mapping.path.removesuffix(_DELETED)
    yield Module(Path(seen).name, seen, path, bias, mapping.start, (end + 4095) & -4096)
