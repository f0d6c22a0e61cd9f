"""``fentry explain``: what tracing does to one function. Nothing is run; the slot is built at made-up addresses."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from fentry.cli import options, show
from fentry.cli.list import resolve
from fentry.cli.traced import is_foreign
from fentry.errors import AskedWrong

if TYPE_CHECKING:
    from fentry.arch import Arch
    from fentry.engine.census import Census, Site, Verdict
    from fentry.engine.island import Island, SlotTable
    from fentry.engine.ops import Op
    from fentry.program.context import Layout

#: where things are in the made-up target
_DATA = 0x7F00_0000_0000
_SHADOW = 0x6000_0000_0000
_STACKS = (0x7000_0000_0000, 1 << 43)
_RING = 1 << 20
#: bytes of a function that are shown where nothing is patched
_SHOWN = 32


@click.command(context_settings=options.SETTINGS)
@click.option("-p", "--tracer", default="function_graph", metavar="TRACER", help="function_graph, function, profile.")
@click.option("-v", "--verbose", is_flag=True, help="Also disassemble the programs.")
@click.argument("prog", metavar="PROG|LIB")
@click.argument("func")
def explain(tracer: str, verbose: bool, prog: str, func: str) -> int:
    """Explain how a function is traced, or why it cannot be.

    Shows the function's first bytes before and after, the slot that they lead to, the instructions that had to
    move, which registers are whose, and the programs that run. Addresses are those of the file; where the slot and
    fentry's data will be is decided at run time, and made up here.

    \b
    fentry explain ./program main
    fentry explain -v -p function /usr/lib/x86_64-linux-gnu/libc.so.6 malloc

    Exit status: 0; 1 if the file cannot be read; 2 if it has no such function.
    """  # noqa: D301  # \b keeps click from joining the lines
    from fentry.engine import census
    from fentry.image import Image

    path = resolve(prog)
    taken = census.take(Image.open(path), main=True)
    verdict = find(taken, func)
    lines = describe(taken, verdict, tracer, foreign=is_foreign(path), verbose=verbose)
    show.output().writelines(line.rstrip() + "\n" for line in lines)
    return 0


def find(taken: Census, func: str) -> Verdict:
    """The one function that is meant. Raises NothingMatched, AskedWrong."""
    from fentry.engine import filter as filters

    found = taken.find(func)
    if found is not None:
        return found
    chosen = [taken.verdicts[i] for i in filters.select(taken.verdicts, [func])]
    if len(chosen) > 1:
        names = ", ".join(v.name for v in chosen[:5])
        raise AskedWrong(f"{func!r} means {len(chosen)} functions: {names}, ...", hint="name one of them")
    return chosen[0]


def describe(taken: Census, verdict: Verdict, tracer: str, *, foreign: bool, verbose: bool) -> Iterator[str]:
    """Lines on one function.

    Args:
        taken: the census of its file.
        verdict: the function.
        tracer: name of the tracer whose programs it gets.
        foreign: the file is for another machine, so that time comes from the emulator.
        verbose: also the programs' instructions.
    """
    arch, image, function = taken.arch, taken.image, verdict.function
    also = f" (also {', '.join(verdict.aliases)})" if verdict.aliases else ""
    yield f"{verdict.name}{also}: {function.size} bytes at {function.address:#x} of {taken.module} ({arch.name})"
    if verdict.sled is None:
        yield f"cannot be traced: {verdict.reason}"
        yield ""
        yield "its first bytes"
        code = image.read(function.address, min(function.size or _SHOWN, _SHOWN))
        yield from _code(arch, code[: _whole(arch, code, _SHOWN - 8)], function.address)
        return
    from fentry.engine import census
    from fentry.target import Module
    from fentry.tracers import Options, load

    sled = verdict.sled
    op = load(tracer).op(Options(), clock="icount" if foreign else "tsc")
    start, end = _bounds(taken)
    (site,) = census.sites(Module(taken.module, image.path, image.path, 0, start, end, main=True), [verdict])
    island, table, layout = build(arch, site, op, (end + 0xFFFFFF) & ~0xFFFFFF, foreign=foreign)
    slot = table.slot(0)
    patched = _changed(arch, arch.arm(site.at, sled, slot, balanced=table.hooked), sled.idle, site.at)
    moved = f"the first {sled.resume} are moved elsewhere" if sled.moved else "nothing is moved"
    goes_on = site.at + sled.resume
    yield f"form {sled.form}: {len(patched)} bytes are replaced, {moved}; it goes on at {goes_on:#x}"
    if not verdict.returns:
        yield f"only its entry is hooked: {verdict.returns_reason}"
    yield ""
    yield "before"
    skip = site.at - function.address
    before = image.read(function.address, max(skip + sled.resume, min(skip + sled.resume + _SHOWN, function.size)))
    before = before[: _whole(arch, before, skip + sled.resume + 8)]
    yield from _code(arch, before, function.address)
    yield ""
    yield "after"
    yield from _code(arch, before[:skip], function.address)
    yield from _code(arch, patched, site.at, {0: "to the slot"})
    left = before[skip + len(patched) : skip + sled.resume]
    if left:
        yield f"  {site.at + len(patched):>10x}: {left.hex(' '):<30} (as it was; nothing comes here any more)"
    yield from _code(arch, before[skip + sled.resume :], site.at + sled.resume)
    yield ""
    yield f"slot, for tracer {tracer}"
    size = table.layout.stride
    yield from _code(arch, _trim(arch, island.code[slot - island.at :][:size]), slot, _notes(table))
    if site.at in island.displaced:
        at, displaced = island.displaced[site.at]
        yield ""
        yield "moved instructions, and the way back"
        yield from _code(arch, displaced.code, at)
    yield ""
    yield "registers"
    yield from ("  " + line for line in story(arch).splitlines())
    yield ""
    yield "programs"
    yield from _programs(arch, layout, op, table, verbose=verbose)


def build(arch: Arch, site: Site, op: Op, at: int, *, foreign: bool) -> tuple[Island, SlotTable, Layout]:
    """Build the island of one site, for a target that does not exist, at `at`."""
    from fentry.arch import ReturnPlane
    from fentry.engine import island as islands
    from fentry.program.context import COUNTER, Layout

    low, size = arch.dialect.stack_window or _STACKS
    layout = Layout(
        region=_DATA,
        nrings=1,
        ring_size=_RING,
        contexts=_DATA + 2 * _RING,
        clock="memory" if foreign else "tsc",
        clock_at=_DATA + 3 * _RING if foreign else 0,
        shadow=(_SHADOW - low) & ((1 << 64) - 1) if op.exit else 0,
        plane=size if op.exit else 0,
        counters=_DATA + 4 * _RING if op.counts else 0,
        sites=_RING // COUNTER if op.counts else 0,
        system_calls=not foreign,
    )
    plane = ReturnPlane(layout.shadow, low, size) if op.exit else None
    tables = islands.group(arch, [(site, (op,))], returns=plane is not None, first_row=0)
    room = islands.room_for(tables, islands.code_size(arch, layout, tables))
    unwinder = _DATA + 5 * _RING if arch.unwinds else 0  # as if the program had one
    island = islands.build(
        arch, layout, tables, at, room, plane=plane, personality=unwinder, resume_unwind=unwinder and unwinder + 64
    )
    return island, tables[0], layout


def story(arch: Arch) -> str:
    """The register story of an architecture's slots: what its slot module says at its top."""
    module = importlib.import_module(f"{type(arch).__module__}.slot")
    text = inspect.cleandoc(module.__doc__ or "(left out of this installation: python -OO)")
    return text[max(text.find("Register story"), 0) :]


def _bounds(taken: Census) -> tuple[int, int]:
    segments = taken.image.segments
    return min(s.vaddr for s in segments), max(s.vaddr + s.memsz for s in segments)


def _whole(arch: Arch, code: bytes, least: int) -> int:
    """The first end of an instruction at or behind `least`; all of `code` if there is none."""
    at = 0
    while at < least:
        at += arch.length(code[at : at + 16]) or len(code)
    return min(at, len(code))


def _changed(arch: Arch, put: bytes, old: bytes, at: int) -> bytes:
    """What of the written bytes is new: the last instructions may be remains of the old ones."""
    pieces = [raw for _, raw, _ in arch.disassemble(put, at)]
    while len(pieces) > 1 and old[: len(put)].endswith(pieces[-1]):
        put = put[: -len(pieces.pop())]
        old = old[: len(put)]
    return put


def _trim(arch: Arch, code: bytes) -> bytes:
    """Leave out the padding behind code: runs of one byte, or of one short instruction."""
    for fill in {code[-1:], code[-arch.insn_align :], code[-4:]}:
        kept = code
        while kept.endswith(fill):
            kept = kept[: -len(fill)]
        if len(code) - len(kept) >= 2 * len(fill):
            code = code[: _whole(arch, code, len(kept))]
    return code


def _notes(table: SlotTable) -> dict[int, str]:
    """What is where in a slot: {offset: remark on the instruction that begins there}, {-offset: that ends there}."""
    layout, notes = table.layout, {}
    for what, marks in (
        ("the entry program", layout.entry_marks),
        ("the exit program", layout.exit_marks),
        ("the entry program, for a tail call", layout.tail_marks),
        ("the entry program, on a stack that is not mirrored", layout.plain_marks),
        ("the exit program, when an exception passes", layout.unwound_marks),
    ):
        notes.update({-mark: what for mark in marks})
    if layout.call >= 0:
        notes[layout.call] = "the function itself"
    if layout.hook >= 0:
        notes[layout.hook] = "it returns to here"
    if layout.pad >= 0:
        notes.setdefault(layout.pad, "exceptions come here")
    return notes


def _code(arch: Arch, code: bytes, at: int, notes: dict[int, str] | None = None) -> Iterator[str]:
    """Lines of disassembly, with remarks."""
    notes = notes or {}
    for address, raw, text in arch.disassemble(code, at) if code else ():
        offset = address - at
        note = notes.get(offset, "") or notes.get(-(offset + len(raw)), "")
        line = f"  {address:>10x}: {raw.hex(' '):<30} {text}"
        yield f"{line:<80} ; {note}" if note else line


def _programs(arch: Arch, layout: Layout, op: Op, table: SlotTable, *, verbose: bool) -> Iterator[str]:
    """What is called by the slot, and how large it is."""
    from fentry.engine.ops import specialise
    from fentry.program.compile import compile_programs

    shift = table.layout.stride.bit_length() - 1
    chosen = specialise(op, arch.dialect, table.form, hooked=table.hooked, base=table.base, shift=shift, row=table.row)
    specs = {
        "entry": chosen.entry,
        "tail": chosen.tail,
        "plain": chosen.plain,
        "exit": chosen.exit,
        "unwound": chosen.unwound,
    }
    named = [replace(spec, name=name) for name, spec in specs.items() if spec is not None]
    blob = compile_programs(arch, layout, named)
    starts = sorted(blob.symbols.values())
    for spec in named:
        at = blob.symbols[spec.name]
        end = next((s for s in starts if s > at), len(blob.code))
        code = _trim(arch, blob.code[at:end])
        listing = arch.disassemble(code, at)
        what = ", ".join(
            text
            for text, on in (
                ("writes an event", spec.record),
                ("counts", spec.count),
                ("takes the time", spec.timed),
                ("with the return value", spec.retval),
            )
            if on
        )
        yield f"  {spec.name:<8} {what or 'nothing'}: {show.count(len(listing), 'instruction')}, {len(code)} bytes"
        if verbose:
            yield from ("  " + line for line in _code(arch, code, at))
