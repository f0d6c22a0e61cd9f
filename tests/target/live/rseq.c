/* Spends nearly all its time inside a restartable sequence; prints the addresses of its start, end and abort handler.
 * Who preempts it must find it at the handler. */
#include <stdint.h>
#include <stdio.h>
#include <sys/rseq.h>

extern char seq_start[], seq_end[], seq_abort[];

int main(void)
{
	struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	if (!__rseq_size)
		return 3;
	printf("%p %p %p\n", (void *)seq_start, (void *)seq_end, (void *)seq_abort);
	fflush(stdout);
	for (;;)
		asm volatile(
			".pushsection __rseq_cs, \"aw\"\n\t.balign 32\n\t"
			"seq_cs: .long 0, 0\n\t.quad seq_start, seq_end - seq_start, seq_abort\n\t.popsection\n\t"
			"lea seq_cs(%%rip), %%rax\n\t"
			"mov %%rax, %0\n\t"
			".globl seq_start, seq_end, seq_abort\n\t"
			"seq_start:\n\t"
			"mov $2000000, %%ecx\n\t"
			"1: loop 1b\n\t"
			"seq_end:\n\t"
			"jmp 2f\n\t"
			".long 0x53053053\n\t" /* RSEQ_SIG: must stand before the handler */
			"seq_abort:\n\t"
			"jmp 2f\n\t"
			"2:\n\t"
			: "=m"(area->rseq_cs)
			:
			: "rax", "rcx", "memory", "cc");
}
