"""Independent counts of calls: what a trace is compared with.

Three witnesses that share no code with the tracer:

* the program itself, built with ``-DCOUNT`` (`own_counts`, see ``count.h``);
* the compiler, ``-finstrument-functions`` (`cyg_counts`, see ``cyg.c``). It also counts functions
  that were inlined, so build with ``-fno-inline`` to compare;
* callgrind, for a program that is not rebuilt at all (`callgrind_counts`).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from tests.programs.build import find_tool


def own_counts(text: str) -> dict[str, int]:
    """Read the lines "NAME HITS" that a program built with -DCOUNT writes."""
    return {name: int(hits) for name, hits in (line.split() for line in text.splitlines())}


def run_counted(
    command: Sequence[str | Path], variable: str = "COUNTS", env: Mapping[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run a counting program; give what it did and what it wrote to the file that $`variable` names."""
    with tempfile.TemporaryDirectory() as scratch:
        counts = Path(scratch) / "counts"
        done = subprocess.run(
            [str(c) for c in command],
            check=False,  # what the status must be is the caller's business
            capture_output=True,
            text=True,
            env={**os.environ, **(env or {}), variable: str(counts)},
        )
        return done, counts.read_text()


def functions_of(path: Path) -> dict[int, list[str]]:
    """Address (as linked) -> names of every function in the symbol table of an ELF file."""
    found: dict[int, list[str]] = {}
    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection), f"{path} is stripped"
        for symbol in table.iter_symbols():
            if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_shndx"] != "SHN_UNDEF":
                found.setdefault(symbol["st_value"], []).append(symbol.name)
    return found


def cyg_counts(path: Path, text: str) -> dict[str, int]:
    """Turn what ``cyg.c`` wrote into counts by name, with the symbol table of the program at `path`."""
    names = functions_of(path)
    (main,) = [at for at, known in names.items() if "main" in known]
    return {min(names[main + int(delta)]): int(hits) for delta, hits in (ln.split() for ln in text.splitlines())}


def callgrind_counts(command: Sequence[str | Path], *, module: str = "", stdin: bytes = b"") -> dict[str, int]:
    """Run an unmodified program under callgrind and give calls by function name.

    Args:
        command: the program and its arguments.
        module: base name of the image whose functions are wanted, e.g. "libsqlite3.so.0.8.6";
            the program itself if empty. (Different images have functions of one name.)
        stdin: what the program reads.

    Recursion is added up. What nobody called by a call or a jump (the first function of a thread, a
    signal handler) may be missing. Raises Missing.
    """
    wanted = module or Path(command[0]).name
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        options = [f"--callgrind-out-file={out}", "--compress-strings=no", "--compress-pos=no"]
        subprocess.run(
            [find_tool("valgrind"), "-q", "--tool=callgrind", *options, *[str(c) for c in command]],
            check=False,  # the program's own status
            input=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        counts: Counter[str] = Counter()
        home = callee_home = callee = ""
        for line in out.read_text().splitlines():
            key, _, value = line.partition("=")
            if key == "ob":
                home = callee_home = Path(value).name
            elif key == "cob":  # only said when it is not that of the caller, and only for one call
                callee_home = Path(value).name
            elif key == "cfn":
                callee = re.sub(r"'\d+$", "", value)
            elif key == "calls":
                if callee_home == wanted:
                    counts[callee] += int(value.split()[0])
                callee_home = home
        return dict(counts)
