/*
 * Control flow that does not return the way it came: exceptions through many frames, rethrow,
 * nested exceptions, exception_ptr across threads, longjmp past frames, fork inside a function,
 * backtrace(), pthread_cancel, coroutines on stacks of their own, signal handlers on an alternate
 * stack, and signals at a high rate.
 *
 *     throw [SCENE...]      runs the named scenes, or all; `throw list` prints their names
 *
 * Each scene prints lines that depend on nothing but the scene. Status 0 if every destructor and
 * cleanup ran as often as it had to, else 1. With -DCOUNT the calls are counted, see count.h; the
 * scenes "signals" and "altstack" call handler functions a number of times that varies from run to run.
 *
 * Frames that an exception or a longjmp passes are named f_*, so that a glob selects exactly them.
 * Link with -rdynamic: the scene "backtrace" prints the names that dladdr() finds.
 */
#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "count.h"

#define EXPORTED extern "C" __attribute__((visibility("default"))) FN

static int failures;

static void expect(const char *what, long have, long want)
{
    if (have != want) {
        failures++;
        printf("FAILED %s: %ld, not %ld\n", what, have, want);
    }
}

/* -- exceptions --------------------------------------------------------------------------------- */
static int guards;

struct Guard {
    int *where;
    explicit Guard(int *w) : where(w) { ++guards; }
    FN ~Guard();
};

Guard::~Guard()
{
    COUNTED();
    --guards;
    ++*where;
}

struct Carried : std::runtime_error {
    int depth;
    explicit Carried(int d) : std::runtime_error("carried"), depth(d) {}
};

EXPORTED int f_down(int n, int *undone)
{
    COUNTED();
    Guard g(undone);
    if (n == 0)
        throw Carried(n);
    int r = f_down(n - 1, undone);
    CALLED(r);
    return r + 1;
}

/* No cleanup of its own: the unwinder passes it without stopping. */
EXPORTED int f_plain(int n, int *undone)
{
    COUNTED();
    int r = f_down(n, undone);
    CALLED(r);
    return r + 2;
}

EXPORTED int f_again(int n, int *undone)
{
    COUNTED();
    try {
        int r = f_plain(n, undone);
        CALLED(r);
        return r;
    } catch (Carried &c) {
        c.depth++;
        if (n % 2)
            throw;
        throw Carried(c.depth + 100);
    }
}

EXPORTED int f_anything(int n, int *undone)
{
    COUNTED();
    try {
        int r = f_again(n, undone);
        CALLED(r);
        return r;
    } catch (...) {
        ++*undone;
        throw;
    }
}

EXPORTED void f_nested(int n)
{
    COUNTED();
    try {
        if (n > 0)
            f_nested(n - 1);
        else
            throw std::logic_error("innermost");
    } catch (...) {
        std::throw_with_nested(std::runtime_error("level " + std::to_string(n)));
    }
}

FN static int nesting(const std::exception &e)
{
    COUNTED();
    try {
        std::rethrow_if_nested(e);
    } catch (const std::exception &inner) {
        int below = nesting(inner);
        CALLED(below);
        return below + 1;
    }
    return 1;
}

EXPORTED int f_noexcept_after(int n) noexcept
{
    COUNTED();
    int undone = 0;
    try {
        f_anything(n, &undone);
    } catch (const std::exception &e) {
        return undone * 10 + (int)std::strlen(e.what());
    }
    return -1;
}

static void scene_throw()
{
    for (int n = 0; n < 40; n++) {
        int undone = 0, depth = -1;
        try {
            f_plain(n, &undone);
        } catch (const Carried &c) {
            depth = c.depth;
        }
        expect("destructors", undone, n + 1);
        expect("depth", depth, 0);
    }
    expect("guards alive", guards, 0);
    puts("throw 40");
}

static void scene_rethrow()
{
    int total = 0;
    for (int n = 0; n < 30; n++) {
        int undone = 0;
        try {
            f_anything(n, &undone);
        } catch (const Carried &c) {
            total += c.depth;
        }
        expect("destructors", undone, n + 2);
        total += f_noexcept_after(n);
    }
    printf("rethrow %d\n", total);
}

static void scene_nested()
{
    for (int n = 0; n < 10; n++) {
        try {
            f_nested(n);
        } catch (const std::exception &e) {
            expect("nesting", nesting(e), n + 2);
        }
    }
    puts("nested 10");
}

EXPORTED void *f_thrower(void *out)
{
    COUNTED();
    int undone = 0;
    try {
        f_plain(12, &undone);
    } catch (...) {
        *static_cast<std::exception_ptr *>(out) = std::current_exception();
    }
    return nullptr;
}

EXPORTED void f_rethrower(std::exception_ptr p)
{
    COUNTED();
    std::rethrow_exception(p);
}

static void scene_pointer()
{
    std::exception_ptr carried;
    pthread_t id;
    int caught = 0;

    pthread_create(&id, nullptr, f_thrower, &carried);
    pthread_join(id, nullptr);
    for (int i = 0; i < 5; i++) {
        try {
            f_rethrower(carried);
        } catch (const Carried &) {
            caught++;
        }
    }
    printf("pointer %d\n", caught);
}

/* -- longjmp -------------------------------------------------------------------------------------- */
static jmp_buf back;

EXPORTED int f_jump(int n)
{
    COUNTED();
    if (n == 0)
        longjmp(back, 17);
    int r = f_jump(n - 1);
    CALLED(r);
    return r + 1;
}

EXPORTED int f_after_jump(int n)
{
    COUNTED();
    if (n == 0)
        return 0;
    int r = f_after_jump(n - 1);
    CALLED(r);
    return r + 1;
}

static void scene_longjmp()
{
    volatile int total = 0;
    for (volatile int n = 0; n < 50; n = n + 1) {
        int code = setjmp(back);
        if (code == 0)
            f_jump(n);
        total = total + code + f_after_jump(n % 7);
    }
    printf("longjmp %d\n", total);
}

/* -- fork ------------------------------------------------------------------------------------------- */
EXPORTED int f_fork(int n, pid_t *child)
{
    COUNTED();
    if (n == 0) {
        fflush(stdout);
        *child = fork();
        return *child == 0 ? 0 : 1000;
    }
    int r = f_fork(n - 1, child);
    CALLED(r);
    return r + 1;
}

static void scene_fork()
{
    for (int n = 1; n < 6; n++) {
        pid_t child = -1;
        int status = -1;
        int r = f_fork(n, &child); /* both return through the frames that were there at the fork */
        if (child == 0)
            _exit(r == n && f_after_jump(20) == 20 ? 40 + n : 1);
        waitpid(child, &status, 0);
        expect("parent's way back", r, 1000 + n);
        expect("child's status", WIFEXITED(status) ? WEXITSTATUS(status) : -status, 40 + n);
    }
    puts("fork 5");
}

/* -- backtrace() ------------------------------------------------------------------------------------ */
static char seen[4096];

EXPORTED int f_walk(int n)
{
    COUNTED();
    if (n == 0) {
        void *pc[64];
        int depth = backtrace(pc, 64);

        /* Names of this program's own frames; frames of the C library and of a tracer are left out. */
        seen[0] = 0;
        for (int i = 0; i < depth; i++) {
            Dl_info info;
            if (dladdr(static_cast<char *>(pc[i]) - 1, &info) && info.dli_sname && !strncmp(info.dli_sname, "f_", 2)) {
                strncat(seen, info.dli_sname, 64);
                strcat(seen, " ");
            }
        }
        return depth > 0;
    }
    int r = f_walk(n - 1);
    CALLED(r);
    return r + 1;
}

EXPORTED int f_walk_more(int n)
{
    COUNTED();
    int r = f_walk(n);
    CALLED(r);
    return r + 1;
}

static void scene_backtrace()
{
    f_walk_more(5);
    printf("backtrace %s\n", seen);
}

/* -- pthread_cancel ----------------------------------------------------------------------------------- */
static int cleaned;
static int ready_pipe[2];

FN static void cleanup(void *)
{
    COUNTED();
    cleaned++;
}

EXPORTED int f_wait(int n)
{
    COUNTED();
    int r = 0;
    pthread_cleanup_push(cleanup, nullptr);
    if (n == 0) {
        char c = 'r';
        if (write(ready_pipe[1], &c, 1) == 1)
            for (;;)
                pause();
    } else {
        r = f_wait(n - 1);
        CALLED(r);
    }
    pthread_cleanup_pop(0);
    return r + 1;
}

EXPORTED void *f_cancelled(void *)
{
    COUNTED();
    static int sink;
    Guard g(&sink);
    int r = f_wait(9);
    CALLED(r);
    return nullptr;
}

static void scene_cancel()
{
    for (int i = 0; i < 5; i++) {
        pthread_t id;
        void *result = nullptr;
        char c;

        cleaned = 0;
        if (pipe(ready_pipe) || pthread_create(&id, nullptr, f_cancelled, nullptr))
            abort();
        if (read(ready_pipe[0], &c, 1) == 1)
            pthread_cancel(id);
        pthread_join(id, &result);
        close(ready_pipe[0]);
        close(ready_pipe[1]);
        expect("cancelled", result == PTHREAD_CANCELED, 1);
        expect("cleanups", cleaned, 10);
        expect("guards alive", guards, 0);
    }
    puts("cancel 5");
}

/* -- coroutines ----------------------------------------------------------------------------------------- */
static ucontext_t main_context, co_context[4];
static uint64_t co_sum;

EXPORTED uint64_t f_yielding(int who, int n)
{
    COUNTED();
    swapcontext(&co_context[who], &main_context);
    if (n == 0)
        return (uint64_t)who + 1;
    uint64_t r = f_yielding(who, n - 1);
    CALLED(r);
    return r * 3 + (uint64_t)n;
}

EXPORTED void f_coroutine(int who)
{
    COUNTED();
    int undone = 0;
    co_sum = co_sum * 31 + f_yielding(who, 6 + who);
    try {
        f_plain(who, &undone); /* an exception on a stack of one's own */
    } catch (const Carried &) {
        co_sum += (uint64_t)undone;
    }
}

static void scene_coroutines()
{
    enum { SIZE = 256 * 1024 };
    void *stack[4];

    for (int i = 0; i < 4; i++) {
        /* even ones in the heap, odd ones mapped */
        stack[i] = i % 2 == 0 ? malloc(SIZE) : mmap(nullptr, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        getcontext(&co_context[i]);
        co_context[i].uc_stack.ss_sp = stack[i];
        co_context[i].uc_stack.ss_size = SIZE;
        co_context[i].uc_link = &main_context;
        makecontext(&co_context[i], reinterpret_cast<void (*)()>(f_coroutine), 1, i);
    }
    for (int turn = 0; turn < 12; turn++)
        for (int i = 0; i < 4; i++)
            if (turn <= 7 + i) /* 7 + i yields, then the end */
                swapcontext(&main_context, &co_context[i]);
    for (int i = 0; i < 4; i++) {
        if (i % 2 == 0)
            free(stack[i]);
        else
            munmap(stack[i], SIZE);
    }
    printf("coroutines %016llx\n", (unsigned long long)co_sum);
}

/* -- signals ---------------------------------------------------------------------------------------------- */
static volatile sig_atomic_t handled;

EXPORTED uint64_t f_handler_leaf(uint64_t x)
{
    COUNTED();
    return x * 2862933555777941757u + 3037000493u;
}

EXPORTED void f_handler(int)
{
    COUNTED();
    uint64_t r = f_handler_leaf((uint64_t)handled);
    CALLED(r);
    handled = handled + 1;
}

EXPORTED uint64_t f_loaded(int n, uint64_t x)
{
    COUNTED();
    if (n == 0)
        return x ^ (x >> 31);
    uint64_t r = f_loaded(n - 1, x * 0x9e3779b97f4a7c15u + 1);
    CALLED(r);
    return r + x;
}

static void handle(int signal, int flags)
{
    struct sigaction act = {};
    act.sa_handler = f_handler;
    act.sa_flags = flags | SA_RESTART;
    sigaction(signal, &act, nullptr);
}

static void scene_altstack()
{
    std::unique_ptr<char[]> memory(new char[64 * 1024]);
    stack_t alternate = {}, none = {};
    uint64_t sum = 0;

    alternate.ss_sp = memory.get();
    alternate.ss_size = 64 * 1024;
    none.ss_flags = SS_DISABLE;
    sigaltstack(&alternate, nullptr);
    handle(SIGUSR1, SA_ONSTACK);
    handled = 0;
    for (int i = 0; i < 200; i++) {
        sum += f_loaded(i % 9, (uint64_t)i);
        raise(SIGUSR1);
    }
    expect("handled", handled, 200);
    signal(SIGUSR1, SIG_DFL);
    sigaltstack(&none, nullptr);
    printf("altstack %016llx\n", (unsigned long long)sum);
}

/* A timer fires every 20 us of real time while functions call each other, until 2,000 were handled. */
static void scene_signals()
{
    timer_t timer;
    struct sigevent event = {};
    struct itimerspec often = {{0, 20000}, {0, 20000}};
    bool same = true;

    event.sigev_notify = SIGEV_SIGNAL;
    event.sigev_signo = SIGPROF;
    handle(SIGPROF, 0);
    handled = 0;
    uint64_t want = f_loaded(12, 99);
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &often, nullptr))
        abort();
    while (handled < 2000)
        for (int i = 0; i < 100; i++)
            same &= f_loaded(12, 99) == want;
    timer_delete(timer);
    signal(SIGPROF, SIG_IGN);
    expect("results under signals", same, 1);
    puts("signals 2000");
}

static const struct {
    const char *name;
    void (*run)();
} scenes[] = {
    {"throw", scene_throw},       {"rethrow", scene_rethrow},       {"nested", scene_nested},   {"pointer", scene_pointer},
    {"longjmp", scene_longjmp},   {"fork", scene_fork},             {"cancel", scene_cancel},   {"backtrace", scene_backtrace},
    {"altstack", scene_altstack}, {"coroutines", scene_coroutines}, {"signals", scene_signals},
};

int main(int argc, char **argv)
{
    for (const auto &scene : scenes) {
        bool wanted = argc < 2;
        for (int i = 1; i < argc; i++)
            wanted |= !strcmp(argv[i], scene.name);
        if (argc == 2 && !strcmp(argv[1], "list"))
            puts(scene.name);
        else if (wanted)
            scene.run();
    }
    fflush(stdout);
    return failures ? 1 : 0;
}
