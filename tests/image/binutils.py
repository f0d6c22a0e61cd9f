"""What binutils say about a file: the second witness for everything that images claim."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

PREFIX = {"gcc": "", "clang": "", "riscv": "riscv64-linux-gnu-", "riscv-noc": "riscv64-linux-gnu-"}


def output(*command: object) -> str:
    """Standard output of a command that must succeed."""
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, timeout=60).stdout


def symbols(path: Path, *, dynamic: bool = False) -> list[tuple[int, int, str, str, str, str]]:
    """(value, size, type, bind, section, name without version) of every symbol, as readelf prints them."""
    found = []
    for line in output("readelf", "-sW", "--dyn-syms" if dynamic else "-s", path).splitlines():
        table = re.match(r"Symbol table '(.*)'", line)
        if table:
            current = table[1]
        row = re.match(r"\s*\d+: ([0-9a-f]+)\s+(\w+) (\w+)\s+(\w+)\s+(\w+)(?:\s+\[.*\])?\s+(\S+)(?: (.*))?$", line)
        if row and current == (".dynsym" if dynamic else ".symtab"):
            value, size, kind, bind, _, home, name = row.groups()
            name = (name or "").split("@")[0].split(" ")[0]
            found.append((int(value, 16), int(size, 0), kind, bind, home, name))
    return found


def sections(path: Path) -> list[tuple[str, int, int, int, str]]:
    """(name, address, offset, size, flags) of every section, as readelf prints them."""
    rows = re.findall(
        r"^\s*\[\s*\d+\] (\S*)\s+\S+\s+([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+) [0-9a-f]+ +([A-Zop]*) +\d+ +\d+ +\d+$",
        output("readelf", "-SW", path),
        re.MULTILINE,
    )
    return [(name, int(at, 16), int(offset, 16), int(size, 16), flags) for name, at, offset, size, flags in rows]


def disassembly(path: Path, compiler: str, names: Iterable[str] = ()) -> dict[str, list[tuple[int, str]]]:
    """Function name to (address, instruction text with relocation lines joined), as objdump prints it.

    In objects the addresses count from the start of the section. With `names`, only the stretch of a linked
    file from the first of these functions to the last: a static program is mostly libc.
    """
    only = set(names)
    places = [(at, size) for at, size, _, _, _, name in symbols(path) if name in only]
    command = [f"{PREFIX[compiler]}objdump", "-dr", "--no-show-raw-insn", path]
    if places:
        command += [f"--start-address={min(places)[0]}", f"--stop-address={max(at + size for at, size in places)}"]
    functions: dict[str, list[tuple[int, str]]] = {}
    lines: list[tuple[int, str]] = []
    for line in output(*command).splitlines():
        if label := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            lines = functions.setdefault(label[1], [])
        elif insn := re.match(r"\s+([0-9a-f]+):\s+(R_.*)$", line):
            lines[-1] = (lines[-1][0], f"{lines[-1][1]} {insn[2]}")
        elif insn := re.match(r"\s+([0-9a-f]+):\t(.*)$", line):
            lines.append((int(insn[1], 16), insn[2].strip()))
    return functions
