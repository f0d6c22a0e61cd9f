/*
 * Hand-written trampolines: what a recorded call must cost at least on this machine.
 *
 * They know everything in advance (thread-local rings at a fixed distance from the thread pointer, no policy, no signals,
 * no losses to count) and keep only what the ABI says a callee must find: r11 is free at an entry, r11 and
 * rcx at an exit. A record is {time, address}, 16 bytes.
 *
 * Entry trampolines are reached by a call from the sled: [rsp] = resume, [rsp+8] = parent. Pairs are reached by a
 * jump: [rsp] = parent.
 */
#include "floor.h"

    .text
    .macro BEGIN name
    .p2align 6
    .globl \name
    .type \name, @function
\name:
    .endm

/* rax = time; rdx is spoilt */
    .macro CLOCK
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    .endm

/* put rax and \id (a source operand) into the ring; rdx and r11 are spoilt, and rax if \id needs it */
    .macro RECORD id:vararg
    mov %fs:floor_pos@tpoff, %rdx
    mov %fs:floor_ring@tpoff, %r11
    add %rdx, %r11
    mov %rax, (%r11)
    \id
    mov %rax, 8(%r11)
    add $16, %edx
    and $(FLOOR_RING - 1), %edx
    mov %rdx, %fs:floor_pos@tpoff
    .endm

BEGIN floor_nothing
    ret

BEGIN floor_count
    incq %fs:floor_hits@tpoff
    ret

/* sequence only: the caller stands where the time would */
BEGIN floor_order
    push %rax
    push %rdx
    mov 24(%rsp), %rax
    RECORD mov 16(%rsp), %rax
    pop %rdx
    pop %rax
    ret

BEGIN floor_entry
    push %rax
    push %rdx
    CLOCK
    RECORD mov 16(%rsp), %rax
    pop %rdx
    pop %rax
    ret

/*
 * The balanced hook: the return address moves to a mirror of the stack, the trampoline's own call puts the hook into the very
 * slot it came from. A stack that is not mirrored, and a tail call from a hooked function (the hook is already there),
 * go straight on.
 */
    .macro PAIR name
BEGIN \name
    mov %rsp, %r11
    sub floor_low(%rip), %r11
    cmp floor_size(%rip), %r11
    jae 9f
    lea 8f(%rip), %r11
    cmp %r11, (%rsp)
    je 9f
    mov floor_shadow(%rip), %r11
    pop (%rsp,%r11)
    push %rax
    push %rdx
    .endm

    .macro MIDDLE
    pop %rdx
    pop %rax
    call callee + 5
8:  push %rax
    push %rdx
    .endm

    .macro END
    pop %rdx
    pop %rax
    mov floor_shadow(%rip), %r11
    push (%rsp,%r11)
    ret
9:  jmp callee + 5
    .endm

PAIR floor_pair
    CLOCK
    RECORD lea callee(%rip), %rax
    MIDDLE
    CLOCK
    RECORD lea callee + 1(%rip), %rax
    END

PAIR floor_pair_order
    RECORD lea callee(%rip), %rax
    MIDDLE
    RECORD lea callee + 1(%rip), %rax
    END

    .section .note.GNU-stack, "", @progbits
