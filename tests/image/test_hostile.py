"""Files that are damaged, or built to do harm: one BadImage or a shorter list, in bounded time and memory."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fentry.errors import BadImage
from fentry.image import Image
from tests.image.crafted import elf, symbol

SMALL = """
static int __attribute__((noinline)) f(int x) { return x * 3; }
int g(int x) { return f(x) + 1; }
int main(int argc, char **argv) { return g(argc); }
"""


def use(data: bytes) -> Image | None:
    """Ask an image everything there is to ask; None if it is refused."""
    try:
        image = Image.from_bytes(data, "hostile", debug_dirs=("/nowhere",))
    except BadImage as error:
        assert str(error).startswith("hostile: ")
        return None
    functions = image.functions()
    for function in functions[:20]:
        assert image.at(function.address) is not None
        image.function(function.name)
    for start, _ in image.executable_ranges()[:20]:
        image.at(start)
    for name in ("main", "_start", "", "a", "environ"):
        image.symbol(name)
    image.sleds()
    image.call_targets("mcount", "__fentry__")
    assert isinstance(image.uses_cxx_unwinder, bool)
    for segment in image.segments[:20]:
        for at, size in ((segment.vaddr, 16), (segment.vaddr, segment.memsz), (segment.vaddr + segment.filesz, 1)):
            with contextlib.suppress(BadImage):
                assert len(image.read(at, size)) == size
    return image


FLAVOURS = {
    "sleds": ("gcc", "pie", "-O2", "-fpatchable-function-entry=8,4", "-Wl,--hash-style=both"),
    "mcount": ("gcc", "pie", "-O2", "-pg"),
    "recorded": ("gcc", "exec", "-O2", "-pg", "-mfentry", "-mrecord-mcount"),
    "object": ("gcc", "object", "-O2", "-pg", "-ffunction-sections", "-fpatchable-function-entry=4"),
    "foreign": ("riscv", "shared", "-O2", "-pg", "-fpatchable-function-entry=4"),
}


@pytest.fixture(scope="module", params=[*FLAVOURS, "bare"])
def good(request, compiled, tmp_path_factory, tool) -> bytes:
    """A small real file; "bare" has no section headers."""
    path = compiled(*FLAVOURS.get(request.param, FLAVOURS["mcount"]), source=SMALL)
    if request.param == "bare":
        bare = tmp_path_factory.mktemp("bare") / "bare"
        subprocess.run([tool("llvm-objcopy"), "--strip-sections", path, bare], check=True, timeout=60)
        path = bare
    return path.read_bytes()


NASTY = [
    0,
    1,
    2,
    3,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutations(good, data):
    """Overwritten fields, mostly in headers and tables, with small, large and negative numbers."""
    bytes_ = bytearray(good)
    shoff = struct.unpack_from("<Q", good, 40)[0] or 64
    places = st.one_of(
        st.integers(0, 63),
        st.integers(64, min(len(good), 1200) - 8),
        st.integers(shoff, len(good) - 8) if shoff < len(good) - 8 else st.just(0),
        st.integers(0, len(good) - 8),
    )
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(places)
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(st.one_of(st.sampled_from(NASTY), st.integers(0, len(good) * 2)))
        bytes_[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    use(bytes(bytes_))


@given(st.floats(0, 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(0.0)
@example(1.0)
def test_truncation(good, share):
    """A file that was cut: refused while its program headers are missing, else shorter lists."""
    use(good[: int(len(good) * share)])


@given(st.binary(max_size=600))
@settings(max_examples=200, deadline=None)
def test_noise(data):
    use(data)
    use(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, 62, 1) + data)


def test_every_header_field(good):
    """Each field of the ELF header and of the first headers of both tables, with every nasty number."""
    shoff = struct.unpack_from("<Q", good, 40)[0]
    places = [(at, 2) for at in range(16, 64, 2)] + [(at, 8) for at in range(64, 64 + 56 * 3, 8)]
    places += [(at, 8) for at in range(shoff, min(len(good) - 8, shoff + 64 * 3), 8)]
    for at, width in places:
        for value in NASTY[::3]:
            data = bytearray(good)
            data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
            use(bytes(data))


# -- built to do harm --------------------------------------------------------------------------------
def bounded(data: bytes, *, factor: float = 10.0, seconds: float = 2.0) -> Image | None:
    """`use` within `factor` times the file in memory, and within `seconds` of processor time."""
    use(data[:1000])  # lazily imported parts do not count
    began = time.process_time()
    image = use(data)
    spent = time.process_time() - began
    tracemalloc.start()
    try:
        use(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < factor * len(data) + (1 << 20), f"{peak / len(data):.1f} times the file"
    assert spent < seconds
    return image


COUNT = 40_000


def test_one_long_name_shared_by_all_symbols():
    """Every symbol's name starts one byte later in one string: 800 MB of names in a file of one."""
    strings = b"\0" + b"a" * COUNT + b"\0"
    table = symbol(0, 0) + b"".join(symbol(n + 1, 0x10000 + n) for n in range(COUNT))
    image = bounded(elf([(0, 2, 0, 0, table, 2, 1, 24), (0, 3, 0, 0, strings, 0, 0, 0)]))
    assert image is not None


def test_strings_without_an_end():
    strings = b"a" * (1 << 20)
    table = symbol(0, 0) + b"".join(symbol(n, 0x10000 + n) for n in range(COUNT))
    image = bounded(elf([(0, 2, 0, 0, table, 2, 1, 24), (0, 3, 0, 0, strings, 0, 0, 0)]))
    assert image is not None
    assert image.functions() == []


def test_a_file_that_is_one_symbol_table():
    strings = b"\0" + b"".join(b"%x\0" % n for n in range(COUNT))
    names = [1]
    for n in range(COUNT):
        names.append(names[-1] + len(b"%x\0" % n))
    table = symbol(0, 0) + b"".join(symbol(names[n], 0x10000 + n) for n in range(COUNT))
    bounded(elf([(0, 2, 0, 0, table, 2, 1, 24), (0, 3, 0, 0, strings, 0, 0, 0)]))


def test_all_symbols_at_one_address():
    strings = b"\0" + b"".join(b"%x\0" % n for n in range(COUNT))
    names = [1]
    for n in range(COUNT):
        names.append(names[-1] + len(b"%x\0" % n))
    table = symbol(0, 0) + b"".join(symbol(names[n], 0x10040) for n in range(COUNT))
    bounded(elf([(0, 2, 0, 0, table, 2, 1, 24), (0, 3, 0, 0, strings, 0, 0, 0)]))


def test_functions_nested_in_each_other():
    strings = b"\0f\0"
    table = symbol(0, 0) + b"".join(symbol(1, 0x10000 + n, COUNT) for n in range(COUNT))
    bounded(elf([(0, 2, 0, 0, table, 2, 1, 24), (0, 3, 0, 0, strings, 0, 0, 0)]))


def test_a_file_that_is_one_unwind_table():
    cie = struct.pack("<IIB3sBBBBB", 14, 0, 1, b"zR\0", 1, 0x78, 16, 1, 0x03)
    cie += b"\0"
    table = bytearray(cie)
    for n in range(COUNT):
        body = struct.pack("<IIIBBBB", len(table) + 4, 0x10000 + n, 1, 0, 0, 0, 0)
        table += struct.pack("<I", len(body)) + body
    data = elf([(1, 1, 2, 0x10000, bytes(table), 0, 0, 0), (0, 3, 0, 0, b"\0.eh_frame\0", 0, 0, 0)])
    data = bytearray(data)
    struct.pack_into("<H", data, 62, 2)  # e_shstrndx
    # one listed function takes 200 bytes and the smallest FDE 20, which no honest file has without code
    image = bounded(bytes(data), factor=13)
    assert image is not None
    assert len(image.functions()) == COUNT


@pytest.mark.parametrize("name", [b"__patchable_function_entries", b"__mcount_loc", b".eh_frame", b".gnu_debuglink"])
def test_a_thousand_sections_that_are_the_whole_file(name):
    body = os.urandom(1 << 16)
    many = [(1, 1, 6, 0x10000, (0, 1 << 16), 0, 0, 0)] * 3000
    data = bytearray(elf([(0, 3, 0, 0, b"\0" + name + b"\0", 0, 0, 0), *many], body=body))
    struct.pack_into("<H", data, 62, 1)
    bounded(bytes(data))
    struct.pack_into("<H", data, 16, 1)  # the same as a relocatable object
    bounded(bytes(data))


def test_a_thousand_relocation_tables_that_are_the_whole_file():
    body = bytes(1 << 16)
    names = b"\0__patchable_function_entries\0"
    many = [(1, 1, 2, 0, (64, 64), 0, 0, 0), *[(0, 4, 0, 0, (0, 1 << 16), 0, 2, 24)] * 3000]
    data = bytearray(elf([(0, 3, 0, 0, names, 0, 0, 0), *many], body=body, kind=1))
    struct.pack_into("<H", data, 62, 1)
    bounded(bytes(data))


def test_all_segments_map_the_same_bytes():
    bounded(elf([], body=b"\xe8" * (1 << 20), loads=10_000))


def test_code_that_is_all_calls():
    """Each byte may start a call: the search stays within its chunk."""
    strings = b"\0mcount\0"
    table = symbol(0, 0) + symbol(1, 0x10000)
    image = bounded(elf([(0, 2, 0, 0, table, 2, 1, 24), (0, 3, 0, 0, strings, 0, 0, 0)], body=b"\xe8" * (1 << 22)))
    assert image is not None


def test_section_count_of_four_billion(compiled):
    data = bytearray(compiled("gcc", "pie", "-O2").read_bytes())
    shoff = struct.unpack_from("<Q", data, 40)[0]
    struct.pack_into("<H", data, 60, 0)
    struct.pack_into("<Q", data, shoff + 32, 1 << 32)
    assert use(bytes(data)) is not None


def test_names_that_control_a_terminal():
    strings = b"\0\x1b[2Jf\n\0\xff\xfe\0"
    table = symbol(0, 0) + symbol(1, 0x10000, 1) + symbol(8, 0x10010, 1)
    image = use(elf([(0, 2, 0, 0, table, 2, 1, 24), (0, 3, 0, 0, strings, 0, 0, 0)]))
    assert image is not None
    assert [f.name for f in image.functions()] == ["\\x1b[2Jf\\n", "\\xff\\xfe"]


# -- not images at all -------------------------------------------------------------------------------
def test_refusals_say_what_to_do(tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nexit 0\n")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    empty = tmp_path / "empty"
    empty.touch()
    for path in (script, fifo, empty, tmp_path, tmp_path / "absent", "/dev/zero", "nul\0byte"):
        with pytest.raises(BadImage) as caught:
            Image.open(str(path))
        assert caught.value.path == str(path)
        assert caught.value.hint
    with pytest.raises(BadImage, match="core dump"):
        Image.from_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 4, 62, 1) + bytes(40), "core")


def test_a_file_that_shrinks_while_it_is_open(compiled, tmp_path):
    """Reads go on as errors, not as signals."""
    path = tmp_path / "program"
    path.write_bytes(compiled("gcc", "pie", "-O2").read_bytes())
    image = Image.open(str(path))
    os.truncate(path, 600)
    with pytest.raises(BadImage):
        image.functions()
        image.read(image.entry, 16)


def test_no_descriptor_is_left_open(compiled):
    path = str(compiled("gcc", "pie", "-O2"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        Image.open(path).functions()
        with pytest.raises(BadImage):
            Image.open("/dev/null")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
