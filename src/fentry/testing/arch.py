r"""The conformance suite of architectures: what every port must keep, without knowing which one it is.

    results = check_arch(arch, sleds=[b"\x90" * 5])
    assert not [r for r in results if r.verdict == "failed"]

Rules use the contract of :mod:`fentry.arch` alone: bytes in, bytes out. That slots keep every register is shown by
running them, which takes an emulator of the architecture; see ``tests/program`` in the source tree.
"""

from __future__ import annotations

import itertools
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fentry.arch import Arch, Refusal, Rung, Sled, SlotPlan, SlotShape, by_elf_machine, load
from fentry.errors import CannotHere, OutOfReach
from fentry.testing.target import Result

#: how many pieces of random code each decoder is given
TRIES = 2000
_NEAR = 0x4000_0000


@dataclass(frozen=True, slots=True)
class Given:
    """What a rule works with."""

    arch: Arch
    sleds: tuple[Sled, ...]
    random: random.Random


class _Broken(Exception):
    """A rule does not hold; the message says what was seen."""


_Rule = Callable[[Given], None]
_RULES: dict[str, _Rule] = {}


def check_arch(arch: Arch, sleds: Sequence[bytes] = (), *, seed: int = 1) -> list[Result]:
    """Run every rule.

    Args:
        arch: the port.
        sleds: code that begins with a sled that compilers leave for patching, one of each kind.
        seed: of the random code that decoders are given.

    Returns: one result per rule, in the order of this file. Never raises for what an architecture does.
    """
    results = []
    for name, rule in _RULES.items():
        try:
            found = [arch.sled_at(code, "patchable") for code in sleds]
            known = tuple(s for s in found if isinstance(s, Sled))
            _must(len(known) == len(sleds), f"a given sled is not recognised: {found}")
            rule(Given(arch, known, random.Random(seed)))  # noqa: S311 - noise that is the same each time
            results.append(Result(name, "passed"))
        except _Broken as e:
            results.append(Result(name, "failed", str(e)))
        except NotImplementedError as e:
            results.append(Result(name, "unsupported", str(e) or "not implemented"))
        except Exception:
            results.append(Result(name, "failed", traceback.format_exc(limit=-3)))
    return results


def _rule(rule: _Rule) -> _Rule:
    """Put a rule on the list; its docstring's first line is its name."""
    assert rule.__doc__
    _RULES[rule.__doc__.splitlines()[0].rstrip(".")] = rule
    return rule


def _must(holds: bool, seen: str) -> None:
    if not holds:
        raise _Broken(seen)


def _noise(given: Given, size: int) -> list[bytes]:
    return [given.random.randbytes(given.random.randrange(size + 1)) for _ in range(TRIES)]


@_rule
def _names(given: Given) -> None:
    """It is found by its name, its aliases and its ELF machine."""
    a = given.arch
    for name in (a.name, *a.aliases):
        _must(load(name) is a, f"load({name!r}) gives another")
    _must(by_elf_machine(a.elf_machine, a.bits) is a, f"ELF machine {a.elf_machine} gives another")


@_rule
def _lengths(given: Given) -> None:
    """A length is 0 or a multiple of the alignment, and never more than the code."""
    for code in _noise(given, 20):
        length = given.arch.length(code)
        _must(0 <= length <= len(code), f"{code.hex()}: length {length}")
        _must(length % given.arch.insn_align == 0, f"{code.hex()}: length {length} is not aligned")


@_rule
def _shown(given: Given) -> None:
    """Disassembly covers all bytes, in order, whatever they are."""
    for code in _noise(given, 40):
        lines = given.arch.disassemble(code, _NEAR)
        _must(b"".join(raw for _, raw, _ in lines) == code, f"{code.hex()}: shown as {lines}")
        at = _NEAR
        for address, raw, text in lines:
            _must(address == at and bool(text), f"{code.hex()}: a line at {address:#x}, not {at:#x}: {text!r}")
            at += len(raw)


@_rule
def _guesses(given: Given) -> None:
    """Any bytes are a sled, a refusal with a reason, or nothing."""
    for code, hint in itertools.product(_noise(given, 32), ("patchable", "mcount", "scan")):
        found = given.arch.sled_at(code, hint)
        if isinstance(found, Sled):
            _must(0 < found.size <= len(code), f"{code.hex()}: a sled of {found.size} bytes")
            _must(code.startswith(found.idle) or found.idle in code, f"{code.hex()}: idle is {found.idle.hex()}")
        elif isinstance(found, Refusal):
            _must(bool(found.reason), f"{code.hex()}: refused without a reason")
        else:
            _must(found is None, f"{code.hex()}: {found!r}")


@_rule
def _windows(given: Given) -> None:
    """Any bytes are a window for an entry jump, or a refusal with a reason."""
    for code in _noise(given, 48):
        if not code:
            continue
        found = given.arch.entry_window(code, _NEAR, len(code), len(code))
        if isinstance(found, Refusal):
            _must(bool(found.reason), f"{code.hex()}: refused without a reason")
            continue
        _must(given.arch.rung >= Rung.MOVABLE, f"{code.hex()}: a window below rung {Rung.MOVABLE.name}")
        _must(found.moved and found.idle in code, f"{code.hex()}: {found}")
        try:
            moved = given.arch.displace(found, _NEAR, _NEAR + 0x10000, _NEAR + found.resume)
        except CannotHere:
            continue
        _must(len(moved.code) >= len(found.idle), f"{code.hex()}: moved to {moved.code.hex()}")


@_rule
def _arming(given: Given) -> None:
    """An armed sled has the sled's size, and what is out of reach is said to be."""
    for sled in given.sleds:
        for distance in (0x1000, -0x1000, given.arch.jump_reach // 2, -given.arch.jump_reach // 2):
            site = 1 << 40
            code = given.arch.arm(site, sled, site + distance & -64, balanced=False)
            _must(len(code) == sled.size, f"{sled.form}: {len(code)} bytes for {sled.size}")
            _must(code != sled.idle, f"{sled.form}: armed it is what it was idle")
        for distance in (1 << 44, -(1 << 39)):
            try:
                given.arch.arm(1 << 40, sled, (1 << 40) + distance, balanced=False)
            except OutOfReach:
                continue
            raise _Broken(f"{sled.form}: {distance:#x} is not out of reach")


@_rule
def _layouts(given: Given) -> None:
    """A slot is as long as its layout says, wherever it is, and its marks are all different."""
    for sled, entry in itertools.product(given.sleds, range(4)):
        layout = given.arch.slot_layout(SlotShape(entry, 0, sled.form))
        _must(layout.stride > 0 and layout.stride & (layout.stride - 1) == 0, f"stride {layout.stride}")
        _must(len(set(layout.entry_marks)) == entry, f"{entry} programs, marks {layout.entry_marks}")
        _must(all(0 < m <= layout.stride for m in layout.entry_marks), f"marks {layout.entry_marks}")
        for at in (_NEAR, _NEAR + 0x100_0000):
            site = _NEAR + 0x80_0000
            slot = given.arch.slot(SlotPlan(at, site, sled, site + sled.resume, (_NEAR + 0x40_0000,) * entry))
            _must(len(slot) == layout.stride, f"{len(slot)} bytes in a stride of {layout.stride}")


@_rule
def _hooked_layouts(given: Given) -> None:
    """Where returns are hooked, every mark is different, and the hook follows the call of the body."""
    for sled, entry, leaving in itertools.product(given.sleds, range(3), range(1, 3)):
        try:
            layout = given.arch.slot_layout(SlotShape(entry, leaving, sled.form))
        except CannotHere:
            continue
        marks = [*layout.entry_marks, *layout.exit_marks, *layout.tail_marks, *layout.plain_marks]
        marks += layout.unwound_marks
        _must(len(set(marks)) == len(marks), f"marks {sorted(marks)}")
        _must(len(layout.exit_marks) == leaving, f"{leaving} exit programs, marks {layout.exit_marks}")
        _must(len(layout.tail_marks) == len(layout.plain_marks) == entry, f"{layout}")
        _must(0 <= layout.call < layout.hook < layout.stride and layout.hook not in marks, f"{layout}")


@_rule
def _signal_frames(given: Given) -> None:
    """No signal frame is seen in an empty stack, and noise is read without an error."""
    _must(given.arch.saved_pcs(bytes(4096)) == [], "a frame in zeros")
    for size in (0, 8, 64, 8000):
        stack = given.random.randbytes(size)
        for offset, value in given.arch.saved_pcs(stack):
            _must(
                stack[offset : offset + 8] == value.to_bytes(8, "little"), f"offset {offset} does not hold {value:#x}"
            )
