"""Instruction patterns, one line each, that run both ways: the line decodes and the line encodes.

A line is written as the instruction listings of the ISA manuals write it, most significant bit first::

    beq   imm[12|10:5] rs2 rs1 000 imm[4:1|11] 1100011 : rs1, rs2, imm
    c.lui 011 imm[17] rd imm[16:12] 01 : rd, upper ; rd!=0,2 imm!=0

* a run of ``0`` and ``1`` is fixed bits;
* a bare word is a field as wide as its :class:`Kind` says (``rd``: 5 bits);
* ``word[12|10:5]`` says which bits of the field's *value* lie here. Pieces of one word anywhere in the line
  make one value; bits below the lowest one named are zero (an offset in units of 2 has no bit 0);
* after `` : `` the operands as a person reads them, left alone here; after ``;`` what a field may not be.

Loading refuses a line whose bits do not add up, a value bit given twice or not at all, a name used twice and
any two lines that one word could match: the first would hide the second. A table is part of the program, so a
bad one is an :class:`~fentry.errors.EngineBug`; a field value that does not fit is :class:`AskedWrong`.

Finding the line of a word walks a tree that branches on the bits *every* remaining line fixes, so its cost does
not grow with the number of lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import and_

from fentry.errors import AskedWrong, EngineBug


@dataclass(frozen=True, slots=True)
class Kind:
    """What a word in a line stands for."""

    name: str  #: key among the decoded values; two words may share it (``rd`` and ``rd'``)
    bits: int = 0  #: width of the bare word; 0 if its bits must be written out
    signed: bool = False  #: the value's top bit is its sign
    base: int = 0  #: added to the bits (``rd'`` counts from x8)


@dataclass(frozen=True, slots=True)
class Field:
    """One value and the places its bits have in a word."""

    name: str
    parts: tuple[tuple[int, int, int], ...]  #: (lowest bit in the word, mask of the width, lowest bit in the value)
    low: int  #: lowest value bit; the value is a multiple of 2**low
    high: int  #: one past the highest value bit
    signed: bool
    base: int

    def get(self, word: int) -> int:
        """Give this field's value in `word`."""
        value = 0
        for at, mask, to in self.parts:
            value |= (word >> at & mask) << to
        if self.signed and value >> (self.high - 1):
            value -= 1 << self.high
        return value + self.base

    def put(self, value: int) -> int:
        """Give the bits of a word that hold `value`. Raises AskedWrong if it does not fit."""
        raw = value - self.base
        low, high = (-(1 << (self.high - 1)), 1 << (self.high - 1)) if self.signed else (0, 1 << self.high)
        if not low <= raw < high:
            raise AskedWrong(f"{self.name}={value} does not fit: {low + self.base} to {high - 1 + self.base}")
        if raw & ((1 << self.low) - 1):
            raise AskedWrong(f"{self.name}={value} is not a multiple of {1 << self.low}")
        return sum((raw >> to & mask) << at for at, mask, to in self.parts)

    @property
    def mask(self) -> int:
        """Bits of a word that belong to this field."""
        return sum(mask << at for at, mask, _ in self.parts)


@dataclass(frozen=True, slots=True)
class Pattern:
    """One instruction: which bits are fixed, and where its fields are."""

    name: str
    size: int  #: bytes
    mask: int
    match: int
    fields: tuple[Field, ...]
    operands: str
    never: tuple[tuple[Field, frozenset[int]], ...] = ()  #: values that make the word another instruction, or none

    def matches(self, word: int) -> bool:
        """Tell whether `word` is this instruction."""
        return word & self.mask == self.match and all(f.get(word) not in values for f, values in self.never)

    def decode(self, word: int) -> dict[str, int]:
        """Give the field values of a word that matches."""
        return {f.name: f.get(word) for f in self.fields}

    def encode(self, **values: int) -> int:
        """Give the word with these field values, all of them named.

        Raises: AskedWrong if a value is missing, unknown, too large, misaligned or excluded for this instruction.
        """
        word = self.match
        for field in self.fields:
            if field.name not in values:
                raise AskedWrong(f"{self.name} needs {field.name}")
            try:
                word |= field.put(values.pop(field.name))
            except AskedWrong as e:
                raise AskedWrong(f"{self.name}: {e.message}") from None
        if values:
            raise AskedWrong(f"{self.name} has no {', '.join(values)}")
        for field, excluded in self.never:
            if field.get(word) in excluded:
                raise AskedWrong(f"{self.name}: {field.name}={field.get(word)} is not this instruction")
        return word

    def clashes(self, other: Pattern) -> bool:
        """Tell whether some word may match both; True whenever the lines do not prove the opposite."""
        if (self.match ^ other.match) & self.mask & other.mask:
            return False
        for a, b in ((self, other), (other, self)):
            for field, excluded in a.never:
                if field.mask & ~b.mask == 0 and field.get(b.match) in excluded:
                    return False
        return True


# A tree node: bits to look at and where each value of them leads, or the few patterns left.
_Node = tuple[int, dict[int, "_Node"]] | list[Pattern]


class Table:
    """The lines of one instruction length.

    Args:
        lines: text, one instruction per line; ``#`` starts a comment.
        kinds: what the words stand for.
        size: bytes of every instruction in it.

    Raises: EngineBug naming the line that is wrong.
    """

    def __init__(self, lines: str, kinds: Mapping[str, Kind], size: int) -> None:
        self.size = size
        self.patterns: dict[str, Pattern] = {}
        for line in lines.splitlines():
            text = line.partition("#")[0].strip()
            if not text:
                continue
            pattern = _parse(text, kinds, size)
            if pattern.name in self.patterns:
                raise EngineBug(f"instruction table: {pattern.name} is there twice")
            self.patterns[pattern.name] = pattern
        self._root = _grow(list(self.patterns.values()), 0)

    def find(self, word: int) -> Pattern | None:
        """Give the pattern of `word`, or None if it is no instruction of this table."""
        node = self._root
        while isinstance(node, tuple):
            below = node[1].get(word & node[0])
            if below is None:
                return None
            node = below
        for pattern in node:
            if pattern.matches(word):
                return pattern
        return None

    def __getitem__(self, name: str) -> Pattern:
        return self.patterns[name]

    def __contains__(self, name: object) -> bool:
        return name in self.patterns

    def __iter__(self) -> Iterator[Pattern]:
        return iter(self.patterns.values())

    def __len__(self) -> int:
        return len(self.patterns)


def _grow(patterns: list[Pattern], seen: int) -> _Node:
    """Build the tree below the bits `seen`. Raises EngineBug for two lines that one word could match."""
    common = reduce(and_, (p.mask for p in patterns), -1) & ~seen
    if len(patterns) < 2 or not common:
        for a, b in combinations(patterns, 2):
            if a.clashes(b):
                raise EngineBug(f"instruction table: a word may be both {a.name} and {b.name}")
        return patterns
    groups: dict[int, list[Pattern]] = {}
    for pattern in patterns:
        groups.setdefault(pattern.match & common, []).append(pattern)
    return common, {key: _grow(group, seen | common) for key, group in groups.items()}


def _parse(line: str, kinds: Mapping[str, Kind], size: int) -> Pattern:
    """Read one line. Raises EngineBug with the line and what is wrong with it."""
    head, _, guards = line.partition(";")
    head, _, operands = head.partition(" : ")  # a colon inside brackets has no blanks around it
    name, *tokens = head.split()
    mask = match = 0
    at = size * 8
    pieces: dict[str, list[tuple[int, int, int]]] = {}
    spelled: dict[str, Kind] = {}
    for token in tokens:
        for bits, value in _token(line, token, kinds):
            width = bits if isinstance(bits, int) else bits[0] - bits[1] + 1
            at -= width
            if at < 0:
                raise _bad(line, f"more than {size * 8} bits")
            if isinstance(bits, int):
                mask |= ((1 << width) - 1) << at
                match |= value << at
            else:
                kind = kinds[token.partition("[")[0]]
                if spelled.setdefault(kind.name, kind) is not kind:
                    raise _bad(line, f"{kind.name} is spelled two ways")
                pieces.setdefault(kind.name, []).append((at, (1 << width) - 1, bits[1]))
    if at:
        raise _bad(line, f"{at} bits are missing")
    fields = {n: _field(line, spelled[n], parts) for n, parts in pieces.items()}
    never = []
    for guard in guards.split():
        target, sep, values = guard.partition("!=")
        if not sep or target not in fields:
            raise _bad(line, f"cannot read {guard!r}")
        never.append((fields[target], frozenset(int(v, 0) for v in values.split(","))))
    return Pattern(name, size, mask, match, tuple(fields.values()), operands.strip(), tuple(never))


def _token(line: str, token: str, kinds: Mapping[str, Kind]) -> Iterable[tuple[int | tuple[int, int], int]]:
    """Give the parts of one token: (width, bits) if fixed, ((high, low) of the value, 0) if a field's."""
    if set(token) <= {"0", "1"}:
        yield len(token), int(token, 2)
        return
    word, bracket, inside = token.partition("[")
    if word not in kinds:
        raise _bad(line, f"unknown word {word!r}")
    if not bracket:
        if not kinds[word].bits:
            raise _bad(line, f"{word} must say which bits lie where")
        yield (kinds[word].bits - 1, 0), 0
        return
    for part in inside.rstrip("]").split("|"):
        high, _, low = part.partition(":")
        try:
            span = int(high), int(low or high)
        except ValueError:
            raise _bad(line, f"cannot read {token!r}") from None
        if span[0] < span[1]:
            raise _bad(line, f"{part} runs backwards")
        yield span, 0


def _field(line: str, kind: Kind, parts: list[tuple[int, int, int]]) -> Field:
    """Join the pieces of one value. Raises EngineBug if a value bit is there twice or not at all."""
    seen = 0
    for _, mask, to in parts:
        if seen & mask << to:
            raise _bad(line, f"a bit of {kind.name} is given twice")
        seen |= mask << to
    low = (seen & -seen).bit_length() - 1
    if (seen >> low) + 1 & (seen >> low):
        raise _bad(line, f"a bit of {kind.name} is not given")
    return Field(kind.name, tuple(parts), low, seen.bit_length(), kind.signed, kind.base)


def _bad(line: str, why: str) -> EngineBug:
    return EngineBug(f"instruction table: {why}: {line}")
