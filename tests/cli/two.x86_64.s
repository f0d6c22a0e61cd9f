# two functions: one with a sled, one whose first instructions have to move
        .text
        .globl  _start
        .type   _start, @function
_start: call    sledded
        call    bare
        mov     $60, %eax
        xor     %edi, %edi
        syscall
        .size   _start, . - _start

        .balign 16
        .globl  sledded
        .type   sledded, @function
sledded:
        endbr64
        .byte   0x0f, 0x1f, 0x44, 0x00, 0x00    # the five bytes of -mnop-mcount
        lea     (%rdi,%rdi), %eax
        ret
        .size   sledded, . - sledded

        .balign 16
        .globl  bare
        .type   bare, @function
bare:   test    %edi, %edi
        je      1f
        mov     there(%rip), %eax
        ret
1:      xor     %eax, %eax
        ret
        .size   bare, . - bare

        .data
there:  .long   7
