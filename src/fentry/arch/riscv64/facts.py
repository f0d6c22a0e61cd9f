"""riscv64 as tables: registers, roles, sleds' numbers, and what others call things. No code, no imports of others.

Sources: RISC-V ELF psABI 1.0 (register names, roles, DWARF numbers), Linux ``arch/riscv/include/uapi/asm/ptrace.h``
(register order), GDB ``features/riscv/64bit-cpu.xml`` (order of the ``g`` packet), unprivileged ISA (the rest).
"""

from __future__ import annotations

from typing import Final

NAME: Final = "riscv64"
ALIASES: Final = ("riscv", "rv64", "rv64gc")
BITS: Final = 64

# -- registers ----------------------------------------------------------------------------------------

#: ABI name of x0..x31
X: Final = (
    *("zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1"),
    *("a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7"),
    *("s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11"),
    *("t3", "t4", "t5", "t6"),
)
#: ABI name of f0..f31
F: Final = (
    *("ft0", "ft1", "ft2", "ft3", "ft4", "ft5", "ft6", "ft7", "fs0", "fs1"),
    *("fa0", "fa1", "fa2", "fa3", "fa4", "fa5", "fa6", "fa7"),
    *("fs2", "fs3", "fs4", "fs5", "fs6", "fs7", "fs8", "fs9", "fs10", "fs11"),
    *("ft8", "ft9", "ft10", "ft11"),
)
#: number of each general register
NUMBER: Final = {name: i for i, name in enumerate(X)}

#: names of ``target.regs()``, in the order of the kernel's user_regs_struct (PTRACE_GETREGSET): 8 bytes each
REGS: Final = ("pc", *X[1:])
PC: Final = "pc"
SP: Final = "sp"
TP: Final = "tp"

# -- roles --------------------------------------------------------------------------------------------

ARGS: Final = ("a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7")
FP_ARGS: Final = ("fa0", "fa1", "fa2", "fa3", "fa4", "fa5", "fa6", "fa7")
RETURNS: Final = ("a0", "a1")
FP_RETURNS: Final = ("fa0", "fa1")
CALLEE_SAVED: Final = ("sp", "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11")
LINK: Final = "ra"  #: holds the parent at a function's entry
#: t0 resumes the body, t1 carries a direct call's address; pairwise different on purpose: a direct trampoline that
#: found its own address in the resume register would re-enter itself for ever
PARENT: Final = "ra"
RESUME: Final = "t0"
DIRECT: Final = "t1"
STATIC_CHAIN: Final = "t2"  #: live at entry of nested functions
#: what a slot may change: dead at function entry under every calling convention compilers use here
SLOT_CLOBBERS: Final = ("t0", "t1")
#: what a program may change at an entry (preserve_mostcc of LLVM's RISC-V back end with t2 and t3 reserved)
PROGRAM_CLOBBERS: Final = ("ra", "t1")
#: what a program may change at an exit: all that is dead at a return
EXIT_CLOBBERS: Final = ("ra", "t0", "t1", "t2", "t3", "t4", "t5", "t6", "a2", "a3", "a4", "a5", "a6", "a7")
#: system call: number in a7, arguments a0..a5, result in a0 (-errno)
SYSCALL_NUMBER: Final = "a7"
SYSCALL_ARGS: Final = ("a0", "a1", "a2", "a3", "a4", "a5")
SYSCALL_RETURN: Final = "a0"
SYSCALL_INSN: Final = bytes.fromhex("73000000")  #: ecall
BREAKPOINT: Final = bytes.fromhex("73001000")  #: ebreak, 4 bytes
BREAKPOINT_SHORT: Final = bytes.fromhex("0290")  #: c.ebreak, 2 bytes
STACK_ALIGN: Final = 16

# -- code -----------------------------------------------------------------------------------------------

INSN_ALIGN: Final = 2
NOP: Final = bytes.fromhex("13000000")  #: addi x0, x0, 0
NOP_SHORT: Final = bytes.fromhex("0100")  #: c.nop
#: auipc + 12-bit offset: [-2**31 - 2**11, 2**31 - 2**11 - 1] from the auipc
PAIR_LOW: Final = -(1 << 31) - (1 << 11)
PAIR_HIGH: Final = (1 << 31) - (1 << 11) - 1
PAIR_REACH: Final = (1 << 31) - (1 << 11)
JAL_REACH: Final = 1 << 20

# -- ELF ------------------------------------------------------------------------------------------------

ELF_MACHINE: Final = 243  #: EM_RISCV
ELF_FLAG_RVC: Final = 0x1  #: EF_RISCV_RVC: code may be 2-byte aligned
R_64: Final = 2  #: R_RISCV_64
R_RELATIVE: Final = 3  #: R_RISCV_RELATIVE
R_JUMP_SLOT: Final = 5  #: R_RISCV_JUMP_SLOT

# -- what others call it ----------------------------------------------------------------------------------

TRIPLE: Final = "riscv64-unknown-linux-gnu"
CPU: Final = "generic-rv64"
FEATURES: Final = "+m,+a,+f,+d,+c"

#: Unicorn's constants, by name
UNICORN_ARCH: Final = "UC_ARCH_RISCV"
UNICORN_MODE: Final = "UC_MODE_RISCV64"
UNICORN_REGS: Final = {
    **{name: f"UC_RISCV_REG_{name.upper()}" for name in REGS},
    **{name: f"UC_RISCV_REG_F{i}" for i, name in enumerate(F)},
}

#: Capstone's constants, by name (display only)
CAPSTONE_ARCH: Final = "CS_ARCH_RISCV"
CAPSTONE_MODES: Final = ("CS_MODE_RISCV64", "CS_MODE_RISCVC")

#: order of GDB's ``g`` packet: x0..x31, pc, then f0..f31; 8 bytes each
GDB_REGS: Final = (*X, "pc", *F)
GDB_ARCH: Final = "riscv:rv64"

#: DWARF register numbers
DWARF: Final = {**{name: i for i, name in enumerate(X)}, **{name: 32 + i for i, name in enumerate(F)}}
DWARF_RETURN: Final = 1  #: ra
