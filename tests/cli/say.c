/*
 * A program for the command line's tests. By its first word:
 *
 *     say exit N          exit with status N
 *     say kill N          write "bye" to stderr, then end by signal N
 *     say args WORDS      print each word in brackets
 *     say cat             copy stdin to stdout, every byte through turn() twice, then exit with 5
 *     say spin            print "ready", call turn() until SIGINT comes, then print "interrupted" and exit with 6
 *     say stubborn        print "ready", ignore SIGINT and SIGHUP and sleep
 *     say fork            print "ready", fork; parent and child call turn() until they are killed
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static volatile sig_atomic_t interrupted;
static volatile unsigned turns;

__attribute__((noipa)) int turn(int byte)
{
    turns++;
    return byte ^ 0x5a;
}

__attribute__((noipa)) int turn_twice(int byte)
{
    turns += 2; /* a call among the first five bytes could not be moved */
    int twice = turn(turn(byte));
    turns--; /* so that the last call is no jump */
    return twice;
}

static void note(int number)
{
    (void)number;
    interrupted = 1;
}

static int spin(void)
{
    do {
        for (int i = 0; i < 100; i++)
            turn_twice(i);
        usleep(1000);
    } while (!interrupted);
    return 6;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "exit";
    static char buffer[4096];

    if (!strcmp(what, "exit"))
        return argc > 2 ? atoi(argv[2]) : 0;
    if (!strcmp(what, "kill")) {
        fprintf(stderr, "bye\n");
        turn_twice(1);
        raise(atoi(argv[2]));
    }
    if (!strcmp(what, "args"))
        for (int i = 2; i < argc; i++)
            printf("[%s]\n", argv[i]);
    if (!strcmp(what, "cat")) {
        size_t n;
        while ((n = fread(buffer, 1, sizeof buffer, stdin)) > 0) {
            for (size_t i = 0; i < n; i++)
                buffer[i] = (char)turn_twice(buffer[i]);
            fwrite(buffer, 1, n, stdout);
        }
        return 5;
    }
    if (!strcmp(what, "spin")) {
        signal(SIGINT, note);
        puts("ready");
        fflush(stdout);
        int status = spin();
        puts("interrupted");
        return status;
    }
    if (!strcmp(what, "stubborn")) {
        signal(SIGINT, SIG_IGN);
        signal(SIGHUP, SIG_IGN);
        turn_twice(1);
        puts("ready");
        fflush(stdout);
        sleep(600);
    }
    if (!strcmp(what, "fork")) {
        puts("ready");
        fflush(stdout);
        while (getppid() > 1 && turns < 5000) {
            turn_twice(1);
            usleep(1000);
        }
        pid_t child = fork();
        if (child > 0) {
            printf("%d\n", (int)child);
            fflush(stdout);
        }
        return spin();
    }
    return 0;
}
