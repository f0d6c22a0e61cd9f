"""The emulated machine passes the shipped conformance suite, and the suite can fail."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from fentry.arch import by_elf_machine
from fentry.errors import Fault
from fentry.target import unicorn
from fentry.testing.target import Probe, check_target

PROGRAMS = Path(__file__).parent / "programs"
FREE = ("-ffreestanding", "-nostdlib", "-nostartfiles", "-mcmodel=medany", "-Wl,--build-id=none")
ANSWER_42 = bytes.fromhex("1305a002 67800000")  # addi a0, zero, 42; jalr zero, 0(ra)


def symbols(path):
    with path.open("rb") as stream:
        table = ELFFile(stream).get_section_by_name(".symtab")
        return {s.name: s["st_value"] for s in table.iter_symbols()}


def loop(build, *flags):
    return build(PROGRAMS / "poll.c", cc="riscv64-linux-gnu-gcc", kind="static", flags=(*FREE, *flags))


def prober(path):
    names = symbols(path)
    arch = by_elf_machine(243, 64)

    def probe(target):
        def rounds():
            return struct.unpack("<Q", target.read(names["rounds"], 8))[0]

        def observe():
            before = rounds()
            for _ in range(100):
                target.run(20)
                if rounds() >= before + 2:  # the first may have been under way
                    break
            else:
                raise AssertionError("the program does not go on")
            return struct.unpack("<q", target.read(names["given"], 8))[0]

        spare = tuple(r for r in target.regs(1) if r not in (arch.pc, arch.sp))
        return Probe(names["answer"], ANSWER_42, observe, spare)

    return probe


@pytest.mark.parametrize(
    "flags", [("-march=rv64gc",), ("-march=rv64g",), ("-Wl,-Ttext-segment=0x80000000",)], ids=["c", "no-c", "bare"]
)
def test_every_rule_holds(build, flags):
    path = loop(build, *flags)
    results = check_target(lambda: unicorn.load(path), prober(path))
    assert len(results) >= 18
    assert [(r.name, r.reason) for r in results if r.verdict != "passed"] == []


def zeros_where_nothing_is(target):
    old = target.read

    def read(at, size):
        try:
            return old(at, size)
        except Fault:
            return bytes(size)

    return read


def all_but_the_last_byte(target):
    old = target.write
    return lambda at, data: old(at, data[:-1])


class Does:
    """Has the verbs, and none does a thing."""

    def __init__(self, *verbs):
        for verb in verbs:
            setattr(self, verb, lambda *args: None)


class Leaky:
    """Never unmaps."""

    def __init__(self, target):
        self.map = target.allocator.map

    def unmap(self, at, size):
        pass


class Elsewhere:
    """Ignores where memory shall be."""

    def __init__(self, target):
        self.real = target.allocator
        self.unmap = self.real.unmap

    def map(self, size, perms, *, near=None, reach=0, at=None, name=""):
        return self.real.map(size, perms, name=name)


class Apart:
    """Gives a view of other memory."""

    def __init__(self, target):
        self.target = target

    def share(self, size, name):
        return self.target.allocator.map(size, "rw-"), memoryview(bytearray(size))


def broken(path, name, replacement):
    def make():
        target = unicorn.load(path)
        setattr(target, name, replacement(target))
        return target

    return make


@pytest.mark.parametrize(
    ("name", "make", "complains"),
    [
        ("read", lambda t: lambda at, size: bytes(size), "Data that was written is read back"),
        ("read", zeros_where_nothing_is, "Memory that is not there is a Fault"),
        ("write", all_but_the_last_byte, "Data that was written is read back"),
        ("mappings", lambda t: lambda old=t.mappings: old()[::-1], "Mappings are in order"),
        ("set_regs", lambda t: lambda tid, regs: None, "Registers are read back as written"),
        ("close", lambda t: lambda: None, "Closing twice is closing"),
        ("code_sync", lambda t: Does("sync"), "Code that ran before runs as patched"),
        ("allocator", Leaky, "Mapped memory is zero"),
        ("allocator", Elsewhere, "Memory asked for near code"),
        ("stepper", lambda t: Does("step"), "A step executes one instruction"),
        ("shared", Apart, "Shared memory is seen from both sides"),
    ],
)
def test_the_suite_can_fail(build, name, make, complains):
    path = loop(build)
    results = check_target(broken(path, name, make), prober(path))
    failed = [r.name for r in results if r.verdict == "failed"]
    assert any(f.startswith(complains) for f in failed), failed


def test_an_absent_ability_is_named(build):
    path = loop(build)
    results = {r.name: r for r in check_target(broken(path, "stepper", lambda t: None), prober(path))}
    step = results["A step executes one instruction"]
    assert step.verdict == "unsupported"
    assert "no single steps" in step.reason


def test_a_crash_of_the_target_is_a_result(build):
    path = loop(build)

    def wrong(at, size):
        raise ZeroDivisionError

    results = check_target(broken(path, "read", lambda t: wrong), prober(path))
    assert "ZeroDivisionError" in next(r.reason for r in results if r.verdict == "failed")
    assert not any(isinstance(r, Fault) for r in results)
