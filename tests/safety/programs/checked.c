/* A program that checks every result of its own functions while they are hooked and unhooked under it.
 *
 *   checked FILE [hard]
 *
 * FILE (at least 4096 bytes) is mapped shared: u64 [0] errors, [1] which (bit per role), [2] ready, [8+role] rounds done.
 * One thread per role; each round dives through hooked functions, does at the bottom what its role is, and compares what
 * comes back through all the frames with what arithmetic says. So frames are always in flight: in recursion, beneath
 * blocked system calls, on the stacks of suspended coroutines, under signal handlers. A pacer wakes the blocked ones about
 * every millisecond. With `hard` nobody rests between rounds and four threads dive deep.
 *
 * Everything is allocated before "ready" is set: afterwards its mappings change only if somebody else changes them.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
#include <fcntl.h>

/* one real function each, whatever the compiler thinks of it */
#define FN __attribute__((noinline, noclone, noipa, used))
/* keeps a recursion from becoming a loop */
#define CALLED(x) __asm__ volatile("" : "+r"(x))

enum { DEEP, DEEP2, DEEP3, DEEP4, REGS, READ, POLL, NAP, FUTEX, COROUTINE, SIGNAL, ROLES };
enum { DEEPEST = 400 };

static volatile uint64_t *shm;
static int hard;
static int pipes[ROLES][2];
static sem_t wake;
static pthread_t ids[ROLES];

struct both {
	uint64_t n;
	double d;
};
typedef uint64_t bottom(void *, uint64_t);

static void wrong(int role)
{
	__atomic_fetch_add(&shm[0], 1, __ATOMIC_SEQ_CST);
	__atomic_fetch_or(&shm[1], 1ull << role, __ATOMIC_SEQ_CST);
}

FN uint64_t mix(uint64_t x, uint64_t k)
{
	x = (x ^ x >> 31) * 0x9e3779b97f4a7c15u + k;
	return x ^ x >> 17;
}

/* Seven integers, so that one goes on the stack, and a double down; an integer and a double back up. */
FN struct both dive(unsigned depth, uint64_t x, double d, bottom *at_bottom, void *arg, uint64_t a, uint64_t b, uint64_t on_stack)
{
	uint64_t keep = mix(x + on_stack, depth + a - b);
	struct both r;
	if (depth == 0)
		r = (struct both){at_bottom(arg, keep), d};
	else
		r = dive(depth - 1, keep, d + depth, at_bottom, arg, b + 1, a + 1, on_stack ^ depth);
	CALLED(r.n);
	return (struct both){r.n * 3 + keep, r.d + 0.5};
}

/* The same by a loop, without a call in flight. */
static struct both expected(unsigned depth, uint64_t x, double d, uint64_t (*value)(uint64_t), uint64_t a, uint64_t b,
			    uint64_t on_stack)
{
	uint64_t keep[DEEPEST + 1];
	for (unsigned i = depth;; i--) {
		keep[i] = x = mix(x + on_stack, i + a - b);
		if (i == 0)
			break;
		uint64_t t = a;
		d += i;
		a = b + 1;
		b = t + 1;
		on_stack ^= i;
	}
	uint64_t n = value(x);
	for (unsigned i = 0; i <= depth; i++) {
		n = n * 3 + keep[i];
		d += 0.5;
	}
	return (struct both){n, d};
}

static uint64_t plain(uint64_t x) { return x ^ 0x1234; }
FN uint64_t turn(void *arg, uint64_t x) { (void)arg; return plain(x); }

static int right(unsigned depth, uint64_t seed, bottom *at_bottom, void *arg)
{
	struct both have = dive(depth, seed, 1.25, at_bottom, arg, 3, 5, 77);
	struct both want = expected(depth, seed, 1.25, plain, 3, 5, 77);
	return have.n == want.n && memcmp(&have.d, &want.d, sizeof have.d) == 0;
}

/* ---- what happens at the bottom ---- */
static void drain(int role)
{
	char byte[64];
	if (read(pipes[role][0], byte, sizeof byte) <= 0)
		wrong(role);
}

FN uint64_t in_read(void *arg, uint64_t x) { (void)arg; drain(READ); return plain(x); }

FN uint64_t in_poll(void *arg, uint64_t x)
{
	struct pollfd fd = {.fd = pipes[POLL][0], .events = POLLIN};
	(void)arg;
	if (poll(&fd, 1, 10000) != 1)
		wrong(POLL);
	drain(POLL);
	return plain(x);
}

FN uint64_t in_nap(void *arg, uint64_t x)
{
	struct timespec t = {0, 300000};
	(void)arg;
	while (clock_nanosleep(CLOCK_MONOTONIC, 0, &t, &t))
		;
	return plain(x);
}

FN uint64_t in_futex(void *arg, uint64_t x)
{
	(void)arg;
	while (sem_wait(&wake))
		;
	return plain(x);
}

/* ---- coroutines: suspended with frames in flight, on stacks from the heap and from mmap ---- */
static ucontext_t around, inside[3];
static uint64_t switches;

FN uint64_t in_switch(void *arg, uint64_t x)
{
	swapcontext(arg, &around);
	return plain(x);
}

FN void coroutine(int which)
{
	for (uint64_t i = which;; i++)
		if (!right(30, i, in_switch, &inside[which]))
			wrong(COROUTINE);
}

static void make_coroutines(void)
{
	void *mapped = mmap(NULL, 1 << 18, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void *stacks[3] = {malloc(1 << 16), malloc(1 << 18), mapped}; /* the first from brk, the second from mmap */
	size_t sizes[3] = {1 << 16, 1 << 18, 1 << 18};
	for (int i = 0; i < 3; i++) {
		memset(stacks[i], 0, sizes[i]);
		getcontext(&inside[i]);
		inside[i].uc_stack.ss_sp = stacks[i];
		inside[i].uc_stack.ss_size = sizes[i];
		makecontext(&inside[i], (void (*)(void))coroutine, 1, i);
	}
}

/* ---- signal handlers above hooked frames, on an alternate stack ---- */
static volatile sig_atomic_t handled;

FN void handler(int number)
{
	if (number != SIGUSR1 || !right(20, (uint64_t)handled, turn, NULL))
		wrong(SIGNAL);
	handled++;
}

FN uint64_t in_signals(void *arg, uint64_t x)
{
	(void)arg;
	for (int until = handled + 2; handled < until;)
		if (!right(3, (uint64_t)handled, turn, NULL))
			wrong(SIGNAL);
	return plain(x);
}

/* ---- every register through a call ---- */
uint64_t reg_in[15], reg_out[15];
uint8_t xmm_in[16][16] __attribute__((aligned(16))), xmm_out[16][16] __attribute__((aligned(16)));

/* untouched() changes nothing but rax and the flags; through_registers() fills every register, calls it, and saves them */
asm(".text\n.p2align 4\n.globl untouched\n.type untouched,@function\nuntouched:\n.cfi_startproc\n"
    "lea 1(%rax), %rax\nlea 2(%rax), %rax\nlea 3(%rax), %rax\nlea 4(%rax), %rax\nret\n"
    ".cfi_endproc\n.size untouched,.-untouched\n");
void through_registers(void);
#define EACH(op) \
	op(rax, 0) op(rbx, 1) op(rcx, 2) op(rdx, 3) op(rsi, 4) op(rdi, 5) op(rbp, 6) op(r8, 7) op(r9, 8) op(r10, 9) \
	op(r11, 10) op(r12, 11) op(r13, 12) op(r14, 13) op(r15, 14)
#define EACHX(op) \
	op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11) op(12) op(13) op(14) op(15)
#define LOAD(r, i) "mov reg_in+8*" #i "(%rip), %" #r "\n"
#define SAVE(r, i) "mov %" #r ", reg_out+8*" #i "(%rip)\n"
#define LOADX(i) "movdqa xmm_in+16*" #i "(%rip), %xmm" #i "\n"
#define SAVEX(i) "movdqa %xmm" #i ", xmm_out+16*" #i "(%rip)\n"
asm(".p2align 4\n.globl through_registers\n.type through_registers,@function\nthrough_registers:\n.cfi_startproc\n"
    "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\n.cfi_adjust_cfa_offset 48\nsub $8, %rsp\n"
    ".cfi_adjust_cfa_offset 8\n" EACHX(LOADX) EACH(LOAD) "call untouched\n" EACH(SAVE) EACHX(SAVEX)
    "add $8, %rsp\n.cfi_adjust_cfa_offset -8\npop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\n"
    ".cfi_adjust_cfa_offset -48\nret\n.cfi_endproc\n.size through_registers,.-through_registers\n");

static int registers_survive(uint64_t seed)
{
	for (int i = 0; i < 15; i++)
		reg_in[i] = seed = mix(seed, i);
	for (int i = 0; i < 16; i++)
		memset(xmm_in[i], (int)(seed >> i) | 1, 16);
	through_registers();
	reg_out[0] -= 10;
	return !memcmp(reg_in, reg_out, sizeof reg_in) && !memcmp(xmm_in, xmm_out, sizeof xmm_in);
}

/* ---- the threads ---- */
static void rest(void)
{
	struct timespec t = {0, 200000};
	while (!hard && nanosleep(&t, &t))
		;
}

static void set_up(int role)
{
	static char stacks[ROLES][65536];
	stack_t stack = {.ss_sp = stacks[role], .ss_size = sizeof stacks[role]};
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaltstack(&stack, NULL);
	pthread_sigmask(role == SIGNAL ? SIG_UNBLOCK : SIG_BLOCK, &set, NULL);
}

static void *thread(void *arg)
{
	int role = (int)(intptr_t)arg;
	set_up(role);
	for (uint64_t i = 1;; i++) {
		int fine = 1;
		switch (role) {
		case DEEP: case DEEP2: case DEEP3: case DEEP4:
			fine = right((unsigned)(i * 37 % DEEPEST), i, turn, NULL);
			rest();
			break;
		case REGS:
			fine = registers_survive(i);
			if (i % 16 == 0)
				rest();
			break;
		case READ: fine = right(40, i, in_read, NULL); break;
		case POLL: fine = right(50, i, in_poll, NULL); break;
		case NAP: fine = right(60, i, in_nap, NULL); break;
		case FUTEX: fine = right(70, i, in_futex, NULL); break;
		case COROUTINE:
			swapcontext(&around, &inside[i % 3]);
			switches++;
			if (i % 3 == 0)
				in_nap(NULL, 0);
			break;
		case SIGNAL: fine = right(80, i, in_signals, NULL); rest(); break;
		}
		if (!fine)
			wrong(role);
		__atomic_fetch_add(&shm[8 + role], 1, __ATOMIC_SEQ_CST);
	}
	return NULL;
}

static void pace(void)
{
	struct timespec t = {0, 1000000};
	for (;;) {
		nanosleep(&t, NULL);
		for (int i = READ; i <= POLL; i++)
			(void)!write(pipes[i][1], "x", 1);
		int waiting = 0;
		sem_getvalue(&wake, &waiting);
		if (waiting < 2)
			sem_post(&wake);
		pthread_kill(ids[SIGNAL], SIGUSR1);
		int all = 1;
		for (int i = 0; i < ROLES; i++)
			all &= (i >= DEEP2 && i <= DEEP4 && !hard) || shm[8 + i] >= 30;
		if (all)
			shm[2] = 1;
	}
}

int main(int argc, char **argv)
{
	static char grown[200000];
	int fd = argc > 1 ? open(argv[1], O_RDWR) : -1;
	hard = argc > 2 && !strcmp(argv[2], "hard");
	shm = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (shm == MAP_FAILED)
		return 2;
	memset(grown, 1, sizeof grown);
	make_coroutines();
	sem_init(&wake, 0, 0);
	struct sigaction action = {.sa_handler = handler, .sa_flags = SA_ONSTACK | SA_RESTART};
	sigaction(SIGUSR1, &action, NULL);
	for (int i = 0; i < ROLES; i++)
		if (pipe2(pipes[i], O_CLOEXEC))
			return 3;
	fcntl(pipes[READ][1], F_SETFL, O_NONBLOCK);
	fcntl(pipes[POLL][1], F_SETFL, O_NONBLOCK);
	set_up(DEEP);
	for (int i = 0; i < ROLES; i++)
		if ((hard || i < DEEP2 || i > DEEP4) && pthread_create(&ids[i], NULL, thread, (void *)(intptr_t)i))
			return 4;
	pace();
}
