/*
 * Entry of a machine-mode image. In: a0 = hart id. Hart 0 runs main(), every other hart sleeps.
 * Traps end the program with status 255, so that a bad patch is a failure and not silence.
 */
    .section .text.start, "ax"
    .globl _start
    .type _start, @function
_start:
    bnez    a0, park
    la      t0, trap
    csrw    mtvec, t0
    li      t0, 0x2000              /* mstatus.FS = initial: floating point may be used */
    csrs    mstatus, t0
    .option push
    .option norelax
    la      gp, __global_pointer$
    .option pop
    li      tp, 0
    la      sp, stack_top
    la      t0, bss_start
    la      t1, bss_end
1:  bgeu    t0, t1, 2f
    sd      zero, 0(t0)
    addi    t0, t0, 8
    j       1b
2:  call    main
    tail    finish
    .size _start, . - _start

    .balign 4
    .type trap, @function
trap:
    li      a0, 255
    tail    finish
    .size trap, . - trap

    .type park, @function
park:
    wfi
    j       park
    .size park, . - park

/* a0 = status: tell the test finisher ("sifive,test0": 0x5555 pass, status << 16 | 0x3333 fail). */
    .globl finish
    .type finish, @function
finish:
    li      t0, 0x100000
    li      t1, 0x5555
    beqz    a0, 1f
    slliw   t1, a0, 16
    li      t2, 0x3333
    or      t1, t1, t2
1:  sw      t1, 0(t0)
2:  wfi
    j       2b
    .size finish, . - finish

    .section .note.GNU-stack, "", @progbits
