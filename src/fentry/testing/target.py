"""The conformance suite of targets: one list of rules, run on every kind of target.

    results = check_target(make, probe)
    assert not [r for r in results if r.verdict == "failed"]

Each rule gets a fresh target and uses the contract of :mod:`fentry.target` alone; what the contract cannot say (which
function to patch, how to see that it ran) comes from the :class:`Probe` that the caller supplies. A rule about an
ability that the target does not have gives "unsupported" and why: those reasons are the support page.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from fentry import arch
from fentry.errors import Fault, Gone, OutOfReach, TraceError, Unsupported
from fentry.target import Mapping, Target, need


@dataclass(frozen=True, slots=True)
class Probe:
    """What a rule must know of the program in one target.

    Args:
        code: address of a function that ``observe`` makes the program call.
        replacement: code to put at its start, so that ``observe`` gives something else.
        observe: lets the stopped program run until it has called the function once more, leaves it stopped,
            and gives what came of the call.
        spare: registers that may be changed while the program is stopped, all general ones at best.
    """

    code: int
    replacement: bytes
    observe: Callable[[], object]
    spare: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one rule."""

    name: str
    verdict: str  #: "passed", "failed" or "unsupported"
    reason: str = ""


class _Broken(Exception):
    """A rule does not hold; the message says what was seen."""


def check_target(make: Callable[[], Target], probe: Callable[[Target], Probe]) -> list[Result]:
    """Run every rule, each on a target of its own.

    Args:
        make: gives a new, stopped target, the program of which has run far enough to be looked at.
        probe: gives the probe for one such target.

    Returns: one result per rule, in the order of this file. Never raises for what a target does.
    """
    results = []
    for name, rule in _RULES.items():
        try:
            target = make()
        except TraceError as e:
            results.append(Result(name, "failed", f"no target could be made: {e}"))
            continue
        try:
            rule(target, probe(target))
            results.append(Result(name, "passed"))
        except Unsupported as e:
            results.append(Result(name, "unsupported", e.message))
        except _Broken as e:
            results.append(Result(name, "failed", str(e)))
        except Exception:
            results.append(Result(name, "failed", traceback.format_exc(limit=-3)))
        finally:
            target.close()
    return results


_Rule = Callable[[Target, Probe], None]
_RULES: dict[str, _Rule] = {}


def _rule(rule: _Rule) -> _Rule:
    """Put a rule on the list; its docstring's first line is its name."""
    assert rule.__doc__
    _RULES[rule.__doc__.splitlines()[0].rstrip(".")] = rule
    return rule


def _must(holds: bool, seen: str) -> None:
    if not holds:
        raise _Broken(seen)


E_ = TypeVar("E_", bound=TraceError)


def _refused(kind: type[E_], what: str, do: Callable[[], object]) -> E_:
    """Give the error that `do` must raise, which is of `kind`."""
    try:
        gave = do()
    except kind as e:
        return e
    except Exception as e:
        raise _Broken(f"{what}: raised {type(e).__name__} ({e}) instead of {kind.__name__}") from e
    raise _Broken(f"{what}: gave {gave!r} instead of raising {kind.__name__}")


def _hole(target: Target) -> int:
    """Find an address just past writable memory, where nothing is mapped."""
    maps = target.mappings()
    starts = {m.start for m in maps}
    for m in reversed(maps):
        if m.perms.startswith("rw") and m.end not in starts:
            try:
                target.read(m.end - 8, 8)
            except Fault:
                continue  # a device
            return m.end
    raise _Broken("no writable mapping is followed by a hole")


def _lies_in(maps: list[Mapping], start: int, end: int) -> list[Mapping]:
    """Mappings that overlap [start, end), if they cover it without a gap; else none."""
    found = [m for m in maps if m.start < end and start < m.end]
    covered = start
    for m in found:
        if m.start > covered:
            return []
        covered = m.end
    return found if covered >= end else []


# -- memory ---------------------------------------------------------------------------------------
@_rule
def _data_round_trip(target: Target, _: Probe) -> None:
    """Data that was written is read back, and nothing beside it changes."""
    main = target.modules()[0]
    data = next(m for m in target.mappings() if "w" in m.perms and m.start < main.end and main.start < m.end)
    at = data.end - 64
    before = target.read(at, 64)
    changed = bytes(b ^ 0xA5 for b in before[16:48])
    target.write(at + 16, changed)
    seen = target.read(at, 64)
    _must(seen == before[:16] + changed + before[48:], f"wrote {changed.hex()} at +16, read {seen.hex()}")
    target.write(at + 16, before[16:48])
    _must(target.read(at, 64) == before, "the first bytes could not be written back")


@_rule
def _code_round_trip(target: Target, probe: Probe) -> None:
    """Code is written through its protection, which stays."""
    maps = target.mappings()
    before = target.read(probe.code, len(probe.replacement))
    target.write(probe.code, probe.replacement)
    _must(target.read(probe.code, len(before)) == probe.replacement, "code reads back as something else")
    target.write(probe.code, before)
    _must(target.read(probe.code, len(before)) == before, "code could not be written back")
    _must([m.perms for m in target.mappings()] == [m.perms for m in maps], "a page's protection changed")


@_rule
def _no_bytes(target: Target, probe: Probe) -> None:
    """Reading nothing gives nothing, and writing nothing does nothing."""
    _must(target.read(probe.code, 0) == b"", "read of 0 bytes gave something")
    target.write(probe.code, b"")


@_rule
def _faults(target: Target, _: Probe) -> None:
    """Memory that is not there is a Fault that says where."""
    hole = _hole(target)
    for at, size in ((hole, 8), (hole - 8, 16)):
        for what, do in (("read", partial(target.read, at, size)), ("write", partial(target.write, at, bytes(size)))):
            before = target.read(hole - 8, 8)
            fault = _refused(Fault, f"{what} of {size} bytes at {at:#x}, unmapped from {hole:#x}", do)
            inside = at <= fault.at and fault.at + fault.size <= at + size
            _must(inside and fault.at + fault.size > hole, f"the Fault says {fault.size} bytes at {fault.at:#x}")
            if what == "write":
                target.write(hole - 8, before)


@_rule
def _wild_addresses(target: Target, _: Probe) -> None:
    """Addresses at the ends of the address space are Faults."""
    for at in (0, (1 << 64) - 16, (1 << 64) - 4):
        _refused(Fault, f"read at {at:#x}", partial(target.read, at, 8))
        _refused(Fault, f"write at {at:#x}", partial(target.write, at, bytes(8)))


# -- what is loaded -------------------------------------------------------------------------------
@_rule
def _mappings(target: Target, _: Probe) -> None:
    """Mappings are in order, do not overlap, and are whole pages."""
    end = 0
    for m in target.mappings():
        _must(end <= m.start < m.end, f"{m} begins below {end:#x} or is empty")
        _must(m.start % target.page == 0 and m.end % target.page == 0, f"{m} is not whole pages")
        shape = len(m.perms) == 4 and all(c in (w, "-") for c, w in zip(m.perms[:3], "rwx", strict=True))
        _must(shape and m.perms[3] in "ps", f"{m}: odd protection")
        end = m.end


@_rule
def _modules(target: Target, _: Probe) -> None:
    """Modules lie in mappings, the program itself is first, and the files can be read."""
    modules = target.modules()
    _must(bool(modules) and modules[0].main, "the first module is not the program")
    _must(sum(m.main for m in modules) == 1, "several modules are the program")
    maps = target.mappings()
    for module in modules:
        ends = [_lies_in(maps, module.start, module.start + 1), _lies_in(maps, module.end - 1, module.end)]
        _must(all(ends), f"{module}: its ends are not mapped")
        if module.file:
            with Path(module.file).open("rb") as stream:
                head = stream.read(4)
            _must(head == b"\x7fELF", f"{module.file} is not an ELF file")


@_rule
def _names(target: Target, probe: Probe) -> None:
    """The architecture is one that is known, and the probe's function is in executable memory."""
    _must(bool(target.kind), "the target has no kind")
    arch.load(target.arch)
    found = _lies_in(target.mappings(), probe.code, probe.code + len(probe.replacement))
    _must(bool(found) and all("x" in m.perms for m in found), "the probe's function cannot be executed")


# -- registers ------------------------------------------------------------------------------------
@_rule
def _registers(target: Target, probe: Probe) -> None:
    """Registers are read back as written, and those not named stay."""
    tid = target.threads()[0]
    before = target.regs(tid)
    facts = arch.load(target.arch)
    for name in (facts.pc, facts.sp, *probe.spare):
        _must(name in before, f"no register {name}")
    for i, name in enumerate(probe.spare):
        value = (0x9E3779B97F4A7C15 * (i + 1) & (1 << facts.bits) - 1) | 1
        target.set_regs(tid, {name: value})
        seen = target.regs(tid)
        _must(seen == {**before, name: value}, f"{name} = {value:#x} gave {_difference(before, seen)}")
        target.set_regs(tid, {name: before[name]})
    values = {name: 0x1234567 + i for i, name in enumerate(probe.spare)}
    target.set_regs(tid, values)
    _must(target.regs(tid) == {**before, **values}, "several at once were not all written")
    target.set_regs(tid, before)
    _must(target.regs(tid) == before, f"could not be put back: {_difference(before, target.regs(tid))}")


def _difference(a: dict[str, int], b: dict[str, int]) -> str:
    return ", ".join(f"{n} {a.get(n, 0):#x} -> {b.get(n, 0):#x}" for n in sorted({*a, *b}) if a.get(n) != b.get(n))


@_rule
def _wrong_names(target: Target, _: Probe) -> None:
    """A thread or a register that does not exist is one clear error, and nothing is written."""
    tid = target.threads()[0]
    before = target.regs(tid)
    _refused(TraceError, "registers of no thread", lambda: target.regs(1 << 30))
    name = next(iter(before))
    _refused(TraceError, "an unknown register", lambda: target.set_regs(tid, {name: 1, "no such register": 1}))
    _must(target.regs(tid) == before, "an error wrote registers")


# -- run control ----------------------------------------------------------------------------------
@_rule
def _stop(target: Target, probe: Probe) -> None:
    """Stopping twice is stopping, and a stopped target stands still."""
    target.stop()
    tid = target.threads()[0]
    before = target.regs(tid)
    target.stop()
    _must(target.regs(tid) == before, "a second stop moved it")
    probe.observe()
    target.stop()
    target.resume()
    target.resume()
    target.stop()
    _must(tid in target.threads(), "the first thread is gone")
    target.regs(tid)


@_rule
def _close(target: Target, probe: Probe) -> None:
    """Closing twice is closing; afterwards the target is Gone."""
    target.close()
    target.close()
    for what, do in (
        ("read", lambda: target.read(probe.code, 4)),
        ("write", lambda: target.write(probe.code, b"1234")),
        ("regs", lambda: target.regs(1)),
        ("mappings", target.mappings),
        ("modules", target.modules),
        ("threads", target.threads),
        ("stop", target.stop),
    ):
        _refused(Gone, f"{what} after close", do)


@_rule
def _step(target: Target, probe: Probe) -> None:
    """A step executes one instruction."""
    stepper = need(target.stepper, "single steps", target=target)
    facts = arch.load(target.arch)
    probe.observe()
    tid = target.threads()[0]
    for _ in range(5):
        before = target.regs(tid)[facts.pc]
        length = facts.length(target.read(before, 16))
        stepper.step(tid)
        after = target.regs(tid)[facts.pc]
        _must(after != before, f"pc stayed at {before:#x}")
        _must(bool(length), f"no instruction at {before:#x}")


# -- abilities ------------------------------------------------------------------------------------
@_rule
def _map_and_unmap(target: Target, _: Probe) -> None:
    """Mapped memory is zero, as protected as asked, and gone without a trace when unmapped."""
    allocator = need(target.allocator, "allocator", target=target)
    first = target.mappings()
    mine = []
    for perms, size, name in (("r-x", 1, ""), ("rw-", 3 * target.page + 5, "noreserve"), ("r--", target.page, ""),
                              ("rw-", 2 * target.page, "wipeonfork")):  # fmt: skip
        at = allocator.map(size, perms, name=name)
        mine.append((at, size))
        _must(at % target.page == 0, f"{at:#x} is not a page's start")
        found = _lies_in(target.mappings(), at, at + size)
        _must(bool(found), f"{size} bytes mapped at {at:#x} are not among the mappings")
        _must({m.perms[:3] for m in found} == {perms}, f"asked for {perms}, got {[m.perms for m in found]}")
        _must(target.read(at, size) == bytes(size), "new memory is not zero")
        target.write(at, b"\x5a" * size)
        _must(target.read(at, size) == b"\x5a" * size, "new memory does not keep what is written")
    _no_new_wx(first, target.mappings())
    for at, size in mine:
        allocator.unmap(at, size)
    _same(first, target.mappings())


@_rule
def _map_near(target: Target, probe: Probe) -> None:
    """Memory asked for near code is near it, whole; where it cannot be, OutOfReach."""
    allocator = need(target.allocator, "allocator", target=target)
    first = target.mappings()
    reach, size = arch.load(target.arch).jump_reach, 1 << 20
    at = allocator.map(size, "r-x", near=probe.code, reach=reach)
    low, high = probe.code - reach, probe.code + reach
    _must(low <= at and at + size <= high, f"{at:#x}..{at + size:#x} is not within {reach:#x} of {probe.code:#x}")
    allocator.unmap(at, size)
    _refused(OutOfReach, "2 pages within 1", lambda: allocator.map(2 * target.page, "rw-", near=probe.code, reach=1))
    _same(first, target.mappings())


@_rule
def _map_exactly(target: Target, probe: Probe) -> None:
    """Memory asked for at an address is there, or nowhere."""
    allocator = need(target.allocator, "allocator", target=target)
    first = target.mappings()
    at = allocator.map(4 * target.page, "rw-")
    target.write(at, b"kept")
    _refused(TraceError, "mapping over a mapping", lambda: allocator.map(target.page, "rw-", at=at))
    taken = probe.code & -target.page
    _refused(TraceError, "mapping over the program", lambda: allocator.map(target.page, "rw-", at=taken))
    _must(target.read(at, 4) == b"kept", "a refused mapping changed memory")
    allocator.unmap(at, 4 * target.page)
    _must(allocator.map(target.page, "r-x", at=at) == at, "not where it was asked for")
    allocator.unmap(at, target.page)
    _same(first, target.mappings())


@_rule
def _never_both(target: Target, _: Probe) -> None:
    """Memory is never mapped both writable and executable."""
    allocator = need(target.allocator, "allocator", target=target)
    first = target.mappings()
    _refused(TraceError, "rwx memory", lambda: allocator.map(target.page, "rwx"))
    _same(first, target.mappings())


def _no_new_wx(before: list[Mapping], after: list[Mapping]) -> None:
    old = [(m.start, m.end) for m in before if "wx" in m.perms]
    for m in after:
        was = any(start <= m.start and m.end <= end for start, end in old)
        _must("wx" not in m.perms or was, f"{m} is writable and executable")


def _same(before: list[Mapping], after: list[Mapping]) -> None:
    gone = [m for m in before if m not in after]
    new = [m for m in after if m not in before]
    _must(not gone and not new, f"mappings are not what they were: gone {gone}, new {new}")


@_rule
def _share(target: Target, _: Probe) -> None:
    """Shared memory is seen from both sides at once."""
    shared = need(target.shared, "shared memory", target=target)
    first = target.mappings()
    size = 3 * target.page
    at, view = shared.share(size, "conformance")
    _must(len(view) == size and not view.readonly, f"the view has {len(view)} bytes, readonly={view.readonly}")
    _must(bytes(view) == bytes(size), "it is not zero")
    view[5:10] = b"hello"
    _must(target.read(at + 5, 5) == b"hello", "what the host wrote, the target does not see")
    target.write(at + size - 4, b"back")
    _must(bytes(view[size - 4 :]) == b"back", "what the target wrote, the host does not see")
    _no_new_wx(first, target.mappings())
    if target.allocator:
        target.allocator.unmap(at, size)
        _same(first, target.mappings())
        _must(bytes(view[5:10]) == b"hello", "the host's view went with the mapping")


@_rule
def _patch(target: Target, probe: Probe) -> None:
    """Code that ran before runs as patched, and as it was when put back."""
    sync = need(target.code_sync, "synchronisation of code", target=target)
    size = len(probe.replacement)
    usual = probe.observe()
    again = probe.observe()
    _must(usual == again, f"the probe is no good: it gave {usual!r}, then {again!r}")
    before = target.read(probe.code, size)
    for _ in range(2):
        target.write(probe.code, probe.replacement)
        sync.sync(probe.code, size)
        patched = probe.observe()
        _must(patched != usual, f"the patched function still gives {patched!r}")
        target.write(probe.code, before)
        sync.sync(probe.code, size)
        back = probe.observe()
        _must(back == usual, f"put back, the function gives {back!r} instead of {usual!r}")
