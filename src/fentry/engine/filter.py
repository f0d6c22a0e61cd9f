r"""Filters: which functions are meant. The kernel's glob grammar, and ``BIN:func``.

Grammar of one pattern (kernel/trace/ftrace.c ``filter_parse_regex``, lib/glob.c):

* ``name`` exact; ``name*`` prefix; ``*name`` suffix; ``*name*`` substring; any other use of ``*``, or any of
  ``? [ \\``, is a full glob: ``*`` any run, ``?`` one character, ``[a-z]`` a class, ``[!x]`` its negation, ``\\``
  quotes;
* a leading ``!`` takes the matching functions out again;
* a pattern that begins with a digit is a 1-based index into the list of functions (decimal, 0x or 0 octal);
* ``pattern:mod:module`` (kernel), ``module:pattern`` and ``module!pattern`` restrict it to modules that match.

Matching is whole-string and case-sensitive. Without a module a pattern means the program itself; if the program has no
such function, the libraries (a library's functions are never mixed with the program's by accident).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fentry.errors import AskedWrong, NothingMatched


class Named(Protocol):
    """What a filter looks at."""

    @property
    def name(self) -> str:
        """Function name."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names of the same address."""

    @property
    def module(self) -> str:
        """Base name of the image."""

    @property
    def main(self) -> bool:
        """True for functions of the program itself."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One parsed pattern."""

    text: str
    remove: bool
    module: str  #: glob on the module name; "" = program first, then libraries; "*" = all
    function: str
    index: int = 0  #: 1-based, instead of `function`


def _index(text: str) -> int:
    try:
        return int(text, 8) if re.fullmatch(r"0[0-7]+", text) else int(text, 0)
    except ValueError:
        raise AskedWrong(
            f"{text!r}: a pattern that begins with a digit is an index into the function list",
            hint="fentry list shows the functions in that order; indices begin with 1",
        ) from None


def parse(text: str) -> Pattern:
    """Parse one pattern. Raises AskedWrong."""
    whole = text
    remove = text.startswith("!")
    if remove:
        text = text[1:]
    module = ""
    if ":mod:" in text:
        text, module = text.split(":mod:", 1)
        module = module or "*"
        text = text or "*"
    else:
        found = re.match(r"([^:!]+)(?::(?!:)|!)(.*)$", text, re.DOTALL)
        if found and not found[1].endswith(("[", "\\")):
            module, text = found[1], found[2]
            text = text or "*"
    if not text:
        raise AskedWrong("an empty pattern matches nothing", hint="use '*' for every function")
    if text[0].isdigit():
        return Pattern(whole, remove, module, "", _index(text))
    return Pattern(whole, remove, module, text)


def glob_regex(glob: str) -> str:
    """Translate a kernel glob into a regular expression for ``re.fullmatch`` with DOTALL.

    What stands between two stars matches a fixed number of characters, so its leftmost match is as good as any: an
    atomic group says so, and no glob takes exponential time.
    """
    pieces = [""]
    i = 0
    while i < len(glob):
        ch = glob[i]
        i += 1
        if ch == "*":
            pieces.append("")
        elif ch == "?":
            pieces[-1] += "."
        elif ch == "\\" and i < len(glob):
            pieces[-1] += re.escape(glob[i])
            i += 1
        elif ch == "[":
            begin = i + (glob[i : i + 1] == "!")
            end = glob.find("]", begin + 1)  # a bracket that comes first is an ordinary character
            if end < 0:  # no end: the kernel takes the bracket literally
                pieces[-1] += re.escape(ch)
                continue
            pieces[-1] += _class(glob[begin:end], negate=begin > i)
            i = end + 1
        else:
            pieces[-1] += re.escape(ch)
    first, *middle = pieces
    if not middle:
        return first
    return first + "".join(f"(?>.*?{piece})" for piece in middle[:-1] if piece) + ".*" + middle[-1]


def _class(body: str, *, negate: bool) -> str:
    """Translate what stands between the brackets of a class; a range that ends before it begins is empty."""
    spans = []
    i = 0
    while i < len(body):
        wide = body[i + 1 : i + 2] == "-" and i + 2 < len(body)
        low, high = body[i], body[i + 2] if wide else body[i]
        if low <= high:
            spans.append(f"\\U{ord(low):08x}-\\U{ord(high):08x}")
        i += 3 if wide else 1
    if not spans:
        return "." if negate else "(?!)"
    return f"[{'^' if negate else ''}{''.join(spans)}]"


def matcher(glob: str) -> Callable[[str], bool]:
    """Give the fastest test for a glob."""
    plain = not any(c in glob for c in "?[\\")
    inner = glob.strip("*")
    if plain and "*" not in inner:
        if glob and not inner:
            return lambda _name: True
        head, tail = glob.startswith("*"), glob.endswith("*")
        if head and tail:
            return lambda name: inner in name
        if tail:
            return lambda name: name.startswith(inner)
        if head:
            return lambda name: name.endswith(inner)
        return lambda name: name == inner
    compiled = re.compile(glob_regex(glob), re.DOTALL)
    return lambda name: compiled.fullmatch(name) is not None


def module_matches(glob: str, module: str) -> bool:
    """Tell whether a module is meant; "libc" finds libc.so.6, and "libfoo.so" finds libfoo.so.1."""
    if matcher(glob)(module):
        return True
    return not any(c in glob for c in "*?[\\") and module.startswith(glob + ".")


def _match(pattern: Pattern, functions: Sequence[Named]) -> list[int]:
    if pattern.index:
        if pattern.index > len(functions):
            raise NothingMatched(f"index {pattern.index} is beyond the last function ({len(functions)})")
        return [pattern.index - 1]
    test = matcher(pattern.function)

    def hit(f: Named) -> bool:
        return test(f.name) or any(test(a) for a in f.aliases)

    if pattern.module:
        modules = {f.module for f in functions}
        wanted = {m for m in modules if module_matches(pattern.module, m)}
        if not wanted:
            raise NothingMatched(
                f"{pattern.text!r}: no module matches {pattern.module!r}",
                hint="loaded modules: " + ", ".join(sorted(modules)),
            )
        return [i for i, f in enumerate(functions) if f.module in wanted and hit(f)]
    own = [i for i, f in enumerate(functions) if f.main and hit(f)]
    if own or pattern.remove:
        return own if not pattern.remove else [i for i, f in enumerate(functions) if hit(f)]
    return [i for i, f in enumerate(functions) if not f.main and hit(f)]


def select(functions: Sequence[Named], wanted: Sequence[str], unwanted: Sequence[str] = ()) -> list[int]:
    """Indices of the functions that are in `wanted` and not in `unwanted`, in order.

    An empty `wanted` means every function of the program itself.

    Raises: NothingMatched for a pattern that matches nothing; AskedWrong for one that cannot be parsed.
    """
    patterns = [parse(p) for p in wanted]
    chosen: set[int] = set()
    if not patterns or all(p.remove for p in patterns):
        chosen = {i for i, f in enumerate(functions) if f.main}
    for pattern in patterns:
        found = _match(pattern, functions)
        if not found:
            raise NothingMatched(_nothing(pattern, functions), hint="fentry list shows what there is")
        if pattern.remove:
            chosen.difference_update(found)
        else:
            chosen.update(found)
    for text in unwanted:
        pattern = parse(text)
        if pattern.remove:
            raise AskedWrong(f"{text!r}: '!' has no meaning in a list of what not to trace")
        module = pattern.module or "*"
        chosen.difference_update(_match(Pattern(text, False, module, pattern.function, pattern.index), functions))
    return sorted(chosen)


def _nothing(pattern: Pattern, functions: Sequence[Named]) -> str:
    """Say that nothing matched, with the nearest names."""
    import difflib

    word = pattern.function.strip("*")
    names = {f.name for f in functions}
    near = [n for n in names if word and word.lower() in n.lower()][:3]
    near = near or difflib.get_close_matches(word, list(names)[:20000], 3)
    also = f"; did you mean {', '.join(sorted(near))}?" if near else ""
    return f"no function matches {pattern.text!r}{also}"
