/* For the conformance suite: calls `answer` all the time, counts the calls, keeps what it gave. With an argument it says
 * when it begins. */
#include <stdint.h>
#include <unistd.h>

volatile uint64_t rounds;
volatile int64_t given;

__attribute__((noinline, noclone)) int64_t answer(void)
{
	asm volatile("");
	return 7;
}

int main(int argc, char **argv)
{
	(void)argv;
	if (argc > 1 && write(1, "ready\n", 6) != 6)
		return 1;
	for (;;) {
		given = answer();
		rounds++;
	}
}
