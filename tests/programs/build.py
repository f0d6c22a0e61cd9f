"""Compile a test program once, whatever the flags, and keep it.

    from tests.programs.build import build
    path = build("calls.c", cc="clang", opt="-O3", flags=("-fpatchable-function-entry=16",))

The result is cached by what decides it: the source and every header, the whole command line and the
compiler's own version line. Several test processes may build at once: each compiles into a
directory of its own and renames the result into place, so nobody ever sees half a program.

Names of compilers: any program on PATH that takes gcc's options (``gcc``, ``clang``,
``riscv64-linux-gnu-gcc``); ``riscv64-linux-gnu-clang`` stands for clang with the target of that
name and the cross compiler's linker and C library (lld 14 cannot relax a riscv64 libc). A ``.cpp``
source is built by the C++ driver of the same family.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent

CROSS = "riscv64-linux-gnu"

#: kind of result -> what the driver is told; "object" and "bare" are special in `build`
KINDS: dict[str, tuple[str, ...]] = {
    "pie": ("-fPIE", "-pie"),
    "exec": ("-fno-pie", "-no-pie"),
    "static": ("-fno-pie", "-static"),
    "static-pie": ("-fPIE", "-static-pie"),
    "shared": ("-fPIC", "-shared"),
    "object": ("-c",),
    "bare": (
        *("-ffreestanding", "-fno-pie", "-nostdlib", "-nostartfiles", "-static"),
        *("-mcmodel=medany", "-Wl,--build-id=none", "-Wl,-z,max-page-size=4096"),
    ),
}

#: Debian package of each compiler, for the message that says what is missing
PACKAGES = {
    "gcc": "gcc",
    "g++": "g++",
    "clang": "clang",
    "clang++": "clang",
    f"{CROSS}-gcc": f"gcc-{CROSS}",
    f"{CROSS}-g++": f"g++-{CROSS}",
}


class Missing(Exception):
    """A tool that is not installed here; the message names the Debian package."""


class BuildFailed(Exception):
    """The compiler refused; the message holds the command and what the compiler said."""


def cache_dir() -> Path:
    """Directory for built programs: $FENTRY_TEST_CACHE, or one in the user's cache directory."""
    named = os.environ.get("FENTRY_TEST_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fentry-tests"
    base.mkdir(parents=True, exist_ok=True)
    return base


def find_tool(name: str) -> str:
    """Path of a program on PATH. Raises Missing."""
    path = shutil.which(name)
    if path is None:
        raise Missing(f"{name} is not installed (Debian package {PACKAGES.get(name, name)}); ./dev setup test")
    return path


@cache
def driver(cc: str, language: str) -> tuple[str, ...]:
    """Command prefix of compiler `cc` for `language` ("c" or "c++"). Raises Missing."""
    if cc.endswith("-clang"):  # clang is every cross compiler at once; the name says which
        clang = find_tool("clang++" if language == "c++" else "clang")
        find_tool(cc.removesuffix("clang") + "gcc")  # its linker, C library and start files
        return (clang, f"--target={cc.removesuffix('-clang')}")
    if language == "c++":
        cc = cc.removesuffix("gcc") + "g++" if cc.endswith("gcc") else cc + "++"
    return (find_tool(cc),)


@cache
def version(program: str) -> str:
    """First line of what a tool says of its version."""
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


@cache
def headers() -> bytes:
    """Everything that a source here may include or be linked with, as one string of bytes."""
    return b"".join(p.name.encode() + p.read_bytes() for p in sorted(HERE.iterdir()) if p.suffix in {".h", ".S", ".ld"})


def build(
    source: str | Path,
    *,
    cc: str = "gcc",
    opt: str = "-O2",
    flags: Sequence[str] = (),
    kind: str = "pie",
    more: Sequence[str | Path] = (),
    extra: Sequence[str] = (),
) -> Path:
    """Compile `source` and return the path of the result.

    Args:
        source: a file here by name, or any path.
        cc: compiler, see above.
        opt: optimisation level.
        flags: further options; they come last, so they win.
        kind: one of `KINDS`. "bare" is a riscv64 machine-mode image at 0x80000000, linked with
            ``start.S`` and ``bare.ld``.
        more: further sources of the program, treated like `source`. Only for kinds that are linked.
        extra: the same, but compiled without `flags` (a counting library must not count itself).

    Raises: Missing, BuildFailed.
    """
    main = _locate(source)
    units = [main, *(_locate(m) for m in more)]
    others = [_locate(e) for e in extra]
    command = driver(cc, "c++" if main.suffix in {".cpp", ".cc"} else "c")
    options = [opt, "-g", "-Wall", *KINDS[kind], *flags]
    if kind == "bare":
        options += [f"-Wl,-T,{HERE / 'bare.ld'}"]
        others.append(HERE / "start.S")
    if kind != "object":
        options += ["-pthread"] if kind != "bare" else []

    key = hashlib.sha256()
    for part in (
        version(command[0]),
        " ".join(command[1:]),
        "\0".join([opt, kind, *flags]),
        *[str(o.name) for o in others],
    ):
        key.update(part.encode() + b"\1")
    for path in (*units, *others):
        key.update(path.read_bytes() + b"\1")
    key.update(headers())
    home = cache_dir() / f"{main.stem}-{key.hexdigest()[:20]}"
    result = home / (main.stem + {"shared": ".so", "object": ".o"}.get(kind, ""))
    if result.exists():
        return result

    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="building-") as scratch:
        made = Path(scratch) / "out"
        made.mkdir()
        linked = []
        for other in others:  # without `flags`
            unit = Path(scratch) / (other.name + ".o")
            codegen = [f for f in KINDS[kind] if f.startswith(("-f", "-m"))]
            _run(
                [
                    *command,
                    opt,
                    "-g",
                    *codegen,
                    *[f for f in flags if f.startswith("-m")],
                    "-c",
                    str(other),
                    "-o",
                    str(unit),
                ]
            )
            linked.append(str(unit))
        link = ["-ldl", "-lm"] if kind not in {"object", "bare"} else []
        _run([*command, *options, *map(str, units), *linked, "-o", str(made / result.name), *link])
        (made / "command").write_text(" ".join([*command, *options]) + "\n" + version(command[0]) + "\n")
        try:
            made.rename(home)
        except OSError:
            if not result.exists():  # else another process was faster, with the same bytes
                raise
    return result


def _locate(source: str | Path) -> Path:
    path = Path(source)
    return path if path.is_absolute() else HERE / path


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildFailed(f"{' '.join(command)}\n{done.stderr}")


def have(cc: str) -> bool:
    """Whether a compiler can be used here. For tests use the fixture ``build`` of conftest."""
    try:
        driver(cc, "c")
    except Missing:
        return False
    return True
