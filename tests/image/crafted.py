"""ELF files made by hand, for what no compiler writes."""

from __future__ import annotations

import struct


def elf(
    sections: list[tuple[int, int, int, int, bytes | tuple[int, int], int, int, int]],
    *,
    kind: int = 2,
    body: bytes = b"",
    loads: int = 1,
) -> bytes:
    """An ELF file whose `loads` x segments map all of it at 0x10000 and up.

    Args:
        sections: (name, type, flags, address, bytes or (offset, size), link, info, entry size).
        kind: e_type.
        body: bytes right after the program headers.
        loads: number of program headers.
    """
    start = 64 + 56 * loads
    blob, heads = bytearray(body), [bytes(64)]
    for name, type_, flags, address, content, link, info, entsize in sections:
        offset, size = content if isinstance(content, tuple) else (start + len(blob), len(content))
        heads.append(struct.pack("<IIQQQQIIQQ", name, type_, flags, address, offset, size, link, info, 8, entsize))
        blob += b"" if isinstance(content, tuple) else content
    total = start + len(blob) + 64 * len(heads)
    phdr = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x10000, 0x10000, total, total, 4096)
    shoff = start + len(blob)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    # the section count may exceed 16 bits: then it is in section 0
    count = len(heads)
    heads[0] = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, count if count > 0xFEFF else 0, 0, 0, 0, 0)
    head = struct.pack(
        "<HHIQQQIHHHHHH", kind, 62, 1, 0, 64, shoff, 0, 64, 56, loads, 64, count if count <= 0xFEFF else 0, 0
    )
    return ident + head + phdr * loads + bytes(blob) + b"".join(heads)


def symbol(name: int, value: int, size: int = 0, info: int = 0x12) -> bytes:
    return struct.pack("<IBBHQQ", name, info, 0, 1, value, size)


def with_symbols(*symbols: tuple[bytes, int, int, int], body: bytes = b"") -> bytes:
    """A program whose .symtab has (name, address, size, info) each; code is all of it, from 0x10000."""
    strings, table = b"\0", symbol(0, 0, 0, 0)
    for name, address, size, info in symbols:
        table += symbol(len(strings), address, size, info)
        strings += name + b"\0"
    return elf([(0, 2, 0, 0, table, 2, 1, 24), (0, 3, 0, 0, strings, 0, 0, 0)], body=body)
