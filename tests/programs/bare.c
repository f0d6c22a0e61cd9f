/*
 * A program without an operating system: riscv64 machine mode, memory at 0x80000000, a UART at
 * 0x10000000 that takes a byte at a time, a finisher at 0x100000 (see start.S).
 *
 * Prints a fixed text and, for each function, how often it was called, counted by the program
 * itself; ends with status 0.
 */
#include <stdint.h>

#define FN __attribute__((noinline, used))
#define CALLED(x) __asm__ volatile("" : "+r"(x))

enum { FIB, HANOI, ADD, TWICE, STACK, FLOATS, TAIL, TAIL_END, KINDS };

static const char *const names[KINDS] = {"fib", "hanoi", "add", "twice", "stack_args", "floats", "tail", "tail_end"};
static uint64_t hits[KINDS];

FN void put(char c)
{
    *(volatile uint8_t *)0x10000000 = (uint8_t)c;
}

FN void puts_plain(const char *s)
{
    while (*s)
        put(*s++);
}

FN void put_hex(uint64_t x)
{
    for (int shift = 60; shift >= 0; shift -= 4)
        put("0123456789abcdef"[x >> shift & 15]);
}

FN uint64_t fib(unsigned n)
{
    hits[FIB]++;
    if (n < 2)
        return n;
    uint64_t one = fib(n - 1);
    CALLED(one);
    uint64_t two = fib(n - 2);
    CALLED(two);
    return one + two;
}

FN uint64_t hanoi(unsigned n, unsigned from, unsigned to, unsigned by)
{
    hits[HANOI]++;
    if (n == 0)
        return 0;
    uint64_t a = hanoi(n - 1, from, by, to);
    CALLED(a);
    uint64_t b = hanoi(n - 1, by, to, from);
    CALLED(b);
    return a * 3 + b + from * 7 + to;
}

FN uint64_t add(uint64_t a, uint64_t b)
{
    hits[ADD]++;
    return a + b;
}

FN uint64_t twice(uint64_t (*f)(uint64_t, uint64_t), uint64_t x)
{
    hits[TWICE]++;
    uint64_t r = f(x, x);
    CALLED(r);
    r = f(r, 1);
    CALLED(r);
    return r;
}

FN uint64_t stack_args(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h, uint64_t i,
                       uint64_t j)
{
    hits[STACK]++;
    return a + b * 2 + c * 3 + d * 4 + e * 5 + f * 6 + g * 7 + h * 8 + i * 9 + j * 10;
}

FN double floats(double a, float b, double c)
{
    hits[FLOATS]++;
    return a * b + c;
}

FN uint64_t tail_end(uint64_t x)
{
    hits[TAIL_END]++;
    return x ^ 0x5a5a;
}

FN uint64_t tail(uint64_t x)
{
    hits[TAIL]++;
    return tail_end(x + 1);
}

int main(void)
{
    uint64_t sum = 0;

    puts_plain("bare: hello\n");
    for (unsigned i = 0; i < 10; i++) {
        sum = sum * 31 + fib(i);
        sum = sum * 31 + twice(add, i);
        sum = sum * 31 + stack_args(i, i, i, i, i, i, i, i, i + 1, i + 2);
        sum = sum * 31 + (uint64_t)floats(i, 0.5f, 2.0);
        sum = sum * 31 + tail(i);
    }
    sum = sum * 31 + hanoi(6, 1, 2, 3);
    for (int k = 0; k < KINDS; k++) {
        puts_plain(names[k]);
        put(' ');
        put_hex(hits[k]);
        put('\n');
    }
    puts_plain("sum ");
    put_hex(sum);
    puts_plain("\nbare: bye\n");
    return 0;
}
