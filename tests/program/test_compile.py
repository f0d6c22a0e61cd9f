"""Compiled programs: self-contained, the same every time, and cached where nobody else can write."""

import hashlib
import os
import stat

import pytest

from fentry.arch import all_archs, load
from fentry.errors import EngineBug
from fentry.program import compile as compiler
from fentry.program.compile import cache_dir, compile_programs, compile_text
from fentry.program.context import Layout
from fentry.program.ir import Parent, Spec, event_units

arches = pytest.mark.parametrize("arch", [a.name for a in all_archs()])
LAYOUT = Layout(
    0x10_0000_0000, 4, 4096, 0x3000_0000, "memory", clock_at=0x13_0000_0000, shadow=1 << 40, plane=1 << 30,
    counters=0x12_0000_0000, sites=64, system_calls=False,
)  # fmt: skip
SPECS = [
    Spec("nop", record=False),
    Spec("entry", stack=True),
    Spec("next", parent=Parent.NEXT),
    Spec("after", parent=Parent.AFTER_RESUME),
    Spec("shadow", parent=Parent.SHADOW),
    Spec("exit", exit=True, stack=True, retval=True),
    Spec("deep", depth=3, threshold=7),
    Spec("deep_exit", exit=True, depth=3, threshold=7, retval=True),
    Spec("hits", record=False, count=True, base=0x4000, shift=6),
    Spec("timed", record=False, count=True, timed=True, base=0x4000, shift=6, row=3),
    Spec("timed_exit", exit=True, record=False, timed=True, base=0x4000, shift=6, row=3),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fentry" / "code"


@arches
def test_one_blob_with_every_program_and_its_slow_half(arch, cache):
    blob = compile_programs(load(arch), LAYOUT, SPECS)
    for spec in SPECS:
        assert 0 <= blob.symbols[spec.name] < len(blob.code)
        assert blob.symbols[spec.name] % load(arch).insn_align == 0
    assert len({blob.symbols[s.name] for s in SPECS}) == len(SPECS)


@arches
def test_a_blob_does_not_depend_on_where_it_lies(arch, cache):
    """No branch leaves it, and nothing is left for a linker: it is copied as it is."""
    a = load(arch)
    blob = compile_programs(a, LAYOUT, SPECS)
    lines = a.disassemble(blob.code, 0)
    assert sum(len(raw) for _, raw, _ in lines) == len(blob.code)
    for at, to in a.branch_targets(blob.code, 0):
        assert 0 <= to < len(blob.code), hex(at)


@arches
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("declare void @outside()\ndefine void @f() {\n call void @outside()\n ret void\n}", "relocations left"),
        ("@g = global i64 7\ndefine i64 @f() {\n %v = load i64, ptr @g\n ret i64 %v\n}", "relocations|data in section"),
        ("@g = global i64 7\ndefine void @f() {\n ret void\n}", "data in section"),
        ("define void @f() {\n nonsense\n}", "does not compile"),
        ("define void @f() {\n ret i32 0\n}", "does not compile"),
    ],
)  # fmt: skip
def test_programs_that_cannot_be_copied_are_bugs(arch, cache, text, why):
    with pytest.raises(EngineBug, match=why):
        compile_text(load(arch), 'target triple = "TRIPLE"\n' + text)
    assert not list(cache.glob("*"))


# -- the cache --------------------------------------------------------------------------------------------


def entries(cache):
    return sorted(p for p in cache.iterdir())


@arches
def test_the_second_time_nothing_is_compiled(arch, cache, monkeypatch):
    first = compile_programs(load(arch), LAYOUT, SPECS)
    assert entries(cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not [p for p in entries(cache) if p.name.startswith(".")]
    monkeypatch.setattr(compiler, "_machine", lambda *_: pytest.fail("compiled again"))
    assert compile_programs(load(arch), LAYOUT, SPECS) == first


def test_what_decides_the_code_decides_the_name(cache):
    a = load("x86_64")
    compile_programs(a, LAYOUT, SPECS[:1])
    one = set(entries(cache))
    compile_programs(a, LAYOUT, SPECS[:2])
    assert len(set(entries(cache)) - one) == 1


def _resealed(data):
    """Damage that the checksum does not show: only somebody who can write here could make it."""
    body = data[32:]
    return hashlib.sha256(body).digest() + body


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: b"",
        lambda d: d[:20],
        lambda d: d[:32],
        lambda d: d[:-1],
        lambda d: d[:40] + b"\xff" + d[41:],
        lambda d: d + b"more",
        lambda d: bytes(len(d)),
        lambda d: _resealed(d[:32]),
        lambda d: _resealed(d[:32] + b"\xff\xff\xff\xff" + d[36:60]),
        lambda d: _resealed(d[:32] + b"\x01\x00\x00\x00\xff\xff\x00\x00\x00\x00\xff"),
    ],
    ids=["empty", "short", "checksum", "cut", "a byte", "longer", "zeros", "sealed empty", "sealed count", "sealed"],
)  # fmt: skip
def test_a_damaged_file_is_compiled_again(cache, damage):
    a = load("x86_64")
    good = compile_programs(a, LAYOUT, SPECS[:2])
    (path,) = entries(cache)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert compile_programs(a, LAYOUT, SPECS[:2]) == good
    assert path.read_bytes() == whole


def test_a_directory_that_others_can_write_is_not_used(cache):
    """Its blobs run inside other processes."""
    cache.mkdir(parents=True)
    for mode in (0o777, 0o770, 0o702):
        cache.chmod(mode)
        assert cache_dir() is None
        assert compile_programs(load("x86_64"), LAYOUT, SPECS[:1]).code
        assert not entries(cache)
    cache.chmod(0o755)
    assert cache_dir() == cache


def test_a_directory_that_cannot_be_made_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_dir() is None
    assert compile_programs(load("x86_64"), LAYOUT, SPECS[:1]).code


def test_a_directory_of_another_user_is_not_used(cache, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    assert cache_dir() is None


# -- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "clock", "parent", "units"),
    [
        (Spec("e"), "tsc", False, 1),
        (Spec("e"), "tsc", True, 2),
        (Spec("e"), "order", True, 1),
        (Spec("x", exit=True, retval=True), "tsc", False, 2),
        (Spec("x", exit=True, retval=True), "order", False, 1),
        (Spec("e", threshold=5), "tsc", True, 0),
        (Spec("x", exit=True, threshold=5, retval=True), "tsc", False, 3),
        (Spec("n", record=False), "tsc", False, 0),
    ],
)
def test_units_of_an_event(spec, clock, parent, units):
    assert event_units(spec, clock, parent=parent) == units
