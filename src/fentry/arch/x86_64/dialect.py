"""What LLVM IR must know of x86_64 to build Programs."""

from __future__ import annotations

from fentry.arch import Dialect

DIALECT = Dialect(
    # %fs:0 holds the thread pointer itself (x86-64 psABI, TLS variant II). Reading it costs 0.25 ns where
    # rdfsbase costs 2.3 (measured), so the hot path reads memory and the slow path checks the register.
    declares="""
declare i64 @llvm.x86.rdfsbase.64() #9
declare i64 @llvm.x86.rdgsbase.64() #9
declare void @llvm.x86.wrgsbase.64(i64) #9
attributes #9 = { "target-features"="+fsgsbase" }
""",
    thread_pointer="{out} = load volatile i64, ptr addrspace(257) null, align 8",
    real_thread_pointer="{out} = call i64 @llvm.x86.rdfsbase.64()",
    cycles="{out} = call i64 @llvm.readcyclecounter()",
    segment=256,
    segment_register="gs_base",
    thread_register="fs_base",
    get_segment="{out} = call i64 @llvm.x86.rdgsbase.64()",
    set_segment="call void @llvm.x86.wrgsbase.64(i64 {in})",
    # the upper 8 TiB of user addresses: the main stack and every mmap'd one (mmap_base lies below the stack)
    stack_window=(0x7800_0000_0000, 1 << 43),
    return_slot=True,
    syscall=(
        '{out} = call i64 asm sideeffect "syscall", '
        '"={{rax}},{{rax}},{{rdi}},{{rsi}},{{rdx}},{{r10}},~{{rcx}},~{{r11}},~{{memory}}"'
        "(i64 {nr}, i64 {a}, i64 {b}, i64 {c}, i64 {d})"
    ),
    syscalls={"getpid": 39, "gettid": 186, "nanosleep": 35},
    # behind a prologue (mcount) the caller's address is at 8(%rbp), which a program cannot read
    parent={"entry-jump": "next", "mcount": "none", "": "after-resume"},
    features="+fsgsbase",
    # r11 is the one register that is free at a function entry (psABI 3.2.1) and at an exit.
    clobbers=("r11",),
)
