"""Real ELF files from real compilers, built once per run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <stdarg.h>

int counter = 3;
static volatile char zeros[70000];
__thread int per_thread = 1;

__attribute__((noinline)) static int leaf(int x) { return x * 3; }
__attribute__((noinline)) static int twice(int x) { return leaf(x) + leaf(x + 1); }
int middle(int x) { return twice(x) + counter; }
int middle_alias(int x) __attribute__((weak, alias("middle")));
__attribute__((noinline)) void nothing(void) { __asm__ volatile(""); }
__attribute__((noinline)) int recurse(int n) { return n ? recurse(n - 1) + leaf(n) : 1; }
__attribute__((cold, noinline)) void fail(const char *why) { fprintf(stderr, "%s\n", why); abort(); }
int checked(int x, int *p) { if (x < 0) { fail("negative"); *p = 7; } return p[0] + middle(x); }
int sum(int n, ...) { va_list v; int s = 0; va_start(v, n); while (n--) s += va_arg(v, int); va_end(v); return s; }
__attribute__((section(".text.apart"), noinline)) int apart(int x) { return x ^ 0x55; }
__attribute__((constructor)) static void early(void) { zeros[69999] = 1; }
__attribute__((noinline)) int with_frame(int n) { volatile char room[300]; room[n] = 1; return room[n + 1 & 255]; }
int entry(int argc, char **argv)
{
    int one = 1;
    nothing();
    printf("%d %d %d\n", checked(argc, &one), sum(3, 1, 2, 3), recurse(argc) + apart(argc) + with_frame(argc));
    return zeros[69999] - 1 + per_thread - 1;
}
#ifndef LIBRARY
int main(int argc, char **argv) { return entry(argc, argv); }
#endif
"""

#: what the source defines and compilers always keep as functions of their own
NAMES = frozenset(
    ("leaf", "twice", "middle", "nothing", "recurse", "fail", "checked", "sum", "apart", "early", "with_frame", "entry")
)

COMPILERS = {
    "gcc": ["gcc"],
    "clang": ["clang"],
    "riscv": ["riscv64-linux-gnu-gcc"],
    "riscv-noc": ["riscv64-linux-gnu-gcc", "-march=rv64g"],
}

KINDS = {
    "exec": ["-no-pie", "-fno-pic"],
    "pie": ["-pie", "-fPIE"],
    "shared": ["-shared", "-fPIC", "-DLIBRARY"],
    "static": ["-static", "-no-pie", "-fno-pic"],
    "static-pie": ["-static-pie", "-fPIE"],
    "object": ["-c"],
}

#: (compiler, kind) that can be linked here: Debian's cross libc has no start file for static-pie
LINKABLE = [
    (compiler, kind) for compiler in COMPILERS for kind in KINDS if (compiler[:5], kind) != ("riscv", "static-pie")
]

Compiled = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """No test reads or writes the index cache of the person who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, tool) -> Compiled:
    """compiled(compiler, kind, *flags, source=...) builds once and gives the path."""
    folder = tmp_path_factory.mktemp("elf")
    done: dict[tuple[object, ...], Path] = {}

    def make(compiler: str, kind: str, *flags: str, source: str = SOURCE) -> Path:
        key = (compiler, kind, flags, source)
        if key not in done:
            program, *options = COMPILERS[compiler]
            text = folder / f"{len(done)}.c"
            text.write_text(source)
            out = text.with_suffix(".o" if kind == "object" else f".{kind}")
            linked = [] if kind == "object" else ["-Wl,--build-id"]
            run = [tool(program), *options, text, "-o", out, "-w", *linked, *KINDS[kind], *flags]
            subprocess.run(run, check=True, timeout=60)
            done[key] = out
        return done[key]

    return make
