"""``fentry list``: the functions of a program, library or process, each with its form or the reason why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fentry.cli import options, show
from fentry.errors import AskedWrong, NothingMatched

if TYPE_CHECKING:
    from fentry.engine.census import Census, Verdict


@click.command("list", context_settings=options.SETTINGS)
@click.option("--pid", type=click.IntRange(1), metavar="N", help="The modules of a running process.")
@click.option("-v", "--verbose", is_flag=True, help="Also other names, why returns are not hooked, and a summary.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object per function.")
@click.argument("words", nargs=-1, metavar="PROG|LIB [GLOB]")
def list_(pid: int | None, verbose: bool, as_json: bool, words: Sequence[str]) -> int:
    """List functions, with how each can be traced or why it cannot.

    Each function has exactly one verdict. Forms: sled, fentry, mcount (room that the compiler left), entry-jump (the
    first instructions are moved). Addresses are those of the file; with --pid, of the process. Without GLOB
    the program's own functions; LIB:GLOB names those of a library of a process.

    \b
    fentry list ./program
    fentry list -v sqlite3
    fentry list /usr/lib/x86_64-linux-gnu/libc.so.6 'mem*'
    fentry list --json ./program | jq -r 'select(.reason).function'
    fentry list --pid 1234 'libc.so.6:*'

    Exit status: 0; 1 if it cannot be read; 2 if nothing matches.
    """  # noqa: D301  # \b keeps click from joining the lines
    from fentry.engine import filter as filters

    if len(words) > 1 + (pid is None) or (not words and pid is None):
        raise AskedWrong("one file, or --pid N, and at most one GLOB", hint="fentry list --help has examples")
    globs = list(words[1:] if pid is None else words)
    with show.Progress("reading symbols"):
        found = of_process(pid, globs) if pid is not None else of_file(words[0])
        verdicts = [(census, verdict, bias) for census, bias in found for verdict in census.verdicts]
        chosen = filters.select([verdict for _, verdict, _ in verdicts], globs)
    verdicts = [verdicts[i] for i in chosen]
    out = show.output()
    if as_json:
        show.write_rows((_row(verdict, bias, verbose=verbose) for _, verdict, bias in verdicts), out)
    else:
        several = len({verdict.module for _, verdict, _ in verdicts}) > 1
        for census, verdict, bias in verdicts:
            out.write(_line(verdict, bias, census.arch.bits // 4, several=several, verbose=verbose))
    out.flush()
    if verbose:
        for line in summary([verdict for _, verdict, _ in verdicts]):
            show.say(line)
    return 0


def resolve(word: str) -> str:
    """The file that a word names: a path, or a program in PATH. Raises AskedWrong."""
    import shutil

    if Path(word).exists():
        return word
    path = shutil.which(word) if "/" not in word else None
    if path is None:
        raise AskedWrong(f"no such file: {word}", hint="give a path, or the name of a program in PATH")
    return path


def of_file(word: str) -> list[tuple[Census, int]]:
    """The census of one file, at its own addresses. Raises AskedWrong, BadImage, NothingMatched."""
    from fentry.engine import census
    from fentry.image import Image

    path = resolve(word)
    taken = census.take(Image.open(path), Path(path).name, main=True)
    if not taken.verdicts:
        raise NothingMatched(
            f"{path}: no function is known: there are neither symbols nor unwind tables",
            hint="is the file whole? Functions of libraries are found in the libraries' own files",
        )
    return [(taken, 0)]


def of_process(pid: int, globs: Sequence[str]) -> list[tuple[Census, int]]:
    """(census, bias) of the modules of a process that `globs` may mean; it is stopped only while it is asked.

    Raises: what attaching says.
    """
    from fentry.engine import census
    from fentry.engine import filter as filters
    from fentry.errors import BadImage
    from fentry.image import Image
    from fentry.target.process import attach

    patterns = [filters.parse(glob) for glob in globs]
    with attach(pid) as target:
        modules = target.modules()
    out = []
    for module in modules:
        if not module.file or not (module.main or patterns):
            continue
        try:
            image = Image.open(module.file)
        except (BadImage, OSError) as error:
            show.say(f"fentry: {module.name} is left out: {error}")
            continue
        out.append((census.take(image, module.name, main=module.main), module.bias))
    return out


def _row(verdict: Verdict, bias: int, *, verbose: bool) -> dict[str, Any]:
    row = {
        "function": verdict.name,
        "module": verdict.module,
        "address": verdict.function.address + bias,
        "size": verdict.size,
        "form": verdict.sled.form if verdict.sled else None,
        "reason": verdict.reason or None,
    }
    if verbose:
        row["aliases"] = list(verdict.aliases)
        row["returns"] = verdict.sled is not None and verdict.returns
        row["returns_reason"] = verdict.returns_reason or None
    return row


def _line(verdict: Verdict, bias: int, digits: int, *, several: bool, verbose: bool) -> str:
    name = f"{verdict.name} [{verdict.module}]" if several else verdict.name
    if verbose and verdict.aliases:
        name += f" = {' = '.join(verdict.aliases)}"
    why = verdict.reason
    if verbose and verdict.sled is not None and not verdict.returns:
        why = f"entry only: {verdict.returns_reason}"
    tail = f"  ({why})" if why else ""
    return f"{verdict.function.address + bias:0{digits}x} {verdict.size:>7} {verdict.form:<10} {name}{tail}\n"


def summary(verdicts: Sequence[Verdict]) -> list[str]:
    """Lines that count forms and reasons."""
    forms = Counter(v.form for v in verdicts if v.sled is not None)
    reasons = Counter(v.reason for v in verdicts if v.sled is None)
    able = sum(forms.values())
    total = max(len(verdicts), 1)
    out = [f"fentry: {show.count(len(verdicts), 'function')}, {able:,} ({100 * able / total:.1f} %) can be traced"]
    out += [f"  {number:>7,} {form}" for form, number in forms.most_common()]
    out += [f"  {number:>7,} not: {reason}" for reason, number in reasons.most_common()]
    entry_only = sum(v.sled is not None and not v.returns for v in verdicts)
    if entry_only:
        out.append(f"  {entry_only:>7,} of the traced at their entry only")
    return out
