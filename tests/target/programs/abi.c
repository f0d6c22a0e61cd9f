/*
 * Linux system calls, one scene each; every line printed is the same on every Linux.
 * Scratch files are made in the directory named by the first argument; further arguments choose scenes.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static const char *dir;
static void *volatile nowhere = (void *)8;

static const char *in_dir(const char *name)
{
    static char path[2][4096];
    static int turn;
    turn ^= 1;
    snprintf(path[turn], sizeof path[turn], "%s/%s", dir, name);
    return path[turn];
}

static void files(void)
{
    FILE *f = fopen(in_dir("a.txt"), "w+");
    for (int i = 0; i < 1000; i++)
        fprintf(f, "line %d\n", i);
    fflush(f);
    printf("written %ld\n", ftell(f));
    rewind(f);
    char line[64];
    unsigned sum = 0;
    while (fgets(line, sizeof line, f))
        sum = sum * 31 + (unsigned char)line[5];
    printf("sum %u\n", sum);
    struct stat s;
    fstat(fileno(f), &s);
    printf("size %ld mode %o links %ld regular %d\n", (long)s.st_size, s.st_mode & 0777, (long)s.st_nlink, S_ISREG(s.st_mode));
    ftruncate(fileno(f), 100);
    stat(in_dir("a.txt"), &s);
    printf("cut %ld\n", (long)s.st_size);
    int dup_fd = dup(fileno(f));
    lseek(dup_fd, 5, SEEK_SET);
    printf("shared position %ld\n", (long)lseek(fileno(f), 0, SEEK_CUR));
    close(dup_fd);
    fclose(f);
    int fd = open(in_dir("a.txt"), O_RDWR | O_APPEND);
    char one[4] = "", two[8] = "";
    struct iovec v[2] = {{one, 3}, {two, 7}};
    printf("readv %ld", (long)readv(fd, v, 2));
    printf(" %.3s|%.7s\n", one, two);
    struct iovec w[2] = {{"abc", 3}, {"defg", 4}};
    printf("writev %ld\n", (long)writev(fd, w, 2));
    printf("pread %ld %.4s\n", (long)pread(fd, one, 4, 103), one);
    printf("append %d\n", !!(fcntl(fd, F_GETFL) & O_APPEND));
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 10};
    printf("lock %d\n", fcntl(fd, F_SETLK, &lock));
    close(fd);
    printf("closed %d %d\n", (int)write(fd, "x", 1), errno == EBADF);
    printf("missing %d %d\n", open(in_dir("none"), O_RDONLY), errno == ENOENT);
    printf("exclusive %d %d\n", open(in_dir("a.txt"), O_CREAT | O_EXCL | O_RDWR, 0600), errno == EEXIST);
    printf("bad pointer %d %d\n", (int)read(0, nowhere, 4), errno == EFAULT);
    mkdir(in_dir("sub"), 0755);
    rename(in_dir("a.txt"), in_dir("sub/b.txt"));
    printf("moved %d %d\n", access(in_dir("sub/b.txt"), R_OK), access(in_dir("a.txt"), F_OK));
    printf("symlink in %d\n", (int)readlink("/proc/self/exe", line, sizeof line) > 0);
    chdir(in_dir("sub"));
    printf("relative %d\n", access("b.txt", R_OK));
    char here[4096];
    printf("cwd %s\n", strrchr(getcwd(here, sizeof here), '/'));
    DIR *d = opendir(".");
    int seen = 0, dots = 0;
    for (struct dirent *e; (e = readdir(d));)
        e->d_name[0] == '.' ? dots++ : (seen += !strcmp(e->d_name, "b.txt"));
    closedir(d);
    printf("entries %d dots %d\n", seen, dots);
    printf("not empty %d\n", rmdir(in_dir("sub")) == -1 && errno == ENOTEMPTY);
    unlink("b.txt");
    printf("removed %d\n", rmdir(in_dir("sub")));
    chdir("/");
    printf("no terminal %d\n", ioctl(open("/dev/null", O_RDWR), TIOCGWINSZ, here) == -1 && errno == ENOTTY);
}

static int down(const void *a, const void *b)
{
    return *(const int *)b - *(const int *)a;
}

static void memory(void)
{
    long total = 0;
    char *kept[200];
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < 200; i++) {
            size_t size = (size_t)(i * i * 37 % 60000 + 1);
            kept[i] = malloc(size);
            memset(kept[i], i, size);
        }
        for (int i = 0; i < 200; i++) {
            total += kept[i][0] + kept[i][i * i * 37 % 60000];
            free(kept[i]);
        }
    }
    printf("malloc %ld\n", total);
    char *big = malloc(40 << 20);
    memset(big, 1, 40 << 20);
    big = realloc(big, 80 << 20);
    printf("realloc %d %d\n", big[0], big[(40 << 20) - 1]);
    free(big);
    char *m = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    m[5000] = 7;
    mprotect(m + 4096, 4096, PROT_READ);
    printf("protected %d\n", m[5000]);
    munmap(m + 8192, 4096);
    printf("two mappings %d\n", mremap(m, 8192, 1 << 22, MREMAP_MAYMOVE) == MAP_FAILED && errno == EFAULT);
    mprotect(m + 4096, 4096, PROT_READ | PROT_WRITE);
    m = mremap(m, 8192, 1 << 22, MREMAP_MAYMOVE);
    printf("moved %d\n", m[5000]);
    madvise(m + 4096, 4096, MADV_DONTNEED);
    printf("forgotten %d\n", m[5000]);
    int fd = open(in_dir("map"), O_CREAT | O_RDWR, 0600);
    for (int i = 0; i < 3000; i++)
        dprintf(fd, "%04d\n", i);
    char *f = mmap(0, 15000, PROT_READ, MAP_PRIVATE, fd, 4096);
    printf("mapped %.5s", f + 4);
    close(fd);
    unlink(in_dir("map"));
    void *brk0 = sbrk(0);
    sbrk(1 << 20);
    memset(brk0, 0xff, 1 << 20);
    sbrk(-(1 << 20));
    sbrk(1 << 20);
    printf("brk %d %d\n", *(char *)brk0, ((char *)brk0)[8192]);
    if (getenv("VIRTUAL")) /* some emulators keep a table of every page that is asked for */
        fprintf(stderr, "too much %d\n", mmap(0, 1UL << 46, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == ENOMEM);
    static int v[5000];
    for (int i = 0; i < 5000; i++)
        v[i] = i * 7919 % 5003;
    qsort(v, 5000, sizeof *v, down);
    printf("sorted %d %d\n", v[0], v[4999]);
    printf("float %.10f %.6e %a\n", sin(1.25) * sqrt(7), exp(-40.5), pow(2, 0.5));
}

static jmp_buf back;
static sigjmp_buf back_from_signal;
static volatile int got, got_code;
static void *volatile got_at;

static void deep(int n)
{
    char room[500];
    memset(room, n, sizeof room);
    if (!n)
        longjmp(back, 42);
    deep(n - 1);
    __asm__ volatile("" ::"r"(room) : "memory");
}

static void on_signal(int number)
{
    got = number;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)context;
    got = number;
    got_code = info->si_code;
    got_at = info->si_addr;
    siglongjmp(back_from_signal, 1);
}

static void jumps(void)
{
    int n = setjmp(back);
    if (!n)
        deep(100);
    printf("longjmp %d\n", n);
    struct sigaction a = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &a, 0);
    double kept = 1.5 * getppid() / getppid();
    raise(SIGUSR1);
    printf("signal %d %.2f\n", got, kept);
    sigset_t set, old;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, &old);
    got = 0;
    raise(SIGUSR1);
    printf("blocked %d\n", got);
    sigprocmask(SIG_SETMASK, &old, 0);
    printf("unblocked %d\n", got);
    signal(SIGUSR1, SIG_IGN);
    got = 0;
    raise(SIGUSR1);
    printf("ignored %d\n", got);
    struct sigaction f = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &f, 0);
    sigaction(SIGILL, &f, 0);
    for (int i = 0; i < 3; i++)
        if (!sigsetjmp(back_from_signal, 1))
            *(volatile int *)(16L + i) = 1;
    printf("fault %d %d %p\n", got, got_code, got_at);
    static const char constant[] = "constant";
    if (!sigsetjmp(back_from_signal, 1))
        *(volatile char *)constant = 1;
    printf("read-only %d %d %d\n", got, got_code, got_at == constant);
    if (!sigsetjmp(back_from_signal, 1))
        __asm__ volatile(".word 0xffffffff");
    printf("illegal %d\n", got);
    if (!sigsetjmp(back_from_signal, 1))
        ((void (*)(void))0x1000)();
    printf("wild jump %d %p\n", got, got_at);
}

static void times_and_names(void)
{
    struct timespec a, b, c, nap = {3, 500000000};
    clock_gettime(CLOCK_MONOTONIC, &a);
    volatile unsigned spin = 0;
    for (int i = 0; i < 100000; i++)
        spin += i;
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("time goes on %d\n", b.tv_sec > a.tv_sec || b.tv_nsec > a.tv_nsec);
    if (getenv("VIRTUAL")) {
        nanosleep(&nap, 0);
        clock_gettime(CLOCK_MONOTONIC, &c);
        long slept = (c.tv_sec - b.tv_sec) * 1000000000L + c.tv_nsec - b.tv_nsec;
        fprintf(stderr, "slept %d\n", slept >= 3500000000L && slept < 3500010000L);
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &c);
        fprintf(stderr, "cpu %d\n", c.tv_sec == 0);
        char bytes[8];
        getrandom(bytes, 8, 0);
        fprintf(stderr, "random %02x%02x\n", bytes[0] & 255, bytes[7] & 255);
        struct timeval t;
        gettimeofday(&t, 0);
        fprintf(stderr, "today %ld\n", (long)t.tv_sec);
    }
    struct utsname u;
    uname(&u);
    printf("%s %s\n", u.sysname, u.machine);
    struct rlimit l;
    printf("stack %d\n", getrlimit(RLIMIT_STACK, &l));
    printf("self %d %d\n", getpid() > 0, kill(getpid(), 0));
    printf("users %d\n", getuid() == geteuid());
    printf("page %ld\n", sysconf(_SC_PAGESIZE));
    char text[200];
    printf("echo %s", fgets(text, sizeof text, stdin) ? text : "nothing\n");
}

int main(int argc, char **argv)
{
    struct { const char *name; void (*run)(void); } scenes[] = {
        {"files", files}, {"memory", memory}, {"jumps", jumps}, {"times", times_and_names}};
    dir = argc > 1 ? argv[1] : ".";
    for (unsigned i = 0; i < sizeof scenes / sizeof *scenes; i++) {
        int wanted = argc < 3;
        for (int k = 2; k < argc; k++)
            wanted |= !strcmp(argv[k], scenes[i].name);
        if (wanted)
            scenes[i].run();
    }
    if (argc > 2 && !strcmp(argv[2], "abort"))
        abort();
    if (argc > 2 && !strcmp(argv[2], "null"))
        *(volatile int *)0 = 1;
    if (argc > 2 && !strcmp(argv[2], "pipe"))
        dup3(0, 99, 0), printf("%d\n", pipe((int[2]){0}) == -1 && errno == ENOSYS);
    if (argc > 2 && !strcmp(argv[2], "fork"))
        printf("fork %d\n", fork());
    if (argc > 2 && !strcmp(argv[2], "spin"))
        for (;;)
            __asm__ volatile("");
    return argc > 2 ? 3 : 0;
}
