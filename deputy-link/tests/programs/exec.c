/* Waits until it may have moved, then becomes itself again, in the way that its first
   argument names, and tells what the new program sees. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static volatile int handled;
static void on_signal(int signal) { handled = signal; }

static void nap(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&t, &t)) {}
}

static unsigned long sum(const char *text) {
    unsigned long value = 5381;
    for (; *text; text++) value = value * 33 + (unsigned char)*text;
    return value;
}

static int tell(int argc, char **argv) {
    sigset_t mask, pending;
    struct sigaction action;
    unsigned long args = 0, env = 0;
    for (int i = 0; i < argc; i++) args = args * 31 + sum(argv[i]);
    for (char **e = environ; *e; e++) if (strncmp(*e, "PID=", 4)) env = env * 31 + sum(*e);
    sigprocmask(SIG_SETMASK, 0, &mask);
    sigpending(&pending);
    printf("argc %d args %lu env %lu pid %d\n", argc, args, env, getpid() == atoi(getenv("PID")));
    for (int i = 1; i < 32; i++) {
        sigaction(i, 0, &action);
        printf("%d%d%d%d ", sigismember(&mask, i), sigismember(&pending, i),
               action.sa_handler == SIG_IGN, action.sa_handler == SIG_DFL);
    }
    printf("\nkept %d closed %d\n", fcntl(60, F_GETFD), fcntl(61, F_GETFD));
    for (int fd = 3; fd < 1024; fd++)
        if (fd != 60 && fcntl(fd, F_GETFD) >= 0) printf("descriptor %d is open\n", fd);
    return 7;
}

int main(int argc, char **argv) {
    if (getenv("PID")) return tell(argc, argv);
    char pid[32], self[4096];
    sigset_t set;
    snprintf(pid, sizeof pid, "PID=%d", getpid());
    readlink("/proc/self/exe", self, sizeof self);
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, 0);
    sigaction(SIGTERM, &action, 0);
    sigaction(SIGCHLD, &action, 0);
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, 0);
    dup2(1, 60);
    dup3(1, 61, O_CLOEXEC);
    const char *way = argv[1];
    puts("begin");
    fflush(stdout);
    nap(600);
    if (!strcmp(way, "big")) {
        /* More than 1 MB, in strings of all lengths. */
        static char *many[600], *env[300];
        many[0] = "big";
        for (int i = 1; i < 500; i++) {
            many[i] = malloc(i * 9 + 1);
            memset(many[i], 'a' + i % 26, i * 9);
            many[i][i * 9] = 0;
        }
        many[500] = malloc(100001);
        memset(many[500], 'Z', 100000);
        many[500][100000] = 0;
        env[0] = pid;
        for (int i = 1; i < 100; i++) {
            env[i] = malloc(5001);
            memset(env[i], 'e', 5000);
            memcpy(env[i], "A=", 2);
            env[i][5000 - i] = 0;
        }
        raise(SIGUSR2);
        execve(self, many, env);
    } else if (!strcmp(way, "fexecve")) {
        int fd = open(self, O_RDONLY | O_CLOEXEC);
        char *args[] = {"f", "", "x y", 0}, *env[] = {pid, "E=", 0};
        fexecve(fd, args, env);
    } else if (!strcmp(way, "null")) {
        char *env[] = {pid, 0};
        syscall(SYS_execve, self, 0, env);
    } else if (!strcmp(way, "fails")) {
        char *args[] = {"x", 0}, *env[] = {pid, 0};
        static char long_one[200000];
        char *too_long[] = {"x", long_one, 0};
        memset(long_one, 'x', sizeof long_one - 1);
        execve("/no/such/file", args, env);
        printf("%d ", errno);
        execve("/etc/passwd", args, env);
        printf("%d ", errno);
        execve("/", args, env);
        printf("%d ", errno);
        for (int i = 0; i < 200; i++) {
            if (execve("/none", args, env) != -1 || errno != ENOENT) puts("wrong");
        }
        /* Handlers and mask are as they were. */
        sigprocmask(SIG_SETMASK, 0, &set);
        printf("mask %d%d%d ", sigismember(&set, SIGUSR1), sigismember(&set, SIGUSR2), sigismember(&set, SIGTERM));
        raise(SIGUSR1);
        printf("handled %d ", handled);
        execve(self, too_long, env);
        printf("%d ", errno);
        execve((char *)8, args, env);
        printf("%d ", errno);
        execve(self, (char **)8, env);
        printf("%d\n", errno);
        fflush(stdout);
        execve(self, args, env);
    } else if (!strcmp(way, "signals")) {
        /* Signals come at all times between many calls that fail: none is lost, none ends it. */
        char *args[] = {"x", 0}, *env[] = {pid, 0};
        for (int i = 0; i < 3000; i++) {
            execve("/none", args, env);
            if (i % 1000 == 0) nap(1);
        }
        while (!handled) nap(10);
        printf("handled %d\n", handled);
        fflush(stdout);
        execve(self, args, env);
    }
    printf("execve: %s\n", strerror(errno));
    return 1;
}
