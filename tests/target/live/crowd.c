/* crowd MODE N: "still" N threads asleep, "churn" threads that are born and die all the time (N at once), "orphans" the
 * first thread ends and N others go on, "vfork" another thread waits for its vfork child until that can read a byte. A byte on standard input is answered by one on standard output. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void *still(void *arg)
{
	for (;;)
		pause();
	return arg;
}

static void *brief(void *arg)
{
	usleep(50);
	return arg;
}

static void *churn(void *arg)
{
	pthread_t thread;
	for (;;) {
		if (pthread_create(&thread, NULL, brief, arg))
			abort();
		pthread_join(thread, NULL);
	}
	return arg;
}

static int gate[2];

static void *parent(void *arg)
{
	char byte;
	if (vfork() == 0)
		_exit(read(gate[0], &byte, 1) != 1);
	return arg;
}

static void *answer(void *arg)
{
	char byte;
	while (read(0, &byte, 1) == 1) {
		if (byte == 'g' && write(gate[1], &byte, 1) != 1)
			abort();
		if (write(1, &byte, 1) != 1)
			abort();
	}
	_exit(0);
	return arg;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	if (argc != 3)
		return 2;
	for (int i = 0; i < atoi(argv[2]); i++)
		if (pthread_create(&thread, NULL, strcmp(argv[1], "churn") ? still : churn, NULL))
			return 3;
	if (!strcmp(argv[1], "vfork") && (pipe(gate) || pthread_create(&thread, NULL, parent, NULL)))
		return 3;
	if (strcmp(argv[1], "orphans"))
		answer(NULL);
	if (pthread_create(&thread, NULL, answer, NULL))
		return 3;
	pthread_exit(NULL);
}
