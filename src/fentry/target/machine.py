"""What the emulator must be told of an instruction set: names, numbers, and how a program is started on it.

One table per ELF machine, strings and numbers only; no code elsewhere in the emulated target knows an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unicorn import riscv_const, unicorn_const

from fentry.arch import by_elf_machine
from fentry.target.baremetal import TrapRegs
from fentry.target.linuxsignal import FrameShape


@dataclass(frozen=True, slots=True)
class Machine:
    """How one instruction set is called and started here; strings and numbers only.

    ``regs`` maps register names to the emulator's numbers. The system call convention is
    number in ``call``, arguments in ``arguments``, result in ``arguments[0]``.
    """

    name: str
    arch: int
    mode: int
    regs: dict[str, int]
    pc: str
    sp: str
    call: str
    arguments: tuple[str, ...]
    call_traps: tuple[int, ...]  #: trap numbers of a system call
    trap_skew: int  #: how far past the instruction a trap leaves pc
    breakpoints: tuple[bytes, ...]
    start_linux: tuple[tuple[int, int], ...]  #: (register number, value) in order: floating point, privilege
    start_bare: tuple[tuple[int, int], ...]
    board_base: int  #: where RAM begins on a bare board
    traps: TrapRegs
    frame: FrameShape
    fp_regs: tuple[int, ...]
    fp_control: int
    hwcap: int
    numbered: int  #: the emulator's number of register 0
    time_read: tuple[int, int, int]  #: (mask, value, shift of the register number) of an instruction that reads time


def _elf_243_64(arch: Any) -> Machine:
    """RISC-V, 64 bit: what is ours to know; names and conventions are the architecture's."""
    facts = arch.facts
    c = riscv_const
    fs_initial = 1 << 13  # mstatus.FS, privileged ISA 3.1.6.6
    return Machine(
        name=arch.name,
        arch=getattr(unicorn_const, facts.UNICORN_ARCH),
        mode=getattr(unicorn_const, facts.UNICORN_MODE),
        regs={name: getattr(c, facts.UNICORN_REGS[name]) for name in facts.REGS},
        pc=arch.pc,
        sp=arch.sp,
        call=facts.SYSCALL_NUMBER,
        arguments=facts.SYSCALL_ARGS,
        call_traps=(8, 9, 11),  # ecall from U, S, M: privileged ISA, table of mcause
        trap_skew=4,
        breakpoints=(facts.BREAKPOINT, facts.BREAKPOINT_SHORT),
        start_linux=((c.UC_RISCV_REG_MSTATUS, fs_initial), (c.UC_RISCV_REG_PRIV, 0)),
        start_bare=((c.UC_RISCV_REG_MSTATUS, fs_initial),),
        board_base=0x8000_0000,
        traps=TrapRegs(
            vector=c.UC_RISCV_REG_MTVEC,
            pc=c.UC_RISCV_REG_MEPC,
            cause=c.UC_RISCV_REG_MCAUSE,
            value=c.UC_RISCV_REG_MTVAL,
            status=c.UC_RISCV_REG_MSTATUS,
            privilege=c.UC_RISCV_REG_PRIV,
        ),
        frame=FrameShape(
            regs=facts.REGS,  # struct user_regs_struct, which sigcontext begins with
            regs_at=176,
            fp_regs=tuple(f"f{i}" for i in range(32)),
            fp_at=176 + 256,
            fp_control="fcsr",
            size=960,
            arguments=facts.SYSCALL_ARGS[:3],
            link="ra",
            pc=arch.pc,
            sp=arch.sp,
            code=bytes.fromhex("9308b008 73000000"),  # li a7, 139; ecall: what unwinders look for
        ),
        fp_regs=tuple(c.UC_RISCV_REG_F0 + i for i in range(32)),
        fp_control=c.UC_RISCV_REG_FCSR,
        hwcap=0x112D,  # letters A C D F I M as bits, uapi/asm/hwcap.h
        numbered=c.UC_RISCV_REG_X0,
        time_read=(0xFFFFF07F, 0xC0102073, 7),  # csrrs rd, time, zero
    )


_MACHINES = {(243, 64): _elf_243_64}  # by ELF machine and word size


def machine_for(elf_machine: int, bits: int) -> Machine | None:
    """Give the machine for an ELF file, or None if it is not emulated here."""
    make = _MACHINES.get((elf_machine, bits))
    return make(by_elf_machine(elf_machine, bits)) if make else None
