"""Symbols that live outside the image: separate debug files, and the compressed table inside of it.

A debug file is found by build-id under the debug directories, then by ``.gnu_debuglink``. What the image
says is a hint from a stranger: the build-id is hex digits by construction, the link must be a bare file
name, only regular files are opened, and a file counts only if it proves that it belongs to the image (same
build-id, or the checksum of the link). Debug files are never asked for debug files of their own, so a chain
or a cycle of them ends at the first.

Source: GDB manual, 18.3 "Debugging Information in Separate Files" and 18.4 "MiniDebugInfo".
"""

from __future__ import annotations

import lzma
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from fentry.errors import BadImage
from fentry.image.elf import Elf, Source

DEBUG_DIRS = ("/usr/lib/debug",)
XZ_MEMORY = 128 << 20  #: bytes the decompressor may use: xz -9 needs 65 MiB
_CRC_CHUNK = 1 << 20


def candidates(elf: Elf, debug_dirs: Sequence[str]) -> list[tuple[str, int | None]]:
    """(path, checksum or None for "same build-id") of existing files that may be the debug file, best first."""
    places: list[tuple[Path, int | None]] = []
    if len(elf.build_id) > 2:
        places += [(Path(d, ".build-id", elf.build_id[:2], f"{elf.build_id[2:]}.debug"), None) for d in debug_dirs]
    link = _debuglink(elf)
    if link and debug_dirs:
        name, checksum = link
        folder = Path(os.path.realpath(elf.path)).parent  # /proc/PID/exe is a link
        places += [(folder / name, checksum), (folder / ".debug" / name, checksum)]
        places += [(Path(root) / folder.relative_to("/") / name, checksum) for root in debug_dirs]
    return [(str(path), checksum) for path, checksum in places if path.is_file()]


def _debuglink(elf: Elf) -> tuple[str, int] | None:
    """(bare file name, CRC-32) from ``.gnu_debuglink``; None if there is none or the name is a path."""
    for section in elf.named(".gnu_debuglink"):
        data = elf.contents(section)[:4096]
        raw, _, _ = data.partition(b"\0")
        at = -(-(len(raw) + 1) // 4) * 4
        name = raw.decode("utf-8", "replace")
        if name in ("", ".", "..") or "/" in name or not name.isprintable() or at + 4 > len(data):
            return None
        return name, struct.unpack_from(f"{elf.order}I", data, at)[0]
    return None


def separate(elf: Elf, debug_dirs: Sequence[str]) -> Elf | None:
    """The debug file of an image, or None."""
    for path, checksum in candidates(elf, debug_dirs):
        try:
            source = Source.open(path)
            if checksum is not None and _crc(source) != checksum:
                continue
            found = Elf(source)
            proven = checksum is not None or found.build_id == elf.build_id
            if proven and (found.machine, found.bits) == (elf.machine, elf.bits) and found.symtab is not None:
                return found
        except BadImage:
            continue  # a broken debug file is no reason to refuse the program
    return None


def _crc(source: Source) -> int:
    value = 0
    for at in range(0, source.size, _CRC_CHUNK):
        value = zlib.crc32(source.read(at, min(_CRC_CHUNK, source.size - at)), value)
    return value


def embedded(elf: Elf) -> Elf | None:
    """The ELF file inside ``.gnu_debugdata``, or None if absent, broken or too large to be honest.

    It holds a part of the symbols of the image, so it may not unfold to more than a few times its size.
    """
    for section in elf.named(".gnu_debugdata"):
        packed = elf.contents(section)
        limit = 2 * elf.source.size + (1 << 20)
        try:
            reader = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
            data = reader.decompress(packed, max_length=limit)
            if not reader.eof:
                return None
            found = Elf(Source(elf.path, len(data), data=data))
        except (lzma.LZMAError, EOFError, MemoryError, BadImage):
            return None
        return found if (found.machine, found.bits) == (elf.machine, elf.bits) else None
    return None
