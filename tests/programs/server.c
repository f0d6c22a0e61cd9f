/*
 * A program that runs until it is told to stop, for attaching to. One command per line on stdin, one
 * line of answer on stdout, nothing else ever:
 *
 *     ready            (printed once, at the start)
 *     work N           call step() N times                      -> "work N CHECKSUM"
 *     spin N           let N threads call step() until "still"  -> "spin N"
 *     still            stop and join them                       -> "still CALLS" (calls they made)
 *     text             FNV-1a hash of the program's own code    -> "text HASH"
 *     fork             a child calls step() 100 times and exits -> "fork STATUS"
 *     exec             replace the program by itself            -> "ready" again
 *     maps             number of lines in /proc/self/maps       -> "maps N"
 *     calls            calls of step() so far, by its own count -> "calls N"
 *     crash            abort()
 *     quit             exit with status 7                       -> "quit"
 *
 * The end of stdin means quit. step() calls inner() once on every call.
 */
#include <elf.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "count.h"

extern const char __executable_start[]; /* both GNU ld and lld define these */
extern const char etext[];

static atomic_ulong calls;
static atomic_int spinning;
static atomic_ulong spun;

FN uint64_t inner(uint64_t x)
{
    x ^= x << 13;
    x ^= x >> 7;
    return x ^ (x << 17);
}

FN uint64_t step(uint64_t x)
{
    atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
    uint64_t r = inner(x + 1);
    CALLED(r);
    return r + 1;
}

FN void *spinner(void *arg)
{
    uint64_t x = (uintptr_t)arg;
    unsigned long made = 0;

    while (atomic_load_explicit(&spinning, memory_order_relaxed)) {
        x = step(x);
        made++;
    }
    atomic_fetch_add(&spun, made);
    return (void *)(uintptr_t)(x & 1);
}

static uint64_t hash_text(void)
{
    uint64_t h = 0xcbf29ce484222325u;
    const Elf64_Ehdr *elf = (const void *)__executable_start;
    const Elf64_Phdr *seg = (const void *)(__executable_start + elf->e_phoff);
    uintptr_t base = 0;

    for (int i = 0; i < elf->e_phnum; i++)
        if (seg[i].p_type == PT_LOAD && seg[i].p_offset == 0)
            base = (uintptr_t)__executable_start - seg[i].p_vaddr;
    for (int i = 0; i < elf->e_phnum; i++)
        if (seg[i].p_type == PT_LOAD && seg[i].p_flags & PF_X)
            for (size_t k = 0; k < seg[i].p_memsz; k++)
                h = (h ^ ((const uint8_t *)(base + seg[i].p_vaddr))[k]) * 0x100000001b3u;
    return h;
}

static int count_maps(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    int c, lines = 0;

    while (maps && (c = fgetc(maps)) != EOF)
        lines += c == '\n';
    if (maps)
        fclose(maps);
    return lines;
}

int main(int argc, char **argv)
{
    char line[256];
    pthread_t id[64];
    unsigned running = 0;
    uint64_t x = 1;

    (void)argc;
    setvbuf(stdout, NULL, _IOLBF, 0);
    setvbuf(stdin, NULL, _IONBF, 0); /* a later exec must find what was not read yet */
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        unsigned long n = 0;

        if (sscanf(line, "work %lu", &n) == 1) {
            for (unsigned long i = 0; i < n; i++)
                x = step(x);
            printf("work %lu %016llx\n", n, (unsigned long long)x);
        } else if (sscanf(line, "spin %lu", &n) == 1 && running + n <= 64) {
            atomic_store(&spinning, 1);
            for (; n > 0 && pthread_create(&id[running], NULL, spinner, (void *)(uintptr_t)running) == 0; n--)
                running++;
            printf("spin %u\n", running);
        } else if (strcmp(line, "still\n") == 0) {
            atomic_store(&spinning, 0);
            while (running > 0)
                pthread_join(id[--running], NULL);
            printf("still %lu\n", atomic_exchange(&spun, 0));
        } else if (strcmp(line, "text\n") == 0) {
            printf("text %016llx\n", (unsigned long long)hash_text());
        } else if (strcmp(line, "fork\n") == 0) {
            int status = -1;
            pid_t child = fork();

            if (child == 0) {
                for (int i = 0; i < 100; i++)
                    x = step(x);
                _exit((int)(x & 0x7f));
            }
            waitpid(child, &status, 0);
            printf("fork %d\n", status);
        } else if (strcmp(line, "exec\n") == 0) {
            execv("/proc/self/exe", argv);
            puts("exec failed");
        } else if (strcmp(line, "maps\n") == 0) {
            printf("maps %d\n", count_maps());
        } else if (strcmp(line, "calls\n") == 0) {
            printf("calls %lu\n", atomic_load(&calls));
        } else if (strcmp(line, "crash\n") == 0) {
            abort();
        } else if (strcmp(line, "quit\n") == 0) {
            puts("quit");
            return 7;
        } else {
            puts("what?");
        }
    }
    return 0;
}
