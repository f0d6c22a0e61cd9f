/*
 * The floor under a tracer: hand-written trampolines (floor.S) on the same hot function as everything else.
 *
 * `callee` is built with a sled of five bytes, which floor_hook fills with a call of, or a jump to, a trampoline. Rings
 * are thread-local and as large as the tracer's in the same run.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "floor.h"

__thread char *floor_ring;
__thread uint64_t floor_pos, floor_hits;

/* where stacks are mirrored: 8 TiB below the usual top of user memory hold every stack of this program */
uint64_t floor_low = UINT64_C(0x780000000000), floor_size = UINT64_C(1) << 43;
int64_t floor_shadow;

extern char callee[];
extern char floor_nothing[], floor_count[], floor_order[], floor_entry[], floor_pair[], floor_pair_order[];

static const struct {
    const char *name;
    char *code;
    uint8_t opcode;
} hooks[] = {
    {"nothing", floor_nothing, 0xe8}, {"count", floor_count, 0xe8}, {"order", floor_order, 0xe8},
    {"entry", floor_entry, 0xe8},     {"pair", floor_pair, 0xe9},   {"pair-order", floor_pair_order, 0xe9},
};

void floor_thread(void)
{
    floor_ring = mmap(NULL, FLOOR_RING, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (floor_ring == MAP_FAILED)
        abort();
}

int floor_hook(const char *name)
{
    uint8_t code[5] = {0x90, 0x90, 0x90, 0x90, 0x90};
    char *page = (char *)((uintptr_t)callee & ~UINT64_C(4095));
    int known = !strcmp(name, "off");

    if (!floor_shadow) {
        char *mirror = mmap(NULL, floor_size, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mirror == MAP_FAILED)
            return -1;
        floor_shadow = (int64_t)mirror - (int64_t)floor_low;
    }
    for (unsigned i = 0; i < sizeof hooks / sizeof *hooks; i++)
        if (!strcmp(name, hooks[i].name)) {
            int32_t to = (int32_t)(hooks[i].code - (callee + 5));

            code[0] = hooks[i].opcode;
            memcpy(code + 1, &to, 4);
            known = 1;
        }
    if (!known || mprotect(page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC))
        return -1;
    memcpy(callee, code, sizeof code); /* no other thread runs here while commands are read */
    return mprotect(page, 8192, PROT_READ | PROT_EXEC);
}
