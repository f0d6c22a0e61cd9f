"""Ops: what runs at a site. An op is a pair of program templates; several may share a site.

On one function the newest op's entry program runs first, and exit programs run in the opposite order (kernel: new ops
are pushed on the head of the list).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fentry.arch import Dialect, SlotLayout
from fentry.program.ir import Parent, Spec
from fentry.record.layout import Kind


@dataclass(eq=False, slots=True)
class Op:
    """One user of sites.

    Attributes:
        name: shown to people; unique in an engine.
        entry: template of the entry program, or None.
        exit: template of the exit program; asks for a return hook.
        parent: the entry program records the caller's address.
        counts: its programs add to counter rows (they need their slot table's address).
    """

    name: str
    entry: Spec | None = None
    exit: Spec | None = None
    parent: bool = False
    counts: bool = False


@dataclass(frozen=True, slots=True)
class Programs:
    """The specs that one op contributes to the slots of one table."""

    entry: Spec | None
    tail: Spec | None = None
    plain: Spec | None = None
    exit: Spec | None = None
    unwound: Spec | None = None


def specialise(op: Op, dialect: Dialect, form: str, *, hooked: bool, base: int, shift: int, row: int) -> Programs:
    """Fit an op's templates to a kind of slot.

    Args:
        op: the op.
        dialect: of the target's architecture.
        form: form of the sled.
        hooked: the slot hooks the return (for this op or another).
        base: address of the slot table.
        shift: log2 of its stride.
        row: its first counter row.
    """

    def fit(spec: Spec | None, parent: Parent = Parent.NONE, **change: object) -> Spec | None:
        if spec is None:
            return None
        if op.counts:
            change |= {"base": base, "shift": shift, "row": row}
        return replace(spec, parent=parent, **change)  # type: ignore[arg-type]  # a dict of field values

    direct = Parent(dialect.parent.get(form, dialect.parent.get("", "next"))) if op.parent else Parent.NONE
    if not hooked:
        return Programs(fit(op.entry, direct, tail=op.exit is not None))
    if not dialect.return_slot:
        shadow = tail = plain = direct
    elif op.parent:
        shadow, tail, plain = Parent.SHADOW, Parent.SHADOW, Parent.NEXT
    else:
        shadow = tail = plain = Parent.NONE
    return Programs(
        entry=fit(op.entry, shadow),
        tail=fit(op.entry, tail, tail=True),
        plain=fit(op.entry, plain, tail=True),
        exit=fit(op.exit),
        unwound=fit(op.exit, retval=False),
    )


def marks(layout: SlotLayout, ops: Sequence[Op]) -> dict[int, dict[int, Kind]]:
    """Which return address in a slot means what: {op index: {offset: kind}}."""
    out: dict[int, dict[int, Kind]] = {}
    entering = [i for i, op in enumerate(ops) if op.entry is not None]
    leaving = [i for i, op in reversed(list(enumerate(ops))) if op.exit is not None]
    hooked = layout.hook >= 0
    for order, i in enumerate(entering):
        mine = out.setdefault(i, {})
        lone = ops[i].exit is not None and not hooked
        mine[layout.entry_marks[order]] = Kind.PLAIN if lone else Kind.ENTRY
        if hooked:
            mine[layout.tail_marks[order]] = Kind.TAIL if ops[i].exit is not None else Kind.ENTRY
            mine[layout.plain_marks[order]] = Kind.PLAIN if ops[i].exit is not None else Kind.ENTRY
    for order, i in enumerate(leaving if hooked else []):
        mine = out.setdefault(i, {})
        mine[layout.exit_marks[order]] = Kind.EXIT
        if layout.unwound_marks:
            mine[layout.unwound_marks[order]] = Kind.UNWOUND
    return out
