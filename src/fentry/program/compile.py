"""Compile programs for a target's instruction set: LLVM IR in, position-independent bytes out, cached.

The result has no relocations left: every call and branch stays inside the blob, every address of the session is
an immediate. One blob serves all slots of an island.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from fentry.arch import Arch
from fentry.errors import EngineBug
from fentry.program.context import Layout
from fentry.program.ir import Module, Spec

#: bump when the meaning of a cached blob changes
CACHE_VERSION = 1

_R_NONE = 0


@dataclass(frozen=True, slots=True)
class Blob:
    """Compiled programs: code and where each one begins."""

    code: bytes
    symbols: dict[str, int]


def compile_programs(arch: Arch, layout: Layout, specs: Sequence[Spec]) -> Blob:
    """Compile `specs` for `arch`.

    On architectures without a return slot a program must know its own frame size to find its caller's frame:
    the module is compiled, frame sizes are read from the code, and compiled again with them.
    """

    def build(lay: Layout) -> Blob:
        module = Module(arch.dialect, lay)
        for spec in specs:
            module.add(spec)
        return compile_text(arch, module.text())

    blob = build(layout)
    if arch.dialect.return_slot:
        return blob
    for _ in range(4):
        frames = {name: arch.frame_size(blob.code[at : at + 32]) for name, at in blob.symbols.items()}
        if frames == layout.frames:
            return blob
        layout = replace(layout, frames=frames)
        blob = build(layout)
    raise EngineBug("frame sizes of programs do not settle")


@cache
def _initialize() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()


@cache
def _machine(triple: str, cpu: str, features: str) -> llvm.TargetMachine:
    _initialize()
    # small code model + static relocation: internal calls are plain pc-relative and get resolved at once
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="static", codemodel="small"
    )


def compile_text(arch: Arch, text: str) -> Blob:
    """Compile a module given as text; TRIPLE stands for the target triple. Raises EngineBug."""
    features = ",".join(f for f in (arch.features, arch.dialect.features) if f)
    text = text.replace("TRIPLE", arch.triple)
    stamp = f"{CACHE_VERSION} {llvmlite.__version__} {arch.triple} {arch.cpu} {features}\n"
    key = hashlib.sha256((stamp + text).encode()).hexdigest()
    cached = _load(key)
    if cached is not None:
        return cached
    machine = _machine(arch.triple, arch.cpu, features)
    try:
        module = llvm.parse_assembly(text)
        module.verify()
    except RuntimeError as error:
        raise EngineBug(f"program does not compile for {arch.name}: {error}") from error
    blob = _link(machine.emit_object(module))
    _save(key, blob)
    return blob


# ---- the object file: one .text, resolved ---------------------------------------------------------


def _link(obj: bytes) -> Blob:
    """Take .text and its symbols out of an ELF64 little-endian object.

    Raises: EngineBug if a relocation or a data section is left: such a program cannot be copied anywhere.
    """
    shoff = struct.unpack_from("<Q", obj, 40)[0]
    shentsize, shnum, shstrndx = struct.unpack_from("<HHH", obj, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", obj, shoff + i * shentsize) for i in range(shnum)]
    names_at = headers[shstrndx][4]

    def name(offset: int) -> str:
        return obj[names_at + offset : obj.index(b"\0", names_at + offset)].decode()

    text_index = next(i for i, h in enumerate(headers) if name(h[0]) == ".text")
    for h in headers:
        kind, flags, size = h[1], h[2], h[5]
        if kind in (4, 9) and h[7] == text_index and size:
            raise EngineBug("a program has relocations left: it refers to something outside itself")
        if kind in (1, 8) and flags & 2 and size and name(h[0]) not in (".text", ".eh_frame"):
            raise EngineBug(f"a program has data in section {name(h[0])}")
    text = headers[text_index]
    code = obj[text[4] : text[4] + text[5]]
    symbols: dict[str, int] = {}
    for h in headers:
        if h[1] != 2:
            continue
        strings = headers[h[6]][4]
        for at in range(h[4], h[4] + h[5], 24):
            st_name, info, _, shndx, value, _ = struct.unpack_from("<IBBHQQ", obj, at)
            if shndx == text_index and info & 15 == 2:
                end = obj.index(b"\0", strings + st_name)
                symbols[obj[strings + st_name : end].decode()] = value
    return Blob(code, symbols)


# ---- cache -----------------------------------------------------------------------------------------


def cache_dir() -> Path | None:
    """Directory of compiled programs, private to the user; None if there is no safe one.

    The blobs run inside other processes: a directory that others can write is not used.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(base).expanduser() / "fentry" / "code"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = path.stat()
    except OSError:
        return None
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        return None
    return path


def _load(key: str) -> Blob | None:
    directory = cache_dir()
    if directory is None:
        return None
    try:
        data = (directory / key).read_bytes()
    except OSError:
        return None
    digest, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != digest:
        return None
    try:
        count = struct.unpack_from("<I", body)[0]
        at = 4
        symbols = {}
        for _ in range(count):
            size, value = struct.unpack_from("<HI", body, at)
            symbols[body[at + 6 : at + 6 + size].decode()] = value
            at += 6 + size
    except (struct.error, UnicodeDecodeError):  # whole, but not ours
        return None
    return Blob(body[at:], symbols)


def _save(key: str, blob: Blob) -> None:
    directory = cache_dir()
    if directory is None:
        return
    body = struct.pack("<I", len(blob.symbols))
    for symbol, value in blob.symbols.items():
        raw = symbol.encode()
        body += struct.pack("<HI", len(raw), value) + raw
    body += blob.code
    temporary = directory / f".{key}.{os.getpid()}"
    try:
        temporary.write_bytes(hashlib.sha256(body).digest() + body)
        temporary.replace(directory / key)
    except OSError:
        temporary.unlink(missing_ok=True)
