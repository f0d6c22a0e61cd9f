/* A program that checks itself all the time: nothing that a tracer does may show in it.
 *
 *   steady FILE ROLE
 *
 * FILE (at least 4096 bytes) is mapped shared: u64 [0] errors, [1] which (bit per role), [2] EINTR seen where the kernel
 * never restarts, [3] ready; [8+role] progress. One thread runs each role; the first thread runs ROLE. A pacer thread
 * wakes the blocked ones about every millisecond, so all counters move while all is well.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SPIN, READ, POLL, NAP, SEM, EPOLL, PPOLL, CALLS, LONG, FUTEX, ROLES };
static const char *const names[ROLES] = {"spin", "read", "poll", "nap", "sem", "epoll", "ppoll", "calls", "long", "futex"};

static volatile uint64_t *shm;
static int pipes[ROLES][2];
static sem_t sem;
static pthread_t ids[ROLES];
static __thread volatile uint64_t gs_words[2];

static void wrong(int role)
{
	__atomic_fetch_add(&shm[0], 1, __ATOMIC_SEQ_CST);
	__atomic_fetch_or(&shm[1], 1ull << role, __ATOMIC_SEQ_CST);
}

/* ---- every register, with a pattern, over a loop of user code ---- */
static uint64_t in[13], out[13];
static uint8_t vin[16][32] __attribute__((aligned(64))), vout[16][32] __attribute__((aligned(64)));
static uint8_t zin[3][64] __attribute__((aligned(64))), zout[3][64] __attribute__((aligned(64)));

static int spin_general(void)
{
	memset(out, 0, sizeof out);
	memset(vout, 0, sizeof vout);
	uint64_t flags = 0, zone = 0;
	asm volatile(
		"push %%rbp\n\t"
		"movq $0x5a5a5a5a, -8(%%rsp)\n\t"
		"movq $0x3c3c3c3c, -128(%%rsp)\n\t"
		"vmovdqa vin+0(%%rip), %%ymm0\n\tvmovdqa vin+32(%%rip), %%ymm1\n\tvmovdqa vin+64(%%rip), %%ymm2\n\t"
		"vmovdqa vin+480(%%rip), %%ymm15\n\tvmovdqa vin+256(%%rip), %%ymm8\n\t"
		"mov in+0(%%rip), %%rax\n\tmov in+8(%%rip), %%rbx\n\tmov in+16(%%rip), %%rdx\n\tmov in+24(%%rip), %%rsi\n\t"
		"mov in+32(%%rip), %%rdi\n\tmov in+40(%%rip), %%rbp\n\tmov in+48(%%rip), %%r8\n\tmov in+56(%%rip), %%r9\n\t"
		"mov in+64(%%rip), %%r10\n\tmov in+72(%%rip), %%r11\n\tmov in+80(%%rip), %%r12\n\tmov in+88(%%rip), %%r13\n\t"
		"mov in+96(%%rip), %%r14\n\t"
		"mov $20000, %%ecx\n\t"
		"xor %%r15d, %%r15d\n\t" /* zero flag */
		"stc\n\t"
		"1: loop 1b\n\t" /* the loop instruction leaves the flags alone */
		"setc %%cl\n\tmovzbl %%cl, %%ecx\n\tlea (%%rcx,%%r15), %%r15\n\t"
		"mov %%rax, out+0(%%rip)\n\tmov %%rbx, out+8(%%rip)\n\tmov %%rdx, out+16(%%rip)\n\tmov %%rsi, out+24(%%rip)\n\t"
		"mov %%rdi, out+32(%%rip)\n\tmov %%rbp, out+40(%%rip)\n\tmov %%r8, out+48(%%rip)\n\tmov %%r9, out+56(%%rip)\n\t"
		"mov %%r10, out+64(%%rip)\n\tmov %%r11, out+72(%%rip)\n\tmov %%r12, out+80(%%rip)\n\tmov %%r13, out+88(%%rip)\n\t"
		"mov %%r14, out+96(%%rip)\n\t"
		"vmovdqa %%ymm0, vout+0(%%rip)\n\tvmovdqa %%ymm1, vout+32(%%rip)\n\tvmovdqa %%ymm2, vout+64(%%rip)\n\t"
		"vmovdqa %%ymm15, vout+480(%%rip)\n\tvmovdqa %%ymm8, vout+256(%%rip)\n\t"
		"mov -8(%%rsp), %%rax\n\tadd -128(%%rsp), %%rax\n\t"
		"pop %%rbp\n\t"
		"mov %%r15, %%rcx\n\t"
		: "=a"(zone), "=c"(flags)
		:
		: "rbx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc", "xmm0", "xmm1",
		  "xmm2", "xmm8", "xmm15");
	if (memcmp(in, out, sizeof in) || flags != 1 || zone != 0x5a5a5a5aull + 0x3c3c3c3cull)
		return 0;
	for (int i = 0; i < 16; i++)
		if ((i < 3 || i == 8 || i == 15) && memcmp(vin[i], vout[i], 32))
			return 0;
	return 1;
}

__attribute__((target("avx512f"))) static int spin_wide(void)
{
	uint32_t mask = 0;
	memset(zout, 0, sizeof zout);
	asm volatile("vmovdqa64 zin+0(%%rip), %%zmm5\n\tvmovdqa64 zin+64(%%rip), %%zmm16\n\tvmovdqa64 zin+128(%%rip), %%zmm31\n\t"
		     "mov $0xb5a7, %%eax\n\tkmovw %%eax, %%k3\n\t"
		     "mov $20000, %%ecx\n\t1: loop 1b\n\t"
		     "kmovw %%k3, %%eax\n\t"
		     "vmovdqa64 %%zmm5, zout+0(%%rip)\n\tvmovdqa64 %%zmm16, zout+64(%%rip)\n\tvmovdqa64 %%zmm31, zout+128(%%rip)\n\t"
		     : "=a"(mask)
		     :
		     : "rcx", "memory", "cc", "xmm5", "xmm16", "xmm31", "k3");
	return mask == 0xb5a7 && !memcmp(zin, zout, sizeof zin);
}

/* ---- per-thread state that no call changes ---- */
static void settle_in(int role)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	if (role == PPOLL)
		sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536, .ss_flags = 0};
	sigaltstack(&stack, NULL);
	gs_words[0] = 0xfeed0000 + role;
	syscall(SYS_arch_prctl, ARCH_SET_GS, gs_words);
	uint32_t mxcsr = 0x3f80;
	asm volatile("ldmxcsr %0" : : "m"(mxcsr));
}

static int undisturbed(int role)
{
	sigset_t set;
	pthread_sigmask(SIG_SETMASK, NULL, &set);
	for (int s = 1; s < 32; s++)
		if (sigismember(&set, s) != (s == SIGUSR2 || (role == PPOLL && s == SIGUSR1)))
			return 0;
	stack_t stack;
	sigaltstack(NULL, &stack);
	uint64_t word;
	asm volatile("mov %%gs:0, %0" : "=r"(word));
	uint32_t mxcsr;
	asm volatile("stmxcsr %0" : "=m"(mxcsr));
	return stack.ss_size == 65536 && stack.ss_flags == 0 && word == 0xfeed0000ull + role && (mxcsr & ~0x3f) == 0x3f80;
}

static volatile sig_atomic_t handled;
static void on_usr1(int sig)
{
	(void)sig;
	handled++;
}

static void one(int role)
{
	char byte;
	struct pollfd pfd = {.fd = pipes[role][0], .events = POLLIN};
	switch (role) {
	case SPIN:
		if (!spin_general() || (__builtin_cpu_supports("avx512f") && !spin_wide()))
			wrong(role);
		sched_yield();
		break;
	case READ:
		if (read(pipes[role][0], &byte, 1) != 1 || byte != 'x')
			wrong(role);
		break;
	case POLL: /* with a timeout: restarts through the kernel's restart block */
		if (poll(&pfd, 1, 100000000) != 1 || read(pipes[role][0], &byte, 1) != 1)
			wrong(role);
		break;
	case NAP: {
		struct timespec ts = {0, 2000000};
		if (nanosleep(&ts, NULL) != 0)
			wrong(role);
		break;
	}
	case SEM:
		if (sem_wait(&sem) != 0)
			wrong(role);
		break;
	case EPOLL: {
		static int ep;
		struct epoll_event ev = {.events = EPOLLIN};
		if (!ep) {
			ep = epoll_create1(0);
			epoll_ctl(ep, EPOLL_CTL_ADD, pipes[role][0], &ev);
		}
		int n = epoll_wait(ep, &ev, 1, -1);
		if (n < 0 && errno == EINTR) { /* the kernel may say so to a stopped thread: counted, not wrong */
			__atomic_fetch_add(&shm[2], 1, __ATOMIC_SEQ_CST);
			break;
		}
		if (n != 1 || read(pipes[role][0], &byte, 1) != 1)
			wrong(role);
		break;
	}
	case PPOLL: { /* SIGUSR1 is let in during the call only, and must then be the reason of its end */
		sigset_t open;
		sigemptyset(&open);
		sigaddset(&open, SIGUSR2);
		sig_atomic_t before = handled;
		int n = ppoll(NULL, 0, NULL, &open);
		if (n != -1 || errno != EINTR || handled == before)
			wrong(role);
		break;
	}
	case CALLS:
		for (int i = 0; i < 200; i++)
			if (syscall(SYS_getpid) != getpid() || syscall(SYS_dup, -1) != -1 || errno != EBADF)
				wrong(role);
		break;
	case LONG: { /* asleep for a time that never ends */
		struct timespec ts = {1000000, 0};
		shm[8 + role]++;
		nanosleep(&ts, NULL);
		wrong(role);
		break;
	}
	case FUTEX: { /* absolute timeout in a bitset wait: ends by time only */
		static uint32_t word;
		struct timespec ts;
		clock_gettime(CLOCK_MONOTONIC, &ts);
		ts.tv_nsec += 3000000;
		if (ts.tv_nsec >= 1000000000)
			ts.tv_sec++, ts.tv_nsec -= 1000000000;
		if (syscall(SYS_futex, &word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, 0, &ts, NULL, FUTEX_BITSET_MATCH_ANY) != -1 ||
		    errno != ETIMEDOUT)
			wrong(role);
		break;
	}
	}
	if (!undisturbed(role))
		wrong(role);
	shm[8 + role]++;
}

__attribute__((noreturn)) static void *play(void *arg)
{
	int role = (int)(intptr_t)arg;
	ids[role] = pthread_self();
	settle_in(role);
	__atomic_fetch_add(&shm[3], 1, __ATOMIC_SEQ_CST);
	for (;;)
		one(role);
}

__attribute__((noreturn)) static void *pace(void *arg)
{
	(void)arg;
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	while (shm[3] < ROLES)
		usleep(100);
	for (;;) {
		usleep(1000);
		int value;
		for (int role = 0; role < ROLES; role++) {
			struct pollfd pfd = {.fd = pipes[role][0], .events = POLLIN};
			if ((role == READ || role == POLL || role == EPOLL) && poll(&pfd, 1, 0) == 0)
				if (write(pipes[role][1], "x", 1) != 1)
					wrong(role);
		}
		sem_getvalue(&sem, &value);
		if (value <= 0)
			sem_post(&sem);
		pthread_kill(ids[PPOLL], SIGUSR1);
	}
}

int main(int argc, char **argv)
{
	int mine = -1;
	for (int role = 0; role < ROLES; role++)
		if (argc > 2 && !strcmp(argv[2], names[role]))
			mine = role;
	if (mine < 0)
		return 2;
	int fd = open(argv[1], O_RDWR);
	shm = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (shm == MAP_FAILED)
		return 3;
	for (int i = 0; i < 13; i++)
		in[i] = 0x0123456789abcdefull * (i + 3);
	for (int i = 0; i < 16; i++)
		memset(vin[i], 0x10 + i, 32);
	for (int i = 0; i < 3; i++)
		memset(zin[i], 0xc0 + i, 64);
	struct sigaction act = {.sa_handler = on_usr1};
	sigaction(SIGUSR1, &act, NULL);
	sem_init(&sem, 0, 0);
	for (int role = 0; role < ROLES; role++)
		if (pipe(pipes[role]))
			return 4;
	pthread_t thread;
	for (int role = 0; role < ROLES; role++)
		if (role != mine)
			pthread_create(&thread, NULL, play, (void *)(intptr_t)role);
	pthread_create(&thread, NULL, pace, NULL);
	play((void *)(intptr_t)mine);
}
