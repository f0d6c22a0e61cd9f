/* Calls `callee` as often as the argument says. */
#include <stdlib.h>

__attribute__((noipa)) long callee(long x)
{
    return (x ^ x >> 7) + 1;
}

static volatile long sink;

int main(int argc, char **argv)
{
    long sum = 0;

    for (long i = argc > 1 ? atol(argv[1]) : 1; i > 0; i--)
        sum += callee(i);
    sink = sum;
    return 0;
}
