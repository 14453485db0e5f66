/* Does what keeps a process at home, and waits. */
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
static void *idle(void *p) { pause(); return p; }
int main(int c, char **v) {
  pthread_t t;
  char params[256] = {0};
  if (!strcmp(v[1], "shared")) mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (!strcmp(v[1], "threads")) pthread_create(&t, 0, idle, 0);
  if (!strcmp(v[1], "mlock")) { static char page[8192]; mlock(page, 4096); }
  if (!strcmp(v[1], "io_uring")) syscall(425, 4, params);
  if (!strcmp(v[1], "seccomp")) { prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT); for (;;) ; }
  if (!strcmp(v[1], "realtime")) { struct sched_param p = {1}; sched_setscheduler(0, SCHED_FIFO, &p); }
  pause();
}
