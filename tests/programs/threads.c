/*
 * Threads that call the same functions at the same time.
 *
 *     threads [THREADS [CALLS [GENERATIONS]]]      defaults 4, 10000, 1
 *
 * Each of THREADS threads calls work() CALLS times; then they end, and the next generation starts
 * (thread contexts are taken and given back). work() calls left() on even and right() on odd
 * numbers, and both call leaf(), so that the number of calls of each function is known:
 * work = leaf = THREADS * CALLS * GENERATIONS, left and right half of that (CALLS even).
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "count.h"

static unsigned long calls = 10000;

FN uint64_t leaf(uint64_t x)
{
    COUNTED();
    return (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u;
}

FN uint64_t left(uint64_t x)
{
    COUNTED();
    uint64_t r = leaf(x + 1);
    CALLED(r);
    return r + 3;
}

FN uint64_t right(uint64_t x)
{
    COUNTED();
    uint64_t r = leaf(x ^ 0x77);
    CALLED(r);
    return r - 5;
}

FN uint64_t work(uint64_t n, uint64_t x)
{
    COUNTED();
    uint64_t r = n % 2 == 0 ? left(x) : right(x);
    CALLED(r);
    return r ^ n;
}

FN void *thread_main(void *seed)
{
    COUNTED();
    uint64_t x = *(uint64_t *)seed;

    for (unsigned long n = 0; n < calls; n++)
        x = work(n, x);
    *(uint64_t *)seed = x;
    return NULL;
}

int main(int argc, char **argv)
{
    unsigned long threads = argc > 1 ? strtoul(argv[1], NULL, 10) : 4;
    unsigned long generations = argc > 3 ? strtoul(argv[3], NULL, 10) : 1;
    uint64_t all = 0;

    if (argc > 2)
        calls = strtoul(argv[2], NULL, 10);
    if (threads < 1 || threads > 1024)
        return 2;
    uint64_t seed[threads];
    pthread_t id[threads];

    for (unsigned long g = 0; g < generations; g++) {
        for (unsigned long t = 0; t < threads; t++) {
            seed[t] = g * 1000 + t;
            if (pthread_create(&id[t], NULL, thread_main, &seed[t]) != 0)
                return 3;
        }
        for (unsigned long t = 0; t < threads; t++) {
            pthread_join(id[t], NULL);
            all ^= seed[t] + t;
        }
    }
    printf("threads %lu calls %lu generations %lu\n", threads, calls, generations);
    printf("total %lu\n", threads * calls * generations);
    printf("checksum %016llx\n", (unsigned long long)all);
    return 0;
}
