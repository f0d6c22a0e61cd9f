"""riscv64: RV64GC with and without compressed instructions. ``ARCH`` is the one public name.

Tables are in ``facts``, reading in ``insn``, writing in ``code``, slots in ``slot``. Rung: sledded; an entry jump
without a sled is not built yet.
"""

from __future__ import annotations

from fentry.arch import Arch, Displaced, Refusal, ReturnPlane, Rung, Sled, SlotLayout, SlotPlan, SlotShape
from fentry.arch.riscv64 import code as writer
from fentry.arch.riscv64 import facts, insn, slot
from fentry.arch.riscv64.dialect import DIALECT
from fentry.errors import Rejected

__all__ = ["ARCH"]

_NO_ENTRY_JUMP = "no sled, and an entry jump without one is not built yet on riscv64"


class _Riscv64(Arch):
    """Facts and verbs of RV64GC; each verb is described where it is done."""

    name = facts.NAME
    aliases = facts.ALIASES
    rung = Rung.SLEDDED
    bits = facts.BITS
    elf_machine = facts.ELF_MACHINE
    triple = facts.TRIPLE
    cpu = facts.CPU
    features = facts.FEATURES
    pc = facts.PC
    sp = facts.SP
    tp = facts.TP
    insn_align = facts.INSN_ALIGN
    jump_reach = facts.PAIR_REACH
    dialect = DIALECT
    facts = facts  #: the tables, for targets that want foreign names

    def length(self, code: bytes) -> int:
        """See :func:`fentry.arch.riscv64.insn.length`."""
        return insn.length(code)

    def disassemble(self, code: bytes, at: int) -> list[tuple[int, bytes, str]]:
        """Give (address, bytes, text) of all of `code`, with the target of each direct branch as an address.

        What the disassembler does not know is written by our own tables, then as data.
        """
        import capstone

        modes = (getattr(capstone, mode) for mode in facts.CAPSTONE_MODES)
        engine = capstone.Cs(getattr(capstone, facts.CAPSTONE_ARCH), sum(modes))
        targets = dict(writer.branch_targets(code, at))
        lines = []
        pos = 0
        while pos < len(code):
            size = insn.length(code[pos : pos + 4]) or min(2, len(code) - pos)
            raw = bytes(code[pos : pos + size])
            known = insn.decode(raw)
            text = next((f"{m} {ops}".strip() for _, n, m, ops in engine.disasm_lite(raw, at + pos) if n == size), "")
            if not text:
                text = known.text if known else f".insn {int.from_bytes(raw, 'little'):#0{2 + 2 * size}x}"
            if at + pos in targets:
                text += f"  # {targets[at + pos]:#x}"
            lines.append((at + pos, raw, text))
            pos += size
        return lines

    def sled_at(self, code: bytes, hint: str) -> Sled | Refusal | None:
        """See :func:`fentry.arch.riscv64.code.sled_at`."""
        return writer.sled_at(code, hint)

    def landing_pad(self, code: bytes) -> int:
        """See :func:`fentry.arch.riscv64.code.landing_pad`."""
        return writer.landing_pad(code)

    def arm(self, site: int, sled: Sled, slot: int, *, balanced: bool) -> bytes:
        """See :func:`fentry.arch.riscv64.code.arm`; `balanced` changes nothing, both kinds of slot are called."""
        del balanced
        return writer.arm(site, sled, slot)

    def slot_layout(self, shape: SlotShape) -> SlotLayout:
        """See :func:`fentry.arch.riscv64.slot.slot_layout`."""
        return slot.slot_layout(shape)

    def slot(self, plan: SlotPlan) -> bytes:
        """See :func:`fentry.arch.riscv64.slot.slot`."""
        return slot.slot(plan)

    def return_consts(self, plane: ReturnPlane, slots: int, size: int) -> bytes:
        """See :func:`fentry.arch.riscv64.slot.return_consts`."""
        return slot.return_consts(plane, slots, size)

    def entry_window(self, code: bytes, at: int, size: int, room: int) -> Sled | Refusal:
        """Refuse: rung 5 is not reached here."""
        del code, at, size, room
        return Refusal(_NO_ENTRY_JUMP)

    def displace(self, sled: Sled, at: int, to: int, resume: int) -> Displaced:
        """Refuse: rung 5 is not reached here. Raises Rejected."""
        del sled, to, resume
        raise Rejected(_NO_ENTRY_JUMP, at=at)

    def frame_size(self, code: bytes) -> int:
        """See :func:`fentry.arch.riscv64.code.frame_size`."""
        return writer.frame_size(code)

    def branch_targets(self, code: bytes, at: int) -> list[tuple[int, int]]:
        """See :func:`fentry.arch.riscv64.code.branch_targets`."""
        return writer.branch_targets(code, at)


ARCH: Arch = _Riscv64()
