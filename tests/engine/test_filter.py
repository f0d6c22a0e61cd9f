"""Filters: the kernel's globs against a matcher that is simple enough to be right, and what is said when nothing is."""

from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fentry.engine import filter as filters
from fentry.errors import AskedWrong, NothingMatched


@dataclass(frozen=True)
class F:
    name: str
    module: str = "prog"
    main: bool = True
    aliases: tuple[str, ...] = ()


PROG = [F("main"), F("parse_line"), F("parse_file"), F("evaluate", aliases=("eval",)), F("free"), F("std::sort(int*)")]
LIBC = [F(n, "libc.so.6", False) for n in ("malloc", "free", "memcpy", "read")]
SO = [F("parse_xml", "libxml2.so.2", False), F("read", "libxml2.so.2", False)]
ALL = [*PROG, *LIBC, *SO]


def names(wanted, unwanted=()):
    return [(ALL[i].module[:4], ALL[i].name) for i in filters.select(ALL, wanted, unwanted)]


def own(*functions):
    return [("prog", f) for f in functions]


# -- one glob ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("name", ["name"], ["names", "aname", "Name", ""]),  # whole string, case-sensitive
        ("name*", ["name", "names"], ["aname"]),
        ("*name", ["name", "aname"], ["names"]),
        ("*name*", ["name", "names", "aname", "anames"], ["nam"]),
        ("na*me", ["name", "na_me"], ["nam", "name_"]),  # anything else is a full glob
        ("*n*e*", ["name", "xnxex"], ["eman"]),
        ("n?me", ["name", "nome"], ["nme", "naame"]),
        ("[a-c]x", ["ax", "bx", "cx"], ["dx", "-x", "x"]),
        ("[!a-c]x", ["dx", "!x"], ["ax", "x"]),
        ("[abc]", ["a", "b"], ["d", "ab"]),
        ("[]a]x", ["]x", "ax"], ["x"]),  # a bracket that comes first is an ordinary one
        ("[!]a]x", ["bx"], ["]x", "ax"]),
        ("[a-]x", ["ax", "-x"], ["bx"]),
        ("[^a]x", ["^x", "ax"], ["bx"]),  # only "!" negates
        ("[a", ["[a"], ["a"]),  # a class without an end is the character
        (r"a\*b", ["a*b"], ["axb", r"a\*b"]),
        (r"a\?", ["a?"], ["ab"]),
        (r"\[a]", ["[a]"], ["a"]),
        ("a.b", ["a.b"], ["axb"]),  # what means something in regular expressions means nothing here
        ("a+(b)|c^$", ["a+(b)|c^$"], ["aab"]),
        ("a\n*", ["a\n", "a\nb"], ["ab"]),
        ("*", ["", "anything", "two\nlines"], []),
        ("**", ["", "anything"], []),
        ("[[]x", ["[x"], ["x"]),
        ("[a&&b]x", ["ax", "&x", "bx"], ["cx"]),
    ],
)
def test_glob(glob, yes, no):
    test = filters.matcher(glob)
    assert [n for n in yes if not test(n)] == []
    assert [n for n in no if test(n)] == []


def reference(glob, text):
    """Match by taking the pattern apart from the left, one rule a line: lib/glob.c's rules, without its speed."""
    if not glob:
        return not text
    head, rest = glob[0], glob[1:]
    if head == "*":
        return any(reference(rest, text[n:]) for n in range(len(text) + 1))
    if not text:
        return False
    if head == "?":
        return reference(rest, text[1:])
    if head == "\\" and rest:
        return rest[0] == text[0] and reference(rest[1:], text[1:])
    if head == "[":
        inside = rest[1:] if rest[:1] == "!" else rest
        end = inside.find("]", 1)
        if end >= 0:
            body, after = inside[:end], inside[end + 1 :]
            hit, n = False, 0
            while n < len(body):
                if body[n + 1 : n + 2] == "-" and n + 2 < len(body):
                    hit |= body[n] <= text[0] <= body[n + 2]
                    n += 3
                else:
                    hit |= body[n] == text[0]
                    n += 1
            return hit != (rest[:1] == "!") and reference(after, text[1:])
    return head == text[0] and reference(rest, text[1:])


ALPHABET = "ab-*?[]!\\^&|~"


@settings(max_examples=1500, deadline=None)
@given(st.text(ALPHABET, max_size=8), st.text("ab-[]!\\^&|~", max_size=6))
@example("[a-b-]", "-")
@example("[!]", "a")
@example("[!]]", "a")
@example("[--b]", "a")
@example("[b-a]", "b")
@example("\\", "\\")
@example("a*\\", "a\\")
@example("[~~a]", "~")
@example("[a||b]", "|")
def test_globs_against_the_reference(glob, text):
    test = filters.matcher(glob)
    assert test(text) == reference(glob, text)


@pytest.mark.parametrize("glob", ["a*a*a*a*a*a*a*a*a*a*a*b", "*" * 30 + "b", "*a?*a?*a?*a?*a?*b"])
def test_no_glob_takes_forever(glob):
    """Backtracking over stars must not be exponential: the name is as long as a C++ symbol can be."""
    test = filters.matcher(glob)
    assert not test("a" * 40)
    assert test("a" * 60 + "b")


# -- one pattern ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "remove", "module", "function"),
    [
        ("main", False, "", "main"),
        ("!main", True, "", "main"),
        ("libc.so.6:mem*", False, "libc.so.6", "mem*"),
        ("libc.so.6!mem*", False, "libc.so.6", "mem*"),
        ("!libc:free", True, "libc", "free"),
        ("mem*:mod:libc*", False, "libc*", "mem*"),
        ("mem*:mod:", False, "*", "mem*"),
        (":mod:libc", False, "libc", "*"),
        ("libc:", False, "libc", "*"),
        ("std::sort(int*)", False, "", "std::sort(int*)"),
        ("std::*", False, "", "std::*"),
        ("libfoo.so:std::*", False, "libfoo.so", "std::*"),
        ("[!a]*", False, "", "[!a]*"),
    ],
)
def test_parse(text, remove, module, function):
    pattern = filters.parse(text)
    assert (pattern.remove, pattern.module, pattern.function, pattern.index) == (remove, module, function, 0)


@pytest.mark.parametrize(("text", "index"), [("1", 1), ("12", 12), ("0x10", 16), ("010", 8), ("!3", 3)])
def test_an_index(text, index):
    assert filters.parse(text).index == index


@pytest.mark.parametrize("text", ["", "!", "1abc", "0x", "09", "99999x", "1*"])
def test_patterns_that_cannot_be(text):
    with pytest.raises(AskedWrong) as caught:
        filters.parse(text)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=20))
def test_any_text_is_a_pattern_or_one_clear_error(text):
    try:
        filters.select(ALL, [text])
    except AskedWrong as error:
        assert error.message


# -- selection --------------------------------------------------------------------------------------------


def test_nothing_asked_is_the_program_itself():
    assert names([]) == own(*(f.name for f in PROG))
    assert names([], ["*"]) == []


def test_the_program_comes_first_then_the_libraries():
    assert names(["free"]) == own("free")
    assert names(["malloc"]) == [("libc", "malloc")]
    assert names(["parse*"]) == own("parse_line", "parse_file")
    assert names(["read"]) == [("libc", "read"), ("libx", "read")]


def test_modules():
    assert names(["libc.so.6:free"]) == names(["libc:free"]) == names(["free:mod:libc*"]) == [("libc", "free")]
    assert names(["*:parse*"]) == [*own("parse_line", "parse_file"), ("libx", "parse_xml")]
    assert names(["libxml2.so:*"]) == [("libx", "parse_xml"), ("libx", "read")]
    assert names(["prog:main"]) == own("main")


def test_aliases_find_the_function_and_it_is_chosen_once():
    assert names(["eval"]) == names(["eval*"]) == own("evaluate")


def test_order_is_that_of_the_list_and_removal_is_in_order_of_patterns():
    assert names(["main", "free"]) == names(["free", "main", "free"]) == own("main", "free")
    assert names(["parse*", "!parse_file"]) == own("parse_line")
    assert names(["!parse*"]) == own("main", "evaluate", "free", "std::sort(int*)")
    assert names(["parse*", "!parse_file", "parse_file"]) == own("parse_line", "parse_file")
    assert names(["*", "libc:*"], ["free"]) == [
        *own("main", "parse_line", "parse_file", "evaluate", "std::sort(int*)"),
        ("libc", "malloc"), ("libc", "memcpy"), ("libc", "read"),
    ]  # fmt: skip


def test_index_into_the_list():
    assert names(["1"]) == own("main")
    assert names(["0x2", "03"]) == own("parse_line", "parse_file")
    with pytest.raises(NothingMatched, match="beyond the last"):
        names([str(len(ALL) + 1)])


def test_index_zero_is_refused():
    """Indices begin with 1; 0 must not be taken for an empty pattern that matches something else."""
    with pytest.raises(AskedWrong):
        names(["0"])


def test_what_nothing_matches_is_an_error_with_a_suggestion():
    for wanted, near in (("parse_lin", "parse_line"), ("mallok", "malloc"), ("*parse_lime*", "parse_line")):
        with pytest.raises(NothingMatched) as caught:
            names([wanted])
        assert wanted in caught.value.message
        assert "did you mean" in caught.value.message, wanted
        assert near in caught.value.message
    with pytest.raises(NothingMatched, match=r"no function matches 'zzzzzz'\n"):
        names(["zzzzzz"])
    with pytest.raises(NothingMatched, match="no module matches 'libz'") as caught:
        names(["libz:free"])
    assert "libc.so.6" in caught.value.hint
    with pytest.raises(NothingMatched):
        names(["main", "!nothing_like_it"])


def test_removal_among_the_unwanted_is_refused():
    with pytest.raises(AskedWrong, match="no meaning"):
        names(["*"], ["!main"])
