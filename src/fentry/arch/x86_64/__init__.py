"""x86_64 (AMD64, Intel 64) Linux user space and kernel. ``ARCH`` is the one public name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fentry.arch import (
    Arch,
    Displaced,
    Refusal,
    ReturnPlane,
    Rung,
    Sled,
    SlotLayout,
    SlotPlan,
    SlotShape,
    UnwindInfo,
)
from fentry.arch.x86_64 import code as writer
from fentry.arch.x86_64 import facts, insn
from fentry.arch.x86_64 import slot as slots_
from fentry.arch.x86_64.dialect import DIALECT

__all__ = ["ARCH"]


class _X86(Arch):
    """Facts and verbs of x86_64; each verb is documented where it is written."""

    name = facts.NAME
    aliases = facts.ALIASES
    rung = Rung.MOVABLE
    bits = facts.BITS
    elf_machine = facts.ELF_MACHINE
    triple = facts.TRIPLE
    cpu = facts.CPU
    features = facts.FEATURES
    pc = facts.PC
    sp = facts.SP
    tp = facts.TP
    insn_align = facts.INSN_ALIGN
    jump_reach = facts.REACH
    dialect = DIALECT
    facts = facts  #: the tables, for targets that want foreign names
    unwinds = True

    def length(self, code: bytes) -> int:
        return insn.length(code)

    def disassemble(self, code: bytes, at: int) -> list[tuple[int, bytes, str]]:
        return insn.disassemble(code, at)

    def sled_at(self, code: bytes, hint: str) -> Sled | Refusal | None:
        return writer.sled_at(code, hint)

    def landing_pad(self, code: bytes) -> int:
        return insn.landing_pad(code)

    def arm(self, site: int, sled: Sled, slot: int, *, balanced: bool) -> bytes:
        return writer.arm(site, sled, slot, balanced=balanced)

    def slot_layout(self, shape: SlotShape) -> SlotLayout:
        return slots_.slot_layout(shape)

    def slot(self, plan: SlotPlan) -> bytes:
        return slots_.slot(plan)

    def slots(self, plan: SlotPlan, sites: Sequence[tuple[int, Sled]], bodies: Sequence[int]) -> bytes:
        return slots_.slots(plan, sites, bodies)

    def return_consts(self, plane: ReturnPlane, slots: int, size: int) -> bytes:
        return slots_.return_consts(plane, slots, size)

    def frame_info(self, shape: SlotShape, slots: Sequence[int], at: int, unwind: UnwindInfo) -> bytes:
        return slots_.frame_info(shape, slots, at, unwind)

    def saved_pcs(self, stack: bytes) -> list[tuple[int, int]]:
        return slots_.saved_pcs(stack)

    def entry_window(self, code: bytes, at: int, size: int, room: int) -> Sled | Refusal:
        return insn.entry_window(code, at, size, room)

    def plan_entries(
        self,
        text: bytes,
        at: int,
        functions: Sequence[tuple[int, int, int]],
        read: Callable[[int, int], bytes] | None = None,
    ) -> list[Sled | Refusal]:
        return insn.plan_entries(text, at, functions, read)

    def displace(self, sled: Sled, at: int, to: int, resume: int) -> Displaced:
        return writer.displace(sled, at, to, resume)

    def branch_targets(self, code: bytes, at: int) -> list[tuple[int, int]]:
        return insn.branch_targets(code, at)


ARCH = _X86()
