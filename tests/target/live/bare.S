/* A program without libc, and without any code that a system call could be borrowed from: no "syscall; ret", no
 * rt_sigreturn. Echoes bytes. */
	.globl _start
_start:
	sub $16, %rsp
again:
	xor %eax, %eax
	xor %edi, %edi
	mov %rsp, %rsi
	mov $1, %edx
	syscall
	cmp $1, %rax
	jne done
	mov $1, %eax
	mov $1, %edi
	mov %rsp, %rsi
	mov $1, %edx
	syscall
	jmp again
done:
	mov $231, %eax
	xor %edi, %edi
	syscall
	hlt
	.section .note.GNU-stack,"",@progbits
