/*
 * One hot function, called as often as the benchmark asks, timed by the program itself.
 *
 *     hot CPU CPU        the processors of the first and the second thread
 *
 * Reads commands from stdin, answers each with one line on stdout, ends at end of file:
 *
 *     run THREADS CALLS  call `callee` CALLS times in one or two threads at once; answers the nanoseconds per call of the
 *                        slower thread, in processor time of the thread (so that whatever else the machine does is not
 *                        counted; nothing here waits)
 *     pace RATE MS       call it at RATE calls a second for MS milliseconds; answers calls and nanoseconds (wall clock)
 *     burst CALLS        call it CALLS times; answers calls and nanoseconds (wall clock)
 *     hook NAME          put a hand-written trampoline there (only where floor.c is linked)
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* tests of floor.c find these */
__attribute__((weak)) int floor_hook(const char *name);
__attribute__((weak)) void floor_thread(void);

__attribute__((noipa)) long callee(long x)
{
    return (x ^ x >> 7) + 1;
}

static volatile long sink;

/* the loop is one function, so that every build runs the same bytes at the same alignment */
__attribute__((noipa, aligned(64))) static void loop(long calls)
{
    long sum = 0;

    for (long i = calls; i; i--)
        sum += callee(i);
    sink = sum;
}

static int64_t now(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set); /* a machine with one processor measures all the same */
}

static pthread_barrier_t gate;
static long job;
static double took[2];

static void timed(int which, int meet)
{
    loop(20000); /* one lap of a ring: warm caches, pages that exist */
    if (meet)
        pthread_barrier_wait(&gate);
    int64_t begun = now(CLOCK_THREAD_CPUTIME_ID);
    loop(job);
    took[which] = (double)(now(CLOCK_THREAD_CPUTIME_ID) - begun) / (double)job;
}

static void *second(void *cpu)
{
    pin(atoi(cpu));
    if (floor_thread)
        floor_thread();
    for (;;) {
        pthread_barrier_wait(&gate); /* a command */
        if (!job)
            return NULL;
        timed(1, 1);
        pthread_barrier_wait(&gate); /* done */
    }
}

static void pace(double rate, long ms)
{
    const long batch = 500; /* 100 us at 5 M/s: far less than a ring holds */
    int64_t begun = now(CLOCK_MONOTONIC), end = begun + ms * 1000000;
    long calls = 0;
    int64_t t = begun;

    while (t < end) {
        loop(batch);
        calls += batch;
        int64_t due = begun + (int64_t)((double)calls * 1e9 / rate);
        do
            t = now(CLOCK_MONOTONIC);
        while (t < due);
    }
    printf("%ld %lld\n", calls, (long long)(t - begun));
}

int main(int argc, char **argv)
{
    char line[128], name[64];
    long threads, calls, ms;
    double rate;
    pthread_t other;

    if (argc != 3)
        return 2;
    pthread_barrier_init(&gate, NULL, 2);
    pin(atoi(argv[1]));
    if (floor_thread)
        floor_thread();
    pthread_create(&other, NULL, second, argv[2]);
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "run %ld %ld", &threads, &calls) == 2 && calls > 0) {
            job = calls;
            if (threads == 2) {
                pthread_barrier_wait(&gate);
                timed(0, 1);
                pthread_barrier_wait(&gate);
                printf("%.4f\n", took[0] > took[1] ? took[0] : took[1]);
            } else {
                timed(0, 0);
                printf("%.4f\n", took[0]);
            }
        } else if (sscanf(line, "pace %lf %ld", &rate, &ms) == 2) {
            pace(rate, ms);
        } else if (sscanf(line, "burst %ld", &calls) == 1) {
            int64_t begun = now(CLOCK_MONOTONIC);
            loop(calls);
            printf("%ld %lld\n", calls, (long long)(now(CLOCK_MONOTONIC) - begun));
        } else if (sscanf(line, "hook %63s", name) == 1 && floor_hook) {
            puts(floor_hook(name) ? "refused" : "hooked");
        } else {
            puts("what?");
        }
        fflush(stdout);
    }
    job = 0;
    pthread_barrier_wait(&gate);
    pthread_join(other, NULL);
    return 0;
}
