/*
 * Counts every call of a program built with -finstrument-functions: the compiler's own witness.
 *
 * Linked into such a program it writes, at exit, one line "DELTA HITS" per function to the file
 * that $CYG_COUNTS names: DELTA is the function's address minus that of main, in decimal, so that
 * the symbol table of the file on disk turns it into a name wherever the program was loaded.
 * `tests/programs/counts.py` reads it.
 *
 * This file itself must be compiled without -finstrument-functions.
 */
#include <stdio.h>
#include <stdlib.h>

enum { SLOTS = 1 << 16 };  /* open addressing; a program with more functions than that aborts */

static struct {
    void *fn;
    unsigned long hits;
} table[SLOTS];

extern int main();

void __cyg_profile_func_enter(void *fn, void *site)
{
    unsigned long at = ((unsigned long)fn * 0x9e3779b97f4a7c15ul) >> 48;

    (void)site;
    for (int tries = 0; tries < SLOTS; tries++, at = (at + 1) % SLOTS) {
        void *none = NULL;
        if (table[at].fn != fn && !__atomic_compare_exchange_n(&table[at].fn, &none, fn, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED) &&
            none != fn)
            continue;
        __atomic_fetch_add(&table[at].hits, 1, __ATOMIC_RELAXED);
        return;
    }
    abort();
}

void __cyg_profile_func_exit(void *fn, void *site)
{
    (void)fn, (void)site;
}

__attribute__((destructor)) static void dump(void)
{
    const char *path = getenv("CYG_COUNTS");
    FILE *out = path ? fopen(path, "w") : NULL;

    if (!out)
        return;
    for (int i = 0; i < SLOTS; i++)
        if (table[i].fn)
            fprintf(out, "%ld %lu\n", (long)((char *)table[i].fn - (char *)main), table[i].hits);
    fclose(out);
}
