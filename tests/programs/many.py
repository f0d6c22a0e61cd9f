"""Programs with very many functions, each at least 16 bytes long and each really called.

    path = many(20_000, cc="gcc", flags=("-fpatchable-function-entry=16",))
    path ROUNDS           calls every function ROUNDS times (default 1), prints a checksum
    path ROUNDS wait      the same, then prints "waiting" and reads stdin to its end before it exits,
                          calling every function once more per line it reads

Functions are called ``fn_00000`` upwards. They are called through a table, so no compiler can
leave one out, and each mixes a constant of its own, so no linker can fold two into one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.programs.build import build, cache_dir

PREAMBLE = """\
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#define FN __attribute__((noinline, used))
typedef uint64_t word;
"""

MAIN = """\
static word all(word x)
{
    for (unsigned i = 0; i < sizeof table / sizeof *table; i++)
        x = table[i](x);
    return x;
}

int main(int argc, char **argv)
{
    unsigned rounds = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 10) : 1;
    word x = 1;

    for (unsigned r = 0; r < rounds; r++)
        x = all(x);
    if (argc > 2) {
        char line[64];
        puts("waiting");
        fflush(stdout);
        while (fgets(line, sizeof line, stdin))
            x = all(x);
    }
    printf("%016llx\\n", (unsigned long long)x);
    return 0;
}
"""


def source(count: int) -> str:
    """C source with `count` functions and a main."""
    lines = [PREAMBLE]
    lines += [
        f"FN word fn_{i:05d}(word x) {{ return (x ^ x >> {1 + i % 31}) * {0x9E3779B97F4A7C15 ^ i:#x}u + {i}; }}\n"
        for i in range(count)
    ]
    lines += ["static word (*const volatile table[])(word) = {\n"]
    lines += [f"fn_{i:05d},\n" for i in range(count)]
    lines += ["};\n", MAIN]
    return "".join(lines)


def many(count: int, *, cc: str = "gcc", opt: str = "-O1", flags: Sequence[str] = (), kind: str = "pie") -> Path:
    """Build a program of `count` functions; same arguments and errors as `tests.programs.build.build`."""
    path = cache_dir() / f"many_{count}.c"
    text = source(count)
    if not path.exists() or path.read_text() != text:
        with tempfile.NamedTemporaryFile("w", dir=cache_dir(), suffix=".c", delete=False) as out:
            out.write(text)
        Path(out.name).replace(path)
    return build(path, cc=cc, opt=opt, flags=("-g0", *flags), kind=kind)  # debug information doubles the time
