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
        for symbol in table.iter_symbols():
            if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_shndx"] != "SHN_UNDEF":
                found.setdefault(symbol["st_value"], []).append(symbol.name)
    return found


def cyg_counts(path: Path, text: str) -> dict[str, int]:
    """Turn what ``cyg.c`` wrote into counts by name, with the symbol table of the program at `path`."""
    names = functions_of(path)
    (main,) = [at for at, known in names.items() if "main" in known]
    return {sorted(names[main + int(delta)])[0]: int(hits) for delta, hits in (ln.split() for ln in text.splitlines())}


def callgrind_counts(command: Sequence[str | Path], *, stdin: bytes = b"") -> dict[str, int]:
    """Run an unmodified program under callgrind and give calls by function name, of all its modules.

    Recursion levels are added up. A function that nobody called by a call or a jump (the first one
    of a thread, a signal handler) may be missing. Raises Missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        options = [f"--callgrind-out-file={out}", "--compress-strings=no", "--compress-pos=no", "--separate-recs=1"]
        subprocess.run(
            [find_tool("valgrind"), "-q", "--tool=callgrind", *options, *[str(c) for c in command]],
            input=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        counts: Counter[str] = Counter()
        callee = ""
        for line in out.read_text().splitlines():
            if line.startswith("cfn="):
                callee = re.sub(r"'\d+$", "", line.removeprefix("cfn="))
            elif line.startswith("calls="):
                counts[callee] += int(line.removeprefix("calls=").split()[0])
        return dict(counts)
