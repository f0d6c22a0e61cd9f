"""Make unwinders see through hooked frames, without calling anything in the target.

Every unwinder on Linux finds call frame information through one of two functions of the C library:
``_dl_find_object`` (glibc >= 2.35; libgcc >= 12 asks it first) and ``dl_iterate_phdr`` (libgcc before, nongnu
libunwind, LLVM libunwind, backtrace()). Both get an entry jump to a small generated function that knows our islands:

* ``_dl_find_object(pc, result)``: fills the result if pc lies in an island, else goes on to the original;
* ``dl_iterate_phdr(callback, data)``: the original first, then one more call of the callback for each island.

So nothing is loaded, no lock is taken, and taking the two jumps out again leaves no trace. Works for a
libgcc_s that the program loads later, because the question is asked where the loader lives.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

FIND = "_dl_find_object"
ITERATE = "dl_iterate_phdr"

#: struct dl_phdr_info (link.h, glibc and musl, 64 bit): addr name phdr phnum(u16) adds subs tls_modid tls_data
PHDR_INFO = 64
#: struct dl_find_object (dlfcn.h, without DLFO_STRUCT_HAS_EH_DBASE): flags, start, end, link_map, eh_frame, 7 reserved
FIND_RESULT = 96

_PT_LOAD, _PT_GNU_EH_FRAME = 1, 0x6474E550
_PF_R, _PF_X = 4, 1


@dataclass(frozen=True, slots=True)
class Object:
    """An island as an unwinder sees it: a range of code and its ``.eh_frame_hdr``."""

    start: int
    size: int
    header: int
    info: int  #: where its ``struct dl_phdr_info`` lies


def phdr_info(at: int, start: int, size: int, header: int, header_size: int) -> bytes:
    """Build ``struct dl_phdr_info``, a name and two program headers, to lie at `at`.

    The object's base is its start, so p_vaddr is relative to it.
    """
    name_at = at + PHDR_INFO
    phdr_at = name_at + 16
    info = struct.pack("<QQQHxxxxxxQQQQ", start, name_at, phdr_at, 2, 1, 0, 0, 0)

    def phdr(kind: int, flags: int, vaddr: int, length: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, 0, vaddr, vaddr, length, length, 16)

    return (
        info
        + b"[fentry]".ljust(16, b"\0")
        + phdr(_PT_LOAD, _PF_R | _PF_X, 0, size)
        + phdr(_PT_GNU_EH_FRAME, _PF_R, header - start, header_size)
    )


PHDR_INFO_ROOM = PHDR_INFO + 16 + 2 * 56


def find_object(objects: list[Object], original: int) -> str:
    """LLVM IR of the function that stands before ``_dl_find_object``."""
    lines = ["define i32 @find(i64 %pc, ptr %result) nounwind noimplicitfloat {", "start:", "  br label %try0"]
    for i, o in enumerate(objects):
        lines += [
            f"try{i}:",
            f"  %d{i} = sub i64 %pc, {o.start}",
            f"  %in{i} = icmp ult i64 %d{i}, {o.size}",
            f"  br i1 %in{i}, label %hit{i}, label %try{i + 1}",
            f"hit{i}:",
        ]
        for offset, value in ((0, 0), (8, o.start), (16, o.start + o.size), (24, 0), (32, o.header)):
            lines += [
                f"  %p{i}_{offset} = getelementptr i8, ptr %result, i64 {offset}",
                f"  store i64 {value}, ptr %p{i}_{offset}, align 8",
            ]
        lines.append("  ret i32 0")
    lines += [
        f"try{len(objects)}:",
        f"  %r = tail call i32 inttoptr (i64 {original} to ptr)(i64 %pc, ptr %result)",
        "  ret i32 %r",
        "}",
    ]
    return "\n".join(lines)


def iterate(objects: list[Object], original: int) -> str:
    """LLVM IR of the function that stands before ``dl_iterate_phdr``."""
    lines = [
        "define i32 @iterate(ptr %callback, ptr %data) nounwind noimplicitfloat uwtable {",
        "start:",
        f"  %r = call i32 inttoptr (i64 {original} to ptr)(ptr %callback, ptr %data)",
        "  %stop = icmp ne i32 %r, 0",
        "  br i1 %stop, label %end, label %try0",
        "end:",
        "  ret i32 %r",
    ]
    for i, o in enumerate(objects):
        lines += [
            f"try{i}:",
            f"  %r{i} = call i32 %callback(ptr inttoptr (i64 {o.info} to ptr), i64 {PHDR_INFO}, ptr %data)",
            f"  %stop{i} = icmp ne i32 %r{i}, 0",
            f"  br i1 %stop{i}, label %end{i}, label %try{i + 1}",
            f"end{i}:",
            f"  ret i32 %r{i}",
        ]
    lines += [f"try{len(objects)}:", "  ret i32 0", "}"]
    return "\n".join(lines)


def module(objects: list[Object], find: int, iterate_at: int) -> str:
    """A whole module; an original address of 0 leaves that function out."""
    parts = ['target triple = "TRIPLE"']
    if find:
        parts.append(find_object(objects, find))
    if iterate_at:
        parts.append(iterate(objects, iterate_at))
    return "\n".join(parts) + "\n"
