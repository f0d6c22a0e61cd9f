/* A process with something odd about it: odd MODE. Prints "ready"; then each line of stdin makes it call work() 1,000
 * times and answer "right" or "wrong"; the end of stdin ends it. Only read and write are called meanwhile.
 */
#define _GNU_SOURCE
#include <linux/seccomp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FN __attribute__((noinline, noclone, noipa, used))

FN uint64_t leaf(uint64_t x) { return (x ^ x >> 29) * 0xbf58476d1ce4e5b9u; }

FN uint64_t work(uint64_t x)
{
	uint64_t r = leaf(x + 1);
	__asm__ volatile("" : "+r"(r));
	return r + 3;
}

FN int right(void)
{
	int fine = 1;
	for (uint64_t i = 0; i < 1000; i++) {
		uint64_t x = i + 1;
		fine &= work(i) == (x ^ x >> 29) * 0xbf58476d1ce4e5b9u + 3;
	}
	return fine;
}

static uint64_t kib(const char *name)
{
	char line[256];
	uint64_t value = 0;
	FILE *status = fopen("/proc/self/status", "r");
	while (status && fgets(line, sizeof line, status))
		if (!strncmp(line, name, strlen(name)))
			sscanf(line + strlen(name), ": %lu", &value);
	if (status)
		fclose(status);
	return value;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	char line[64];

	if (!strcmp(mode, "little-room")) {
		uint64_t bytes = (kib("VmSize") << 10) + (512u << 20);
		setrlimit(RLIMIT_AS, &(struct rlimit){bytes, bytes});
	} else if (!strcmp(mode, "no-room")) {
		uint64_t bytes = kib("VmSize") << 10;
		setrlimit(RLIMIT_AS, &(struct rlimit){bytes, bytes});
	} else if (!strcmp(mode, "no-descriptor")) {
		setrlimit(RLIMIT_NOFILE, &(struct rlimit){16, 16});
		while (dup(0) >= 0)
			;
	} else if (!strcmp(mode, "locked")) {
		/* by rlimit, not by capability: whoever may lock everything would be given all memory there is */
		setrlimit(RLIMIT_MEMLOCK, &(struct rlimit){64u << 20, 64u << 20});
		if (geteuid() == 0 && (setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534)))
			return 3;
		if (mlockall(MCL_CURRENT | MCL_FUTURE))
			return 4;
	} else if (!strcmp(mode, "undumpable")) {
		prctl(PR_SET_DUMPABLE, 0);
	} else if (!strcmp(mode, "strict")) {
		prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT);
	}
	(void)!write(1, "ready\n", 6);
	while (read(0, line, sizeof line) > 0)
		(void)!write(1, right() ? "right\n" : "wrong\n", 6);
	syscall(SYS_exit, 0); /* strict seccomp knows no exit_group */
}
