/*
 * Threads that stand still at the bottom of a recursion, for looking at their stacks.
 *
 *     nested THREADS DEPTH
 *
 * It prints "begun", and starts the threads when it is given a line. Each calls down(DEPTH), which calls across(),
 * which calls down(DEPTH - 1), and so on; down(0) calls bottom(), which waits. "ready" is printed when all wait; at
 * the end of stdin they come back, and the sum of what they give is printed.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "count.h"

static pthread_barrier_t arrived, ended;

FN long down(long depth);

FN long bottom(long x)
{
    pthread_barrier_wait(&arrived);
    pthread_barrier_wait(&ended);
    return x + 1;
}

FN long across(long depth)
{
    long r = down(depth - 1);
    CALLED(r);
    return r + 1;
}

FN long down(long depth)
{
    long r = depth ? across(depth) : bottom(depth);
    CALLED(r);
    return r + 1;
}

FN void *thread(void *arg)
{
    long r = down((long)arg);
    CALLED(r);
    return (void *)r;
}

int main(int argc, char **argv)
{
    long threads = argc > 1 ? atol(argv[1]) : 0, depth = argc > 2 ? atol(argv[2]) : 0, sum = 0;
    pthread_t id[16];
    char c;

    if (threads < 1 || threads > 16 || depth < 0)
        return 2;
    puts("begun");
    fflush(stdout);
    while (read(0, &c, 1) == 1 && c != '\n')
        ;
    pthread_barrier_init(&arrived, NULL, (unsigned)threads + 1);
    pthread_barrier_init(&ended, NULL, (unsigned)threads + 1);
    for (long i = 0; i < threads; i++)
        if (pthread_create(&id[i], NULL, thread, (void *)depth) != 0)
            return 3;
    pthread_barrier_wait(&arrived);
    puts("ready");
    fflush(stdout);
    while (read(0, &c, 1) == 1)
        ;
    pthread_barrier_wait(&ended);
    for (long i = 0; i < threads; i++) {
        void *r;

        pthread_join(id[i], &r);
        sum += (long)r;
    }
    printf("%ld\n", sum);
    return 0;
}
