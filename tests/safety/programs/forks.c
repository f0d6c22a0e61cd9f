/* A program that forks at the bottom of a recursion; parent and children check every result.
 *
 * Commands on stdin, one line each, answered by one line:
 *     fork      a child returns through the frames it inherited, and goes on calling     -> "child PID"
 *     twice     the same, and the child forks once more                                  -> "child PID" twice
 *     work      1,000 calls                                                              -> "work 0" (errors)
 *     end PID   ask a child (or grandchild) to end                                       -> "ended PID ERRORS"
 */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FN __attribute__((noinline, noclone, noipa, used))

static volatile sig_atomic_t asked_to_end;
static struct { volatile pid_t pid; volatile int ended, errors; } *board; /* shared by all */
static int mine;

FN uint64_t dive(unsigned depth, uint64_t x, void (*at_bottom)(void))
{
	uint64_t keep = (x ^ x >> 29) * 0xbf58476d1ce4e5b9u + depth;
	uint64_t r = x;
	if (depth)
		r = dive(depth - 1, keep, at_bottom);
	else if (at_bottom)
		at_bottom();
	__asm__ volatile("" : "+r"(r));
	return r * 3 + keep;
}

static uint64_t by_loop(unsigned depth, uint64_t x)
{
	uint64_t keep[256], r;
	for (unsigned i = depth;; i--) {
		keep[i] = (x ^ x >> 29) * 0xbf58476d1ce4e5b9u + i;
		r = x;
		if (i == 0)
			break;
		x = keep[i];
	}
	for (unsigned i = 0; i <= depth; i++)
		r = r * 3 + keep[i];
	return r;
}

FN int fine(unsigned depth, uint64_t x, void (*at_bottom)(void)) { return dive(depth, x, at_bottom) == by_loop(depth, x); }

static void on_term(int number) { (void)number; asked_to_end = 1; }

static int depth_of_forks;
static int is_child;

FN void split(void)
{
	int slot = 0;
	while (board[slot].pid)
		slot++;
	board[slot].pid = -1;
	pid_t pid = fork();
	if (pid) {
		board[slot].pid = pid;
		return;
	}
	mine = slot;
	is_child = 1;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (--depth_of_forks > 0)
		board[slot].errors += !fine(40, 7, split);
}

static void live_on(void)
{
	struct timespec t = {0, 100000};
	for (uint64_t i = 0; !asked_to_end; i++) {
		board[mine].errors += !fine((unsigned)(i % 100), i, NULL);
		nanosleep(&t, NULL);
	}
	board[mine].ended = 1;
	_exit(0);
}

int main(void)
{
	char line[64];
	struct sigaction action = {.sa_handler = on_term};
	sigaction(SIGTERM, &action, NULL);
	signal(SIGCHLD, SIG_IGN);
	board = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	setvbuf(stdin, NULL, _IONBF, 0);
	puts("ready");
	while (fgets(line, sizeof line, stdin)) {
		int pid = 0;
		if (!strcmp(line, "fork\n") || !strcmp(line, "twice\n")) {
			int first = 0;
			depth_of_forks = line[0] == 't' ? 2 : 1;
			while (board[first].pid)
				first++;
			int errors = !fine(60, 5, split);
			if (is_child) {
				board[mine].errors += errors;
				live_on();
			}
			for (int i = first; i < first + depth_of_forks; i++) {
				while (board[i].pid <= 0)
					usleep(100);
				printf("child %d\n", board[i].pid);
			}
		} else if (!strcmp(line, "work\n")) {
			int errors = 0;
			for (int i = 0; i < 1000; i++)
				errors += !fine((unsigned)(i % 100), (uint64_t)i, NULL);
			printf("work %d\n", errors);
		} else if (sscanf(line, "end %d", &pid) == 1) {
			int i = 0;
			while (board[i].pid != pid)
				i++;
			kill(pid, SIGTERM);
			while (!board[i].ended && kill(pid, 0) == 0)
				usleep(100);
			printf("ended %d %d\n", pid, board[i].ended ? board[i].errors : -1);
		}
	}
	return 0;
}
