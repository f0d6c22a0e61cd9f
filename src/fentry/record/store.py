"""A trace on disk: a directory that is written while the target runs and can be read whatever happened.

===============  ========================================================================================
``meta.json``    what the trace is of (:mod:`fentry.record.meta`); replaced atomically
``segments.bin`` ring bytes as they came: chunks, only ever appended
``symbols.arrow`` functions of the traced program (address, size, module, name), sorted by address,
                 so that the trace needs neither the program nor its symbols to be read
===============  ========================================================================================

A chunk is a header of 64 bytes (little-endian) and its payload::

     0  magic b"FENTRYC1"     16  tid u32       32  first  u64  stream position of the payload
     8  ring u32              20  level u32     40  nbytes u64  of payload, a multiple of 16
    12  pid u32               24  parent u32    48  lost   u64  events this ring lost before `first`
                              28  zero          56  crc32 of bytes 0..56; 60 zero

A reader believes none of it: a chunk that cannot be is skipped to the next header that can, a file that ends early is
a shorter trace, and :attr:`Trace.damage` says so.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fentry.errors import AskedWrong, BadTrace, CannotHere
from fentry.record import event, layout
from fentry.record.event import U64, Columns, Decoder, Marks
from fentry.record.meta import HEAD, Meta, ModuleInfo, Site, TargetInfo, utf8
from fentry.record.ring import MAX_JUMP, MAX_LEVEL, RingInfo

__all__ = ["Functions", "Meta", "ModuleInfo", "Site", "TargetInfo", "Thread", "Trace", "Writer"]

CHUNK_MAGIC = b"FENTRYC1"
CHUNK = struct.Struct("<8sIIIIIIQQQII")
_CRC_AT = 56
#: Bytes collected before they are written in one go.
FLUSH = 1 << 20
#: Records decoded at a time: what a batch of events is made of.
BATCH = 1 << 19
#: A larger meta.json is not read: it would be a way to fill memory.
MAX_META = 1 << 30
_EXT_LIMIT = np.uint64(layout.EXT_LIMIT)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Functions:
    """Functions of one module for :meth:`Writer.write_symbols`: parallel columns, addresses as in the target."""

    module: str
    addresses: Sequence[int] | npt.NDArray[np.uint64]
    sizes: Sequence[int] | npt.NDArray[np.uint64]
    names: Sequence[str]


class Writer:
    """Writes a trace. Thread-safe; use it as a context manager or call :meth:`close`.

    A trace already at `path` becomes ``path.old`` (replacing an older one there) once the new one has begun.

    Args:
        path: directory to make.
        meta: as far as known; enough to read the trace if this process dies.

    Raises:
        AskedWrong: `path` holds something that is not a trace, or cannot be written.
        CannotHere: the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str], meta: Meta) -> None:
        self.path = Path(path)
        self.meta = meta
        self.records = 0  #: written so far, extensions included
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._ends: list[int] = []
        self._size = 0
        self._last: tuple[int, int, int, int, int] | None = None
        self._fd = -1
        if not self._replaceable():
            raise AskedWrong(f"{self.path} exists and is not a fentry trace", hint="name another directory with -o")
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            self._fd = os.open(fresh / "segments.bin", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
            _replace(fresh / "meta.json", meta.to_json())
            self._move_in(fresh)
        except AskedWrong:
            self._abandon(fresh)
            raise
        except OSError as error:
            self._abandon(fresh)
            if error.errno in _FULL:
                raise CannotHere(f"disk full: cannot begin a trace in {self.path}", hint="free some space") from None
            raise AskedWrong(
                f"cannot write a trace to {self.path}: {error.strerror}", hint="name another directory with -o"
            ) from None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, ring: RingInfo, data: memoryview | bytes) -> None:
        """Append bytes of a ring; may be given to a drain as its sink.

        Raises: CannotHere if the disk is full; the trace up to here is readable.
        """
        nbytes = len(data)
        with self._lock:
            if self._fd < 0:
                raise CannotHere(f"the trace {self.path} is closed")
            key = (ring.index, ring.pid, ring.tid, ring.first, ring.lost)
            if self._last == key and self._ends:
                self._extend(nbytes)
            else:
                self._buffer += _chunk_header(ring, nbytes)
                self._ends.append(0)
            self._buffer += data
            self._ends[-1] = len(self._buffer)
            self._last = (ring.index, ring.pid, ring.tid, ring.first + nbytes, ring.lost)
            self.records += nbytes // layout.RECORD
            if len(self._buffer) >= FLUSH:
                self._flush()

    def flush(self) -> None:
        """Hand everything to the kernel. Raises CannotHere if the disk is full."""
        with self._lock:
            if self._fd >= 0:
                self._flush()

    def write_symbols(self, functions: Iterable[Functions]) -> None:
        """Store the functions that parent addresses are named by; replaces what was stored before."""
        modules = list(functions)
        address = np.concatenate([np.asarray(m.addresses, np.uint64) for m in modules] or [np.empty(0, np.uint64)])
        size = np.concatenate([np.asarray(m.sizes, np.uint64) for m in modules] or [np.empty(0, np.uint64)])
        which = np.repeat(np.arange(len(modules), dtype=np.int32), [len(m.names) for m in modules])
        names = pa.array([utf8(name) for m in modules for name in m.names], pa.string())
        order = np.argsort(address, kind="stable")
        table = pa.table(
            {
                "address": address[order],
                "size": size[order],
                "module": pa.DictionaryArray.from_arrays(
                    which[order], pa.array([utf8(m.module) for m in modules], pa.string())
                ),
                "name": names.take(pa.array(order)),
            }
        )
        part = self.path / "symbols.arrow.part"
        try:
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            part.replace(self.path / "symbols.arrow")
        except OSError as error:
            part.unlink(missing_ok=True)
            raise self._failed(error) from None

    def update(self, meta: Meta) -> None:
        """Replace the meta data (new sites, threads, the final status). Raises CannotHere if the disk is full."""
        self.meta = meta
        try:
            _replace(self.path / "meta.json", meta.to_json())
        except OSError as error:
            raise self._failed(error) from None

    def close(self, meta: Meta | None = None) -> None:
        """Write what is left, and `meta` as the last word. Idempotent. Raises CannotHere if the disk is full."""
        try:
            self.flush()
            if meta is not None:
                self.update(meta)
        finally:
            with self._lock:
                if self._fd >= 0:
                    os.close(self._fd)
                    self._fd = -1

    # -- within -----------------------------------------------------------------------------------
    def _replaceable(self) -> bool:
        try:
            if not self.path.exists():
                return True
            return self.path.is_dir() and (is_trace(self.path) or not any(self.path.iterdir()))
        except OSError as error:
            raise AskedWrong(f"cannot look at {self.path}: {error.strerror}") from None

    def _abandon(self, fresh: Path) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        shutil.rmtree(fresh, ignore_errors=True)

    def _move_in(self, fresh: Path) -> None:
        if self.path.exists():
            if is_trace(self.path):
                old = self.path.with_name(self.path.name + ".old")
                if old.exists():
                    if not is_trace(old):
                        raise AskedWrong(f"{old} is in the way of the trace that was at {self.path}", hint="move it")
                    shutil.rmtree(old)
                self.path.rename(old)
            else:
                self.path.rmdir()
        fresh.rename(self.path)

    def _extend(self, nbytes: int) -> None:
        """Let the last chunk in the buffer grow: its owner came again before anybody else."""
        start = self._ends[-2] if len(self._ends) > 1 else 0
        head = list(CHUNK.unpack_from(self._buffer, start))
        head[8] += nbytes
        head[10] = 0
        CHUNK.pack_into(self._buffer, start, *head)
        struct.pack_into("<I", self._buffer, start + _CRC_AT, zlib.crc32(self._buffer[start : start + _CRC_AT]))

    def _flush(self) -> None:
        done = 0
        view = memoryview(self._buffer)
        try:
            while done < len(view):
                done += os.write(self._fd, view[done:])
        except OSError as error:
            # keep whole chunks only, so that the trace up to here is clean
            whole = max((end for end in self._ends if end <= done), default=0)
            self.records -= sum(
                CHUNK.unpack_from(view, start)[8] // layout.RECORD for start in [0, *self._ends[:-1]] if start >= whole
            )
            os.ftruncate(self._fd, self._size + whole)
            os.close(self._fd)
            self._fd = -1
            raise self._failed(error) from None
        finally:
            view.release()
            self._buffer.clear()
            self._ends.clear()
            self._last = None
        self._size += done

    def _failed(self, error: OSError) -> CannotHere:
        what = "disk full" if error.errno in _FULL else f"cannot write ({error.strerror})"
        return CannotHere(
            f"{what} after {self.records} records; the trace in {self.path} is readable up to here",
            hint="free some space or name a directory on another disk with -o",
        )


def is_trace(path: Path) -> bool:
    """Tell whether a directory is a trace of any version."""
    try:
        with (path / "meta.json").open("rb") as file:
            return file.read(len(HEAD)) == HEAD
    except OSError:
        return False


def _chunk_header(ring: RingInfo, nbytes: int) -> bytes:
    head = CHUNK.pack(
        CHUNK_MAGIC, ring.index, ring.pid, ring.tid, ring.level, ring.parent, 0, ring.first, nbytes, ring.lost, 0, 0
    )
    return head[:_CRC_AT] + struct.pack("<II", zlib.crc32(head[:_CRC_AT]), 0)


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@dataclass(slots=True)
class _Stream:
    """Chunks of one ring while it belonged to one thread."""

    ring: int
    level: int
    parent: int
    #: per chunk: file offset of the payload, its bytes, its stream position, events missing before it, bytes
    #: missing before it (then the first record may be torn), position of the parent ring
    chunks: list[tuple[int, int, int, int, bool, int]] = field(default_factory=list)
    end: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread of a trace."""

    pid: int
    tid: int
    comm: str
    lane: int  #: its number among the trace's threads, by first appearance
    _streams: tuple[_Stream, ...] = ()


class Trace:
    """A trace that can be read; use :meth:`open`.

    Reading is repeatable and works on a trace that is still being written (up to what was there at the opening).
    """

    def __init__(self, path: Path, meta: Meta, data: mmap.mmap | bytes, symbols: pa.Table | None) -> None:
        self.path = path
        self.meta = meta
        self.marks = Marks(meta.tables, len(meta.sites))
        self._data = data
        self._symbols = symbols
        self._notes: list[str] = []
        self._senseless: dict[tuple[int, int], int] = {}
        self._count = -1
        self.threads: tuple[Thread, ...] = self._index()
        self.lost_in_stream = sum(c[3] for t in self.threads for s in t._streams for c in s.chunks)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Trace:
        """Open a trace directory.

        Raises: BadTrace if it is none, is of a newer version, or has unusable meta data.
        """
        where = Path(path)
        try:
            with (where / "meta.json").open("rb") as file:
                text = file.read(MAX_META)
            with (where / "segments.bin").open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise BadTrace(
                f"cannot read {where}: {error.strerror}", hint="name a directory that fentry record made with -i"
            ) from None
        trace = cls(where, Meta.from_json(text), data, None)
        trace._symbols = trace._read_symbols()
        return trace

    def close(self) -> None:
        """Let go of the file. Tables already given stay valid."""
        self._data = b""
        self.threads = ()

    # -- what it says -----------------------------------------------------------------------------
    @property
    def damage(self) -> list[str]:
        """What was found to be wrong so far; complete after all events were read."""
        senseless = sum(self._senseless.values())
        more = [f"{senseless} records name no known function or belong to none; dropped"] if senseless else []
        return self._notes + more

    @property
    def lost(self) -> int:
        """Events known to be lost: as the meta data say, or at least what the stream shows."""
        return max(sum(n for n in self.meta.lost.values() if n > 0), self.lost_in_stream)

    def count(self) -> int:
        """How many events there are (records that are not extensions), without decoding them."""
        if self._count < 0:
            self._count = sum(
                int(np.count_nonzero(self._words(chunk)[:, 1] >= _EXT_LIMIT))
                for thread in self.threads
                for stream in thread._streams
                for chunk in stream.chunks
            )
        return self._count

    def symbolize(self, addresses: npt.NDArray[np.uint64]) -> pa.DictionaryArray:
        """Name code addresses: the function around each, or the address in hex.

        Returns: strings, dictionary-encoded, one per address.
        """
        unique, index = np.unique(addresses, return_inverse=True)
        names = [hex(a) for a in unique.tolist()]
        table = self._symbols
        if table is not None and table.num_rows:
            start = table.column("address").to_numpy()
            size = table.column("size").to_numpy()
            at = np.searchsorted(start, unique, "right").astype(np.int64) - 1
            known = (at >= 0) & (unique - start[at] < np.maximum(size[at], 1))
            rows = np.flatnonzero(known)
            for row, name in zip(rows.tolist(), table.column("name").take(pa.array(at[rows])).to_pylist(), strict=True):
                names[row] = name or names[row]
        return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), pa.array(names, pa.string()))

    # -- events -----------------------------------------------------------------------------------
    def events_of(self, thread: Thread, batch: int = BATCH) -> Iterator[pa.Table]:
        """Give a thread's events in order, as tables of :data:`fentry.record.event.SCHEMA`."""
        for _, columns, seq in self._thread(thread, batch):
            yield event.to_table(columns, self.meta.clock, pid=thread.pid, tid=thread.tid, seq=seq)

    def events(self, batch: int = BATCH) -> Iterator[pa.Table]:
        """Give the events of all threads in batches, merged by time.

        For clock ``order`` there is no time to merge by: one thread comes after the other. Memory depends
        on `batch` and the number of threads, not on the length of the trace.
        """
        if not self.meta.clock.timed or len(self.threads) == 1:
            for thread in self.threads:
                yield from self.events_of(thread, batch)
            return
        pids = np.array([t.pid for t in self.threads], np.uint32)
        tids = np.array([t.tid for t in self.threads], np.uint32)
        share = max(batch // max(len(self.threads), 1), 4096)
        for origin, columns in event.merge([self._numbered(t, share) for t in self.threads]):
            assert columns.position is not None
            yield event.to_table(columns, self.meta.clock, pid=pids[origin], tid=tids[origin], seq=columns.position)

    def _numbered(self, thread: Thread, batch: int) -> Iterator[tuple[U64, Columns]]:
        for keys, columns, seq in self._thread(thread, batch):
            columns.position = np.arange(seq, seq + len(columns), dtype=np.uint64)
            yield keys, columns

    def _thread(self, thread: Thread, batch: int) -> Iterator[tuple[U64, Columns, int]]:
        """Give (keys that never go down, events, number of the first event)."""
        decoder = Decoder(self.marks, self.meta.clock)
        bases, base = {}, 0
        for stream in thread._streams:
            bases[stream.ring] = base
            if stream.level == 0:
                base += stream.end
        # level 0 first: at equal times a signal handler comes after what it interrupted
        streams = sorted(thread._streams, key=lambda s: s.level)
        sources = [
            self._stream(s, decoder, batch, bases[s.ring] if s.level == 0 else bases.get(s.parent, 0)) for s in streams
        ]
        seq, newest = 0, np.uint64(0)
        merged: Iterator[tuple[U64 | None, Columns]]
        merged = iter(sources[0]) if len(sources) == 1 else ((None, c) for _, c in event.merge(sources))
        for keys, columns in merged:
            if len(columns):
                keys = np.maximum.accumulate(columns.ts) if keys is None else keys
                keys = np.maximum(keys, newest)
                newest = keys[-1]
                yield keys, columns, seq
                seq += len(columns)
        self._senseless[thread.pid, thread.tid] = decoder.damaged

    def _stream(self, stream: _Stream, decoder: Decoder, batch: int, base: int) -> Iterator[tuple[U64, Columns]]:
        newest = np.uint64(0)
        nested = stream.level > 0
        timed = self.meta.clock.timed
        for words, first, gaps, near in self._batches(stream, batch):
            columns = decoder.columns(words, position=first, nested=nested, gaps=gaps)
            if timed:
                keys = columns.ts
            elif nested:
                # before what the parent ring holds at that position; without one, where the drain found it
                place = np.full(len(columns), near, np.uint64) if columns.position is None else columns.position
                keys = (place + np.uint64(base)) * np.uint64(2)
            else:
                assert columns.position is not None
                keys = (columns.position + np.uint64(base)) * np.uint64(2) + np.uint64(1)
            if len(keys):
                keys = np.maximum(np.maximum.accumulate(keys), newest)
                newest = keys[-1]
                yield keys, columns

    def _batches(self, stream: _Stream, batch: int) -> Iterator[tuple[U64, int, list[tuple[int, int]], int]]:
        """Give (whole records, position, gaps, position of the parent ring) of a stream."""
        limit = max(batch, 64)
        separate = stream.level > 0 and not self.meta.clock.timed
        parts: list[U64] = []
        gaps: list[tuple[int, int]] = []
        held, position, near = 0, 0, 0
        for number, chunk in enumerate(stream.chunks):
            words = self._words(chunk)
            first, missing, torn = chunk[2], chunk[3], chunk[4]
            if torn:
                if held:
                    yield np.concatenate(parts), position, gaps, near
                    parts, gaps, held = [], [], 0
                skip = _leading_extensions(words)
                words, first = words[skip:], first + skip * layout.RECORD
            at = 0
            while at < len(words):
                if not held:
                    position, near = first + at * layout.RECORD, chunk[5]
                if missing:
                    gaps.append((held, missing))
                    missing = 0
                piece = words[at : at + max(limit - held, 1)]
                parts.append(piece)
                held += len(piece)
                at += len(piece)
                last = number == len(stream.chunks) - 1 and at == len(words)
                if held >= limit or last or (separate and at == len(words)):
                    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
                    cut = len(joined) if last else event.whole_records(joined)
                    if not cut:
                        continue
                    yield joined[:cut], position, [g for g in gaps if g[0] < cut], near
                    parts = [joined[cut:]] if cut < len(joined) else []
                    gaps = [(g[0] - cut, g[1]) for g in gaps if g[0] >= cut]
                    held = len(joined) - cut
                    position += cut * layout.RECORD
        if held:  # only where the last chunk had nothing but torn extensions
            yield np.concatenate(parts), position, gaps, near

    def _words(self, chunk: tuple[int, int, int, int, bool, int]) -> U64:
        return np.frombuffer(self._data, "<u8", chunk[1] // 8, chunk[0]).reshape(-1, 2)

    # -- opening ----------------------------------------------------------------------------------
    def _note(self, text: str) -> None:
        if len(self._notes) < 32:
            self._notes.append(text)

    def _index(self) -> tuple[Thread, ...]:
        """Find the chunks, and whose they are."""
        data, size = self._data, len(self._data)
        streams: dict[tuple[int, int, int], _Stream] = {}
        ends: dict[int, int] = {}  # of each ring: position after its newest chunk so far
        at = 0
        while at < size:
            head = self._header(at)
            if head is None:
                found = data.find(CHUNK_MAGIC, at + 1)
                after = found if found >= 0 else size
                self._note(f"segments.bin: {after - at} bytes at {at} are no chunk; skipped")
                at = after
                continue
            ring, pid, tid, level, parent, first, nbytes, lost = head
            payload = at + CHUNK.size
            at = payload + nbytes
            if at > size:
                self._note(f"segments.bin ends {at - size} bytes before the end of its last chunk")
                nbytes = (size - payload) & -layout.RECORD
            stream = streams.get((ring, pid, tid))
            if stream is None:
                stream = streams[ring, pid, tid] = _Stream(ring, level, parent)
                stream.lost = lost
                missing, torn = lost, first > 0
            else:
                missing, torn = max(0, lost - stream.lost), first > stream.end
                missing += (first - stream.end + layout.RECORD - 1) // layout.RECORD if torn else 0
            if stream.chunks and first < stream.end:
                self._note(f"segments.bin: ring {ring} repeats position {first}; skipped")
                continue
            stream.end, stream.lost = first + nbytes, lost
            near = ends.get(parent, 0) if level else 0
            ends[ring] = stream.end
            if nbytes:
                stream.chunks.append((payload, nbytes, first, missing, torn, near))
        by_thread: dict[tuple[int, int], list[_Stream]] = {}
        for (_, pid, tid), stream in streams.items():
            if stream.chunks:
                by_thread.setdefault((pid, tid), []).append(stream)
        return tuple(
            Thread(pid, tid, self.meta.comm(tid), lane, tuple(found))
            for lane, ((pid, tid), found) in enumerate(by_thread.items())
        )

    def _header(self, at: int) -> tuple[int, int, int, int, int, int, int, int] | None:
        """Read a chunk's header; None if it cannot be one."""
        if at + CHUNK.size > len(self._data):
            return None
        magic, ring, pid, tid, level, parent, _, first, nbytes, lost, crc, _ = CHUNK.unpack_from(self._data, at)
        if magic != CHUNK_MAGIC or crc != zlib.crc32(self._data[at : at + _CRC_AT]):
            return None
        if nbytes % layout.RECORD or first % layout.RECORD or level > MAX_LEVEL:
            return None
        if nbytes > MAX_JUMP or first > 1 << 62 or lost > 1 << 62:
            return None
        return ring, pid, tid, level, parent, first, nbytes, lost

    def _read_symbols(self) -> pa.Table | None:
        path = self.path / "symbols.arrow"
        if not path.exists():
            sites = sorted((s.address, s.size, s.name) for s in self.meta.sites)
            columns: dict[str, Any] = {
                "address": pa.array([s[0] for s in sites], pa.uint64()),
                "size": pa.array([s[1] for s in sites], pa.uint64()),
                "name": pa.array([utf8(s[2]) for s in sites], pa.string()),
            }
            return pa.table(columns)
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            table.validate(full=True)
            table = table.select(["address", "size", "name"]).cast(
                pa.schema([("address", pa.uint64()), ("size", pa.uint64()), ("name", pa.string())])
            )
            start = table.column("address").combine_chunks()
            if start.null_count or table.column("size").null_count or not bool((np.diff(start) >= 0).all()):
                raise ValueError("not sorted by address")
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            self._note(f"symbols.arrow cannot be used: {str(error).splitlines()[0]}")
            return None
        return table


def _leading_extensions(words: U64) -> int:
    """How many extensions of a lost record come first (a record has at most three)."""
    for i in range(min(len(words), 3)):
        if words[i, 1] >= _EXT_LIMIT:
            return i
    return min(len(words), 3)
