"""Function lists against readelf: real builds, installed libraries, stripped files, other symbol files."""

from __future__ import annotations

import re
import subprocess
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path

import pytest

from fentry.image import Function, Image
from tests.image.binutils import output, sections, symbols
from tests.image.conftest import LINKABLE, NAMES
from tests.image.crafted import with_symbols

LIBRARIES = [
    "libc.so.6",
    "libsqlite3.so.0",
    "libpython3.11.so.1.0",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
]


def code_of(path: Path) -> list[tuple[int, int]]:
    return sorted((at, at + size) for _, at, _, size, flags in sections(path) if "A" in flags and "X" in flags)


def inside(ranges: list[tuple[int, int]], at: int) -> bool:
    index = bisect_right(ranges, (at, 1 << 64)) - 1
    return index >= 0 and at < ranges[index][1]


def typed(path: Path, *, dynamic: bool = False) -> dict[int, set[str]]:
    """Address to names of every function symbol in code."""
    code, names = code_of(path), defaultdict[int, set[str]](set)
    for value, _, kind, _, home, name in symbols(path, dynamic=dynamic):
        if kind in ("FUNC", "IFUNC") and home != "UND" and value and name and inside(code, value):
            names[value].add(name)
    return names


def frames(path: Path) -> dict[int, int]:
    """Start to size of every FDE outside the PLT, as readelf decodes them; signal frames are left out."""
    stubs = [(at, at + size) for name, at, _, size, _ in sections(path) if name.startswith((".plt", ".iplt"))]
    found, signal, current = {}, set[str](), ""
    for line in output("readelf", "--debug-dump=frames", "-wN", path).splitlines():
        if cie := re.match(r"([0-9a-f]+) [0-9a-f]+ [0-9a-f]+ CIE", line):
            current = cie[1]
        elif re.match(r'\s+Augmentation: +"z.*S', line):
            signal.add(current)
        elif fde := re.match(r"[0-9a-f]+ [0-9a-f]+ [0-9a-f]+ FDE cie=([0-9a-f]+) pc=([0-9a-f]+)\.\.([0-9a-f]+)", line):
            start, end = int(fde[2], 16), int(fde[3], 16)
            if fde[1] not in signal and not inside(sorted(stubs), start):
                found.setdefault(start, end - start)
    return found


def check_list(image: Image) -> None:
    """What holds for every list."""
    functions = image.functions()
    starts = [function.address for function in functions]
    assert starts == sorted(set(starts))
    assert all(function.size > 0 for function in functions)
    ranges = image.executable_ranges()
    assert all(inside(ranges, function.address) for function in functions)
    for function in functions:
        assert image.at(function.address) == function
        assert function.name not in function.aliases
    for function in functions[:: len(functions) // 50 + 1]:
        last = image.at(function.address + function.size - 1)
        assert last is not None
        assert last.address >= function.address


@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize(("compiler", "kind"), LINKABLE)
def test_functions_are_those_of_readelf(compiled, compiler, kind, level):
    path = compiled(compiler, kind, level)
    image = Image.open(str(path))
    listed = image.functions()
    check_list(image)
    assert {function.name for function in listed} >= NAMES
    if kind == "object":
        expected = {name for _, _, type_, _, home, name in symbols(path) if type_ == "FUNC" and home != "UND"}
        assert {name for f in listed for name in (f.name, *f.aliases)} == expected
        return
    expected = typed(path)
    found = {f.address: {f.name, *f.aliases} for f in listed}
    labels = {f.address for f in listed} - set(expected) - set(frames(path))
    # whatever else is listed is a global label of hand-written assembly
    plain = {
        value for value, size, type_, bind, _, _ in symbols(path) if (type_, bind, size) == ("NOTYPE", "GLOBAL", 0)
    }
    assert labels <= plain
    for at, names in expected.items():
        assert found[at] >= names, hex(at)
    sizes = defaultdict[int, set[int]](set)
    for value, size, *_ in symbols(path):
        sizes[value].add(size)
    assert all(f.size in sizes[f.address] for f in listed if f.sized and f.address in expected)


@pytest.mark.parametrize("target", ["s390x-linux-gnu", "mips-linux-gnu", "i386-linux-gnu", "armv7-linux-gnueabi"])
def test_other_byte_orders_and_widths(tmp_path, tool, target):
    """Machines whose code fentry knows nothing of still have functions."""
    out, text = tmp_path / "other.o", tmp_path / "other.c"
    text.write_text("static int v; int f(int x) { return x + v++; } int g(int x) { return f(x) * 3; }")
    command = [tool("clang"), f"--target={target}", "-O2", "-c", text, "-o", out]
    subprocess.run(command, check=True, timeout=60)
    image = Image.open(str(out))
    assert image.little == (target[0] in "ia")
    assert image.bits == (64 if target[0] == "s" else 32)
    assert {f.name: f.size for f in image.functions()} == {
        name: size for _, size, kind, _, _, name in symbols(out) if kind == "FUNC"
    }
    assert {f.name for f in image.functions()} == {"f", "g"}
    assert image.sleds() == {}


def test_aliases_and_objects(compiled):
    path = compiled("gcc", "pie", "-O2")
    image = Image.open(str(path))
    middle = image.function("middle")
    assert middle is not None
    assert middle.aliases == ("middle_alias",)
    assert image.function("middle_alias") == middle
    at = {name: value for value, _, _, _, _, name in symbols(path)}
    assert image.symbol("middle_alias") == image.symbol("middle") == at["middle"] == middle.address
    assert image.symbol("counter") == at["counter"]
    assert image.symbol("zeros") == at["zeros"]
    assert image.function("counter") is None
    assert image.symbol("per_thread") is None  # an offset, not an address
    assert image.symbol("printf") is None  # undefined here
    assert image.symbol("") is None
    assert image.symbol("iddle") is None  # the tail of a name is not a name


def test_cold_parts_are_not_entered_by_call(compiled, tmp_path, tool):
    """Known by name with symbols; without them by unwind rules that start with a frame already built."""
    path = compiled("gcc", "pie", "-O2")
    image = Image.open(str(path))
    cold = {function.address for function in image.functions() if function.cold}
    assert cold == {value for value, *_, name in symbols(path) if name.endswith(".cold")}
    assert cold, "the test needs a cold part"
    bare = tmp_path / "bare"
    subprocess.run([tool("strip"), "-o", bare, path], check=True, timeout=60)
    assert {f.address for f in Image.open(str(bare)).functions() if f.cold} == cold


def test_stripped_code_is_listed_by_its_unwind_tables(compiled, tmp_path, tool):
    for compiler in ("gcc", "clang"):
        path = compiled(compiler, "pie", "-O2")
        bare = tmp_path / compiler
        subprocess.run([tool("strip"), "-o", bare, path], check=True, timeout=60)
        image = Image.open(str(bare))
        check_list(image)
        expected = frames(path)
        assert {f.address: f.size for f in image.functions()} == expected
        assert {f.source for f in image.functions()} == {"eh_frame"}
        own = {at: names for at, names in typed(path).items() if names & NAMES}
        for at in own:
            assert image.function(f"sub_{at:x}") == image.at(at)


def test_files_without_section_headers(compiled, tmp_path, tool):
    """Everything then comes through program headers: symbols by hash table, code by unwind header, no PLT."""
    for compiler, kind in (("gcc", "pie"), ("clang", "shared"), ("gcc", "exec")):
        for style in ("gnu", "sysv"):
            path = compiled(compiler, kind, "-O2", f"-Wl,--hash-style={style}")
            bare = tmp_path / f"{compiler}-{kind}-{style}"
            subprocess.run([tool("llvm-objcopy"), "--strip-sections", path, bare], check=True, timeout=60)
            image, whole = Image.open(str(bare)), Image.open(str(path))
            assert image.sections == ()
            check_list(image)
            assert {f.address: f.size for f in image.functions() if f.source == "eh_frame"}.items() <= frames(
                path
            ).items()
            assert {f.address for f in image.functions()} == set(frames(path)) | set(typed(path, dynamic=True))
            assert (image.needed, image.build_id, image.type) == (whole.needed, whole.build_id, whole.type)


def test_mcount_calls_without_section_headers(compiled, tmp_path, tool):
    path = compiled("clang", "pie", "-O2", "-pg")
    bare = tmp_path / "bare"
    subprocess.run([tool("llvm-objcopy"), "--strip-sections", path, bare], check=True, timeout=60)
    assert Image.open(str(bare)).sleds() == Image.open(str(path)).sleds() != {}


@pytest.mark.parametrize("name", LIBRARIES)
def test_installed_libraries(name):
    """Debian's own files: exported functions by readelf, hidden ones by their unwind tables."""
    found = [path for folder in ("/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib") for path in Path(folder).glob(name)]
    if not found:
        pytest.skip(f"{name} is not installed")
    path = found[0]
    image = Image.open(str(path), debug_dirs=(), cache=False)
    check_list(image)
    listed = {function.address: function for function in image.functions()}
    exported = typed(path, dynamic=True)
    for at, names in exported.items():
        assert {listed[at].name, *listed[at].aliases} == names
    covered = [(at, at + f.size) for at, f in listed.items() if f.source == "dynsym" and f.sized]
    expected = {at: size for at, size in frames(path).items() if at not in exported and not inside(covered, at)}
    assert {at: f.size for at, f in listed.items() if f.source == "eh_frame"} == expected


def test_names_people_use(tmp_path):
    """Of a C library's many aliases the documented one is shown; of its versions the default one is meant."""
    path = Path("/usr/lib/x86_64-linux-gnu/libc.so.6")
    if not path.exists():
        pytest.skip("no such C library here")
    image = Image.open(str(path), cache=False)
    for name in ("read", "write", "open", "fork", "malloc", "getpid", "printf"):
        function = image.function(name)
        assert function is not None
        assert function.name == name
    lines = output("readelf", "-W", "--dyn-syms", path)
    versions = re.findall(r": ([0-9a-f]+) +\d+ +I?FUNC .* memcpy@(@?)", lines)
    default = {int(at, 16) for at, mark in versions if mark}
    assert len(versions) > 1, "the test needs two versions of memcpy"
    memcpy = image.function("memcpy")
    assert memcpy is not None
    assert {memcpy.address} == default == {image.symbol("memcpy")}


LOCAL, GLOBAL, WEAK = 0x02, 0x12, 0x22  # st_info of functions


def test_preferred_names():
    """The documented order of names at one address, each rule against the next."""
    best_first = [
        (b"plain", GLOBAL),
        (b"weaker", WEAK),
        (b"longest_weak", WEAK),
        (b"__underscored", GLOBAL),
        (b"here", LOCAL),
        (b"made.localalias", GLOBAL),
        (b"old@V1", GLOBAL),
    ]
    for index, _ in enumerate(best_first):
        rest = best_first[index:]
        for order in (rest, rest[::-1]):
            symbols_ = [(name, 0x10040, 4, info) for name, info in order]
            (function,) = Image.from_bytes(with_symbols(*symbols_), "crafted").functions()
            assert [function.name, *function.aliases] == [name.split(b"@")[0].decode() for name, _ in rest]


@pytest.mark.parametrize("turned", [False, True])
def test_one_name_at_several_addresses(turned):
    """Default version before old, global before weak before local, then the lowest address."""
    groups = [
        [(b"f@@V2", 0x10030, GLOBAL), (b"f@V1", 0x10010, GLOBAL)],
        [(b"g", 0x10050, GLOBAL), (b"g", 0x10048, WEAK), (b"g", 0x10040, LOCAL)],
        [(b"h", 0x10060, LOCAL), (b"h", 0x10068, LOCAL)],
    ]
    rows = [(name, at, 4, info) for group in groups for name, at, info in group]
    image = Image.from_bytes(with_symbols(*rows[:: -1 if turned else 1]), "crafted")
    assert len(image.functions()) == len(rows)
    for group in groups:
        name = group[0][0].split(b"@")[0].decode()
        function = image.function(name)
        assert function is not None
        assert function.address == group[0][1] == image.symbol(name)


def test_names_of_assemblers_are_dropped():
    rows = [(name, 0x10000 + 8 * at, 4, GLOBAL) for at, name in enumerate((b"$x", b"$d.1", b".L12", b"", b"real"))]
    assert [f.name for f in Image.from_bytes(with_symbols(*rows), "crafted").functions()] == ["real"]


def test_labels_inside_unwind_ranges_are_no_functions(compiled):
    source = """
    __asm__(".text\\n.globl begins\\nbegins: .cfi_startproc\\nnop\\n"
            ".globl middle\\nmiddle: nop\\nret\\n.cfi_endproc\\n");
    int main(void) { return 0; }
    """
    image = Image.open(str(compiled("gcc", "pie", "-O1", source=source)))
    begins = image.function("begins")
    assert begins is not None
    assert (begins.size, begins.sized) == (3, True)  # the unwind table knows
    assert image.function("middle") is None


def test_indirect_functions(compiled):
    source = """
    static int one(int x) { return x + 1; }
    static int (*choose(void))(int) { return one; }
    int chosen(int) __attribute__((ifunc("choose")));
    int main(int argc, char **argv) { return chosen(argc); }
    """
    image = Image.open(str(compiled("gcc", "pie", "-O1", source=source)))
    chosen = image.function("chosen")
    assert chosen is not None
    assert chosen.ifunc
    assert "choose" in (chosen.name, *chosen.aliases)
    assert [f.name for f in image.functions() if f.ifunc] == [chosen.name]


def test_functions_without_a_size_end_at_the_next(compiled):
    source = """
    __asm__(".text\\n.globl bare\\n.type bare, @function\\nbare: nop\\nnop\\nret\\n"
            ".globl untyped\\nuntyped: nop\\nret\\nlocal_label: nop\\nret\\n"
            ".globl last\\n.type last, @function\\nlast: ret\\n.size last, 1\\n");
    int main(void) { return 0; }
    """
    image = Image.open(str(compiled("gcc", "pie", "-O1", source=source)))
    sizes = {f.name: (f.size, f.sized) for f in image.functions() if f.name in ("bare", "untyped", "last")}
    assert sizes == {"bare": (3, False), "untyped": (4, False), "last": (1, True)}
    assert image.function("local_label") is None
    init = image.function("_init")
    end = max(end for start, end in image.executable_ranges() if start <= init.address < end)
    assert init.address + init.size == end  # the end of .init, not the start of what follows


def test_at_finds_the_innermost(compiled):
    source = """
    __asm__(".text\\n.globl outer\\n.type outer, @function\\nouter: nop\\nnop\\n"
            ".globl inner\\n.type inner, @function\\ninner: nop\\n.size inner, 1\\n"
            "nop\\nret\\n.size outer, .-outer\\n");
    int main(void) { return 0; }
    """
    image = Image.open(str(compiled("gcc", "pie", "-O1", source=source)))
    outer = image.function("outer")
    assert [f.name for at in range(5) if (f := image.at(outer.address + at))] == [
        "outer",
        "outer",
        "inner",
        "outer",
        "outer",
    ]
    assert image.at(0) is None
    assert image.at(1 << 63) is None


# -- symbols that live elsewhere ---------------------------------------------------------------------
@pytest.fixture
def split(compiled, tmp_path, tool):
    """(stripped file with a debuglink, its debug file, the whole file)."""
    whole = compiled("gcc", "pie", "-O2")
    debug, bare = tmp_path / "prog.debug", tmp_path / "prog"
    objcopy = tool("objcopy")
    subprocess.run([objcopy, "--only-keep-debug", whole, debug], check=True, timeout=60)
    subprocess.run([objcopy, "-S", f"--add-gnu-debuglink={debug}", whole, bare], check=True, timeout=60)
    return bare, debug, whole


def sources(image: Image) -> set[str]:
    return {function.source for function in image.functions()}


def test_debug_file_by_link(split):
    bare, debug, whole = split
    named = {f.name: f.address for f in Image.open(str(whole)).functions()}
    assert {f.name: f.address for f in Image.open(str(bare)).functions()} == named
    assert sources(Image.open(str(bare))) == {"debug"}
    assert sources(Image.open(str(bare), debug_dirs=())) == {"eh_frame"}
    debug.write_bytes(debug.read_bytes() + b"\0")
    assert sources(Image.open(str(bare))) == {"eh_frame"}, "the checksum no longer fits"


def test_debug_file_in_its_folders(split, tmp_path):
    bare, debug, _ = split
    (bare.parent / ".debug").mkdir()
    debug = debug.rename(bare.parent / ".debug" / debug.name)
    assert sources(Image.open(str(bare))) == {"debug"}
    root = tmp_path / "root"
    apart = root / str(bare.parent).lstrip("/")
    apart.mkdir(parents=True)
    debug.rename(apart / debug.name)
    assert sources(Image.open(str(bare))) == {"eh_frame"}
    assert sources(Image.open(str(bare), debug_dirs=(str(root),))) == {"debug"}


def test_debug_file_by_build_id(split, tmp_path, compiled):
    bare, debug, _ = split
    image = Image.open(str(bare))
    folder = tmp_path / "debug" / ".build-id" / image.build_id[:2]
    folder.mkdir(parents=True)
    place = folder / f"{image.build_id[2:]}.debug"
    debug.rename(place)
    dirs = (str(tmp_path / "debug"),)
    assert sources(Image.open(str(bare), debug_dirs=dirs)) == {"debug"}
    place.write_bytes(compiled("gcc", "pie", "-O0").read_bytes())
    assert sources(Image.open(str(bare), debug_dirs=dirs)) == {"eh_frame"}, "it belongs to another program"
    place.write_bytes(b"\x7fELF")
    assert sources(Image.open(str(bare), debug_dirs=dirs)) == {"eh_frame"}, "broken"


@pytest.mark.parametrize("name", ["../prog.debug", "/etc/passwd", ".", "..", "", "sub/../prog.debug", "prog"])
def test_debug_links_are_bare_names(split, name, tmp_path, tool):
    """A link that is a path, or leads back to the file itself, is not followed."""
    import struct
    import zlib

    bare, debug, _ = split
    (bare.parent / "sub").mkdir(exist_ok=True)
    link = tmp_path / "link"
    raw = name.encode() + b"\0"
    crc = zlib.crc32(bare.read_bytes() if name == "prog" else debug.read_bytes())
    link.write_bytes(raw.ljust(-(-len(raw) // 4) * 4, b"\0") + struct.pack("<I", crc))
    subprocess.run([tool("objcopy"), f"--update-section=.gnu_debuglink={link}", bare], check=True, timeout=60)
    assert sources(Image.open(str(bare))) == {"eh_frame"}


def test_embedded_symbols(compiled, tmp_path, tool):
    """.gnu_debugdata as Fedora makes it: symbols of a stripped program, packed with xz."""
    import lzma

    whole = compiled("gcc", "pie", "-O2")
    bare, inner, packed = tmp_path / "bare", tmp_path / "inner", tmp_path / "inner.xz"
    subprocess.run([tool("objcopy"), "--only-keep-debug", whole, inner], check=True, timeout=60)
    packed.write_bytes(lzma.compress(inner.read_bytes()))
    command = [tool("objcopy"), "-S", f"--add-section=.gnu_debugdata={packed}"]
    subprocess.run([*command, whole, bare], check=True, timeout=60)
    image = Image.open(str(bare), debug_dirs=())
    assert sources(image) == {"minidebug"}
    assert {f.name for f in image.functions()} >= NAMES
    # a bomb of zeros and a cut stream are left alone
    for data in (lzma.compress(bytes(1 << 24)), packed.read_bytes()[:-20], b"nonsense"):
        packed.write_bytes(data)
        subprocess.run([*command, whole, bare], check=True, timeout=60)
        assert sources(Image.open(str(bare), debug_dirs=())) == {"eh_frame"}


def test_function_is_a_plain_value():
    function = Function("f", 1, 2, "symtab")
    assert (function.aliases, function.ifunc, function.sized, function.cold) == ((), False, True, False)
    with pytest.raises(AttributeError):
        function.size = 3
