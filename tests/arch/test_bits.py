"""Pattern lines: what they mean, and that a table with a mistake in it does not load."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fentry.arch.bits import Kind, Table
from fentry.errors import AskedWrong, EngineBug

KINDS = {
    "r": Kind("r", 3),
    "q": Kind("q", 3),
    "r'": Kind("r", 2, base=4),
    "imm": Kind("imm", signed=True),
    "u": Kind("u"),
}


def test_one_line():
    jump = Table("jump imm[2:1] 1 r 01 : imm ; r!=7  # a comment", KINDS, 1)["jump"]
    assert (jump.name, jump.mask, jump.match, jump.operands) == ("jump", 0b00100011, 0b00100001, "imm")


def test_scattered_signed_field():
    table = Table("jump imm[3|1|2] r 01 : imm ; r!=7", KINDS, 1)
    assert table["jump"].encode(r=5, imm=-6) == 0b1_1_0_101_01
    assert table["jump"].decode(0b1_1_0_101_01) == {"imm": -6, "r": 5}
    assert table["jump"].decode(0b0_0_1_000_01) == {"imm": 4, "r": 0}
    assert table.find(0b0_0_1_111_01) is None  # r may not be 7
    assert table.find(0b0_0_1_000_00) is None


def test_biased_field():
    table = Table("short 0000 r' 11", KINDS, 1)
    assert table["short"].encode(r=6) == 0b0000_10_11
    assert table["short"].decode(0b0000_11_11) == {"r": 7}
    for r in (3, 8):
        with pytest.raises(AskedWrong, match="4 to 7"):
            table["short"].encode(r=r)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("a 000 r 0", "1 bits are missing"),
        ("a 000 r 000", "more than 8 bits"),
        ("a imm[4|2:1] r 01", "a bit of imm is not given"),
        ("a imm[2:1|2] r 01", "a bit of imm is given twice"),
        ("a r r 01", "a bit of r is given twice"),
        ("a r r' 001", "r is spelled two ways"),
        ("a zz 00000", "unknown word 'zz'"),
        ("a imm 00000", "must say which bits"),
        ("a imm[1:3] 00000", "runs backwards"),
        ("a imm[x] 0000000", "cannot read"),
        ("a 00000 r : r ; q!=1", "cannot read 'q!=1'"),
        ("a 00000 r : r ; r=1", "cannot read 'r=1'"),
        ("a 00000000\na 00000001", "a is there twice"),
        ("a 00000 r\nb r 00000", "both a and b"),
        ("a 00000 r\nb 000000 00", "both a and b"),
        ("a 00000 r ; r!=1\nb 000000 00", "both a and b"),
    ],
)
def test_refused(line, why):
    with pytest.raises(EngineBug, match=why):
        Table(line, KINDS, 1)


def test_excluded_values_tell_lines_apart():
    table = Table("a 00000 r : r ; r!=0,3\nb 00000 000\nc 00000 011", KINDS, 1)
    assert [table.find(w).name for w in range(8)] == ["b", "a", "a", "c", "a", "a", "a", "a"]
    with pytest.raises(AskedWrong, match="not this instruction"):
        table["a"].encode(r=3)


def test_encode_wants_exactly_its_fields():
    a = Table("a 00 r q", KINDS, 1)["a"]
    for fields in ({"r": 1}, {"r": 1, "q": 1, "imm": 1}, {"r": 8, "q": 0}, {"r": -1, "q": 0}):
        with pytest.raises(AskedWrong, match="^a"):
            a.encode(**fields)


@given(st.integers(0, 255))
def test_find_is_matches(word):
    """The tree finds what looking at every line finds."""
    table = Table("a 000 imm[4:0]\nb 001 r 00\nc 001 r 01 ; r!=0\nd 1 u[6:2] 11\ne 1 u[6:2] 10\nf 010 11 r", KINDS, 1)
    every = [p for p in table if p.matches(word)]
    assert every == ([] if table.find(word) is None else [table.find(word)])
    for p in every:
        assert p.encode(**p.decode(word)) == word
