/* What a hostile program may try against the agent inside of it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#define REGION ((char *)0x200000000000UL)
static long at(char *instruction, long nr, long a, long b, long c) {
  long r;
  register long r10 __asm__("r10") = 0;
  __asm__ volatile("call *%1" : "=a"(r) : "r"(instruction), "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
  return r;
}
int main(int c, char **v) {
  struct timespec pause = {0, 400000000};
  nanosleep(&pause, 0);
  if (!strcmp(v[1], "jump")) {
    /* syscall; ret in the agent's code, which lies at home where it lies here. */
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[256];
    while (fgets(line, sizeof line, maps)) {
      char *start, *end, perms[5];
      if (sscanf(line, "%p-%p %4s", &start, &end, perms) != 3 || perms[2] != 'x') continue;
      if (start < REGION || end > REGION + (16 << 20)) continue;
      for (char *p = start; p + 3 < end; p++)
        if (p[0] == 0x0f && p[1] == 0x05 && (unsigned char)p[2] == 0xc3) {
          long fd = at(p, SYS_open, (long)"/etc/passwd", 0, 0);
          printf("open gave %ld\n", fd);
          return 1;
        }
    }
    printf("no instruction found\n");
    return 2;
  }
  if (!strcmp(v[1], "unmap")) {
    int ok = munmap(REGION, 16 << 20) == -1 && munmap(REGION + 4096, 4096) == -1
      && mprotect(REGION, 16 << 20, PROT_READ | PROT_WRITE | PROT_EXEC) == -1
      && mmap(REGION, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED
      && madvise(REGION, 16 << 20, MADV_DONTNEED) == -1;
    printf(ok ? "refused\n" : "SUCCEEDED\n");
    return !ok;
  }
  long pid;
  __asm__ volatile("int $0x80" : "=a"(pid) : "a"(20) : "memory"); /* getpid, i386 */
  nanosleep(&pause, 0);
  printf("%ld\n", pid);
  return 0;
}
