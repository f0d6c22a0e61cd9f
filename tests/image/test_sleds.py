"""Sleds of every compiler, level, kind of file and flag, against objdump's text and readelf's sizes."""

from __future__ import annotations

import re
import subprocess

import pytest

from fentry.image import Image
from tests.image.binutils import PREFIX, disassembly, output, sections, symbols
from tests.image.conftest import KINDS, LINKABLE, NAMES

#: flags and (N, M) of -fpatchable-function-entry
PATCHABLE = {
    "5": (5, 0),
    "16,11": (16, 11),
    "4": (4, 0),
    "8,4": (8, 4),
    "2,2": (2, 2),
}
#: -mnop-mcount exists without PIC only (gcc manual), and static-pie allows no relocations in __mcount_loc
MCOUNT = {
    "-pg": {*KINDS},
    "-pg -mfentry": {*KINDS},
    "-pg -mfentry -mrecord-mcount": {"exec", "pie", "shared", "static", "object"},
    "-pg -mfentry -mnop-mcount -mrecord-mcount -fno-pic -no-pie": {"exec", "static"},
    "-pg -fno-plt": {"exec", "pie", "shared"},
    "-pg -Wl,-z,now -fcf-protection=full": {"pie", "shared"},
}
NOPS = re.compile(r"(data16 |cs |xchg %ax,%ax$|(nop([lw]|\b)))")
PADS = ("endbr64", "endbr32")


def hints_by_name(path):
    """{name: (offset of the site from the function, hint)} of the functions that have a hint."""
    image = Image.open(str(path))
    sleds = image.sleds()
    names = {function.address: function for function in image.functions()}
    assert set(sleds) <= set(names), "a hint belongs to no function"
    return {names[at].name: (hint.address - at, hint) for at, hint in sleds.items()}


def is_nop(text: str) -> bool:
    return NOPS.match(text) is not None


def nop_bytes_at(lines, index: int) -> int:
    """Bytes of nops in a row from line `index` of a function, as objdump decodes them."""
    last = index
    while last < len(lines) and is_nop(lines[last][1]):
        last += 1
    end = lines[last][0] if last < len(lines) else lines[-1][0] + 1
    return end - lines[index][0] if last > index else 0


def check_patchable(path, compiler: str, flag: str) -> None:
    total, before = PATCHABLE[flag]
    unit = {"riscv": 2, "riscv-noc": 4}.get(compiler, 1)
    found = hints_by_name(path)
    # one witness: the section has one pointer for each
    size = sum(size for name, _, _, size, _ in sections(path) if name == "__patchable_function_entries")
    assert len(found) == size // 8
    assert set(found) >= NAMES
    assert {hint.kind for _, hint in found.values()} == {"patchable"}
    assert {hint.before for _, hint in found.values()} == {before * unit}
    # another: the nops are where objdump shows them
    listing = disassembly(path, compiler, found if "static" in path.suffix else ())
    for name, (offset, _) in found.items():
        lines = listing[name]
        first = 1 if lines[0][1] in PADS else 0
        assert offset == lines[first][0] - lines[0][0], name
        if total > before:
            assert nop_bytes_at(lines, first) >= (total - before) * unit, name


@pytest.mark.parametrize(
    ("compiler", "kind", "flag"),
    [
        (compiler, kind, flag)
        for compiler, kind in LINKABLE
        # what people use: 5 and 16,11 on one machine, 4 and 8,4 on the other
        for flag in (("4", "8,4", "2,2") if compiler.startswith("riscv") else ("5", "16,11", "2,2"))
    ],
)
def test_patchable_entries_of_every_kind(compiled, compiler, kind, flag):
    path = compiled(compiler, kind, "-O2", f"-fpatchable-function-entry={flag}")
    check_patchable(path, compiler, flag)


@pytest.mark.parametrize("level", ["-O0", "-O1", "-O3", "-Os"])
@pytest.mark.parametrize("flag", ["5", "8,4"])
@pytest.mark.parametrize("compiler", ["gcc", "clang", "riscv"])
def test_patchable_entries_of_every_level(compiled, compiler, level, flag):
    path = compiled(compiler, "pie", level, f"-fpatchable-function-entry={flag}", "-ffunction-sections")
    check_patchable(path, compiler, flag)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("flag", ["5", "16,11"])
@pytest.mark.parametrize("kind", ["pie", "exec", "object"])
def test_patchable_entries_lie_behind_landing_pads(compiled, compiler, flag, kind):
    path = compiled(compiler, kind, "-O2", "-fcf-protection=full", f"-fpatchable-function-entry={flag}")
    assert "endbr64" in {lines[0][1] for lines in disassembly(path, compiler).values()}
    check_patchable(path, compiler, flag)


@pytest.mark.parametrize("kind", ["object", "shared", "exec"])
def test_patchable_entries_in_many_sections(compiled, kind):
    """With -ffunction-sections clang's objects have one section of records for each text section."""
    path = compiled("clang", kind, "-O2", "-ffunction-sections", "-fpatchable-function-entry=16,11")
    if kind == "object":
        assert sum(name == "__patchable_function_entries" for name, *_ in sections(path)) >= len(NAMES)
    check_patchable(path, "clang", "16,11")


def test_patchable_entries_with_packed_relocations(compiled, tool):
    """DT_RELR leaves the value in the file."""
    tool("ld.lld")
    flags = ["-O2", "-fuse-ld=lld", "-Wl,--pack-dyn-relocs=relr", "-fpatchable-function-entry=5"]
    path = compiled("clang", "shared", *flags)
    assert ".relr.dyn" in {name for name, *_ in sections(path)}
    check_patchable(path, "clang", "5")


def test_patchable_entries_with_lld(compiled, tool):
    tool("ld.lld")
    check_patchable(compiled("clang", "pie", "-O2", "-fuse-ld=lld", "-fpatchable-function-entry=8,4"), "clang", "8,4")


@pytest.mark.parametrize(
    ("target", "options", "flag", "site", "before"),
    [
        ("aarch64-linux-gnu", ["-mbranch-protection=bti"], "4,2", 4, 8),
        ("i386-linux-gnu", ["-fcf-protection=full"], "5", 4, 0),
        ("i386-linux-gnu", [], "16,11", 0, 11),
        ("riscv32-unknown-elf", ["-march=rv32imac"], "4", 0, 0),
        ("riscv32-unknown-elf", ["-march=rv32ima"], "4,2", 0, 8),
    ],
)
def test_patchable_entries_of_other_machines(tmp_path, tool, target, options, flag, site, before):
    """Objects of machines without a C library here, from clang alone: other widths, nops and landing pads."""
    out, text = tmp_path / "other.o", tmp_path / "other.c"
    text.write_text("int f(int x) { return x + 1; } int g(int x) { return f(x) * 3; }")
    command = [tool("clang"), f"--target={target}", "-O2", *options, f"-fpatchable-function-entry={flag}"]
    subprocess.run([*command, "-c", text, "-o", out], check=True, timeout=60)
    found = hints_by_name(out)
    expected = (site, "patchable", before)
    assert {name: (offset, hint.kind, hint.before) for name, (offset, hint) in found.items()} == {
        "f": expected,
        "g": expected,
    }


# -- calls -------------------------------------------------------------------------------------------
def calls_in(listing) -> dict[str, tuple[int, str]]:
    """{function: (offset of its first call of mcount or fentry, which of the two)}, from objdump's text."""
    found = {}
    for name, lines in listing.items():
        for at, text in lines:
            goal = re.search(r"\b(?:call|jal|jalr|auipc)\b.*?\b(__fentry__|_?mcount)\b", text)
            if goal and name not in found:
                found[name] = (at - lines[0][0], "fentry" if goal[1] == "__fentry__" else "mcount")
    return found


@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize(
    ("compiler", "flags", "kind"),
    [
        (compiler, flags, kind)
        for compiler in ("gcc", "clang")
        for flags, kinds in MCOUNT.items()
        for kind in sorted(kinds)
        if compiler == "gcc" or "-mrecord-mcount" not in flags  # clang has it for another machine only
    ],
)
def test_mcount_calls(compiled, compiler, flags, kind, level):
    path = compiled(compiler, kind, level, *flags.split())
    found = hints_by_name(path)
    listing = disassembly(path, compiler, found if "static" in path.suffix else ())
    assert set(found) >= NAMES
    if "mnop" in flags:
        expected = {name: (0, "nop") for name, lines in listing.items() if lines[0][1].startswith("nopl")}
        assert {name: expected.get(name) for name in NAMES} == dict.fromkeys(NAMES, (0, "nop"))
    else:
        expected = calls_in(listing)
    assert {name: (offset, hint.kind) for name, (offset, hint) in found.items()} == expected


@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize(("compiler", "kind"), [pair for pair in LINKABLE if pair[0].startswith("riscv")])
def test_mcount_calls_of_split_addresses(compiled, compiler, kind, level):
    """One jal, or auipc and jalr where the linker may not relax; to the function or its PLT entry."""
    for flags in ([], ["-mno-relax"]):
        path = compiled(compiler, kind, level, "-pg", *flags)
        found = hints_by_name(path)
        expected = calls_in(disassembly(path, compiler, found if "static" in path.suffix else ()))
        if kind != "object" and "-mno-relax" in flags:
            # objdump names the target behind the jalr; the site is the auipc before it
            expected = {name: (at - 4, goal) for name, (at, goal) in expected.items()}
        assert set(found) >= NAMES
        assert {name: (offset, hint.kind) for name, (offset, hint) in found.items()} == expected


@pytest.mark.parametrize("kind", ["static-pie", "pie"])
def test_relaxed_calls_keep_their_prefix(compiled, kind):
    """The linker makes 67 e8 of a call through the GOT: the site is the whole instruction."""
    path = compiled("gcc", kind, "-O2", "-pg", "-mfentry", "-fPIC")
    image = Image.open(str(path))
    codes = {image.read(hint.address, 2) for hint in image.sleds().values()}
    assert codes == {b"\x67\xe8" if kind == "static-pie" else b"\xff\x15"}


def test_calls_through_stubs_with_landing_pads(compiled):
    """-z ibtplt puts endbr64 (and once a bnd prefix) in front of the jump: calls aim at the pad."""
    path = compiled("clang", "pie", "-O2", "-pg", "-fcf-protection=full", "-Wl,-z,ibtplt")
    listing = disassembly(path, "clang")
    assert listing["mcount@plt"][0][1] == "endbr64", "the test needs such a stub"
    expected = calls_in(listing)
    assert {name: (at, hint.kind) for name, (at, hint) in hints_by_name(path).items()} == expected


def test_calls_in_cold_parts_are_no_sleds(compiled):
    """Nobody calls f.cold, so what it calls says nothing about its entry."""
    source = """
    __asm__(".text\\n.type f.cold, @function\\nf.cold: call mcount@PLT\\nret\\n.size f.cold, .-f.cold\\n");
    int main(void) { return 0; }
    """
    path = compiled("gcc", "pie", "-O1", "-pg", source=source)
    assert set(hints_by_name(path)) == {"main"}


@pytest.mark.parametrize(("compiler", "kind"), LINKABLE)
def test_plain_builds_have_no_sleds(compiled, compiler, kind):
    assert Image.open(str(compiled(compiler, kind, "-O2"))).sleds() == {}


def test_call_targets(compiled):
    """The function, its PLT entry and its GOT slot, as readelf and objdump name them."""
    for compiler, kind in (("clang", "pie"), ("gcc", "pie"), ("riscv", "shared")):
        path = compiled(compiler, kind, "-O2", "-pg")
        targets = Image.open(str(path)).call_targets("mcount", "_mcount")
        slots = {
            int(at, 16)
            for at in re.findall(
                r"^([0-9a-f]+)\s.*(?:JUMP_SLO|GLOB_DAT).* _?mcount@", output("readelf", "-rW", path), re.MULTILINE
            )
        }
        stubs = {
            lines[0][0] for name, lines in disassembly(path, compiler).items() if re.fullmatch(r"_?mcount@plt", name)
        }
        assert slots, "the test looks for nothing"
        assert targets == slots | stubs
    path = compiled("gcc", "static", "-O2", "-pg")
    (address,) = {value for value, _, _, _, _, name in symbols(path) if name in ("mcount", "_mcount")}
    assert address in Image.open(str(path)).call_targets("mcount")
    assert Image.open(str(path)).call_targets("no_such_function") == frozenset()


def test_stripped_programs_keep_their_records(compiled, tmp_path, tool):
    """strip leaves the records and the unwind tables: the same sites under made-up names."""
    for flags in (["-fpatchable-function-entry=16,11"], ["-pg", "-mfentry"]):
        path = compiled("gcc", "pie", "-O2", *flags)
        bare = tmp_path / "bare"
        subprocess.run([tool("strip"), "-o", bare, path], check=True, timeout=60)
        assert Image.open(str(bare)).sleds() == Image.open(str(path)).sleds()


@pytest.mark.parametrize(
    ("compiler", "kind", "flags"),
    [
        ("riscv", "static", ["-fpatchable-function-entry=4"]),
        ("clang", "pie", ["-fpatchable-function-entry=5", "-fcf-protection=full"]),
        ("riscv", "shared", ["-fpatchable-function-entry=8,4"]),
    ],
)
def test_records_alone_make_functions(compiled, tmp_path, tool, compiler, kind, flags):
    """No symbols and no unwind tables: every record still tells of a function.

    In the library some functions are exported, which tells how far behind the record a label lies.
    """
    path = compiled(compiler, kind, "-O2", *flags)
    bare = tmp_path / "bare"
    drop = ["-S", "-R", ".eh_frame", "-R", ".eh_frame_hdr"]
    subprocess.run([tool(f"{PREFIX[compiler]}objcopy"), *drop, path, bare], check=True, timeout=60)
    whole, rest = Image.open(str(path)), Image.open(str(bare))
    assert rest.sleds() == whole.sleds() != {}
    assert "patchable" in {f.source for f in rest.functions()}
