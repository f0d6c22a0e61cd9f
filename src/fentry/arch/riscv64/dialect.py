"""What LLVM IR must know of riscv64 to build Programs."""

from __future__ import annotations

from fentry.arch import Dialect
from fentry.arch.riscv64 import facts

DIALECT = Dialect(
    # The steady counter is rdtime. Since Linux 6.6 user space may not read the cycle counter that
    # llvm.readcyclecounter stands for.
    declares="""
declare ptr @llvm.thread.pointer.p0()
declare i64 @llvm.readsteadycounter()
""",
    thread_pointer="{out}.p = call ptr @llvm.thread.pointer.p0()\n  {out} = ptrtoint ptr {out}.p to i64",
    cycles="{out} = call i64 @llvm.readsteadycounter()",
    # no `syscall`: only the native assembler is reachable, and ecall has no intrinsic
    # preserve_mostcc leaves t1, t2 and t3 to a function (CSR_RT_MostRegs); t2 and t3 may be live at an entry: static
    # chain, arguments of clang's fastcc
    features="+reserve-x7,+reserve-x28",
    # only sleds are hooked here, and compilers do not count on what a function with a sled leaves alone (gcc turns
    # -fipa-ra off for it, checked), so at an exit every caller-saved register but the two of the result is free
    exit_pair=True,
    atomic_add=True,  # amoadd.d
    clobbers=facts.PROGRAM_CLOBBERS,
)
