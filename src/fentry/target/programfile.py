"""Reading an ELF program to load it: segments, checked, and what kind of program it is.

This is what execve looks at and no more; symbols and sleds are ``fentry.image``'s.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.enums import ENUM_E_MACHINE

from fentry.errors import BadImage, TraceError

MAX_IMAGE = 1 << 32  #: bytes of memory that an image may ask for
MAX_SEGMENTS = 256  #: PT_LOAD headers; linkers make two to six


@dataclass(frozen=True, slots=True)
class Segment:
    """One PT_LOAD: addresses are link-time ones, `data` is what the file holds of it."""

    start: int
    end: int
    perms: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ProgramFile:
    """What loading needs of an ELF file, checked."""

    path: str
    machine: int
    bits: int
    entry: int
    fixed: bool  #: ET_EXEC
    for_linux: bool  #: position independent, or marked by a NT_GNU_ABI_TAG note
    interpreter: str
    headers: int  #: link-time address of the program headers, or 0
    header_count: int
    segments: tuple[Segment, ...]


def read_program(path: str) -> ProgramFile:
    """Read an executable. Raises BadImage for anything that is not one, however it is broken."""
    try:
        with Path(path).open("rb") as stream:
            return _parse(path, ELFFile(stream), os.fstat(stream.fileno()).st_size)
    except TraceError:
        raise
    except OSError as e:
        raise BadImage(path, f"cannot be read: {e.strerror or e}") from e
    except Exception as e:  # the reader raises construct errors, AttributeError and more on hostile files
        raise BadImage(path, f"is not an ELF program that can be read ({type(e).__name__}: {e})") from e


def _parse(path: str, elf: ELFFile, file_size: int) -> ProgramFile:
    header = elf.header
    kind = header["e_type"]
    if kind not in ("ET_EXEC", "ET_DYN"):
        raise BadImage(path, f"is not an executable ({kind})", hint="link it first")
    if not elf.little_endian:
        raise BadImage(path, "is big-endian; none of the emulated machines is")
    segments: list[Segment] = []
    interpreter, for_linux, headers, loaded = "", kind == "ET_DYN", 0, 0
    for segment in elf.iter_segments():
        at, size, offset, in_file = (segment[k] for k in ("p_vaddr", "p_memsz", "p_offset", "p_filesz"))
        what = segment["p_type"]
        if in_file and offset + in_file > file_size:
            raise BadImage(path, f"is truncated: a segment ends at {offset + in_file}, the file at {file_size}")
        if what == "PT_INTERP":
            interpreter = segment.data().rstrip(b"\0").decode(errors="replace")
        elif what == "PT_NOTE":
            for_linux = for_linux or b"\x04\0\0\0\x10\0\0\0\x01\0\0\0GNU\0\0\0\0\0" in segment.data()
        elif what == "PT_LOAD" and size:
            loaded += in_file
            if in_file > size or at + size > MAX_IMAGE << 8 or loaded > 2 * file_size or len(segments) == MAX_SEGMENTS:
                raise BadImage(path, f"has a segment of {size:#x} bytes at {at:#x} that is too large or one too many")
            flags = segment["p_flags"]
            perms = ("r" if flags & 6 else "-") + ("w" if flags & 2 else "-") + ("x" if flags & 1 else "-")
            segments.append(Segment(at, at + size, perms, offset, segment.data()))
            if offset <= header["e_phoff"] < offset + in_file:
                headers = at + header["e_phoff"] - offset
    if not segments or sum(s.end - s.start for s in segments) > MAX_IMAGE:
        raise BadImage(path, "has nothing to load, or too much")
    return ProgramFile(
        path,
        elf["e_machine"] if isinstance(elf["e_machine"], int) else ENUM_E_MACHINE[elf["e_machine"]],
        elf.elfclass,
        header["e_entry"],
        kind == "ET_EXEC",
        for_linux,
        interpreter,
        headers,
        header["e_phnum"],
        tuple(segments),
    )
