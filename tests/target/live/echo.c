/* echo MODE: answers each byte on standard input by one on standard output, in unusual circumstances.
 *   filter     under a seccomp filter that kills for anything but read, write, exit_group and rt_sigreturn
 *   coroutine  on a stack of 64 KiB in the middle of other memory, which it checks each time
 *   tiny       on a stack in static memory with hardly any room
 *   dispatch   with syscall user dispatch switched on (all calls allowed for now)
 *   exec       replaces itself by argv[2] at the byte 'x'
 *   fork       forks at the byte 'f'; the child tells what it finds at the address on its standard input, and ends
 */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

static char **args;
static uint8_t *arena;
static size_t arena_size, stack_from, stack_size;

static void check(void)
{
	for (size_t i = 0; i < arena_size; i++)
		if ((i < stack_from || i >= stack_from + stack_size) && arena[i] != 0xa5)
			_exit(9);
}

static void forked(void)
{
	uint64_t at = 0;
	if (read(0, &at, 8) != 8)
		_exit(1);
	pid_t child = fork();
	if (child == 0) {
		if (write(1, (void *)at, 8) != 8)
			_exit(1);
		_exit(0);
	}
	waitpid(child, NULL, 0);
}

static void answer(void)
{
	char byte;
	while (read(0, &byte, 1) == 1) {
		check();
		if (byte == 'x')
			execl(args[2], args[2], args[3], args[4], NULL);
		if (byte == 'f')
			forked();
		if (write(1, &byte, 1) != 1)
			_exit(1);
	}
	_exit(0);
}

static void filter(void)
{
	static const int calls[] = {SYS_read, SYS_write, SYS_exit_group, SYS_rt_sigreturn, SYS_restart_syscall};
	enum { N = sizeof calls / sizeof *calls };
	struct sock_filter code[N + 3] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr))};
	for (int i = 0; i < N; i++)
		code[1 + i] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[i], N - i, 0);
	code[N + 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	code[N + 2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = {N + 3, code};
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		_exit(8);
}

int main(int argc, char **argv)
{
	static ucontext_t here, there;
	static uint8_t small[4096 + 2048] __attribute__((aligned(4096)));
	args = argv;
	if (argc < 2)
		return 2;
	if (!strcmp(argv[1], "filter"))
		filter();
	if (!strcmp(argv[1], "dispatch")) {
		static char selector; /* SYSCALL_DISPATCH_FILTER_ALLOW */
		if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector))
			return 77;
	}
	if (!strcmp(argv[1], "coroutine")) {
		arena_size = 1 << 20;
		arena = mmap(NULL, arena_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		memset(arena, 0xa5, arena_size);
		stack_from = 512 << 10;
		stack_size = 64 << 10;
	}
	if (!strcmp(argv[1], "tiny")) { /* nothing below it: the page before is taken away */
		stack_size = sizeof small;
		arena = mmap(NULL, 12288, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		munmap(arena, 4096);
		arena += 4096;
		stack_size = 2048;
	}
	if (stack_size) {
		getcontext(&there);
		there.uc_stack.ss_sp = arena + stack_from;
		there.uc_stack.ss_size = stack_size;
		makecontext(&there, answer, 0);
		swapcontext(&here, &there);
	}
	answer();
}
