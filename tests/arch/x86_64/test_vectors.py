"""Golden bytes: every entry of vectors.toml, and the edges around them."""

import struct
import tomllib
from importlib import resources

import pytest

from fentry.arch import Refusal, Sled, load
from fentry.arch.x86_64 import ARCH, code, facts
from fentry.errors import AskedWrong, OutOfReach, Rejected

VECTORS = tomllib.loads(resources.files("fentry.arch.x86_64").joinpath("vectors.toml").read_text())

SLED = Sled("sled", 5, b"\x90" * 5, 5, "stack")


def named(kind):
    return [pytest.param(vector, id=vector["source"][:60]) for vector in VECTORS[kind]]


def test_every_vector_has_a_source():
    assert all(vector["source"] for vectors in VECTORS.values() for vector in vectors)


def test_found_by_name_and_alias():
    assert load("x86_64") is load("amd64") is ARCH


@pytest.mark.parametrize("vector", named("branch"))
def test_branch(vector):
    at, to = int(vector["at"], 16), int(vector["to"], 16)
    assert ARCH.arm(at, SLED, to, balanced=vector["balanced"]) == bytes.fromhex(vector["want"])


@pytest.mark.parametrize("vector", named("sled"))
def test_sled(vector):
    given = bytes.fromhex(vector["code"])
    found = ARCH.sled_at(given, vector["hint"])
    if "refusal" in vector:
        assert found == Refusal(vector["refusal"])
    elif "form" not in vector:
        assert found is None
    else:
        begin = ARCH.landing_pad(given)
        idle = given[begin : begin + vector["size"]]
        assert found == Sled(vector["form"], vector["size"], idle, vector["resume"], "stack")


@pytest.mark.parametrize("vector", named("window"))
def test_window(vector):
    body = bytes.fromhex(vector["code"])
    padding = bytes.fromhex(vector.get("padding", ""))
    found = ARCH.entry_window(body + padding, 0x401000, len(body), len(body) + len(padding))
    if "refusal" in vector:
        assert found == Refusal(vector["refusal"])
        return
    begin, size = ARCH.landing_pad(body), vector["size"]
    assert isinstance(found, Sled)
    assert (found.form, found.size, found.resume, found.moved) == ("entry-jump", size, size, True)
    assert found.idle == (body + padding)[begin : begin + size]


@pytest.mark.parametrize("vector", named("displace"))
def test_displace(vector):
    idle = bytes.fromhex(vector["idle"])
    sled = Sled("entry-jump", len(idle), idle, len(idle), moved=True)
    moved = ARCH.displace(sled, 0x401000, 0x501000, 0x401000 + len(idle))
    assert moved.code.hex(" ") == vector["want"]
    assert [list(move) for move in moved.moves] == vector["moves"]


def test_arm_fills_long_sleds_and_keeps_the_rest_of_a_window():
    """A call returns to where the sled ends: a slot may return after the sled's own instruction was put back."""
    long_nop = bytes.fromhex("2e660f1f840000020000")
    armed = ARCH.arm(0x1000, Sled("sled", 10, long_nop, 16, "stack"), 0x2000, balanced=False)
    assert armed == b"\x2e" * 5 + b"\xe8" + struct.pack("<i", 0x1000 - 10)
    assert [text for _, _, text in ARCH.disassemble(armed, 0x1000)] == ["call 0x2000"]
    six = bytes.fromhex("ff1500000000")
    assert ARCH.arm(0x1000, Sled("fentry", 6, six, 6, "stack"), 0x2000, balanced=True)[5:] == b"\x90"
    window = bytes.fromhex("4157415641 55")
    armed = ARCH.arm(0x1000, Sled("entry-jump", 6, window, 6, moved=True), 0x2000, balanced=False)
    assert armed[:1] == b"\xe9"
    assert armed[5:] == b"\x55"


@pytest.mark.parametrize("length", range(40))
def test_fill_is_nops_of_that_length(length):
    fill = code.nops(length)
    assert len(fill) == length
    pos = 0
    while pos < length:
        step = ARCH.length(fill[pos:])
        assert fill[pos : pos + step] in facts.NOPS
        pos += step


def test_reach_is_exact():
    at = 0x7F0000000000
    for to in (at + 5 + 2**31 - 1, at + 5 - 2**31):
        assert len(ARCH.arm(at, SLED, to, balanced=False)) == 5
    for to in (at + 5 + 2**31, at + 5 - 2**31 - 1):
        with pytest.raises(OutOfReach):
            ARCH.arm(at, SLED, to, balanced=False)


def test_displace_refuses_what_is_out_of_reach():
    operand = Sled("entry-jump", 7, bytes.fromhex("488b05000000 70"), 7, moved=True)
    with pytest.raises(Rejected, match="out of reach"):
        ARCH.displace(operand, 0x10000, 0x10000 - 2**30, 0x10007)
    branch = Sled("entry-jump", 6, bytes.fromhex("0f8400000070"), 6, moved=True)
    with pytest.raises(Rejected, match="branch target is out of reach"):
        ARCH.displace(branch, 0x80000000, 0x80000000 - 2**30, 0x80000006)
    plain = Sled("entry-jump", 5, bytes.fromhex("554889e553"), 5, moved=True)
    with pytest.raises(OutOfReach):
        ARCH.displace(plain, 0x10000, 2**33, 0x10005)
    with pytest.raises(Rejected, match="invalid"):
        ARCH.displace(Sled("entry-jump", 5, b"\x06" * 5, 5, moved=True), 0x10000, 0x20000, 0x10005)


def test_no_return_hook_behind_a_prologue():
    sled = ARCH.sled_at(bytes.fromhex("e800000000"), "mcount")
    with pytest.raises(Rejected, match="behind the prologue"):
        ARCH.arm(0x1000, sled, 0x2000, balanced=True)


def test_unknown_hint_is_named():
    with pytest.raises(AskedWrong, match="patchabel"):
        ARCH.sled_at(b"\x90" * 8, "patchabel")
