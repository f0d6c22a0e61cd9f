# a function with a sled of four two-byte nops, and one without
        .text
        .globl  _start
        .type   _start, @function
_start: call    sledded
        call    bare
        li      a7, 93
        li      a0, 0
        ecall
        .size   _start, . - _start

        .balign 8
        .globl  sledded
        .type   sledded, @function
sledded:
        c.nop
        c.nop
        c.nop
        c.nop
        slliw   a0, a0, 1
        ret
        .size   sledded, . - sledded
        .section __patchable_function_entries, "awo", @progbits, sledded
        .balign 8
        .8byte  sledded

        .text
        .balign 8
        .globl  bare
        .type   bare, @function
bare:   addiw   a0, a0, 1
        ret
        .size   bare, . - bare
