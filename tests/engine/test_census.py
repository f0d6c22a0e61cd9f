"""The census: each function has exactly one verdict, and what is not hooked says why."""

import pytest

from fentry.arch import Rung
from fentry.engine import census
from fentry.engine.census import _never, sites, take
from fentry.image import Function, Image
from fentry.target import Module

FORMS = [
    ("gcc", (), "x86_64", "entry-jump"),
    ("gcc", ("-fpatchable-function-entry=5",), "x86_64", "sled"),
    ("gcc", ("-fpatchable-function-entry=16",), "x86_64", "sled"),
    ("clang", ("-fpatchable-function-entry=5",), "x86_64", "sled"),
    ("gcc", ("-pg", "-mfentry"), "x86_64", "fentry"),
    ("gcc", ("-pg", "-mfentry", "-mrecord-mcount", "-mnop-mcount", "-fno-pie", "-no-pie"), "x86_64", "fentry"),
    ("gcc", ("-pg", "-mno-fentry"), "x86_64", "mcount"),
    ("riscv64-linux-gnu-gcc", ("-fpatchable-function-entry=4",), "riscv64", "sled"),
    ("riscv64-linux-gnu-gcc", (), "riscv64", "-"),
]
OWN = ("fib", "mix", "is_even", "is_odd")


def one_verdict_each(taken):
    functions = taken.image.functions()
    assert [v.function for v in taken.verdicts] == list(functions)
    addresses = [v.function.address for v in taken.verdicts]
    assert addresses == sorted(set(addresses))
    for v in taken.verdicts:
        assert (v.sled is None) == bool(v.reason), v.name
        assert v.returns != bool(v.returns_reason), v.name
        if v.sled is not None:
            code = taken.image.read(v.site, len(v.sled.idle))
            assert code == v.sled.idle, v.name
            assert v.function.address <= v.site < v.function.address + max(v.size, 32)
        assert (v.form == "-") == (v.sled is None)


@pytest.mark.parametrize(
    ("cc", "flags", "arch", "form"), FORMS, ids=lambda x: " ".join(x) if isinstance(x, tuple) else x
)
def test_each_function_has_one_verdict(build, cc, flags, arch, form):
    path = build("calls.c", cc=cc, flags=flags)
    taken = take(Image.open(str(path)), main=True)
    assert taken.arch.name == arch
    one_verdict_each(taken)
    for name in OWN:
        v = taken.find(name)
        assert v is not None
        assert v.form == form, (name, v.reason)
        assert v.main
    if form == "-":
        assert taken.arch.rung < Rung.MOVABLE
        assert "no sled" in taken.find("fib").reason
    if form == "mcount":
        assert not taken.find("fib").returns
    start = taken.find("_start")
    assert start.sled is None
    assert "first instruction" in start.reason


def test_the_c_library(tool):
    """A large library: every verdict has its reason, and the dangerous ones are what they must be."""
    import ctypes.util
    import subprocess

    name = ctypes.util.find_library("c")
    listed = subprocess.run([tool("ldconfig"), "-p"], capture_output=True, text=True, check=True).stdout
    path = next(line.split(" => ")[1] for line in listed.splitlines() if line.split()[:1] == [name])
    taken = take(Image.open(path))
    one_verdict_each(taken)
    assert len(taken.verdicts) > 2000
    hooked = sum(v.sled is not None for v in taken.verdicts)
    assert hooked > len(taken.verdicts) // 2
    for function in ("_setjmp", "getcontext", "vfork"):
        v = taken.find(function)
        assert v.sled is None or not v.returns, function
    v = taken.find("longjmp")
    assert v.sled is None or not v.returns
    assert {v.reason for v in taken.verdicts if v.sled is None} >= {
        "an ifunc resolver: it runs before relocation is finished"
    }


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("_dl_runtime_resolve_xsavec", "calling convention"),
        ("__x86_return_thunk", "calling convention"),
        ("__x86_indirect_thunk_rax", "calling convention"),
        ("__riscv_save_4", "calling convention"),
        ("__restore_rt", "calling convention"),
        ("mcount", "instrumentation hook"),
        ("__fentry__", "instrumentation hook"),
        ("__cyg_profile_func_enter", "instrumentation hook"),
        ("_start", "first instruction"),
        ("_dl_start", "first instruction"),
        ("main", ""),
        ("mcount_of_things", ""),
        ("my_start", ""),
        ("restore", ""),
    ],
)
def test_names_that_are_refused(name, why):
    for f in (Function(name, 0x1000, 64, "symtab"), Function("other", 0x1000, 64, "symtab", aliases=("x", name))):
        assert why in _never(f)
        assert bool(_never(f)) == bool(why)


def test_resolvers_and_cold_parts_are_refused():
    assert "resolver" in _never(Function("memcpy", 0x1000, 64, "symtab", ifunc=True))
    assert "cold" in _never(Function("f.cold", 0x1000, 64, "symtab", cold=True))


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (census._RETURNS_TWICE, ["setjmp", "_setjmp", "__sigsetjmp", "sigsetjmp", "vfork", "__vfork", "getcontext"],
         ["fork", "setjmp_count", "my_setjmp"]),
        (census._UNWINDER, ["_Unwind_RaiseException", "longjmp", "_longjmp", "siglongjmp", "__libc_siglongjmp",
                            "__longjmp_chk", "unw_step", "dl_iterate_phdr", "__gxx_personality_v0"],
         ["jump", "unwrap"]),
        (census._UNWINDER_LIBRARY, ["libgcc_s.so.1", "libunwind.so.8", "libunwind-x86_64.so.8", "libgcc_s-12.so"],
         ["libgcc.so", "libunwinder.so", "libc.so.6"]),
    ],
    ids=["returns twice", "unwinder", "unwinder library"],
)  # fmt: skip
def test_returns_that_are_left_alone(pattern, yes, no):
    assert [n for n in yes if not pattern.fullmatch(n)] == []
    assert [n for n in no if pattern.fullmatch(n)] == []


def test_sites_are_placed_where_the_module_is_loaded(build):
    taken = take(Image.open(str(build("calls.c"))), "calls", main=True)
    module = Module("calls", "calls", "", 0x5555_0000_0000, 0x5555_0000_0000, 0x5555_0001_0000, True)
    placed = sites(module, taken.verdicts)
    assert len(placed) == sum(v.sled is not None for v in taken.verdicts)
    for s in placed:
        assert s.at == s.verdict.site + module.bias
        assert s.function == s.verdict.function.address + module.bias
        assert s.name == s.verdict.name
        assert s.sled is s.verdict.sled


def test_find_knows_aliases_and_nothing_else(build):
    taken = take(Image.open(str(build("calls.c"))))
    assert taken.find("no such function") is None
    aliased = [(v, a) for v in taken.verdicts for a in v.aliases]
    for v, alias in aliased:
        assert taken.find(alias) is not None or v
