"""Lengths, text and branch targets against objdump, over the C library and over noise."""

import re
import subprocess

from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import Decoder

from fentry.arch.x86_64 import ARCH, facts, insn

LINE = re.compile(r"^ +([0-9a-f]+):\t((?:[0-9a-f]{2} )+) *(?:\t(.*))?$")


BRANCH = re.compile(
    r"(?:(?:bnd|notrack|data16|addr32|rex\.W|xacquire|xrelease|repz|repnz) )*"
    r"(call|jmp|j\w+|loop\w*|xbegin)(?:,p[nt])? +([0-9a-f]+) "
)


def objdump(tool, path, section=".text"):
    """(address, bytes, text) of each instruction as objdump sees it."""
    command = [tool("objdump"), "-d", "-w", "--insn-width=16", "-j", section, path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        if match := LINE.match(line):
            yield int(match[1], 16), bytes.fromhex(match[2]), (match[3] or "").strip()


def test_lengths_agree_with_objdump_over_libc(library, tool):
    libc = library("libc.so.6")
    compared = 0
    wrong = []
    for at, raw, text in objdump(tool, libc.path):
        if "(bad)" in text:
            continue
        # objdump shows these prefixes and some instructions apart: it prints `lock`, `fwait` alone where both are one
        if ARCH.length(libc.code(at, facts.INSN_MAX)) != len(raw):
            wrong.append((hex(at), raw.hex(" "), text))
        compared += 1
    assert compared > 100_000
    assert not wrong[:10]


def test_branch_targets_agree_with_objdump(library, tool):
    libc = library("libc.so.6")
    theirs = set()
    for at, _, text in objdump(tool, libc.path):
        if match := BRANCH.match(text + " "):
            theirs.add((at, int(match[2], 16)))
    ours = set(ARCH.branch_targets(libc.text, libc.at))
    assert len(theirs) > 30_000
    assert ours == theirs


def test_text_is_att_syntax_and_bad_bytes_are_shown():
    lines = ARCH.disassemble(bytes.fromhex("4889e5 06 e8fbffffff c3"), 0x1000)
    assert [(at, len(raw)) for at, raw, _ in lines] == [(0x1000, 3), (0x1003, 1), (0x1004, 5), (0x1009, 1)]
    assert [text for *_, text in lines] == ["mov %rsp,%rbp", "(bad)", "call 0x1004", "ret"]


@given(st.binary(max_size=40))
def test_any_bytes_have_a_length_and_a_text(code):
    size = ARCH.length(code)
    assert 0 <= size <= min(len(code), facts.INSN_MAX)
    lines = ARCH.disassemble(code, 0x1000)
    assert b"".join(raw for _, raw, _ in lines) == code


@given(st.binary(min_size=1, max_size=64))
def test_no_nop_pattern_matches_what_is_not_a_nop(code):
    match = insn._PADDING.match(code)
    if match and match[0] != b"\xcc":
        one = Decoder(64, code).decode()
        assert one.len == match.end()
        assert "nop" in ARCH.disassemble(match[0], 0)[0][2]
