/* Writes a line for every SIGRTMIN+0..3 it gets, with the value sent; "end" and exits on SIGTERM. Otherwise it spins. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void log_it(int sig, siginfo_t *info, void *context)
{
	char line[64];
	(void)context;
	int n = sig == SIGTERM ? snprintf(line, sizeof line, "end\n")
			       : snprintf(line, sizeof line, "%d %d\n", sig - SIGRTMIN, info->si_value.sival_int);
	if (write(1, line, n) != n || sig == SIGTERM)
		_exit(sig != SIGTERM);
}

int main(void)
{
	struct sigaction act = {.sa_sigaction = log_it, .sa_flags = SA_SIGINFO};
	sigfillset(&act.sa_mask);
	for (int i = 0; i < 4; i++)
		sigaction(SIGRTMIN + i, &act, NULL);
	sigaction(SIGTERM, &act, NULL);
	if (write(1, "ready\n", 6) != 6)
		return 1;
	for (volatile long spin = 0;; spin++)
		;
}
