/*
 * A program for looking at: answer() is called for ever, and what it gave is kept where it can be read.
 * answer() returns 41, in two instructions of four bytes: the conformance suite replaces them.
 */
volatile long given;
volatile unsigned long rounds;

__attribute__((naked, noinline, used)) long answer(void)
{
    __asm__(".option norvc\n li a0, 41\n ret\n .option rvc");
}

__attribute__((noinline, used)) void round_is_over(void)
{
    __asm__ volatile("" ::: "memory");
}

void _start(void)
{
    for (;;) {
        given = answer();
        rounds++;
        round_is_over();
    }
}
