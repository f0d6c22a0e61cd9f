"""LLVM's assembler and disassembler as a witness: thousands of instructions per process."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable

WIDE = "+m,+a,+f,+d,+zba,+zbb,+zbs"  # without +c the assembler does not shorten what it is given
ALL = WIDE + ",+c"

MC = next((p for p in ("llvm-mc", "llvm-mc-14", "/usr/lib/llvm-14/bin/llvm-mc") if shutil.which(p)), "")


def _run(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [MC, "--triple=riscv64", "-M", "no-aliases", *options]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def disassemble(words: Iterable[int], size: int) -> list[str | None]:
    """Give the text of each word, None where LLVM says that it is no instruction."""
    lines = [" ".join(f"0x{b:02x}" for b in w.to_bytes(size, "little")) for w in words]
    done = _run("\n".join(lines) + "\n", "--disassemble", f"--mattr={ALL}")
    bad = {int(n) for n in re.findall(r"^<stdin>:(\d+):", done.stderr, re.MULTILINE)}
    texts = iter([" ".join(t.split()) for t in done.stdout.splitlines() if t.strip() and t.strip() != ".text"])
    result = [None if n in bad else next(texts) for n in range(1, len(lines) + 1)]
    assert next(texts, None) is None, "more texts than words"
    return result


def assemble(texts: Iterable[str], *, short: bool) -> list[int | None]:
    """Give the word of each text, None where LLVM refuses it."""
    texts = list(texts)
    done = _run("\n".join(texts) + "\n", "--show-encoding", f"--mattr={ALL if short else WIDE}")
    bad = {int(n) for n in re.findall(r"^<stdin>:(\d+):\d+: error", done.stderr, re.MULTILINE)}
    codes = iter(re.findall(r"encoding: \[([^\]]*)\]", done.stdout))
    result = []
    for n in range(1, len(texts) + 1):
        code = None if n in bad else bytes(int(b, 16) for b in next(codes).split(","))
        result.append(None if code is None else int.from_bytes(code, "little"))
    assert next(codes, None) is None, "more encodings than texts"
    return result
