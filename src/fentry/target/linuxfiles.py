# ruff: noqa: D102 - sys_NAME is the system call NAME; section 2 of the manual is its docstring
"""File system calls of an emulated Linux program, on the real files of this host.

Numbers and structures are those of ``include/uapi/asm-generic`` (6.1). Handlers are called ``sys_NAME``, take the six
argument registers and return a number; an OSError becomes the negative error number.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import select
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fentry.errors import AskedWrong, Fault
from fentry.target.guestspace import Space

PAGE = 4096
CHUNK = 1 << 20  #: bytes moved between a file and the program at a time
AT_FDCWD = -100
MAX_FILES = 1024  #: descriptors of one program, as RLIMIT_NOFILE says


def int32(value: int) -> int:
    """Give the low 32 bits of a register as the C int that they are."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def int64(value: int) -> int:
    """Give a register as a signed number."""
    return value - (1 << 64) if value >> 63 else value


@runtime_checkable
class Reader(Protocol):
    """Where standard input may come from."""

    def read(self, size: int, /) -> bytes:
        """Give up to `size` bytes; none means end of file."""


@runtime_checkable
class Writer(Protocol):
    """Where standard output may go."""

    def write(self, data: bytes, /) -> object:
        """Take all of `data`."""


Stream = int | bytes | Reader | Writer | None
"""A host descriptor, input bytes, an object with read() or write(), or None for the host's own."""


@dataclass(slots=True)
class OpenFile:
    """What a guest descriptor stands for; descriptors made by dup share one."""

    fd: int = -1  #: descriptor of this host, or -1
    owned: bool = False  #: close `fd` with the last reference
    source: Reader | None = None
    sink: Writer | None = None
    path: str = ""
    flags: int = 0
    entries: list[tuple[str, int, int]] | None = None  #: a directory's (name, inode, type)
    next_entry: int = 0
    references: int = 1


def stream_file(stream: Stream, fd: int) -> OpenFile:
    """Make what guest descriptor `fd` (0, 1 or 2) stands for."""
    if stream is None:
        return OpenFile(fd=fd)
    if isinstance(stream, int):
        return OpenFile(fd=stream)
    if isinstance(stream, bytes):
        return OpenFile(source=io.BytesIO(stream))
    if fd == 0 and isinstance(stream, Reader):
        return OpenFile(source=stream)
    if fd and isinstance(stream, Writer):
        return OpenFile(sink=stream)
    raise AskedWrong(f"{stream!r} cannot be standard {('input', 'output', 'error')[fd]}")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back a Ctrl-C: a call must not be half done when it comes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def await_input(fd: int) -> None:
    """Wait until a read of `fd` would not block; a Ctrl-C ends the wait with nothing read."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        with contextlib.suppress(ValueError):  # a number that select does not take: files with many others open
            select.select([fd], [], [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Files:
    """Descriptors and paths of one program.

    Args:
        space: its memory.
        streams: what its descriptors 0, 1 and 2 are.
        exe: path of the program.
        pid: what it believes to be its process id.
        now: gives the time of day in nanoseconds.
        broken_pipe: called when a pipe it writes to has no reader.
    """

    def __init__(
        self,
        space: Space,
        streams: tuple[Stream, Stream, Stream],
        *,
        exe: str,
        pid: int,
        now: Callable[[], int],
        broken_pipe: Callable[[], None],
    ) -> None:
        self.space = space
        self.files = {fd: stream_file(stream, fd) for fd, stream in enumerate(streams)}
        self._exe = exe
        self._pid = pid
        self._now = now
        self._broken_pipe = broken_pipe
        self._cwd = os.getcwd()  # noqa: PTH109 - a guest's path stays a string
        self._umask = 0o022

    def close(self) -> None:
        """Close the host files that the program opened."""
        for number in list(self.files):
            self.drop(number)

    # -- what the handlers share --------------------------------------------------------------------
    def file(self, fd: int) -> OpenFile:
        try:
            return self.files[int32(fd)]
        except KeyError:
            raise OSError(errno.EBADF, "no such descriptor") from None

    def _new_fd(self, file: OpenFile, low: int = 0) -> int:
        fd = next((n for n in range(low, MAX_FILES) if n not in self.files), -1)
        if fd < 0:
            raise OSError(errno.EMFILE, "too many descriptors")
        self.files[fd] = file
        return fd

    def drop(self, fd: int) -> None:
        file = self.file(fd)
        del self.files[int32(fd)]
        file.references -= 1
        if not file.references and file.owned:
            os.close(file.fd)

    def _string(self, at: int) -> bytes:
        """Read a string of at most PATH_MAX bytes."""
        found = b""
        while len(found) < 4096:
            size = PAGE - at % PAGE
            part = self.space.read(at, size)
            end = part.find(b"\0")
            if end >= 0:
                return found + part[:end]
            found += part
            at += size
        raise OSError(errno.ENAMETOOLONG, "path too long")

    def _place(self, dirfd: int, at: int) -> tuple[str, int | None]:
        """Read a path and give what functions of os want: (path, dir_fd)."""
        path = os.fsdecode(self._string(at))
        if not path:
            raise FileNotFoundError(errno.ENOENT, "empty path")
        if path in ("/proc/self/exe", f"/proc/{self._pid}/exe"):
            return self._exe, None
        if path.startswith(("/proc/self", f"/proc/{self._pid}/", "/proc/thread-self")):
            raise FileNotFoundError(errno.ENOENT, "not emulated")
        if path.startswith("/"):
            return path, None
        if int32(dirfd) == AT_FDCWD:
            return os.path.join(self._cwd, path), None  # noqa: PTH118 - a guest's path stays a string
        return path, self.host_fd(dirfd)

    def host_fd(self, fd: int) -> int:
        if int32(fd) == AT_FDCWD:
            raise OSError(errno.EBADF, "no such descriptor")
        file = self.file(fd)
        if file.fd < 0:
            raise OSError(errno.EINVAL, "not a file")
        return file.fd

    def _vector(self, at: int, count: int) -> list[tuple[int, int]]:
        if not 0 <= int32(count) <= 1024:
            raise OSError(errno.EINVAL, "too many pieces")
        words = struct.unpack(f"<{2 * count}Q", self.space.read(at, 16 * count))
        return list(zip(words[::2], words[1::2], strict=True))

    # -- files --------------------------------------------------------------------------------------
    def _read_some(self, file: OpenFile, size: int, at: int | None) -> bytes:
        size = min(size, CHUNK)
        if file.fd >= 0:
            return os.read(file.fd, size) if at is None else os.pread(file.fd, size, at)
        if at is not None:
            raise OSError(errno.ESPIPE, "a stream has no position")
        if file.source is None:
            raise OSError(errno.EBADF, "not open for reading")
        return file.source.read(size)

    def _read_into(self, fd: int, pieces: list[tuple[int, int]], at: int | None = None) -> int:
        file, total = self.file(fd), 0
        for buffer, size in pieces:
            room = self.space.covered(buffer, min(size, 1 << 31))
            if size and not room:
                raise Fault(buffer, size, "write")
            if not size:
                continue
            if not total and at is None and file.fd >= 0:
                await_input(file.fd)
            data = self._read_some(file, room, None if at is None else at + total)
            self.space.write(buffer, data)
            total += len(data)
            if len(data) < size:
                break
        return total

    def _write_from(self, fd: int, pieces: list[tuple[int, int]], at: int | None = None) -> int:
        file, total = self.file(fd), 0
        for buffer, size in pieces:
            done = 0
            while done < size:
                data = self.space.read(buffer + done, min(size - done, CHUNK))
                if file.fd >= 0:
                    n = os.write(file.fd, data) if at is None else os.pwrite(file.fd, data, at + total)
                elif file.sink is None:
                    raise OSError(errno.EBADF, "not open for writing")
                else:
                    file.sink.write(data)
                    n = len(data)
                done += n
                total += n
                if n < len(data):
                    return total
        return total

    def _guarded_write(self, fd: int, pieces: list[tuple[int, int]], at: int | None = None) -> int:
        try:
            return self._write_from(fd, pieces, at)
        except BrokenPipeError:
            self._broken_pipe()
            raise

    def sys_read(self, fd: int, at: int, size: int, *_: int) -> int:
        return self._read_into(fd, [(at, size)])

    def sys_write(self, fd: int, at: int, size: int, *_: int) -> int:
        self.file(fd)
        return self._guarded_write(fd, [(at, size)])

    def sys_readv(self, fd: int, at: int, count: int, *_: int) -> int:
        return self._read_into(fd, self._vector(at, count))

    def sys_writev(self, fd: int, at: int, count: int, *_: int) -> int:
        return self._guarded_write(fd, self._vector(at, count))

    def sys_pread64(self, fd: int, at: int, size: int, offset: int, *_: int) -> int:
        return self._read_into(fd, [(at, size)], int64(offset))

    def sys_pwrite64(self, fd: int, at: int, size: int, offset: int, *_: int) -> int:
        return self._guarded_write(fd, [(at, size)], int64(offset))

    def sys_lseek(self, fd: int, offset: int, whence: int, *_: int) -> int:
        file = self.file(fd)
        if file.fd < 0:
            raise OSError(errno.ESPIPE, "a stream has no position")
        if file.entries is not None and whence == 0:
            file.entries, file.next_entry = (None, 0) if offset == 0 else (file.entries, offset)
            return offset
        return os.lseek(file.fd, int64(offset), whence)

    def sys_openat(self, dirfd: int, path: int, flags: int, mode: int, *_: int) -> int:
        if self._string(path) in (b"/proc/self/maps", b"/proc/%d/maps" % self._pid):
            text = "".join(
                f"{m.start:x}-{m.end:x} {m.perms} {m.offset:08x} 00:00 0 {m.path}\n" for m in self.space.mappings()
            )
            return self._new_fd(OpenFile(source=io.BytesIO(text.encode()), path="/proc/self/maps"))
        where, dir_fd = self._place(dirfd, path)
        # include/uapi/asm-generic/fcntl.h against this host's own numbers
        host = flags & 3 | os.O_CLOEXEC
        for bit, name in (
            (0o100, "O_CREAT"),
            (0o200, "O_EXCL"),
            (0o400, "O_NOCTTY"),
            (0o1000, "O_TRUNC"),
            (0o2000, "O_APPEND"),
            (0o4000, "O_NONBLOCK"),
            (0o10000, "O_DSYNC"),
            (0o200000, "O_DIRECTORY"),
            (0o400000, "O_NOFOLLOW"),
            (0o1000000, "O_NOATIME"),
            (0o4000000, "O_SYNC"),
            (0o10000000, "O_PATH"),
        ):
            if flags & bit:
                host |= getattr(os, name)
        if len(self.files) >= MAX_FILES:
            raise OSError(errno.EMFILE, "too many descriptors")
        fd = os.open(where, host, mode & 0o7777 & ~self._umask, dir_fd=dir_fd)
        return self._new_fd(OpenFile(fd=fd, owned=True, path=where, flags=flags))

    def sys_close(self, fd: int, *_: int) -> int:
        self.drop(fd)
        return 0

    def sys_dup(self, fd: int, *_: int) -> int:
        file = self.file(fd)
        file.references += 1
        return self._new_fd(file)

    def sys_dup3(self, old: int, new: int, *_: int) -> int:
        file = self.file(old)
        if int32(old) == int32(new) or not 0 <= int32(new) < MAX_FILES:
            raise OSError(errno.EINVAL, "same or bad descriptor")
        if int32(new) in self.files:
            self.drop(new)
        file.references += 1
        self.files[int32(new)] = file
        return int32(new)

    def sys_fcntl(self, fd: int, what: int, arg: int, *_: int) -> int:
        file = self.file(fd)
        if what in (0, 1030):  # F_DUPFD, F_DUPFD_CLOEXEC
            file.references += 1
            return self._new_fd(file, arg)
        if what in (1, 2):  # F_GETFD, F_SETFD: there is no exec
            return 1 if what == 1 and file.flags & 0o2000000 else 0
        if file.fd < 0:
            return 0 if file.source is not None else 1
        if what == 3:  # F_GETFL
            return fcntl.fcntl(file.fd, fcntl.F_GETFL)
        if what == 4:  # F_SETFL would change the host's own terminal for everyone
            return fcntl.fcntl(file.fd, fcntl.F_SETFL, arg) if file.owned else 0
        if what in (5, 6, 7):  # F_GETLK, F_SETLK, F_SETLKW: one struct flock on every 64-bit port
            reply = fcntl.fcntl(file.fd, what, self.space.read(arg, 32))
            self.space.write(arg, reply)
            return 0
        raise OSError(errno.EINVAL, "unknown fcntl")

    def sys_ioctl(self, fd: int, request: int, at: int, *_: int) -> int:
        file = self.file(fd)
        sizes = {0x5401: 36, 0x5413: 8}  # TCGETS, TIOCGWINSZ: asm-generic/ioctls.h, termbits.h
        if file.fd < 0 or request not in sizes:
            raise OSError(errno.ENOTTY, "not a terminal")
        reply = fcntl.ioctl(file.fd, request, bytes(64))
        self.space.write(at, reply[: sizes[request]])
        return 0

    def _put_stat(self, at: int, s: os.stat_result | None) -> int:
        """Write struct stat of asm-generic/stat.h: 128 bytes."""
        if s is None:  # a stream that is no file of this host: a pipe
            values = [0, 0, stat.S_IFIFO | 0o600, 1, 0, 0, 0, 0, 0, PAGE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        else:
            times = [part for t in (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns) for part in divmod(t, 10**9)]
            values = [s.st_dev, s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_rdev, 0, s.st_size]
            values += [s.st_blksize, 0, s.st_blocks, *times, 0, 0]
        self.space.write(at, struct.pack("<QQIIIIQQqiiqqQqQqQII", *values))
        return 0

    def sys_fstat(self, fd: int, at: int, *_: int) -> int:
        file = self.file(fd)
        return self._put_stat(at, os.fstat(file.fd) if file.fd >= 0 else None)

    def _stat(self, dirfd: int, path: int, flags: int) -> os.stat_result | None:
        if flags & 0x1000 and not self._string(path):  # AT_EMPTY_PATH
            file = self.file(dirfd)
            return os.fstat(file.fd) if file.fd >= 0 else None
        where, dir_fd = self._place(dirfd, path)
        return os.stat(where, dir_fd=dir_fd, follow_symlinks=not flags & 0x100)

    def sys_newfstatat(self, dirfd: int, path: int, at: int, flags: int, *_: int) -> int:
        return self._put_stat(at, self._stat(dirfd, path, flags))

    def sys_statx(self, dirfd: int, path: int, flags: int, _mask: int, at: int, *_: int) -> int:
        s = self._stat(dirfd, path, flags)
        if s is None:
            s = os.stat_result((stat.S_IFIFO | 0o600, 0, 0, 1, 0, 0, 0, 0, 0, 0))

        def when(ns: int) -> bytes:
            return struct.pack("<qIi", *divmod(ns, 10**9), 0)

        head = struct.pack("<IIQIIIHHQQQQ", 0x7FF, getattr(s, "st_blksize", PAGE), 0, s.st_nlink, s.st_uid, s.st_gid,
                           s.st_mode, 0, s.st_ino, s.st_size, getattr(s, "st_blocks", 0), 0)  # fmt: skip
        times = when(s.st_atime_ns) + bytes(16) + when(s.st_ctime_ns) + when(s.st_mtime_ns)
        rdev, dev = getattr(s, "st_rdev", 0), s.st_dev
        tail = struct.pack("<IIII", os.major(rdev), os.minor(rdev), os.major(dev), os.minor(dev))
        self.space.write(at, (head + times + tail).ljust(256, b"\0"))  # struct statx, linux/stat.h
        return 0

    def sys_readlinkat(self, dirfd: int, path: int, at: int, size: int, *_: int) -> int:
        if self._string(path) == b"/proc/self/exe":
            link = os.fsencode(os.path.realpath(self._exe))
        else:
            where, dir_fd = self._place(dirfd, path)
            link = os.fsencode(os.readlink(where, dir_fd=dir_fd))
        self.space.write(at, link[:size])
        return min(len(link), size)

    def sys_faccessat(self, dirfd: int, path: int, mode: int, *_: int) -> int:
        where, dir_fd = self._place(dirfd, path)
        os.stat(where, dir_fd=dir_fd)
        if not os.access(where, mode, dir_fd=dir_fd):
            raise OSError(errno.EACCES, "no access")
        return 0

    sys_faccessat2 = sys_faccessat

    def sys_getcwd(self, at: int, size: int, *_: int) -> int:
        path = os.fsencode(self._cwd) + b"\0"
        if len(path) > size:
            raise OSError(errno.ERANGE, "buffer too small")
        self.space.write(at, path)
        return len(path)

    def sys_chdir(self, path: int, *_: int) -> int:
        where = self._place(AT_FDCWD & (1 << 64) - 1, path)[0]
        if not stat.S_ISDIR(os.stat(where).st_mode):  # noqa: PTH116 - a guest's path stays a string
            raise OSError(errno.ENOTDIR, "not a directory")
        self._cwd = os.path.realpath(where)
        return 0

    def sys_getdents64(self, fd: int, at: int, size: int, *_: int) -> int:
        file = self.file(fd)
        if file.entries is None:
            host = self.host_fd(fd)
            file.entries = [(".", 1, 4), ("..", 1, 4)]
            kinds = (
                (10, os.DirEntry.is_symlink),
                (4, os.DirEntry.is_dir),
                (8, os.DirEntry.is_file),
            )  # DT_LNK, DT_DIR, DT_REG
            with os.scandir(host) as found:
                for entry in sorted(found, key=lambda e: e.name):
                    kind = next((number for number, is_kind in kinds if is_kind(entry)), 0)
                    file.entries.append((entry.name, entry.inode(), kind))
        packed = b""
        for name, inode, kind in file.entries[file.next_entry :]:
            raw = os.fsencode(name) + b"\0"
            length = -(-(19 + len(raw)) // 8) * 8  # struct linux_dirent64, linux/dirent.h
            if len(packed) + length > size:
                if not packed:
                    raise OSError(errno.EINVAL, "buffer too small")
                break
            file.next_entry += 1
            packed += (struct.pack("<QqHB", inode, file.next_entry, length, kind) + raw).ljust(length, b"\0")
        self.space.write(at, packed)
        return len(packed)

    def sys_ftruncate(self, fd: int, size: int, *_: int) -> int:
        os.ftruncate(self.host_fd(fd), int64(size))
        return 0

    def sys_fsync(self, fd: int, *_: int) -> int:
        os.fsync(self.host_fd(fd))
        return 0

    sys_fdatasync = sys_fsync

    def sys_flock(self, fd: int, what: int, *_: int) -> int:
        fcntl.flock(self.host_fd(fd), what)
        return 0

    def sys_fadvise64(self, fd: int, *_: int) -> int:
        self.file(fd)
        return 0

    def sys_unlinkat(self, dirfd: int, path: int, flags: int, *_: int) -> int:
        where, dir_fd = self._place(dirfd, path)
        (os.rmdir if flags & 0x200 else os.unlink)(where, dir_fd=dir_fd)
        return 0

    def sys_mkdirat(self, dirfd: int, path: int, mode: int, *_: int) -> int:
        where, dir_fd = self._place(dirfd, path)
        os.mkdir(where, mode & ~self._umask, dir_fd=dir_fd)
        return 0

    def sys_renameat2(self, from_fd: int, old: int, to_fd: int, new: int, flags: int = 0, *_: int) -> int:
        if flags:
            raise OSError(errno.EINVAL, "flags")
        (a, a_fd), (b, b_fd) = self._place(from_fd, old), self._place(to_fd, new)
        os.rename(a, b, src_dir_fd=a_fd, dst_dir_fd=b_fd)
        return 0

    def sys_renameat(self, from_fd: int, old: int, to_fd: int, new: int, *_: int) -> int:
        return self.sys_renameat2(from_fd, old, to_fd, new)

    def sys_fchmod(self, fd: int, mode: int, *_: int) -> int:
        os.fchmod(self.host_fd(fd), mode & 0o7777)
        return 0

    def sys_fchmodat(self, dirfd: int, path: int, mode: int, *_: int) -> int:
        where, dir_fd = self._place(dirfd, path)
        os.chmod(where, mode & 0o7777, dir_fd=dir_fd)
        return 0

    def sys_utimensat(self, dirfd: int, path: int, at: int, _flags: int, *_: int) -> int:
        now, omit = (1 << 30) - 1, (1 << 30) - 2
        where: str | int
        where, dir_fd = self._place(dirfd, path) if path else (self.host_fd(dirfd), None)
        old = os.stat(where, dir_fd=dir_fd)
        words: tuple[int, ...] = struct.unpack("<qqqq", self.space.read(at, 32)) if at else (0, now, 0, now)
        times: list[int] = []
        for seconds, ns, kept in ((*words[:2], old.st_atime_ns), (*words[2:], old.st_mtime_ns)):
            whole = seconds * 10**9 + ns
            times.append(kept if ns == omit else self._now() if ns == now else whole)
        os.utime(where, ns=(times[0], times[1]), dir_fd=dir_fd)
        return 0

    def sys_umask(self, mask: int, *_: int) -> int:
        old, self._umask = self._umask, mask & 0o777
        return old
