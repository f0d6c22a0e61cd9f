"""Headers, segments, memory and identity of files, against readelf and the bytes themselves."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fentry.errors import BadImage
from fentry.image import Image
from tests.image.binutils import output, sections
from tests.image.conftest import LINKABLE

TYPES = {"exec": "exec", "pie": "pie", "shared": "dyn", "static": "static", "static-pie": "static-pie", "object": "rel"}


@pytest.mark.parametrize(("compiler", "kind"), LINKABLE)
def test_header(compiled, compiler, kind):
    path = compiled(compiler, kind, "-O2")
    image = Image.open(str(path))
    text = output("readelf", "-hldnW", path)
    assert image.type == TYPES[kind]
    assert image.machine == (243 if compiler.startswith("riscv") else 62)
    assert (image.bits, image.little) == (64, True)
    assert image.entry == int(re.search(r"Entry point address:\s+(0x[0-9a-f]+)", text)[1], 16)
    interp = re.search(r"program interpreter: (.*)\]", text)
    assert image.interp == (interp[1] if interp else "")
    build_id = re.search(r"Build ID: ([0-9a-f]+)", text)
    assert image.build_id == (build_id[1] if build_id else "")
    assert list(image.needed) == re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    assert image.has_eh_frame_hdr == ("GNU_EH_FRAME" in text)
    if kind != "object":
        loads = re.findall(r"^\s+LOAD +(0x\w+) (0x\w+) 0x\w+ (0x\w+) (0x\w+) (.{3}) 0x", text, re.MULTILINE)
        expected = [
            (
                int(at, 16),
                int(mem, 16),
                int(offset, 16),
                int(size, 16),
                perms.replace(" ", "-").replace("R", "r").replace("W", "w").replace("E", "x"),
            )
            for offset, at, size, mem, perms in loads
        ]
        assert [(s.vaddr, s.memsz, s.offset, s.filesz, s.perms) for s in image.segments] == expected


@pytest.mark.parametrize(("compiler", "kind"), LINKABLE)
def test_memory(compiled, compiler, kind):
    """Every loaded section reads as its bytes in the file, and .bss as zeros."""
    path = compiled(compiler, kind, "-O2")
    image, data = Image.open(str(path)), path.read_bytes()
    checked = set()
    for name, at, offset, size, flags in sections(path):
        if "A" not in flags or "T" in flags or not size:
            continue
        if kind == "object":
            section = next(s for s in image.sections if (s.name, s.offset, s.size) == (name, offset, size))
            at = section.addr
        expected = (
            bytes(size)
            if name.startswith((".bss", ".sbss", ".dynbss", "__libc_freeres_ptrs"))
            else data[offset : offset + size]
        )
        assert image.read(at, size) == expected, name
        checked.add(name)
    assert {".text", ".bss"} <= checked


def test_memory_ends_where_segments_end(compiled):
    image = Image.open(str(compiled("gcc", "pie", "-O2")))
    last = image.segments[-1]
    end = last.vaddr + last.memsz
    assert last.memsz > last.filesz, "the test needs a .bss"
    assert image.read(last.vaddr + last.filesz - 4, 8)[4:] == bytes(4)  # across the end of the file's part
    assert image.read(end - 8, 8) == bytes(8)
    assert image.read(end, 0) == b""
    for at, size in ((end - 8, 9), (end, 1), (1 << 62, 4), (image.entry, -1)):
        with pytest.raises(BadImage):
            image.read(at, size)


@pytest.mark.parametrize(("compiler", "kind"), LINKABLE)
def test_executable_ranges(compiled, compiler, kind):
    path = compiled(compiler, kind, "-O2")
    image = Image.open(str(path))
    expected = sorted(
        (at if kind != "object" else offset, size)
        for _, at, offset, size, flags in sections(path)
        if "AX" in flags and size
    )
    assert [(start, end - start) for start, end in image.executable_ranges()] == expected


def test_unwinder(compiled, tmp_path, tool):
    """C programs do not unwind by themselves; C++ ones and static glibc ones can."""
    assert not Image.open(str(compiled("gcc", "pie", "-O2"))).uses_cxx_unwinder
    assert Image.open(str(compiled("gcc", "static", "-O2"))).uses_cxx_unwinder  # pthread_cancel
    text, out = tmp_path / "t.cc", tmp_path / "t"
    text.write_text("int main(int c, char **) { try { if (c > 1) throw 1; } catch (int) { return 2; } return 0; }")
    subprocess.run([tool("g++"), text, "-o", out], check=True, timeout=60)
    assert Image.open(str(out)).uses_cxx_unwinder


def test_from_bytes_is_the_same(compiled):
    path = compiled("gcc", "pie", "-O2", "-fpatchable-function-entry=8,4")
    one, other = Image.open(str(path)), Image.from_bytes(path.read_bytes(), "[memory]")
    assert one.functions() == other.functions()
    assert one.sleds() == other.sleds() != {}
    assert other.path == "[memory]"


def test_this_process_vdso():
    """An image that exists in memory only."""
    with Path("/proc/self/maps").open() as maps, Path("/proc/self/mem").open("rb") as memory:
        line = next((line for line in maps if "[vdso]" in line), None)
        if line is None:
            pytest.skip("this kernel maps no vdso")
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        memory.seek(start)
        image = Image.from_bytes(memory.read(end - start), "[vdso]")
    assert image.type == "dyn"
    assert any("gettimeofday" in name for f in image.functions() for name in (f.name, *f.aliases))
