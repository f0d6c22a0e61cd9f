/*
 * Loops for measuring what one traced call costs. The loop is in measure(), which nobody should trace.
 *
 *     hot FUNCTION CALLS [THREADS]
 *
 * FUNCTION is empty, small, args or nest. Prints one line "FUNCTION CALLS THREADS SECONDS", SECONDS
 * of wall time for the loops, by the slowest thread; the loops start together.
 *
 *     empty   nothing but a return: one or two bytes without a sled, so only sleds can hook it
 *     small   about twenty bytes of arithmetic: long enough for an entry jump
 *     args    six arguments, all used
 *     nest    calls small; two hooks per call, one inside the other
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "count.h"

FN void empty(void)
{
    __asm__ volatile("");
}

FN uint64_t small(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdu;
    return x;
}

FN uint64_t args(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
    return a + b * 2 + c * 4 + d * 8 + e * 16 + f * 32;
}

FN uint64_t nest(uint64_t x)
{
    uint64_t r = small(x + 1);
    CALLED(r);
    return r + 1;
}

struct run {
    const char *what;
    unsigned long calls;
    double seconds;
    uint64_t result;
};

static pthread_barrier_t start;

static void *measure(void *arg)
{
    struct run *run = arg;
    struct timespec a, b;
    uint64_t x = 1;

    pthread_barrier_wait(&start);
    clock_gettime(CLOCK_MONOTONIC, &a);
    if (strcmp(run->what, "empty") == 0)
        for (unsigned long i = 0; i < run->calls; i++)
            empty();
    else if (strcmp(run->what, "small") == 0)
        for (unsigned long i = 0; i < run->calls; i++)
            x = small(i);
    else if (strcmp(run->what, "args") == 0)
        for (unsigned long i = 0; i < run->calls; i++)
            x = args(i, 1, 2, 3, 4, 5);
    else
        for (unsigned long i = 0; i < run->calls; i++)
            x = nest(i);
    clock_gettime(CLOCK_MONOTONIC, &b);
    run->seconds = (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec) * 1e-9;
    run->result = x;
    return NULL;
}

int main(int argc, char **argv)
{
    static const char *const known[] = {"empty", "small", "args", "nest"};
    int ok = 0;

    for (unsigned i = 0; argc > 2 && i < sizeof known / sizeof *known; i++)
        ok |= strcmp(argv[1], known[i]) == 0;
    unsigned long threads = argc > 3 ? strtoul(argv[3], NULL, 10) : 1;
    if (!ok || threads < 1 || threads > 64) {
        fprintf(stderr, "usage: hot empty|small|args|nest CALLS [THREADS]\n");
        return 2;
    }
    struct run run[64];
    pthread_t id[64];
    double slowest = 0;

    pthread_barrier_init(&start, NULL, (unsigned)threads);
    for (unsigned long t = 0; t < threads; t++) {
        run[t] = (struct run){argv[1], strtoul(argv[2], NULL, 10), 0, 0};
        if (pthread_create(&id[t], NULL, measure, &run[t]) != 0)
            return 3;
    }
    for (unsigned long t = 0; t < threads; t++) {
        pthread_join(id[t], NULL);
        if (run[t].seconds > slowest)
            slowest = run[t].seconds;
    }
    printf("%s %lu %lu %.9f\n", argv[1], run[0].calls, threads, slowest);
    return 0;
}
