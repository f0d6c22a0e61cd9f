"""Entry jumps planned over real libraries, with objdump's listing as the second witness."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fentry.arch import Refusal, Sled
from fentry.arch.x86_64 import ARCH, insn
from fentry.errors import Fault
from tests.arch.x86_64.test_decode import BRANCH, objdump

LIBRARIES = ["libc.so.6", "libsqlite3.so.0", "libpython3.11.so.1.0"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_nine_of_ten_functions_get_an_entry_jump(library, name):
    lib = library(name)
    plans = insn.plan_entries(lib.text, lib.at, lib.functions, lib.read)
    assert len(plans) == len(lib.functions)
    large = [plan for plan, (_, size, _) in zip(plans, lib.functions, strict=True) if size >= 16]
    planned = sum(isinstance(plan, Sled) for plan in large)
    reasons = Counter(plan.reason for plan in plans if isinstance(plan, Refusal))
    print(f"{name}: {planned} of {len(large)} ({planned / len(large):.1%}); refused: {dict(reasons.most_common())}")
    assert planned >= 0.9 * len(large)


@pytest.mark.parametrize("name", LIBRARIES[:2])
def test_nothing_in_objdumps_listing_enters_a_window(library, tool, name):
    """Whatever objdump takes for a branch must not lead to the middle of a patched jump."""
    lib = library(name)
    plans = insn.plan_entries(lib.text, lib.at, lib.functions, lib.read)
    starts = {}
    inside = {}
    for (address, size, _), plan in zip(lib.functions, plans, strict=True):
        if isinstance(plan, Sled):
            site = address + ARCH.landing_pad(lib.code(address, 4))
            assert plan.idle == lib.code(site, plan.size)
            starts[site] = address + size
            inside.update((site + i, site) for i in range(1, 5))
    begins = set()
    wrong = []
    for at, _, text in objdump(tool, lib.path):
        begins.add(at)
        branch = BRANCH.match(text + " ")
        to = int(branch[2], 16) if branch else 0
        if text.startswith("lea") and "(%rip)" in text:
            to = int(text.split("# ")[1].split()[0], 16)
        if to in inside:
            wrong.append((hex(at), text))
        elif branch and to in starts and to + 5 <= at < starts[to] and branch[1] != "call":
            wrong.append((hex(at), text, "loop"))
    assert not wrong
    assert all(site in begins for site in starts)


def test_one_function_alone_is_planned_like_many(library):
    lib = library("libsqlite3.so.0")
    plans = insn.plan_entries(lib.text, lib.at, lib.functions, lib.read)
    differing = 0
    for (address, size, room), plan in zip(lib.functions[::7], plans[::7], strict=True):
        alone = ARCH.entry_window(lib.code(address, size + 16), address, size, room)
        # Alone it cannot see what arrives from elsewhere; the other way round it must agree.
        if isinstance(plan, Sled):
            assert alone == plan
        differing += alone != plan
    assert differing <= 3


def test_suspects_are_a_superset_of_real_branches(library):
    lib = library("libc.so.6")
    text, at = lib.text[:0x20000], lib.at
    real = [(source, to) for source, to in ARCH.branch_targets(text, at) if at + 0x4000 <= to < at + 0x5000]
    found = {to for _, to in insn.suspects(text, at, at + 0x4000, at + 0x5000)}
    assert len(real) > 100
    assert {to for _, to in real} <= found


ENTRY = bytes.fromhex("31c0 4889fa 90 c3") + b"\x90" * 9  # instructions begin at 0, 2, 5
AT = 0x400000


def plan_with(code_after, *, read=None, functions=()):
    text = ENTRY + code_after
    return insn.plan_entries(text, AT, [(AT, 7, 16), *functions], read)[0]


def rel(opcode, at, to):
    return bytes.fromhex(opcode) + (to - (at + len(bytes.fromhex(opcode)) + 4)).to_bytes(4, "little", signed=True)


@pytest.mark.parametrize("opcode", ["e8", "e9", "0f84", "f2e9", "2e0f85", "c7f8"])
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_branch_from_another_function(opcode, offset):
    assert plan_with(rel(opcode, 16, offset) + b"\xc3", functions=[(AT + 16, 8, 8)]) == insn.BRANCH
    assert isinstance(plan_with(rel(opcode, 16, 5) + b"\xc3", functions=[(AT + 16, 8, 8)]), Sled)


def test_branch_from_code_that_no_function_covers():
    assert plan_with(b"\x55\x48\x89\xe5" + rel("e9", 20, 2)) == insn.BRANCH


def test_bytes_that_only_look_like_a_branch():
    hidden = b"\x48\xb8" + rel("e9", 18, 2) + b"\0\0\0" + b"\xc3"  # movabs with a jump in its immediate
    assert insn.suspects(ENTRY + hidden, AT, AT + 1, AT + 5) == [(AT + 18, AT + 2)]
    assert isinstance(plan_with(hidden, functions=[(AT + 16, 11, 11)]), Sled)


def test_tail_call_from_elsewhere_is_a_call():
    assert isinstance(plan_with(rel("e9", 16, 0), functions=[(AT + 16, 5, 5)]), Sled)


def test_function_that_starts_in_the_window():
    assert plan_with(b"", functions=[(AT + 2, 5, 5)]) == insn.ENTRY_INSIDE


def test_relative_jump_table_into_the_window():
    table = AT + 0x100
    code = bytes.fromhex("488d15") + (table - AT - 23).to_bytes(4, "little") + b"\xff\xe0"
    for target, want in ((2, insn.TABLE), (5, None)):
        entries = b"".join((AT + to - table).to_bytes(4, "little", signed=True) for to in (16, target, 0x4000))

        def read(at, size, entries=entries):
            return entries[at - table :][:size] if at >= table else b""

        got = plan_with(code, read=read, functions=[(AT + 16, 9, 9)])
        assert got == want if want else isinstance(got, Sled)


def test_absolute_jump_table_into_the_window():
    table = AT + 0x100
    code = bytes.fromhex("ff24c5") + table.to_bytes(4, "little")
    entries = b"".join((AT + to).to_bytes(8, "little") for to in (16, 0, 2))

    def read(at, size):
        if not table <= at <= at + size <= table + len(entries):
            raise Fault(at, size)
        return entries[at - table :][:size]

    assert plan_with(code, read=read, functions=[(AT + 16, 7, 7)]) == insn.TABLE


def test_what_is_asked_wrongly_is_refused_one_by_one():
    plans = insn.plan_entries(ENTRY, AT, [(AT, 0, 0), (AT - 1, 7, 7), (AT, 0x1000, 0), (AT, 7, 16), (2**64 - 1, 5, 5)])
    assert plans[:3] == [insn.NO_SIZE, insn.OUTSIDE, insn.OUTSIDE]
    assert isinstance(plans[3], Sled)
    assert plans[4] == insn.OUTSIDE
    assert insn.plan_entries(b"", AT, []) == []


@given(st.binary(min_size=1, max_size=200), st.data())
def test_noise_has_exactly_one_verdict_each(noise, data):
    starts = data.draw(st.lists(st.integers(0, len(noise) - 1), max_size=8))
    functions = [(AT + s, data.draw(st.integers(0, 64)), data.draw(st.integers(0, 80))) for s in starts]
    plans = insn.plan_entries(noise, AT, functions, lambda at, size: noise[(at - AT) % len(noise) :][:size])
    assert len(plans) == len(functions)
    for (address, size, room), plan in zip(functions, plans, strict=True):
        if isinstance(plan, Sled):
            begin = address - AT + ARCH.landing_pad(noise[address - AT :])
            assert plan.idle == noise[begin : begin + plan.size]
            assert 5 <= plan.size <= max(size, room)
            ARCH.displace(plan, AT + begin, AT + 0x10000, AT + begin + plan.size)
