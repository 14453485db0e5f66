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
#include <sys/prctl.h>
#include <sys/resource.h>
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
    signal(SIGCHLD, SIG_DFL);
    handled = waited = 0;
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
    signal(SIGUSR1, SIG_DFL);
    signal(SIGUSR2, SIG_IGN);
    sigprocmask(SIG_UNBLOCK, &mask, 0);
    signal(SIGUSR2, SIG_DFL);
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

/* Process groups that the parent makes, and one signal for all of a group. */
static int made_groups(void) {
    pid_t pids[3], group = 0;
    for (int i = 0; i < 3; i++) {
        pids[i] = fork();
        if (pids[i] == 0) for (;;) pause();
        if (setpgid(pids[i], group)) printf("setpgid %d\n", errno);
        if (i == 0) group = pids[0];
    }
    printf("groups %d %d %d\n", getpgid(pids[0]) == group, getpgid(pids[2]) == group, getpgrp() == group);
    fflush(stdout);
    nap(40);
    killpg(group, SIGTERM);
    for (int i = 0; i < 3; i++) {
        int status, ours = 0;
        pid_t got = waitpid(-group, &status, 0);
        for (int k = 0; k < 3; k++) ours += got == pids[k];
        printf("one %d ", ours);
        tell("of the group", status);
    }
    pid_t pid = fork();
    if (pid == 0) {
        errno = 0;
        int first = setsid() == getpid(), again = setsid();
        _exit(first + 2 * (again == -1 && errno == EPERM) + 4 * (getpgrp() == getpid()));
    }
    reap(pid, "session");
    printf("no group %d\n", setpgid(1 << 21, 0) ? errno : 0);
    fflush(stdout);
    return 13;
}

/* Children that end, stop and continue each other. */
static int made_siblings(void) {
    int status;
    pid_t victim = fork();
    if (victim == 0) for (;;) nap(1000);
    pid_t killer = fork();
    if (killer == 0) { nap(20); _exit(kill(victim, SIGINT) ? 1 : 21); }
    reap(victim, "victim");
    reap(killer, "killer");
    victim = fork();
    if (victim == 0) for (;;) memory[2]++;
    killer = fork();
    if (killer == 0) {
        kill(victim, SIGSTOP);
        nap(60);
        kill(victim, SIGCONT);
        nap(60);
        _exit(kill(victim, SIGKILL) ? 1 : 22);
    }
    waitpid(victim, &status, WUNTRACED);
    printf("stopped %d by %d\n", WIFSTOPPED(status), WSTOPSIG(status));
    waitpid(victim, &status, WCONTINUED);
    printf("continued %d\n", WIFCONTINUED(status));
    reap(victim, "victim");
    reap(killer, "killer");
    return 14;
}

/* The ways to wait. */
static int made_waits(void) {
    siginfo_t info;
    struct rusage used;
    int status;
    pid_t pid = fork();
    if (pid == 0) { nap(60); _exit(31); }
    printf("not yet %d\n", waitpid(pid, &status, WNOHANG));
    info.si_pid = 7;
    waitid(P_ALL, 0, &info, WEXITED | WNOHANG);
    printf("none %d\n", info.si_pid);
    waitid(P_PID, pid, &info, WEXITED | WNOWAIT);
    printf("left %d %d %d\n", info.si_pid == pid, info.si_status, info.si_code);
    printf("wait4 %d ", wait4(pid, &status, 0, &used) == pid);
    tell("rusage", status);
    printf("nobody %d\n", wait(&status) < 0 ? errno : 0);
    pid = fork();
    if (pid == 0) { setpgid(0, 0); nap(30); _exit(32); }
    nap(15);
    while (getpgid(pid) != pid) nap(1);
    printf("other group %d\n", waitpid(0, &status, 0) < 0 ? errno : 0);
    printf("its group %d ", waitpid(-pid, &status, 0) == pid);
    tell("it", status);
    signal(SIGCHLD, SIG_IGN);
    pid = fork();
    if (pid == 0) { nap(30); _exit(33); }
    printf("ignored %d\n", waitpid(pid, &status, 0) < 0 ? errno : 0);
    signal(SIGCHLD, SIG_DFL);
    sigset_t mask, before;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, &before);
    pid = fork();
    if (pid == 0) { sigprocmask(SIG_SETMASK, &before, 0); nap(30); _exit(34); }
    int got;
    do got = sigwaitinfo(&mask, &info); while (got < 0 && errno == EINTR);
    printf("signal %d of %d status %d\n", got == SIGCHLD, info.si_pid == pid, info.si_status);
    sigprocmask(SIG_SETMASK, &before, 0);
    reap(pid, "signalled");
    return 15;
}

/* A pipeline: each child changes what goes through, the parent feeds and reads. */
static int made_pipes(void) {
    enum { STAGES = 4, TOTAL = 300000 };
    int ends[STAGES + 1][2];
    pid_t pids[STAGES + 1];
    unsigned char buffer[4096];
    for (int i = 0; i <= STAGES; i++) if (pipe(ends[i])) return 1;
    for (int i = 0; i <= STAGES; i++) {
        pids[i] = fork();
        if (pids[i]) continue;
        int in = i ? ends[i - 1][0] : -1, out = ends[i][1];
        for (int k = 0; k <= STAGES; k++) {
            if (ends[k][0] != in) close(ends[k][0]);
            if (ends[k][1] != out) close(ends[k][1]);
        }
        for (int done = 0; done < TOTAL;) {
            ssize_t n = i ? read(in, buffer, sizeof buffer) : TOTAL - done < 4096 ? TOTAL - done : 4096;
            if (n <= 0) _exit(90);
            for (int k = 0; k < n; k++) buffer[k] = i ? buffer[k] * 5 + i : memory[done + k];
            for (ssize_t m = 0, w; m < n; m += w)
                if ((w = write(out, buffer + m, n - m)) <= 0) _exit(91);
            done += n;
        }
        _exit(50 + i);
    }
    unsigned s = 0, total = 0;
    ssize_t n;
    for (int k = 0; k <= STAGES; k++) { close(ends[k][1]); if (k < STAGES) close(ends[k][0]); }
    while ((n = read(ends[STAGES][0], buffer, sizeof buffer)) > 0)
        for (int k = 0; k < n; k++, total++) s = s * 31 + buffer[k];
    close(ends[STAGES][0]);
    printf("through %u %u\n", total, s);
    for (int i = 0; i <= STAGES; i++) reap(pids[i], "stage");
    return 16;
}

/* Children become other programs, in all the ways there are. */
static int made_execs(void) {
    for (int i = 0; i < 4; i++) {
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            char *args[] = {"sh", "-c", "nap=$(sleep 0.03; echo $0 $X); echo \"it $nap\"; exit 44", "zero", 0};
            char *own[] = {"X=own", "PATH=/bin:/usr/bin", 0};
            setenv("X", "outer", 1);
            if (i == 0) execv("/bin/sh", args);
            if (i == 1) execve("/bin/sh", args, own);
            if (i == 2) { execv("/etc/passwd", args); execvp("sh", args); }
            if (i == 3) { int fd = open("/bin/sh", O_PATH | O_CLOEXEC); fexecve(fd, args, own); }
            _exit(errno);
        }
        reap(pid, "exec");
    }
    return 17;
}

/* Orphans come to the nearest process that has asked for them. */
static int made_reaper(void) {
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    pid_t me = getpid(), pid = fork();
    if (pid == 0) {
        pid_t middle = getpid();
        if (fork() == 0) {
            while (getppid() == middle) nap(3);
            _exit(getppid() == me ? 61 : 62);
        }
        nap(20);
        _exit(60);
    }
    reap(pid, "middle");
    int status = -1;
    printf("orphan %d ", wait(&status) > 0);
    tell("ended", status);
    prctl(PR_SET_CHILD_SUBREAPER, 0);
    return 18;
}

static int made_all(int rounds) {
    int (*ways[])(void) = {made_tree, made_siblings, made_daemon, made_waits, made_execs, made_ids, made_pipes,
        made_spawns, made_groups, made_vforks, made_shells, made_reaper, made_handled, made_deaths};
    int total = 0;
    for (int i = 0; i < rounds; i++)
        for (unsigned k = 0; k < sizeof ways / sizeof *ways; k++) {
            total += ways[k]();
            fflush(stdout);
            nap(5);
        }
    return total & 127;
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
    if (!strcmp(way, "groups")) status = made_groups();
    if (!strcmp(way, "siblings")) status = made_siblings();
    if (!strcmp(way, "waits")) status = made_waits();
    if (!strcmp(way, "pipes")) status = made_pipes();
    if (!strcmp(way, "execs")) status = made_execs();
    if (!strcmp(way, "reaper")) status = made_reaper();
    if (!strcmp(way, "all")) status = made_all(atoi(argv[2]));
    printf("sum %u\n", sum());
    fflush(stdout);
    return status;
}
