/* Waits until it may have moved, then makes children in the way that its first argument
   names, and prints what became of them: the same away and at home. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static unsigned char *memory;
static size_t memory_len = 1 << 20;

static void nap(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&t, &t)) {}
}

static void fill(unsigned seed) {
    for (size_t i = 0; i < memory_len; i++) memory[i] = seed = seed * 1103515245 + 12345 >> 3;
}

static unsigned sum(void) {
    unsigned s = 0;
    for (size_t i = 0; i < memory_len; i++) s = s * 31 + memory[i];
    return s;
}

static void tell(const char *what, int status) {
    if (WIFEXITED(status)) printf("%s exited %d\n", what, WEXITSTATUS(status));
    else if (WIFSIGNALED(status)) printf("%s signal %d core %d\n", what, WTERMSIG(status), !!WCOREDUMP(status));
    else printf("%s %x\n", what, status);
}

static int reap(pid_t pid, const char *what) {
    int status = -1;
    pid_t got;
    while ((got = waitpid(pid, &status, 0)) < 0 && errno == EINTR) {}
    if (got != pid) printf("%s: wait %d errno %d\n", what, got == pid, errno);
    tell(what, status);
    fflush(stdout);
    return status;
}

/* A process makes two children, each of these two, and so on; each adds up what its
   children send through pipes. */
static unsigned tree(int depth, unsigned name) {
    unsigned total = name, part;
    int pipes[2][2];
    pid_t pids[2];
    if (depth == 0) return sum() + name;
    for (int i = 0; i < 2; i++) {
        if (pipe(pipes[i])) return 0;
        pids[i] = fork();
        if (pids[i] == 0) {
            close(pipes[i][0]);
            if (getppid() == getpid()) _exit(99);
            memory[name % memory_len] += i + 1;
            part = tree(depth - 1, name * 2 + i);
            if (write(pipes[i][1], &part, sizeof part) != sizeof part) _exit(98);
            _exit(name * 2 + i & 63);
        }
        if (pids[i] < 0) { printf("fork: %d\n", errno); return 0; }
        close(pipes[i][1]);
    }
    for (int i = 0; i < 2; i++) {
        int status = -1;
        if (read(pipes[i][0], &part, sizeof part) != sizeof part) part = 1;
        close(pipes[i][0]);
        if (waitpid(pids[i], &status, 0) != pids[i]) part += 7;
        total = total * 31 + part + status;
    }
    return total;
}

static int made_tree(void) {
    for (int i = 0; i < 3; i++) {
        fill(i);
        printf("tree %u\n", tree(3, 1));
        fflush(stdout);
    }
    return 3;
}

/* Each child dies in another way. */
static int made_deaths(void) {
    int signals[] = {SIGTERM, SIGKILL, SIGSEGV, SIGABRT, SIGUSR1, SIGHUP, SIGALRM, SIGFPE};
    for (unsigned i = 0; i < sizeof signals / sizeof *signals; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            if (signals[i] == SIGSEGV) *(volatile int *)8 = 1;
            if (signals[i] == SIGALRM) { alarm(1); for (;;) memory[0]++; }
            if (signals[i] == SIGFPE) { volatile int zero = 0; zero = 1 / zero; }
            kill(getpid(), signals[i]);
            for (;;) pause();
        }
        char name[32];
        snprintf(name, sizeof name, "child %d", signals[i]);
        reap(pid, name);
    }
    pid_t pid = fork();
    if (pid == 0) for (;;) memory[1]++;
    nap(50);
    kill(pid, SIGTERM);
    reap(pid, "computing");
    pid = fork();
    if (pid == 0) { nap(50); _exit(41); }
    siginfo_t info;
    waitid(P_PID, pid, &info, WEXITED);
    printf("waitid %d %d %d\n", info.si_pid == pid, info.si_status, info.si_code);
    return 4;
}

static volatile int handled, waited;
static void on_child(int signal) {
    int status;
    (void)signal;
    handled++;
    while (waitpid(-1, &status, WNOHANG) > 0) waited += 1 + (WEXITSTATUS(status) == 9);
}

static int made_handled(void) {
    struct sigaction action = {.sa_handler = on_child, .sa_flags = SA_RESTART};
    sigaction(SIGCHLD, &action, 0);
    for (int i = 0; i < 4; i++) {
        pid_t pid = fork();
        if (pid == 0) { nap(30); _exit(9); }
        while (waited < 2 * (i + 1)) nap(10);
        printf("handled %d waited %d\n", handled > i, waited);
        fflush(stdout);
    }
    return 5;
}

/* The child's child outlives its parent and is reparented. */
static int made_daemon(void) {
    int ends[2];
    char byte = 0;
    if (pipe(ends)) return 1;
    pid_t pid = fork();
    if (pid == 0) {
        setsid();
        pid_t second = fork();
        if (second == 0) {
            pid_t parent = getppid();
            while (getppid() == parent) nap(5);
            close(ends[0]);
            byte = 'a' + 2 * (getsid(0) == getpid()) + (getsid(0) != getpgrp());
            if (write(ends[1], &byte, 1) != 1) _exit(1);
            _exit(0);
        }
        nap(20);
        _exit(2);
    }
    reap(pid, "first");
    close(ends[1]);
    printf("read %zd ", read(ends[0], &byte, 1));
    printf("%c end %zd\n", byte, read(ends[0], &byte, 1));
    return 6;
}

/* What clone(2) stores where, and what a child inherits. */
static int made_ids(void) {
    static int parent_tid, child_tid;
    child_tid = 5;
    long pid = syscall(SYS_clone, CLONE_PARENT_SETTID | CLONE_CHILD_SETTID | SIGCHLD, 0, &parent_tid, &child_tid, 0);
    if (pid == 0) _exit((child_tid == getpid()) + 2 * (syscall(SYS_gettid) == getpid()));
    printf("parent_tid %d child_tid %d\n", parent_tid == pid, child_tid);
    reap(pid, "clone");
    struct clone_args args = {.flags = CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID, .exit_signal = SIGCHLD, .child_tid = (unsigned long)&child_tid};
    struct sigaction action = {.sa_handler = on_child};
    sigaction(SIGUSR1, &action, 0);
    pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) {
        sigaction(SIGUSR1, 0, &action);
        _exit((child_tid == getpid()) + 2 * (action.sa_handler == on_child));
    }
    reap(pid, "clone3");
    args.flags |= CLONE_CLEAR_SIGHAND;
    pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) {
        sigaction(SIGUSR1, 0, &action);
        _exit((child_tid == getpid()) + 2 * (action.sa_handler == SIG_DFL));
    }
    reap(pid, "clear");
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigprocmask(SIG_BLOCK, &mask, 0);
    kill(getpid(), SIGUSR2);
    pid = fork();
    if (pid == 0) {
        sigset_t pending, now;
        sigpending(&pending);
        sigprocmask(SIG_SETMASK, 0, &now);
        _exit(sigismember(&pending, SIGUSR2) + 2 * sigismember(&now, SIGUSR2) + 4 * sigismember(&now, SIGUSR1));
    }
    reap(pid, "masked");
    errno = 0;
    pid = syscall(SYS_clone, CLONE_THREAD | SIGCHLD, 0, 0, 0, 0);
    printf("thread %ld errno %d\n", pid, errno);
    return 7;
}

static int run(const char *path, char **argv, posix_spawn_file_actions_t *actions, posix_spawnattr_t *attr, const char *what) {
    pid_t pid = -1;
    int error = posix_spawnp(&pid, path, actions, attr, argv, environ);
    if (error) { printf("%s: error %d\n", what, error); fflush(stdout); return error; }
    return reap(pid, what);
}

static int made_spawns(void) {
    char *yes[] = {"sh", "-c", "echo spawned; exit 3", 0};
    char *no[] = {"none", 0};
    posix_spawnattr_t attr;
    sigset_t mask;
    posix_spawnattr_init(&attr);
    sigfillset(&mask);
    posix_spawnattr_setsigdefault(&attr, &mask);
    sigemptyset(&mask);
    posix_spawnattr_setsigmask(&attr, &mask);
    posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    for (int i = 0; i < 3; i++) {
        fflush(stdout);
        run("sh", yes, 0, 0, "plain");
        run("sh", yes, &actions, &attr, "with");
        run("/nowhere/none", no, 0, 0, "ENOENT");
        run("/etc/passwd", no, 0, 0, "EACCES");
    }
    return 8;
}

static int made_vforks(void) {
    static volatile int shared;
    for (int i = 0; i < 4; i++) {
        fflush(stdout);
        pid_t pid = vfork();
        if (pid == 0) { shared += 10; _exit(i); }
        printf("shared %d\n", shared);
        reap(pid, "vfork");
        pid = vfork();
        if (pid == 0) {
            shared++;
            execl("/bin/sh", "sh", "-c", "exit 11", (char *)0);
            shared = -100;
            _exit(127);
        }
        printf("shared %d\n", shared);
        reap(pid, "vfork+exec");
        pid = vfork();
        if (pid == 0) {
            execl("/nowhere", "sh", (char *)0);
            shared += errno;
            _exit(127);
        }
        printf("shared %d\n", shared);
        reap(pid, "vfork+ENOENT");
    }
    /* Within each other, deeper than is done away. */
    shared = 0;
    pid_t outer = vfork();
    if (outer == 0) {
        pid_t a = vfork();
        if (a == 0) {
            pid_t b = fork();
            if (b == 0) { shared = 1000; _exit(1); }
            waitpid(b, 0, 0);
            shared += 1;
            _exit(0);
        }
        waitpid(a, 0, 0);
        shared += 2;
        _exit(3);
    }
    reap(outer, "nested");
    printf("shared %d\n", shared);
    return 9;
}

static int made_shells(void) {
    char line[128];
    fflush(stdout);
    int status = system("echo system; exit 5");
    tell("system", status);
    FILE *out = popen("echo popened; exit 6", "r");
    while (out && fgets(line, sizeof line, out)) fputs(line, stdout);
    tell("popen", pclose(out));
    fflush(stdout);
    out = popen("cat", "w");
    fputs("to cat\n", out);
    tell("cat", pclose(out));
    return 10;
}

/* Every process makes two, until no more can be made; all are counted in a file. */
static int made_bomb(int most) {
    int counter = memfd_create("counter", 0);
    int ends[2];
    if (pipe(ends)) return 1;
    for (int level = 0;; level++) {
        pid_t pid = fork();
        if (pid == 0) {
            char byte = 1;
            if (write(counter, &byte, 1) != 1) _exit(1);
            if (lseek(counter, 0, SEEK_END) >= most) _exit(0);
            continue;
        }
        if (pid < 0 || lseek(counter, 0, SEEK_END) >= most) break;
    }
    close(ends[1]);
    char byte;
    while (waitpid(-1, 0, 0) > 0) {}
    if (read(ends[0], &byte, 1) < 0) return 1;
    if (getenv("FIRST") && atoi(getenv("FIRST")) == getpid())
        printf("enough %d\n", lseek(counter, 0, SEEK_END) >= most);
    return 11;
}

/* One child, whose steps the test disturbs. */
static int made_one(void) {
    for (int i = 0; i < 2; i++) {
        int value = 0;
        pid_t pid = fork();
        if (pid == 0) { memory[0] = 77; nap(20); _exit(memory[0] - i); }
        reap(pid, "one");
        printf("own %d\n", memory[0] != 77 || value);
        fflush(stdout);
    }
    return 12;
}

int main(int argc, char **argv) {
    memory = mmap(0, memory_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fill(4711);
    char first[24];
    snprintf(first, sizeof first, "%d", getpid());
    setenv("FIRST", first, 1);
    nap(700);
    const char *way = argc > 1 ? argv[1] : "";
    int status = 1;
    if (!strcmp(way, "tree")) status = made_tree();
    if (!strcmp(way, "deaths")) status = made_deaths();
    if (!strcmp(way, "handled")) status = made_handled();
    if (!strcmp(way, "daemon")) status = made_daemon();
    if (!strcmp(way, "ids")) status = made_ids();
    if (!strcmp(way, "spawns")) status = made_spawns();
    if (!strcmp(way, "vforks")) status = made_vforks();
    if (!strcmp(way, "shells")) status = made_shells();
    if (!strcmp(way, "bomb")) status = made_bomb(atoi(argv[2]));
    if (!strcmp(way, "one")) status = made_one();
    printf("sum %u\n", sum());
    fflush(stdout);
    return status;
}
