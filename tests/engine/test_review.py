"""Known harms, each reduced to a small program. They are expected to fail; whoever mends one takes its mark away."""

from __future__ import annotations

import subprocess
import time

import pyarrow as pa
import pytest

from fentry.errors import Fault
from fentry.target.process import attach
from fentry.tracers.session import Plan, Session
from tests.live.tracing import environment, run, trace

pytestmark = pytest.mark.live

_HOT = "volatile long n; __attribute__((noinline)) int hot(int x) { n++; return x + 1; }\n"

ZERO_AT_FS = (
    _HOT
    + r"""
static long call(long nr, long a, long b) {
    long r;
    __asm__ volatile("syscall" : "=a"(r) : "a"(nr), "D"(a), "S"(b) : "rcx", "r11", "memory");
    return r;
}
static char block[256] __attribute__((aligned(64)));
__attribute__((force_align_arg_pointer)) void _start(void) {
    call(158, 0x1002, (long)block + 128);  /* arch_prctl(ARCH_SET_FS) */
    for (int i = 0; i < 100; i++) hot(i);
    call(231, 0, 0);
}
"""
)

FORK_IN_HANDLER = (
    r"""
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>
"""
    + _HOT
    + r"""
static volatile int child, children;
static void handler(int s) {
    (void)s;
    if (child || children == 200) return;
    children++;
    if (fork() == 0) child = 1;
}
int main(void) {
    signal(SIGALRM, handler);
    struct itimerval often = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &often, 0);
    while (!child && children < 200) hot(1);
    if (child) {
        for (int i = 0; i < 1000; i++) hot(1);
        _exit(0);
    }
    setitimer(ITIMER_REAL, &never, 0);
    int bad = 0, status;
    for (;;) {
        if (wait(&status) >= 0) bad += status != 0;
        else if (errno != EINTR) break;
    }
    printf("bad %d\n", bad);
    return 0;
}
"""
)

NEXT_SYMBOL = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
int main(void) { puts(dlsym(RTLD_NEXT, "malloc") ? "found" : "not found"); return 0; }
"""

SECCOMP = (
    r"""
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
"""
    + _HOT
    + r"""
int main(void) {
    struct sock_filter only[] = {{BPF_LD | BPF_W | BPF_ABS, 0, 0, 0},
                                 {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 231},
                                 {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW},
                                 {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_KILL_PROCESS}};
    struct sock_fprog program = {4, only};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return 7;
    for (int i = 0; i < 100; i++) hot(i);
    syscall(231, 0);
}
"""
)

HEIRS = (
    r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
"""
    + _HOT
    + r"""
/* each thread creates the next one and ends; every second one calls hot, and says who it is */
static void *work(void *p) {
    long k = (long)p;
    if (k % 2 == 0) {
        for (int i = 0; i < 10; i++) hot(i);
        printf("%ld\n", syscall(SYS_gettid));
    } else {
        usleep(3000);
    }
    if (k == 20) exit(0);
    pthread_t t;
    pthread_create(&t, 0, work, (void *)(k + 1));
    pthread_detach(t);
    return 0;
}
int main(void) {
    pthread_t t;
    pthread_create(&t, 0, work, 0);
    pthread_detach(t);
    for (;;) pause();
}
"""
)

CALLBACK = r"""
#define _GNU_SOURCE
#include <link.h>
#include <unistd.h>
static int callback(struct dl_phdr_info *i, size_t s, void *d) { usleep(20000); return 0; }
__attribute__((noinline)) int work(int x) { usleep(1000); return x; }
int main(void) { for (;;) { work(1); dl_iterate_phdr(callback, 0); } }
"""

THROWING = r"""
volatile long n;
extern "C" __attribute__((noinline)) int thrower(int x) { if (x >= 0) throw x; return x; }
extern "C" __attribute__((noinline)) int passer(int x) { int r = thrower(x); n++; return r + 1; }
int main() { for (;;) try { passer(1); } catch (int) { } }
"""

SHARING = (
    r"""
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
"""
    + _HOT
    + r"""
static int child(void *p) { for (;;) hot(1); }
int main(void) {
    char *stack = malloc(1 << 16);
    int pid = clone(child, stack + (1 << 16), CLONE_VM | SIGCHLD, 0), status;
    for (;;) { hot(1); usleep(1000); if (waitpid(pid, &status, WNOHANG) == pid) return 1; }
}
"""
)

LARGE = r"""
#include <sys/mman.h>
#include <unistd.h>
int main(void) {
    if (mmap(0, 1L << 30, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED) return 9;
    for (;;) pause();
}
"""

#: text of a library that became a shared mapping, which nobody can write to
SHARED_TEXT = (
    r"""
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
extern int distant(int);
"""
    + _HOT
    + r"""
int main(void) {
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512], perms[8], path[400];
    unsigned long start, end, offset;
    while (fgets(line, sizeof line, maps)) {
        if (!strstr(line, "distant.so") || !strstr(line, "r-xp")) continue;
        sscanf(line, "%lx-%lx %7s %lx %*s %*s %399s", &start, &end, perms, &offset, path);
        int fd = open(path, O_RDONLY);
        if (mmap((void *)start, end - start, 5, MAP_SHARED | MAP_FIXED, fd, offset) == MAP_FAILED) return 9;
    }
    for (;;) { hot(1); distant(1); usleep(100); }
}
"""
)


def _made(directory, source, *flags, cc="gcc"):
    """Compile a source text."""
    name = "a.cpp" if cc == "g++" else "a.c"
    (directory / name).write_text(source)
    flags = ("-O1", "-fpatchable-function-entry=5", *flags)
    subprocess.run([cc, directory / name, *flags, "-o", directory / "prog"], check=True)
    return directory / "prog"


def _visited(program, directory, wanted):
    """Attach to a running program, trace it for a moment, let go; tells whether it lives on."""
    child = subprocess.Popen([program], env=environment())
    try:
        for round_ in range(12):
            time.sleep(0.1)  # it comes to its loop; later, it does or does not outlive the visit
            if child.poll() is not None:
                break
            plan = Plan(wanted=wanted)
            with Session(attach(child.pid), plan, directory=directory / f"trace{round_}", started=False) as session:
                session.start()
                session.wait(0.1)
        return child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_word_at_thread_pointer_is_zero(tmp_path):
    program = _made(tmp_path, ZERO_AT_FS, "-nostdlib", "-static", "-fno-stack-protector")
    assert run([program]).status == 0
    seen = trace([program], tmp_path, wanted=["hot"])
    assert seen.did.status == 0
    assert seen.outcome.lost == 200


def test_fork_in_a_handler_that_interrupted_a_program(tmp_path):
    program = _made(tmp_path, FORK_IN_HANDLER)
    assert trace([program], tmp_path, wanted=["hot"]).did.stdout == run([program]).stdout == b"bad 0\n"


def test_dlsym_next_finds_who_asks(tmp_path):
    program = _made(tmp_path, NEXT_SYMBOL)
    assert trace([program], tmp_path, wanted=["libc.so.6:dlsym"]).did == run([program])


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="programs make system calls, for which a filter kills the program"
)
def test_a_program_that_locked_itself_in(tmp_path):
    program = _made(tmp_path, SECCOMP)
    assert run([program]).status == 0
    assert trace([program], tmp_path, wanted=["hot"]).did.status == 0


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="a thread pointer used again is taken for the dead thread that had it"
)
def test_threads_that_inherit_a_dead_ones_context_and_thread_pointer(tmp_path):
    seen = trace([_made(tmp_path, HEIRS, "-pthread")], tmp_path, wanted=["hot"])
    told = {int(line) for line in seen.did.stdout.split()}
    assert set(pa.concat_tables(seen.trace.events()).column("tid").to_pylist()) == told


def test_detach_during_a_callback_of_dl_iterate_phdr(tmp_path):
    assert _visited(_made(tmp_path, CALLBACK), tmp_path, ["work"])


def test_detach_while_an_exception_is_under_way(tmp_path):
    assert _visited(_made(tmp_path, THROWING, cc="g++"), tmp_path, ["thrower", "passer"])


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="a process that shares the memory is not stopped at detach"
)
def test_detach_beside_a_process_that_shares_the_memory(tmp_path):
    assert _visited(_made(tmp_path, SHARING), tmp_path, ["hot"])


def test_a_visit_that_fails_half_way(tmp_path):
    library = tmp_path / "distant.so"
    (tmp_path / "distant.c").write_text("volatile long m; int distant(int x) { m++; return x + 2; }")
    flags = ("-O1", "-fpatchable-function-entry=5", "-shared", "-fPIC")
    subprocess.run(["gcc", *flags, tmp_path / "distant.c", "-o", library], check=True)
    program = _made(tmp_path, SHARED_TEXT, library, f"-Wl,-rpath,{tmp_path}")
    child = subprocess.Popen([program], env=environment())
    try:
        time.sleep(0.2)  # it comes to its loop
        plan = Plan(wanted=["hot", "distant.so:distant"])
        with (
            pytest.raises(Fault),
            Session(attach(child.pid), plan, directory=tmp_path / "trace", started=False) as session,
        ):
            session.start()
        time.sleep(0.3)  # it calls both again and again
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_untouched_memory_is_not_read_at_detach(tmp_path):
    child = subprocess.Popen([_made(tmp_path, LARGE)], env=environment())
    try:
        time.sleep(0.2)  # it maps its memory; a visit before that fails below
        with attach(child.pid) as target:
            large = max((m for m in target.mappings() if m.perms == "rw-p"), key=lambda m: m.size)
            assert large.size >= 1 << 30
            assert sum(hi - lo for lo, hi in target.touched(large.start, large.end)) < 1 << 24
    finally:
        child.kill()
        child.wait()
