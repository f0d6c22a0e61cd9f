"""A real C code base: Lua, from Debian's own source package, built in every way a tracer may meet.

    path = lua("gcc", "-O2", "patchable")        x86_64 or whatever this machine is
    path = lua("riscv64-linux-gnu-gcc", "-O2", "patchable", march="rv64gc")

The source is fetched once per machine with apt, by a private configuration: the same archives that
this machine already uses (its own source lists, with ``deb-src`` added), but lists and downloads in
our cache directory, so the system's apt state is not touched and root is not needed. What apt
fetched is checked by apt (signed lists, hashes in the .dsc).

Builds differ from Debian's in one way: a fixed seed for hash tables (Lua takes the time and an address
otherwise, and the number of calls changes from run to run).

A program built with "fentry" or "mcount" is gprof's: it writes gmon.out into its working directory.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.programs.build import Missing, build, cache_dir, driver, find_tool

#: name of an instrumentation -> its options; "patchable" has the size that each architecture's sled wants
INSTRUMENTATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "patchable": ("-fpatchable-function-entry=16",),
    "mcount": ("-pg",),
    "fentry": ("-pg", "-mfentry"),  # x86_64 compilers only
    "nop-fentry": ("-pg", "-mfentry", "-mnop-mcount", "-mrecord-mcount"),  # and only gcc, kind "exec"
    "cyg": ("-finstrument-functions", "-fno-inline"),
}

#: sleds by -march on riscv64: eight bytes as four 2-byte nops, or as two 4-byte ones
RISCV_SLED = {"rv64gc": ("-fpatchable-function-entry=4",), "rv64g": ("-fpatchable-function-entry=2",)}


class NoSource(Missing):
    """The source package cannot be had on this machine; the message says what apt said."""


def _apt_options(home: Path) -> list[str]:
    """Write a private apt configuration under `home`; the options that select it."""
    parts = home / "sources.list.d"
    for directory in (parts, home / "lists" / "partial", home / "archives" / "partial"):
        directory.mkdir(parents=True, exist_ok=True)
    etc = Path("/etc/apt")
    for old in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if old.suffix == ".sources" and old.is_file():
            text = [
                "Types: deb-src" if line.lower().startswith("types:") else line for line in old.read_text().splitlines()
            ]
        elif old.suffix == ".list" and old.is_file():
            text = ["deb-src" + line[3:] for line in old.read_text().splitlines() if line.startswith(("deb ", "deb\t"))]
        else:
            continue
        (parts / old.name).write_text("\n".join(text) + "\n")
    options = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": parts,
        "Dir::State::lists": home / "lists",
        "Dir::Cache": home,
        "Dir::Cache::archives": home / "archives",
        "APT::Get::List-Cleanup": "false",
        "APT::Sandbox::User": "",  # apt's own user cannot write to our directory
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def fetch(package: str) -> Path:
    """Give the unpacked source tree of a Debian source package. Raises NoSource."""
    home = cache_dir() / f"source-{package}"
    if home.is_dir():
        return next(p for p in home.iterdir() if p.is_dir())
    if shutil.which("apt-get") is None:
        raise NoSource("apt-get is not here: this is no Debian, so its source packages cannot be fetched")
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="fetching-") as scratch:
        apt = Path(scratch) / "apt"
        apt.mkdir()
        options = _apt_options(apt)
        tree = Path(scratch) / "tree"
        tree.mkdir()
        for command in (["update"], ["source", "--download-only", package]):
            done = subprocess.run(
                ["apt-get", "-q", *options, *command], cwd=tree, check=False, capture_output=True, text=True
            )
            if done.returncode != 0:
                raise NoSource(f"apt-get {' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-400:]}")
        _unpack(tree)
        try:
            tree.rename(home)
        except OSError:
            if not home.is_dir():  # else another process was faster
                raise
    return next(p for p in home.iterdir() if p.is_dir())


def _unpack(tree: Path) -> None:
    """Unpack the upstream tarball that lies in `tree` (dpkg-source would need dpkg-dev)."""
    (tarball,) = [p for p in tree.iterdir() if ".orig.tar." in p.name and not p.name.endswith(".asc")]
    subprocess.run([find_tool("tar"), "-xf", str(tarball), "-C", str(tree)], check=True)


def _lua_source() -> Path:
    """Directory of Lua's C files."""
    source = fetch("lua5.4") / "src"
    if not (source / "lua.c").is_file():
        raise NoSource(f"{source} holds no lua.c")
    return source


def lua(cc: str = "gcc", opt: str = "-O2", instrument: str = "none", *, march: str = "", kind: str = "") -> Path:
    """Build Lua's interpreter.

    Args:
        cc: as for `build`; a riscv64 compiler makes a static program.
        opt: optimisation level.
        instrument: a key of `INSTRUMENTATIONS`; "cyg" is linked with ``cyg.c``.
        march: riscv64 only, a key of `RISCV_SLED`.
        kind: as for `build`; default "static" for a cross compiler, else "pie".

    Raises: Missing, NoSource, BuildFailed.
    """
    driver(cc, "c")  # do not fetch anything for a compiler that is not here
    cross = cc.startswith("riscv64")
    flags: list[str] = list(INSTRUMENTATIONS[instrument])
    if cross:
        march = march or "rv64gc"
        flags = [*(RISCV_SLED[march] if instrument == "patchable" else flags), f"-march={march}", "-mabi=lp64d"]
    source = _lua_source()
    flags += ["-DLUA_USE_POSIX", "-Dluai_makeseed(L)=0x5eedu", "-Wno-unused", f"-I{source}"]
    return build(
        source / "lua.c",
        cc=cc,
        opt=opt,
        flags=flags,
        kind=kind or ("static" if cross else "pie"),
        more=[p for p in sorted(source.glob("l*.c")) if p.name not in {"lua.c", "luac.c"}],
        extra=("cyg.c",) if instrument == "cyg" else (),
    )
