"""x86_64 as tables: registers, roles, nops, numbers, and what others call things. No code, no imports of others.

Sources: Linux ``arch/x86/include/asm/user_64.h`` (order of user_regs_struct), System V psABI for AMD64 1.0 (roles,
DWARF numbers), GDB ``features/i386/64bit-core.xml`` (order of the ``g`` packet), Intel SDM volume 2 (encodings; table
4-12 is the recommended multi-byte nops), binutils ``gas/config/tc-i386.c`` (alignment fills), LLVM
``X86MCInstLower.cpp`` (what clang emits for patchable entries).
"""

from __future__ import annotations

from typing import Final

NAME: Final = "x86_64"
ALIASES: Final = ("x86-64", "amd64", "x64")
BITS: Final = 64

# -- registers ----------------------------------------------------------------------------------------

#: names of ``target.regs()``, in the order of the kernel's user_regs_struct (PTRACE_GETREGS, NT_PRSTATUS): 8 bytes each
REGS: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
    *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss"),
    *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
PC: Final = "rip"
SP: Final = "rsp"
TP: Final = "fs_base"
FLAGS: Final = "eflags"
#: general registers in the order of their numbers in an instruction
GENERAL: Final = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
#: eflags bits that a program can observe and that code must preserve: CF PF AF ZF SF DF OF
ARITHMETIC_FLAGS: Final = 0xCD5

# -- roles --------------------------------------------------------------------------------------------

ARGS: Final = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
FP_ARGS: Final = ("xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7")
RETURNS: Final = ("rax", "rdx")
FP_RETURNS: Final = ("xmm0", "xmm1")
CALLEE_SAVED: Final = ("rbx", "rsp", "rbp", "r12", "r13", "r14", "r15")
STATIC_CHAIN: Final = "r10"  #: live at entry of nested functions
SCRATCH: Final = "r11"  #: neither argument nor result nor saved: free at a function's entry (psABI figure 3.4)
VECTOR_COUNT: Final = "rax"  #: al bounds the vector registers used by a call with variable arguments
LINK: Final = "stack"  #: a call leaves the return address at [rsp]
STACK_ALIGN: Final = 16  #: of rsp before a call
RED_ZONE: Final = 128  #: bytes below rsp that a leaf function may use
#: system call: number in rax, result in rax (-errno); rcx and r11 are destroyed
SYSCALL_NUMBER: Final = "rax"
SYSCALL_ARGS: Final = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
SYSCALL_RETURN: Final = "rax"
SYSCALL_INSN: Final = bytes.fromhex("0f05")
BREAKPOINT: Final = b"\xcc"  #: int3

# -- code -----------------------------------------------------------------------------------------------

INSN_ALIGN: Final = 1
INSN_MAX: Final = 15  #: bytes (SDM volume 2, 2.3.11)
LANDING_PAD: Final = bytes.fromhex("f30f1efa")  #: endbr64
CALL: Final = b"\xe8"  #: call rel32
JUMP: Final = b"\xe9"  #: jmp rel32
BRANCH_SIZE: Final = 5  #: of either
#: the CS segment prefix before a call: ignored (SDM volume 2, 2.1.1); at most 10 of them, an instruction has 15 bytes
NO_MEANING: Final = b"\x2e"
#: bytes: 2 GiB less room for the slots themselves and for the windows they serve
REACH: Final = 2**31 - 2**20

#: the recommended nop of each length (SDM volume 2, table 4-12): what fentry itself writes as fill
NOPS: Final = (
    b"",
    bytes.fromhex("90"),
    bytes.fromhex("6690"),
    bytes.fromhex("0f1f00"),
    bytes.fromhex("0f1f4000"),
    bytes.fromhex("0f1f440000"),
    bytes.fromhex("660f1f440000"),
    bytes.fromhex("0f1f8000000000"),
    bytes.fromhex("0f1f840000000000"),
    bytes.fromhex("660f1f840000000000"),
)
#: SIB bytes whose base field is 5: with mod 0 a 32-bit displacement follows (SDM volume 2, table 2-3)
_NO_BASE: Final = b"".join(b"\\x%02x" % sib for sib in range(5, 256, 8))
#: One nop of any shape, as a pattern over bytes (compile with DOTALL): operand-size and segment prefixes, then either
#: ``90`` or ``0f 1f /0`` with any address. It covers gcc's single 90s, clang's ``0f 1f 44 00 08`` and
#: ``0f 1f 84 00 00 02 00 00``, and the fills ``66 66 2e 0f 1f 84 00 ...`` of binutils and lld. ``f3 90`` is pause, and
#: ``41 90`` is xchg: neither matches.
NOP: Final = (
    rb"(?:[\x26\x2e\x36\x3e\x64-\x66]{0,10}(?:\x90|\x0f\x1f(?:"
    rb"[\x00-\x03\x06\x07\xc0-\xc7]|\x04[^" + _NO_BASE + rb"]|\x04[" + _NO_BASE + rb"].{4}|\x05.{4}"
    rb"|[\x40-\x43\x45-\x47].|\x44.{2}|[\x80-\x83\x85-\x87].{4}|\x84.{5}"
    rb")))"
)
#: what lies between functions: nops, or the int3 that lld writes
PADDING: Final = rb"(?:" + NOP + rb"|\xcc)"

# -- ELF ------------------------------------------------------------------------------------------------

ELF_MACHINE: Final = 62  #: EM_X86_64
R_64: Final = 1  #: R_X86_64_64
R_GLOB_DAT: Final = 6  #: R_X86_64_GLOB_DAT
R_JUMP_SLOT: Final = 7  #: R_X86_64_JUMP_SLOT
R_RELATIVE: Final = 8  #: R_X86_64_RELATIVE
R_IRELATIVE: Final = 37  #: R_X86_64_IRELATIVE

# -- what others call it ----------------------------------------------------------------------------------

TRIPLE: Final = "x86_64-unknown-linux-gnu"
CPU: Final = "x86-64"
FEATURES: Final = ""

#: Unicorn's constants, by name
UNICORN_ARCH: Final = "UC_ARCH_X86"
UNICORN_MODE: Final = "UC_MODE_64"
UNICORN_REGS: Final = {
    **{name: f"UC_X86_REG_{name.upper()}" for name in (*GENERAL, "rip", "fs_base", "gs_base", "cs", "ss", "ds", "es")},
    "fs": "UC_X86_REG_FS",
    "gs": "UC_X86_REG_GS",
    "eflags": "UC_X86_REG_EFLAGS",
}

#: Capstone's constants, by name (display only)
CAPSTONE_ARCH: Final = "CS_ARCH_X86"
CAPSTONE_MODES: Final = ("CS_MODE_64",)

#: order of GDB's ``g`` packet: 8 bytes each up to rip, 4 bytes each after it
GDB_REGS: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip"),
    *("eflags", "cs", "ss", "ds", "es", "fs", "gs"),
)
GDB_ARCH: Final = "i386:x86-64"

#: DWARF register numbers (psABI figure 3.36)
DWARF: Final = {
    name: number
    for number, name in enumerate(
        (
            *("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip"),
        )
    )
}
DWARF_RETURN: Final = 16  #: the return address column
