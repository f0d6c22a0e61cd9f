/*
 * One deterministic call tree with every way to call a function that C has: recursion (plain and
 * mutual), function pointers, tail calls, varargs, structures by value and returned through memory,
 * arguments on the stack, floating point and vector arguments, a callback from libc (qsort), and
 * functions too short to be patched without a sled.
 *
 *     calls [ROUNDS]        ROUNDS defaults to 20
 *
 * Prints one line per kind and a checksum; the output depends on ROUNDS and on nothing else. The
 * number of calls of each function: build with -DCOUNT (see count.h) or -finstrument-functions (see
 * cyg.c).
 */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "count.h"

static uint64_t sum = 0xcbf29ce484222325u;

FN void mix(uint64_t value)
{
    COUNTED();
    sum = (sum ^ value) * 0x100000001b3u;
}

/* -- recursion ------------------------------------------------------------------------------- */
FN uint64_t fib(unsigned n)
{
    COUNTED();
    if (n < 2)
        return n;
    uint64_t one = fib(n - 1);
    CALLED(one);
    uint64_t two = fib(n - 2);
    CALLED(two);
    return one + two;
}

FN int is_odd(unsigned n);

FN int is_even(unsigned n)
{
    COUNTED();
    if (n == 0)
        return 1;
    int r = is_odd(n - 1);
    CALLED(r);
    return r;
}

FN int is_odd(unsigned n)
{
    COUNTED();
    if (n == 0)
        return 0;
    int r = is_even(n - 1);
    CALLED(r);
    return r;
}

FN uint64_t deep(unsigned n)
{
    COUNTED();
    volatile char frame[64];
    frame[n % sizeof frame] = (char)n;
    if (n == 0)
        return (uint64_t)frame[0];
    uint64_t below = deep(n - 1);
    CALLED(below);
    return below + (uint64_t)frame[n % sizeof frame];
}

/* -- function pointers ------------------------------------------------------------------------- */
FN int64_t op_add(int64_t a, int64_t b)
{
    COUNTED();
    return a + b;
}

FN int64_t op_sub(int64_t a, int64_t b)
{
    COUNTED();
    return a - b;
}

FN int64_t op_mul(int64_t a, int64_t b)
{
    COUNTED();
    return a * b + 1;
}

static int64_t (*const volatile ops[])(int64_t, int64_t) = {op_add, op_sub, op_mul};

FN int64_t apply(int64_t (*op)(int64_t, int64_t), int64_t a, int64_t b)
{
    COUNTED();
    int64_t r = op(a, b);
    return r ^ (r >> 7);
}

FN int compare(const void *a, const void *b)
{
    COUNTED();
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* -- tail calls: at -O2 each of these jumps to the next one ------------------------------------------ */
FN uint64_t tail_end(uint64_t a, unsigned n)
{
    COUNTED();
    return a * 31 + n;
}

FN uint64_t tail_two(uint64_t a, unsigned n)
{
    COUNTED();
    return tail_end(a ^ 0x55, n + 1);
}

FN uint64_t tail_one(uint64_t a, unsigned n)
{
    COUNTED();
    return tail_two(a + 17, n * 3);
}

/* -- arguments and results ------------------------------------------------------------------------ */
FN uint64_t many_args(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h, uint64_t i,
                      uint64_t j, uint64_t k, uint64_t l)
{
    COUNTED();
    return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i + 10 * j + 11 * k + 12 * l;
}

FN int64_t varied(const char *kinds, ...)
{
    COUNTED();
    va_list ap;
    int64_t r = 0;
    double x = 0;

    va_start(ap, kinds);
    for (; *kinds; kinds++) {
        if (*kinds == 'i')
            r = r * 7 + va_arg(ap, int);
        else if (*kinds == 'q')
            r = r * 11 + va_arg(ap, long long);
        else if (*kinds == 'd')
            x = x * 0.5 + va_arg(ap, double);
        else
            r = r * 13 + (int64_t)strlen(va_arg(ap, const char *));
    }
    va_end(ap);
    return r + (int64_t)(x * 1024);
}

struct pair {
    uint64_t first, second;
};

struct wide {
    uint64_t word[9];
};

FN struct pair pair_of(uint64_t a, uint64_t b)
{
    COUNTED();
    return (struct pair){a ^ b, a + b};
}

FN struct wide wide_of(uint64_t seed)
{
    COUNTED();
    struct wide w;
    for (unsigned i = 0; i < 9; i++)
        w.word[i] = seed = seed * 6364136223846793005u + 1442695040888963407u;
    return w;
}

FN uint64_t wide_sum(struct wide by_value, struct pair also)
{
    COUNTED();
    uint64_t r = also.first - also.second;
    for (unsigned i = 0; i < 9; i++)
        r = (r << 5 | r >> 59) ^ by_value.word[i];
    return r;
}

FN double mean(double a, float b, double c, float d, double e, double f, double g, double h, double i, double j)
{
    COUNTED();
    return (a + b * 2 + c * 3 + d * 4 + e * 5 + f * 6 + g * 7 + h * 8 + i * 9 + j * 10) / 55;
}

FN float halve(float x)
{
    COUNTED();
    return x * 0.5f;
}

typedef float vec4 __attribute__((vector_size(16)));

FN vec4 vec_madd(vec4 a, vec4 b, vec4 c)
{
    COUNTED();
    return a * b + c;
}

FN long double extended(long double x, int n)
{
    COUNTED();
    if (n == 0)
        return x;
    long double below = extended(x / 2, n - 1);
    __asm__ volatile("" : "+m"(below));
    return below + 1;
}

FN __int128 wide_mul(int64_t a, int64_t b)
{
    COUNTED();
    return (__int128)a * b;
}

/* -- short functions: two to eight bytes of code on most machines ------------------------------------ */
FN void tiny_nothing(void)
{
    COUNTED();
}

FN int tiny_const(void)
{
    COUNTED();
    return 7;
}

FN uint64_t tiny_same(uint64_t x)
{
    COUNTED();
    return x;
}

/* A loop whose head is the first instruction of the function: a branch goes back into any patch window. */
FN uint64_t loop_at_entry(uint64_t n, uint64_t *out)
{
    COUNTED();
    do
        *out += n;
    while (--n);
    return *out;
}

FN uint64_t switched(unsigned which, uint64_t x)
{
    COUNTED();
    switch (which % 8) {
    case 0: return x + 1;
    case 1: return x * 3;
    case 2: return x ^ 0xff;
    case 3: return x - 9;
    case 4: return x << 1;
    case 5: return x >> 1;
    case 6: return ~x;
    default: return 0;
    }
}

FN void one_round(unsigned r)
{
    COUNTED();
    uint32_t data[16];
    uint64_t out = r;

    mix(fib(8 + r % 4));
    mix((uint64_t)is_even(r % 13));
    mix(deep(r % 40));
    for (unsigned i = 0; i < 9; i++)
        mix((uint64_t)apply(ops[i % 3], (int64_t)(r * 1000 + i), (int64_t)(i + 3)));
    for (unsigned i = 0; i < 16; i++)
        data[i] = (r + i) * 2654435761u;
    qsort(data, 16, sizeof data[0], compare);
    for (unsigned i = 0; i < 16; i++)
        mix(data[i]);
    mix(tail_one(r, r + 1));
    mix(many_args(r, r + 1, r + 2, r + 3, r + 4, r + 5, r + 6, r + 7, r + 8, r + 9, r + 10, r + 11));
    mix((uint64_t)varied("isqdd", (int)r, "four", (long long)r << 33, r * 0.25, 3.5));
    mix(wide_sum(wide_of(r), pair_of(r, r * 5)));
    mix((uint64_t)(mean(r, (float)r, 2, 3, 4, 5, 6, 7, 8, 9) * 1024));
    mix((uint64_t)(halve((float)r) * 16));
    vec4 v = vec_madd((vec4){(float)r, 2, 3, 4}, (vec4){1, 0.5f, 0.25f, 2}, (vec4){8, 8, 8, 8});
    mix((uint64_t)(v[0] + v[1] * 2 + v[2] * 4 + v[3] * 8));
    mix((uint64_t)(extended(r, 5) * 64));
    mix((uint64_t)(wide_mul((int64_t)r << 40, 12345) >> 20));
    tiny_nothing();
    mix((uint64_t)tiny_const() + tiny_same(r));
    mix(loop_at_entry(1 + r % 7, &out));
    mix(switched(r, out));
}

int main(int argc, char **argv)
{
    COUNTED();
    unsigned rounds = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 10) : 20;

    for (unsigned r = 0; r < rounds; r++)
        one_round(r);
    printf("fib %llu\n", (unsigned long long)fib(15));
    printf("rounds %u\n", rounds);
    printf("checksum %016llx\n", (unsigned long long)sum);
    return (int)(sum & 0x3f);
}
