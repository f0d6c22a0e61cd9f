"""Programs of real compilers for the emulated machine: what hooks must not disturb, in one source file."""

import shutil
import subprocess

import pytest
from elftools.elf.elffile import ELFFile

from tests.arch.riscv64.machine import STACK, STACK_SIZE, STOP, Machine

SOURCE = r"""
typedef unsigned long u64;
struct big { long v[6]; };
void *memcpy(void *to, const void *from, u64 n)
{ volatile char *t = to; const char *f = from; while (n--) *t++ = *f++; return to; }
static u64 state = 88172645463325252ul;
u64 next(void) { state ^= state << 13; state ^= state >> 7; state ^= state << 17; return state; }
__attribute__((noinline)) long sum(struct big b, int n) { return n ? b.v[n % 6] + sum(b, n - 1) : (long)next() % 100; }
__attribute__((noinline)) long many(long a, long b, long c, long d, long e, long f, long g, long h, long i, long j)
{ return a + 2*b + 3*c + 4*d + 5*e + 6*f + 7*g + 8*h + 9*i + 10*j + (long)(next() & 7); }
__attribute__((noinline)) double real(double a, float b, double c) { return next() & 1 ? a * b + c : a - b * c; }
__attribute__((noinline)) long even(long n);
__attribute__((noinline)) long odd(long n) { return n == 0 ? 0 : even(n - 1); }
long even(long n) { return n == 0 ? 1 : odd(n - 1); }
__attribute__((noinline)) static long fib(long n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
static long add(long a, long b) { return a + b; }
static long sub(long a, long b) { return a - b; }
static long (*volatile table[])(long, long) = { add, sub };
struct two { u64 a, b; };
__attribute__((noinline)) struct two both(u64 x) { struct two t = { x ^ next(), x + 1 }; return t; }
NESTED
long run(void) {
    struct big b = { { 1, 2, 3, 4, 5, 6 } };
    long r = sum(b, 11) + many(1, 2, 3, 4, 5, 6, 7, 8, 9, 10) + even(21) * 1000 + odd(21) + fib(9);
    for (int i = 0; i < 6; i++) r = r * 31 + table[i & 1](r, i) + (long)(real(r % 97, i, 0.5) * 16);
    struct two t = both(r);
    return NEST(r) + (long)(t.a * 3 ^ t.b);
}
"""
# a nested function called directly: its static chain is live in t2 at its entry
NESTED = r"""
__attribute__((noinline)) long nest(long r) {
    long k = r, s = 0;
    __attribute__((noinline)) long inner(long x) { return x * k++ + (long)(next() & 3); }
    for (int i = 0; i < 5; i++) s += inner(i);
    return s + k;
}
"""
GCC = ("riscv64-linux-gnu-gcc", "-fno-stack-protector")
CLANG = ("clang", "--target=riscv64-linux-gnu", "-fuse-ld=lld", "-mno-relax")


def load_program(tmp_path, compiler, *options):
    """Build SOURCE as a static program and give (segments, site addresses, function addresses by name)."""
    if not shutil.which(compiler[0]):
        pytest.skip(f"{compiler[0]} is not installed")
    nested = compiler is GCC
    text = SOURCE.replace("NESTED", NESTED if nested else "").replace("NEST(r)", "nest(r)" if nested else "r")
    source, output = tmp_path / "p.c", tmp_path / "p"
    source.write_text(text)
    base = ("-nostdlib", "-static", "-fno-pie", "-no-pie", "-Wl,-e,run", "-ffreestanding", "-o", str(output))
    done = subprocess.run([*compiler, *options, *base, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with output.open("rb") as f:
        elf = ELFFile(f)
        segments = [(s["p_vaddr"], s.data(), s["p_memsz"]) for s in elf.iter_segments("PT_LOAD")]
        symbols = {s.name: s["st_value"] for s in elf.get_section_by_name(".symtab").iter_symbols() if s["st_value"]}
        listed = elf.get_section_by_name("__patchable_function_entries").data()
    sites = sorted(int.from_bytes(listed[n : n + 8], "little") for n in range(0, len(listed), 8))
    return segments, [s for s in sites if s], symbols


def run_program(loaded, arm):
    """Run it, with the sites armed by arm(machine, sites, reader); gives (result, events, instructions)."""
    segments, sites, symbols = loaded
    machine = Machine()
    for at, data, size in segments:
        machine.map(at, size)
        machine.write(at, data)
    if arm:
        arm(machine, sites)
    machine["sp"] = STACK + STACK_SIZE - 0x1000
    machine["ra"] = STOP
    machine["gp"] = symbols.get("__global_pointer$", 0)
    machine.run(symbols["run"])
    return machine["a0"], machine.log(), machine


BUILDS = [
    *[(GCC, o, "-march=rv64gc", "-mabi=lp64d", "-fpatchable-function-entry=4") for o in ("-O0", "-O1", "-O2", "-O3")],
    (GCC, "-O2", "-march=rv64g", "-mabi=lp64d", "-fpatchable-function-entry=2"),
    (GCC, "-Os", "-march=rv64gc", "-mabi=lp64d", "-fpatchable-function-entry=8"),
    *[(CLANG, o, "-march=rv64gc", "-mabi=lp64d", "-fpatchable-function-entry=4") for o in ("-O0", "-O2", "-O3")],
]
