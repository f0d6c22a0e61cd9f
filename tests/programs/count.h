/*
 * A program that counts its own calls: the independent witness for every count a tracer reports.
 *
 * Built with -DCOUNT, each function that begins with COUNTED() counts its calls. When the program
 * ends by exit() or by returning from main, one line "NAME HITS" per function that ran is written
 * to the file that $COUNTS names, or to stderr if it is not set. A process that leaves by _exit()
 * or by a signal writes nothing. Without -DCOUNT nothing is counted and no code is added.
 *
 * Functions named count_* belong to the counting and are not part of any program's call tree.
 */
#ifndef COUNT_H
#define COUNT_H

/* One real function with this very name and signature: no inlining, no clones, no merged copies. */
#if defined(__clang__)
#define FN __attribute__((noinline, used))
#else
#define FN __attribute__((noinline, noclone, noipa, used))
#endif

/*
 * After a call whose result is `x`: the call stays a call. Without it compilers turn a recursion into
 * a loop and a last call into a jump, and the number of calls in the source is not the number of
 * times that the function is entered.
 */
#define CALLED(x) __asm__ volatile("" : "+r"(x))

#ifdef COUNT
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

struct count_of {
    const char *name;
    unsigned long hits;
    struct count_of *next;
};

static struct count_of *count_all;

static inline __attribute__((always_inline, no_instrument_function)) void count_hit(struct count_of *c)
{
    /* The first hit links the counter in; fetch_add makes sure that only one thread sees 0. */
    if (__atomic_fetch_add(&c->hits, 1, __ATOMIC_RELAXED) == 0) {
        struct count_of *head = __atomic_load_n(&count_all, __ATOMIC_RELAXED);
        do
            c->next = head;
        while (!__atomic_compare_exchange_n(&count_all, &head, c, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED));
    }
}

__attribute__((destructor, no_instrument_function)) static void count_dump(void)
{
    const char *path = getenv("COUNTS");
    int fd = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600) : 2;

    for (struct count_of *c = __atomic_load_n(&count_all, __ATOMIC_ACQUIRE); c; c = c->next)
        dprintf(fd, "%s %lu\n", c->name, __atomic_load_n(&c->hits, __ATOMIC_RELAXED));
    if (fd > 2)
        close(fd);
}

#define COUNTED()                                        \
    do {                                                 \
        static struct count_of count_me = {__func__, 0, 0}; \
        count_hit(&count_me);                            \
    } while (0)
#else
#define COUNTED() ((void)0)
#endif

#endif
