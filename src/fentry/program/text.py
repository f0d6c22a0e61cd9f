"""LLVM IR as text, being written: fresh value names, and shorthands for the few instructions that programs use."""

from __future__ import annotations

#: attributes of every function: a program must not touch FP or vector registers, and nothing unwinds through it
ATTRIBUTES = "nounwind noimplicitfloat"


class Text:
    """LLVM IR being written: fresh value names, and shorthands for the few instructions in use."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def new(self, hint: str = "v") -> str:
        """Give a fresh SSA name."""
        self.count += 1
        return f"%{hint}{self.count}"

    def add(self, line: str) -> None:
        """Append one line."""
        self.lines.append("  " + line)

    def label(self, name: str) -> None:
        """Begin a block."""
        self.lines.append(f"{name}:")

    def op(self, what: str, hint: str = "v") -> str:
        """Append ``%new = what``."""
        out = self.new(hint)
        self.add(f"{out} = {what}")
        return out

    def snippet(self, template: str, **values: str | int) -> str:
        """Append a dialect snippet; gives its {out}."""
        out = self.new("d")
        self.add(template.format(out=out, **values))
        return out

    def at(self, base: str, offset: int) -> str:
        """Pointer `offset` bytes behind `base`."""
        return self.op(f"getelementptr i8, ptr {base}, i64 {offset}", "p") if offset else base

    def load(self, ptr: str, *, volatile: bool = False, space: int = 0) -> str:
        """Load an i64."""
        where = f"ptr addrspace({space})" if space else "ptr"
        return self.op(f"load {'volatile ' if volatile else ''}i64, {where} {ptr}, align 8")

    def store(self, value: str | int, ptr: str, *, volatile: bool = False, space: int = 0) -> None:
        """Store an i64."""
        where = f"ptr addrspace({space})" if space else "ptr"
        self.add(f"store {'volatile ' if volatile else ''}i64 {value}, {where} {ptr}, align 8")

    def pointer(self, value: str | int) -> str:
        """An i64 as a pointer."""
        return self.op(f"inttoptr i64 {value} to ptr", "p")

    def barrier(self) -> None:
        """Keep the compiler from moving memory accesses across (a signal may arrive here); no instruction."""
        self.add('fence syncscope("singlethread") seq_cst')

    def branch(self, cond: str, yes: str, no: str, *, likely: bool) -> None:
        """Conditional branch with a strong hint."""
        self.add(f"br i1 {cond}, label %{yes}, label %{no}, !prof !{0 if likely else 1}")
